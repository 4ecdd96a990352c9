"""Pairs that invite a wrong load: twin towers, a second net in the checkpoint, adapters, other depths, strangers.

Where nothing tells which of two sources is meant, the truth is to load neither: ``new`` covers the whole target.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gauntlet import pairs_language as language
from benchmarks.gauntlet import pairs_more as more
from benchmarks.gauntlet import pairs_vision as vision
from benchmarks.gauntlet.pair import Pair, images, input_of, output_of, pick, tokens
from benchmarks.gauntlet.pairs_language import BERT, IDS, UPCAST, VOCAB, _hf
from benchmarks.gauntlet.rewrites.encoders import TorchBert
from benchmarks.gauntlet.rewrites.llama import MetaLlama
from benchmarks.gauntlet.rewrites.vision import Wrapped
from benchmarks.gauntlet.truth import drop, keep, rename


def _tags(*names: str) -> frozenset[str]:
    return frozenset({*names, "trap"})


# Two of a kind --------------------------------------------------------------------------------------------------------
def _twin_open_clip() -> nn.Module:
    import open_clip

    image = {"layers": 2, "width": 40, "head_width": 20, "patch_size": 8, "image_size": 32, "mlp_ratio": 2.4}
    text = {"context_length": 12, "vocab_size": 96, "width": 40, "heads": 2, "layers": 2, "mlp_ratio": 2.4}
    return open_clip.CLIP(embed_dim=24, vision_cfg=image, text_cfg=text)


def _twin_hf_clip() -> nn.Module:
    import transformers

    shared = {
        "hidden_size": 40,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
    }
    text = {"vocab_size": 96, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 95, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config={**text, **shared},
        vision_config={"image_size": 32, "patch_size": 8, **shared},
        projection_dim=24,
    )
    return transformers.CLIPModel(config)


class Siamese(nn.Module):
    """Two nets of one architecture under two names; the first one answers."""

    def __init__(self, build: Any, first: str, second: str, swap: bool = False):
        super().__init__()
        for name in (second, first) if swap else (first, second):
            self.add_module(name, build())
        self.first = first

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.first)(*args, **kwargs)


def _student(build: Any) -> nn.Module:
    return Wrapped(build(), "student")


class Generator(nn.Module):
    def __init__(self, names: tuple[str, ...] = ("up1", "up2", "up3")):
        super().__init__()
        self.names = names
        widths = (32, 24, 16, 3)
        for name, a, b in zip(names, widths[:-1], widths[1:], strict=True):
            self.add_module(name, nn.ConvTranspose2d(a, b, 4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(torch.relu(x))
        return torch.tanh(x)


class GAN(nn.Module):
    """The discriminator's convolutions have exactly the shapes of the generator's, in the opposite order."""

    def __init__(self) -> None:
        super().__init__()
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 16, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 24, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(24, 32, 4, 2, 1),
        )
        self.generator = Generator()

    def forward(self, x: Tensor) -> Tensor:
        return self.generator(x)


def two_of_a_kind() -> list[Pair]:
    known = {pair.name: pair for pair in more.clips()}
    clip = replace(
        known["clip/open_clip-to-transformers"],
        name="clip_twins/open_clip-to-transformers",
        source=_twin_open_clip,
        target=_twin_hf_clip,
        tags=_tags("clip", "split", "twins"),
    )
    resnet = partial(vision.tv_resnet, "BasicBlock", (1, 1, 1, 1))
    student = Pair(
        "trap/student_and_teacher-to-student",
        partial(Siamese, resnet, "student", "teacher", True),
        partial(_student, resnet),
        (keep(r"^student\."),),
        images(),
        tags=_tags("resnet", "twins"),
    )
    either = Pair(
        "trap/query_and_key_encoder-to-encoder",
        partial(Siamese, resnet, "encoder_q", "encoder_k"),
        resnet,
        (drop(r"."),),
        images(),
        new=r".",
        tags=_tags("resnet", "twins", "undecidable"),
    )
    ema = Pair(
        "trap/lightning_with_ema-to-transformers",
        partial(Siamese, vision.timm_vit, "model", "ema_model"),
        vision.hf_vit,
        (keep(r"^model\."), rename((r"^model\.", "")), *vision.VIT_TIMM_TO_HF),
        images(32),
        target_call=pick("logits"),
        insensitive=vision.KEY_BIAS_HF,
        tags=_tags("vit", "twins", "split"),
    )
    gan = Pair(
        "trap/gan-to-generator",
        GAN,
        partial(Generator, ("block_a", "block_b", "block_c")),
        (
            keep(r"^generator\."),
            rename((r"^generator\.", ""), (r"^up(\d)", lambda m: f"block_{'abc'[int(m[1]) - 1]}")),
        ),
        lambda: ((torch.randn(2, 32, 4, 4),), {}),
        tags=_tags("gan", "twins"),
    )
    return [clip, clip.reverse(insensitive=None), student, either, ema, gan]


# More or fewer layers -------------------------------------------------------------------------------------------------
class Adapted(nn.Module):
    """A block with an adapter behind it whose two matrices have the shape of the block's own; off at first."""

    def __init__(self, block: nn.Module, width: int):
        super().__init__()
        self.adapter_in = nn.Linear(width, width)
        self.adapter_out = nn.Linear(width, width)
        self.adapter_norm = nn.LayerNorm(width)
        self.block = block
        self.scale = 0.0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = self.block(x, *args, **kwargs)
        return x + self.scale * self.adapter_out(torch.relu(self.adapter_in(self.adapter_norm(x))))


