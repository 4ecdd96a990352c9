"""Harvest the words of the part that validates: from packages that no other harvest has read.

    python -m benchmarks.refactors.harvest_validate      where the packages below are installed beside the benchmarks'

Operators, agents, forecasters, flows, autoencoders of many kinds, detectors, and models of one paper each. They are
built as ``harvest_third.py`` builds its own. The result is ``harvested_validate.json``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock

import torch
from torch import nn

from benchmarks.refactors import harvest_third
from benchmarks.refactors.harvest import Call, Candidate
from benchmarks.refactors.harvest_third import MISREAD, models
from benchmarks.refactors.vocabulary import HARVESTED_VALIDATE

PACKAGES = {  # package -> where its networks are
    "dalle2_pytorch": ("dalle2_pytorch",),
    "enformer_pytorch": ("enformer_pytorch",),
    "palm_rlhf_pytorch": ("palm_rlhf_pytorch",),
    "med_seg_diff_pytorch": ("med_seg_diff_pytorch",),
    "memorizing_transformers_pytorch": ("memorizing_transformers_pytorch",),
    "equiformer_pytorch": ("equiformer_pytorch",),
    "point_transformer_pytorch": ("point_transformer_pytorch",),
    "slot_attention": ("slot_attention",),
    "x_clip": ("x_clip",),
    "deepxde": ("deepxde.nn.pytorch",),
    "e3nn": ("e3nn.nn",),
    "neuralop": ("neuralop.models", "neuralop.layers"),
    "pytorch_tabnet": ("pytorch_tabnet.tab_network",),
    "pl_bolts": ("pl_bolts.models", "pl_bolts.models.self_supervised", "pl_bolts.models.vision"),
    "mambapy": ("mambapy",),
    "pythae": ("pythae.models.nn", "pythae.models"),
    "normflows": ("normflows.nets", "normflows.flows"),
    "zuko": ("zuko.nn",),
    "lpips": ("lpips",),
    "chronos": ("chronos",),
    "torch_rechub": ("torch_rechub.models", "torch_rechub.basic.layers"),
    "ultralytics": ("ultralytics.nn.modules",),
    "torchrl": ("torchrl.modules",),
    "bert_pytorch": ("bert_pytorch.model",),
    "video_diffusion_pytorch": ("video_diffusion_pytorch",),
    "uformer_pytorch": ("uformer_pytorch",),
    "flamingo_pytorch": ("flamingo_pytorch",),
    "x_unet": ("x_unet",),
    "pytorch_toolbelt": ("pytorch_toolbelt.modules",),
    "pytorchvideo": ("pytorchvideo.models", "pytorchvideo.layers"),
    "pytorch_widedeep": ("pytorch_widedeep.models",),
    "nuwa_pytorch": ("nuwa_pytorch",),
}
ABSENT = frozenset(  # what they import for training, data or plots
    (
        *("annoy", "coca_pytorch", "cv2", "ema_pytorch", "faiss", "gensim", "gym", "hl_gauss_pytorch", "kornia"),
        *("adam_atan2_pytorch", "lightning_fabric", "loguru", "matplotlib", "pyfaidx", "polars", "portalocker"),
        *("pytorch_lightning", "pytorch_warmup", "pytz", "resize_right", "skopt", "sklearn", "spacy", "tensorly"),
        *("taylor_series_linear_attention", "tltorch", "torchaudio", "torchmetrics", "unfoldNd", "fastparquet"),
    )
)
MISREAD_HERE = {  # parts of blocks that were taken for blocks, lists of single layers, norms before their convolutions
    "attention": r"kv=to_out",
    "list": r"conv1|mix1|mlp|disc|gen|cond|bbox|feat|=[mst]$|conv|cross",
    "stages": r"feat|mix|=decoder$",
    "stem": r"conv2|qkv|split|fpn|=conv\.|=project$|to_|branch",
    "head": r"W_Res|cell|hidden|qkv|to_|=context$|=model$",
    "neck": r"mix|patches|=model\.\d|block",
    "position": r"null|=W",
    "modalities": r"attn",
    "tokens": r"wide",
}


class Absent(MetaPathFinder, Loader):
    """Lets what is imported and never called be there."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in ABSENT else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return MagicMock(__spec__=spec, __path__=[], __name__=spec.name, __version__="2.0.0")

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


def ultralytics_models(each: int) -> Iterator[Candidate]:
    """Modules, and a detector of each generation, whose layers are numbered."""
    from ultralytics.nn.tasks import DetectionModel

    yield from models("ultralytics", PACKAGES["ultralytics"], each)
    calls: tuple[Call, ...] = (lambda model: model(torch.empty(1, 3, 64, 64, device="meta")),)
    for name in ("yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "rtdetr-resnet50"):

        def build(name: str = name) -> nn.Module:
            model: nn.Module = DetectionModel(f"{name}.yaml", verbose=False)
            return model

        yield Candidate("ultralytics", "detection", name, build, calls)


SPECIAL = {"ultralytics": ultralytics_models}


def main() -> int:
    """Harvest them."""
    os.environ["DDE_BACKEND"] = "pytorch"
    sys.meta_path.append(Absent())
    misreadings = {
        group: "|".join(filter(None, (MISREAD.get(group), MISREAD_HERE.get(group)))) for group in MISREAD | MISREAD_HERE
    }
    return harvest_third.main(PACKAGES, SPECIAL, HARVESTED_VALIDATE, misreadings)


if __name__ == "__main__":
    sys.exit(main())
