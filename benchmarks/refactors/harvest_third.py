"""Harvest the words of the third part: from other public packages than those of ``harvest.py``.

    python -m benchmarks.refactors.harvest_third      where the packages below are installed beside the benchmarks'

These packages have no list of models by name. Their classes are built on the meta device instead, from their own
defaults and a table of usual arguments; what cannot be built so is left out. The result is ``harvested_third.json``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import nn

import benchmarks.torchvision_guard  # noqa: F401  (before torchvision)
from benchmarks.refactors.harvest import Call, Candidate, alone, harvest
from benchmarks.refactors.vocabulary import HARVESTED_THIRD

PACKAGES = {  # package -> where its networks are
    "diffusers": ("diffusers.models",),
    "vit_pytorch": ("vit_pytorch",),
    "x_transformers": ("x_transformers",),
    "monai": ("monai.networks.nets", "monai.networks.blocks"),
    "segmentation_models_pytorch": ("segmentation_models_pytorch.decoders", "segmentation_models_pytorch.base"),
    "torch_geometric": ("torch_geometric.nn",),
    "conformer": ("conformer",),
    "denoising_diffusion_pytorch": ("denoising_diffusion_pytorch",),
    "perceiver_pytorch": ("perceiver_pytorch",),
    "performer_pytorch": ("performer_pytorch",),
    "vector_quantize_pytorch": ("vector_quantize_pytorch",),
    "timesformer_pytorch": ("timesformer_pytorch",),
    "spandrel": ("spandrel.architectures",),
    "segment_anything": ("segment_anything.modeling",),
    "efficientnet_pytorch": ("efficientnet_pytorch",),
    "litgpt": ("litgpt",),
    "kornia": ("kornia.feature", "kornia.contrib", "kornia.models"),
    "dynamic_network_architectures": ("dynamic_network_architectures",),
    "pytorch_forecasting": ("pytorch_forecasting.models", "pytorch_forecasting.layers"),
    "speechbrain": ("speechbrain.lobes.models", "speechbrain.nnet", "speechbrain.processing"),  # last: they need stubs
    "encodec": ("encodec",),
}
# A class is not always a whole model: what its first or last layer is called may then be the name of something else.
MISREAD = {
    "attention": r"pos|img|txt|bias|mlp|mask|\bq=\S*(to_k|to_v|qkv_)|\bkv=\S*to_q|qkv=(to_q |c_fc)",
    "convs": r"(conv1|conv2)=\S*(skip|short|down|res)",
    "gated": r"gate=\S*up",
    "mlp": r"time",
    "stem": r"out|get|depth|spatial|inverted|stem_conv=(q|proj) |model|head|1 stem_bn=\S*2|get_v|pointwise",
    "tokens": r"=$|pos|bias|codebook|quant|time|indicator|fn|cath|cond|atom",
    "neck": r"conv|bn|blocks|linear_head$|attn_|fns|net\.|proj|point|pool|post_norms|layers\.",
    "head": r"att|qkv|=\d|=v|w2|w3|mlp\.|down|=up|block|channel|_0|encoder|=o_|\.w$|lin2",
    "list": r"norm|activ|pool|proj|scale|shift|image|latent|heads|rgb|expert|quant|discr|degree|am_|map|fc|adapt|out",
    "stages": r"discr|_in|_out|score|_models|mdl|feats|hg",
    "coder": r"refiner|transformer",
}
STUBBED = ("speechbrain", "encodec", "vocos", "dac")
STUBS = (
    "audiotools",
    "torchaudio",
    "torchaudio.transforms",
    "torchaudio.functional",
)  # imported there, and never called

USUAL: dict[str, Any] = {  # what arguments without a default are called, and what they are given
    **dict.fromkeys(("dim", "d_model", "hidden_size", "embed_dim", "n_embd", "dim_model", "width", "inner_dim"), 64),
    **dict.fromkeys(("hidden_dim", "hidden_channels", "dim_hidden", "mlp_dim", "d_ffn", "ff_dim", "mlp_hidden"), 128),
    **dict.fromkeys(("nhead", "num_heads", "heads", "n_heads", "num_attention_heads", "n_head"), 4),
    **dict.fromkeys(("depth", "num_layers", "n_layers", "layers", "num_blocks", "n_layer", "num_encoder_layers"), 2),
    **dict.fromkeys(("dim_head", "attention_head_dim", "head_dim", "d_head", "kdim", "vdim"), 16),
    **dict.fromkeys(("image_size", "img_size", "input_size", "size", "image_height", "image_width"), 64),
    **dict.fromkeys(("patch_size", "image_patch_size", "frame_patch_size", "temporal_patch_size"), 8),
    **dict.fromkeys(("num_classes", "n_classes", "num_class", "classes", "num_labels", "out_features"), 10),
    **dict.fromkeys(("in_channels", "in_chans", "num_in_ch", "input_channels", "in_ch", "channels_in", "in_nc"), 64),
    **dict.fromkeys(("out_channels", "out_chans", "num_out_ch", "output_channels", "out_ch", "channels_out"), 64),
    **dict.fromkeys(("channels", "n_feats", "num_feat", "num_features", "features", "planes", "in_planes"), 64),
    **dict.fromkeys(("in_features", "input_dim", "dim_in", "in_dim", "input_channel", "n_neurons"), 64),
    **dict.fromkeys(("output_dim", "dim_out", "out_dim", "query_dim", "cross_attention_dim", "context_dim"), 64),
    **dict.fromkeys(("num_tokens", "vocab_size", "num_embeddings", "n_vocab", "vocab", "padded_vocab_size"), 50),
    **dict.fromkeys(("max_seq_len", "max_len", "seq_len", "sequence_length", "max_length", "num_patches"), 32),
    **dict.fromkeys(("spatial_dims", "n_dims", "dimensions", "dims"), 2),
    **dict.fromkeys(("frames", "num_frames", "image_frames"), 8),
    **dict.fromkeys(("kernel_size", "kernel"), 3),
    **dict.fromkeys(("stride", "strides", "upscale", "scale", "expand_ratio", "expansion", "mlp_ratio", "ratio"), 2),
    **dict.fromkeys(("dropout", "drop", "p", "attn_drop", "drop_path"), 0.0),
    **dict.fromkeys(("input_resolution", "window_size", "grid_size"), 8),
    **dict.fromkeys(("edge_dim", "num_relations", "num_nodes"), 8),
    "input_shape": [None, None, 64],
    "in_shape": (1, 64, 64),
}


def classes_of(package: str, places: Iterable[str]) -> Iterator[type[nn.Module]]:
    """Every module class that a package defines in the given places."""
    if package in STUBBED:
        stub()
    seen: set[type] = set()
    for place in places:
        for name in (place, *_below(place)):
            try:
                found = vars(importlib.import_module(name))
            except (Exception, SystemExit):
                continue
            for cls in list(found.values()):
                own = inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__.startswith(package)
                if own and cls not in seen:
                    seen.add(cls)
                    yield cls


def stub() -> None:
    """Let what is imported and never called be there."""
    for name in STUBS:
        sys.modules.setdefault(name, MagicMock(__spec__=ModuleSpec(name, None), __version__="2.0.0"))


def _below(place: str) -> list[str]:
    try:
        module = importlib.import_module(place)
    except (Exception, SystemExit):
        return []
    paths = getattr(module, "__path__", [])
    names = [found.name for found in pkgutil.walk_packages(paths, f"{place}.", onerror=lambda name: None)]
    return [name for name in names if ".tests" not in name]


def arguments(cls: type[nn.Module]) -> dict[str, Any] | None:
    """What a class is built with; ``None`` if it asks for something unusual."""
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        fixed = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if fixed or parameter.default is not parameter.empty:
            continue
        if name not in USUAL:
            return None
        given[name] = USUAL[name]
    return given


def models(package: str, places: Iterable[str], each: int) -> Iterator[Candidate]:
    """The classes of a package that can be built."""
    for cls in classes_of(package, places):
        try:
            given = arguments(cls)
        except (ValueError, TypeError):
            continue
        if given is not None:
            family = cls.__module__.rpartition(".")[2]
            yield Candidate(package, family, cls.__name__, partial(cls, **given), CALLS)


def litgpt_models(each: int) -> Iterator[Candidate]:
    """One model of each family; its classes are built from a configuration."""
    from litgpt import GPT, Config
    from litgpt.config import name_to_config

    families: dict[str, str] = {}
    for name in sorted(name_to_config, key=lambda name: (len(name), name)):
        families.setdefault(re.split(r"[-.\d]", name)[0].lower(), name)
    calls: tuple[Call, ...] = (lambda model: model(torch.ones(1, 8, dtype=torch.long, device="meta")),)
    for family, name in families.items():
        yield Candidate("litgpt", family, name, lambda name=name: GPT(Config.from_name(name, n_layer=2)), calls)


def x_transformers_models(each: int) -> Iterator[Candidate]:
    """The classes that can be built alone, and whole models with the options that change names."""
    import x_transformers as x

    yield from models("x_transformers", PACKAGES["x_transformers"], each)
    calls: tuple[Call, ...] = (
        lambda model: model(torch.ones(1, 8, dtype=torch.long, device="meta")),
        lambda model: model(torch.empty(1, 3, 64, 64, device="meta")),
    )
    options = ({}, {"ff_glu": True}, {"cross_attend": True}, {"use_rmsnorm": True}, {"sandwich_norm": True})
    for number, option in enumerate(options):

        def text(option: dict[str, Any] = option) -> nn.Module:
            layers = x.Decoder(dim=64, depth=2, heads=4, **option)
            return x.TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=layers)

        def image(option: dict[str, Any] = option) -> nn.Module:
            layers = x.Encoder(dim=64, depth=2, heads=4, **option)
            return x.ViTransformerWrapper(image_size=64, patch_size=8, num_classes=10, attn_layers=layers)

        yield Candidate("x_transformers", "text", f"text {number}", text, calls)
        yield Candidate("x_transformers", "image", f"image {number}", image, calls)


def _calls() -> Iterator[Call]:
    for shape in ((1, 3, 64, 64), (1, 64, 64, 64), (1, 1, 64, 64), (1, 32, 64), (1, 64, 32)):
        yield lambda model, shape=shape: model(torch.empty(shape, device="meta"))  # type: ignore[misc]
    yield lambda model: model(torch.ones(1, 32, dtype=torch.long, device="meta"))


CALLS = tuple(_calls())


SPECIAL = {"litgpt": litgpt_models, "x_transformers": x_transformers_models}


def main(
    packages: Mapping[str, tuple[str, ...]] = PACKAGES,
    special: Mapping[str, Callable[[int], Iterator[Candidate]]] = SPECIAL,
    written: Path = HARVESTED_THIRD,
    misreadings: Mapping[str, str] = MISREAD,
) -> int:
    """Harvest these packages, or those of them that the command line names; some have models of their own."""
    alone()
    torch.hub.load_state_dict_from_url = _no_weights
    chosen = sys.argv[1:] or list(packages)
    result = harvest({name: special.get(name, partial(models, name, packages[name])) for name in chosen}, 1)
    result["groups"] = {
        name: [
            e for e in entries if not any(map(_foreign, e["families"])) and not misread(name, e["words"], misreadings)
        ]
        for name, entries in result["groups"].items()
    }
    for group, entries in result["groups"].items():
        print(f"{group}: {len(entries)} groups of words, e.g. {[e['words'] for e in entries[:3]]}")
    text = json.dumps(result, indent=None, separators=(",", ":")).replace('{"words"', '\n{"words"')
    written.write_text(text + "\n")
    return 0


def misread(group: str, words: dict[str, str], misreadings: Mapping[str, str]) -> bool:
    """Whether words can hardly stand for the roles that they were taken for."""
    text = " ".join(f"{role}={word}" for role, word in words.items())
    return "weight" in words.values() or re.search(misreadings.get(group, "$^"), text) is not None


def _no_weights(*_: Any, **__: Any) -> Any:
    raise ConnectionError("only names are wanted")


def _foreign(family: str) -> bool:
    """Wrappers around the models of timm and torchvision, whose words are known."""
    return re.search("timm|torchvision|transformers_|open_clip", family) is not None


if __name__ == "__main__":
    sys.exit(main())