def _adapted_vit() -> nn.Module:
    net = vision.timm_vit()
    net.blocks = nn.Sequential(*(Adapted(block, 24) for block in net.blocks))
    return net


class Sandwiched(MetaLlama):
    """Two more norms in every block, of the shape of the two that are there."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.attention_norm_after = nn.RMSNorm(32)
            layer.ffn_norm_after = nn.RMSNorm(32)


def layers() -> list[Pair]:
    adapters = Pair(
        "trap/vit-to-vit_with_adapters",
        vision.tv_vit,
        _adapted_vit,
        (vision.VIT_TV_TO_TIMM, rename((r"^blocks\.(\d)\.", r"blocks.\1.block."))),
        images(32),
        new=r"\.adapter_",
        tags=_tags("vit", "partial", "new layers"),
    )
    norms = Pair(
        "trap/llama-to-llama_with_more_norms",
        language.hf_llama,
        Sandwiched,
        (language.LLAMA_TO_META,),
        tokens(VOCAB),
        source_sample=IDS,
        source_call=pick("logits"),
        new=r"_norm_after\.",
        tolerance=UPCAST,
        tags=_tags("llama", "partial", "new layers"),
    )
    shorter = Pair(
        "trap/bert_4_layers-to-3",
        partial(_hf, "BertModel", "BertConfig", **{**BERT, "num_hidden_layers": 4}),
        TorchBert,
        (drop(r"^encoder\.layer\.3\."), *language.BERT_TO_TORCH),
        tokens(VOCAB),
        source_sample=IDS,
        source_call=output_of("encoder.layer.2"),
        target_call=output_of("encoder"),
        insensitive=r"^pool\.",  # behind the layer that is compared; there is only one such place
        tolerance=UPCAST,
        tags=_tags("bert", "partial", "depth", "concat"),
    )
    longer = Pair(
        "trap/vit_3_layers-to-5",
        vision.timm_vit,
        partial(vision.hf_vit, depth=5),
        vision.VIT_TIMM_TO_HF,
        images(32),
        source_call=input_of("norm"),
        target_call=output_of("vit.layers.2"),
        insensitive=r"(k_proj|key)\.bias$|^vit\.layernorm\.|^classifier\.",  # behind the layer that is compared
        new=r"^vit\.layers\.[34]\.",
        tags=_tags("vit", "partial", "depth", "split"),
    )
    return [adapters, norms, longer, shorter]


# Strangers and types --------------------------------------------------------------------------------------------------
def others() -> list[Pair]:
    stranger = Pair(
        "trap/resnet-to-vit",
        partial(vision.tv_resnet, "BasicBlock", (1, 1, 1, 1)),
        partial(vision.timm_vit, width=64, mlp=256, heads=4),
        (drop(r"."),),
        images(32),
        new=r".",
        tags=_tags("stranger"),
    )
    half = replace(
        {pair.name: pair for pair in vision.swins()}["swin/torchvision-to-transformers"],
        name="half/torchvision_swin-to-transformers",
        source_dtype=torch.float16,
        tags=_tags("swin", "split", "cast"),
    )
    bfloat = replace(
        {pair.name: pair for pair in language.llamas()}["llama/fused_gate-to-transformers"],
        name="half/fused_llama-to-transformers",
        source_dtype=torch.bfloat16,
        tags=_tags("llama", "split", "cast"),
    )
    return [stranger, half, bfloat]


def pairs() -> list[Pair]:
    """All pairs of this module, in a fixed order."""
    return [*two_of_a_kind(), *layers(), *others()]
