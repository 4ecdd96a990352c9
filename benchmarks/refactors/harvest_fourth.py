"""Harvest the words of the fourth part: from packages that the other harvests have not read.

    python -m benchmarks.refactors.harvest_fourth      where the packages below are installed beside the benchmarks'

Most are one repository of one paper, with words of its own: speech and music, series, tables, recommenders,
proteins, faces. They are built as ``harvest_third.py`` builds its own, but for those that ask for a configuration. The
result is ``harvested_fourth.json``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import packaging.version
import torch

from benchmarks.refactors import harvest_third
from benchmarks.refactors.harvest import Candidate
from benchmarks.refactors.harvest_third import CALLS, MISREAD, models
from benchmarks.refactors.vocabulary import HARVESTED_FOURTH

PACKAGES = {  # package -> where its networks are
    "pytorchcv": ("pytorchcv.models",),
    "pretrainedmodels": ("pretrainedmodels.models",),
    "geffnet": ("geffnet",),
    "resnest": ("resnest.torch",),
    "facenet_pytorch": ("facenet_pytorch.models",),
    "torchxrayvision": ("torchxrayvision.models", "torchxrayvision.baseline_models"),
    "lightly": ("lightly.models",),
    "clip": ("clip.model",),
    "vocos": ("vocos.models", "vocos.modules", "vocos.heads"),
    "demucs": ("demucs",),
    "asteroid": ("asteroid.models", "asteroid.masknn"),
    "dac": ("dac.model", "dac.nn"),
    "neuralforecast": ("neuralforecast.models", "neuralforecast.common._modules"),
    "tsai": ("tsai.models",),
    "rtdl_revisiting_models": ("rtdl_revisiting_models",),
    "tab_transformer_pytorch": ("tab_transformer_pytorch",),
    "deepctr_torch": ("deepctr_torch.models", "deepctr_torch.layers"),
    "esm": ("esm.model", "esm.modules"),
    "egnn_pytorch": ("egnn_pytorch",),
    "nflows": ("nflows.nn", "nflows.transforms"),
    "g_mlp_pytorch": ("g_mlp_pytorch",),
    "reformer_pytorch": ("reformer_pytorch",),
    "linformer": ("linformer",),
    "nystrom_attention": ("nystrom_attention",),
    "linear_attention_transformer": ("linear_attention_transformer",),
    "local_attention": ("local_attention",),
}
MISREAD_HERE = {  # parts of blocks that were taken for blocks, norms before their convolutions
    "convs": r"branch|hig[nh]|_low|gm\.|\.att\.|bn1=conv2|dice|preprocess|conv2=conv3|bn_conv|lw_|rw_|inst_norm",
    "stem": r"branch|identity|dw_|path|merge|low|res_|main_|1x1|scale_|subblock|double|unit1|v=conv\.conv",
    "head": r"q_proj|se\.|=embed|fc3",
    "list": r"spp|conv|path|irrev|backbones",
    "neck": r"cbr",
    "stages": r"repeat",
    "position": r"alpha",
}


def pytorchcv_models(each: int) -> Iterator[Candidate]:
    """Classes that can be built alone, and one whole model of each family."""
    from pytorchcv.model_provider import _models as known

    yield from models("pytorchcv", PACKAGES["pytorchcv"], each)
    families: dict[str, str] = {}
    for name in sorted(known, key=lambda name: (len(name), name)):
        families.setdefault(known[name].__module__.rpartition(".")[2], name)
    for family, name in families.items():
        yield Candidate("pytorchcv", family, name, lambda name=name: known[name](), CALLS)  # type: ignore[misc]


def clip_models(each: int) -> Iterator[Candidate]:
    """With a transformer and with convolutions."""
    sys.modules["pkg_resources"] = SimpleNamespace(packaging=packaging)  # type: ignore[assignment]  # it asks for a version
    from clip.model import CLIP

    image, ids = (torch.empty(1, 3, 64, 64, device="meta"), torch.ones(1, 8, dtype=torch.long, device="meta"))
    call = lambda model: model(image, ids)  # noqa: E731
    for layers, patch in ((2, 16), ((1, 1, 1, 1), None)):
        build = lambda layers=layers, patch=patch: CLIP(32, 64, layers, 64, patch, 8, 50, 64, 4, 2)  # noqa: E731
        yield Candidate("clip", "clip", f"clip {patch}", build, (call,))


SPECIAL = {"pytorchcv": pytorchcv_models, "clip": clip_models}


def main() -> int:
    """Harvest them."""
    misreadings = {
        group: "|".join(filter(None, (MISREAD.get(group), MISREAD_HERE.get(group)))) for group in MISREAD | MISREAD_HERE
    }
    return harvest_third.main(PACKAGES, SPECIAL, HARVESTED_FOURTH, misreadings)


if __name__ == "__main__":
    sys.exit(main())
