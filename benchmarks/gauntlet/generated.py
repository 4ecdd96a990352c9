"""Generated refactors: many architectures, five kinds of refactoring, truth by the identity of the tensors."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gauntlet import pairs_language as language
from benchmarks.gauntlet import pairs_vision as vision
from benchmarks.gauntlet.pair import Call, Pair, Sample, images, outputs, pick, tokens
from benchmarks.gauntlet.refactor import KINDS, Kind, refactor
from benchmarks.gauntlet.rewrites.unet import UNet
from benchmarks.gauntlet.truth import Tensors


@dataclass(frozen=True)
class Architecture:
    """A network to refactor."""

    name: str
    build: Callable[[], nn.Module]
    sample: Callable[[], Sample]
    call: Call = outputs
    insensitive: str | None = None
    tolerance: float = 1e-6


@dataclass(frozen=True)
class ByIdentity:
    """The rule original -> refactored: where the same tensor object ended up."""

    build: Callable[[], nn.Module]
    kind: Kind
    style: int

    def places(self) -> list[tuple[str, str]]:
        net = self.build()
        before = {id(v): k for k, v in reversed(net.state_dict(keep_vars=True).items())}
        after = refactor(net, self.kind, self.style).state_dict(keep_vars=True)
        return [(before[id(value)], name) for name, value in after.items()]

    def __call__(self, state: Tensors) -> Tensors:
        return {new: state[old] for old, new in self.places()}


def _clip() -> nn.Module:
    import open_clip

    return open_clip.CLIP(
        embed_dim=24,
        vision_cfg={
            "layers": 2,
            "width": 40,
            "head_width": 20,
            "patch_size": 8,
            "image_size": 32,
            "mlp_ratio": 2.4,
        },
        text_cfg={"context_length": 12, "vocab_size": 96, "width": 32, "heads": 2, "layers": 3, "mlp_ratio": 2.5},
    )


def _clip_sample() -> Sample:
    return (torch.randn(3, 3, 32, 32), torch.randint(2, 96, (3, 12))), {}


def _mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes=10, img_size=32, patch_size=8, num_blocks=3, embed_dim=24)


def _dinov2() -> nn.Module:
    return language._hf(
        "Dinov2ForImageClassification",
        "Dinov2Config",
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        mlp_ratio=3,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )


def _segformer() -> nn.Module:
    return language._hf(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        depths=[1, 2, 1, 1],
        hidden_sizes=[8, 16, 20, 32],
        num_attention_heads=[1, 2, 4, 8],
        decoder_hidden_size=24,
        num_labels=7,
    )


SOME = r"."  # some tensors (a key's bias, a mask token) don't reach the output; identity is proof enough for them


def architectures() -> list[Architecture]:
    """The networks, from every family, at sizes that run in a moment."""
    logits = pick("logits")
    tv = vision._tv
    return [
        Architecture("resnet", partial(vision.tv_resnet, "Bottleneck", (2, 3, 2, 2), 16), images()),
        Architecture("convnext", vision.timm_convnext, images()),
        Architecture("vit", vision.timm_vit, images(32)),
        Architecture("swin", vision.tv_swin, images()),
        Architecture("densenet", vision.tv_densenet, images()),
        Architecture("vgg", partial(vision.tv_vgg, True), images(224, batch=1)),
        Architecture("efficientnet", partial(tv, "efficientnet_b0", num_classes=10), images()),
        Architecture("regnet", partial(tv, "regnet_y_400mf", num_classes=10), images()),
        Architecture("mobilenet_v3", partial(tv, "mobilenet_v3_small", num_classes=10), images()),
        Architecture(
            "googlenet", partial(tv, "googlenet", num_classes=10, aux_logits=False, init_weights=False), images()
        ),
        Architecture("shufflenet", partial(tv, "shufflenet_v2_x0_5", num_classes=10), images()),
        Architecture("unet", UNet, images(32)),
        Architecture("mixer", _mixer, images(32), insensitive=SOME),
        Architecture("segformer", _segformer, images(), logits, SOME),
        Architecture("dinov2", _dinov2, images(32), logits, SOME),
        Architecture("clip", _clip, _clip_sample),
        Architecture("bert", language.hf_bert, language.IDS, insensitive=SOME, tolerance=1e-5),
        Architecture("gpt2", language.hf_gpt2, language.IDS, logits, tolerance=1e-5),
        Architecture("llama", language.hf_llama, language.IDS, logits, tolerance=1e-5),
        Architecture("mixtral", partial(language.MetaLlama, experts=4), tokens(96), tolerance=1e-5),
        Architecture("t5", language.hf_t5, language._two_ids, logits, tolerance=1e-5),
        Architecture("whisper", language.hf_whisper, language._audio_hf, logits, tolerance=1e-5),
    ]


def _refactored(build: Callable[[], nn.Module], kind: Kind, style: int) -> nn.Module:
    return refactor(build(), kind, style)


def pairs() -> list[Pair]:
    """Every architecture in every kind; in half of them the refactored net is the source."""
    out: list[Pair] = []
    for number, arch in enumerate(architectures()):
        for kind in KINDS:
            style = zlib.crc32(f"{arch.name}/{kind}".encode()) % 1000
            pair = Pair(
                f"generated/{arch.name}-to-{kind}",
                arch.build,
                partial(_refactored, arch.build, kind, style),
                (ByIdentity(arch.build, kind, style),),
                arch.sample,
                source_call=arch.call,
                target_call=arch.call,
                insensitive=arch.insensitive,
                tolerance=arch.tolerance,
                tags=frozenset({"generated", kind, arch.name}),
            )
            out.append(pair if (number + KINDS.index(kind)) % 2 else pair.reverse())
    return out


__all__: list[Any] = ["architectures", "pairs"]
