"""Permutation specs by architecture name, for architectures that everybody knows, and for your own.

A registered function makes the spec from the shapes of a state dict. Inference needs no registration; this is for state
dicts without a model at hand, and for architectures that cannot be traced. The name says the family, and the tensors
which of its published layouts it is: a residual block is what has a ``conv1`` and a ``conv2``, whatever the block and
its norms are called. What is registered is not proven until ``verify_permutation_spec`` has proven it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor, nn

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.spec.builder import PermutationSpecBuilder
from lit_wsl.rebasin.spec.spec import PermutationSpec

_PUBLISHED = {1280: 16, 1408: 16, 1664: 16}
"""Widths of published transformers whose heads do not have 64 dimensions, and their heads."""


@dataclass(frozen=True)
class Heads:
    """Where the number of attention heads comes from: the user, the model, or what is published.

    Attributes:
        given: What the user said.
        model: The model, whose attention modules know it.
    """

    given: int | None = None
    model: nn.Module | None = None

    def of(self, block: str, width: int) -> int:
        """Heads of the attention in a block of this width.

        Raises:
            RebasinError: Nobody knows.
        """
        found = self.given or self._of_model(block) or _PUBLISHED.get(width) or (width // 64 if width % 64 == 0 else 0)
        if not found or width % found:
            raise RebasinError(
                f"The number of heads in {block!r} of width {width} cannot be told from the tensors: "
                "pass the model, or heads=..."
            )
        return found

    def _of_model(self, block: str) -> int:
        if self.model is None:
            return 0
        counts = [
            int(found)
            for module in self.model.get_submodule(block).modules()
            for key in ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
            if isinstance(found := getattr(module, key, None), int)
        ]
        return counts[0] if counts else 0


def natural(names: Iterable[str]) -> list[str]:
    """Distinct names, numbers in their order: ``layer.2`` before ``layer.10``."""
    return sorted(set(names), key=lambda text: [(p.isdigit(), int(p or 0) if p.isdigit() else p) for p in _cut(text)])


def _cut(text: str) -> list[str]:
    return [part for part in re.split(r"(\d+)", text) if part]


def _stages(names: Iterable[str], pattern: str) -> list[str]:
    """Distinct first groups of a pattern over names, in natural order."""
    return natural(match.group(1) for name in names if (match := re.match(pattern, name)))


# ---- convolutional networks ------------------------------------------------------------------------------------------


class _Residual:
    """A residual network: a stem, blocks of numbered convolutions with norms, a classifier."""

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        self.builder = PermutationSpecBuilder(state_dict)
        self.shapes = self.builder.shapes
        weights = [name.removesuffix(".weight") for name in self.shapes if name.endswith(".weight")]
        self.convs = [name for name in weights if len(self.shapes[f"{name}.weight"]) == 4]
        self.norms = [name for name in weights if len(self.shapes[f"{name}.weight"]) == 1]
        self.linears = [name for name in weights if len(self.shapes[f"{name}.weight"]) == 2]
        inner = [name.rpartition(".")[0] for name in self.convs if name.endswith(".conv2")]
        self.blocks = natural(block for block in inner if f"{block}.conv1" in self.convs)
        self.outside = [n for n in (*self.convs, *self.norms, *self.linears) if not n.startswith(tuple(self._inside()))]
        if not self.blocks or len([n for n in self.outside if n in self.linears]) != 1:
            raise RebasinError("The state dict lacks the blocks or the classifier of a residual network.")
        self.before = self._norms_come_first()

    def _inside(self) -> list[str]:
        return [f"{block}." for block in self.blocks]

    def _size(self, name: str, axis: int = 0) -> int:
        return self.shapes[f"{name}.weight"][axis]

    def _numbered(self, block: str) -> list[tuple[str, list[str]]]:
        """Convolutions of a block in order, each with its norms."""
        own = [name for name in self.convs if re.fullmatch(rf"{re.escape(block)}\.conv\d+", name)]
        numbers = {name: int(name.rpartition("conv")[2]) for name in own}
        return [
            (
                conv,
                [n for n in self.norms if re.match(rf"{re.escape(block)}\.[A-Za-z_]+{numbers[conv]}(\.|$)", n)],
            )
            for conv in sorted(own, key=numbers.__getitem__)
        ]

    def _norms_come_first(self) -> bool:
        """Whether norms stand before their convolutions, as the sizes say where these change."""
        pairs = [
            (self._size(norm), self._size(conv), self._size(conv, 1))
            for block in self.blocks
            for conv, norms in self._numbered(block)
            for norm in norms
        ]
        return all(norm == inp for norm, _, inp in pairs) and any(norm != out for norm, out, _ in pairs)

    def _norm(self, names: Sequence[str], group: str | None) -> None:
        for name in names:
            self.builder.norm(name, group)

    def _block(self, block: str, stream: str | None, after: str | None) -> None:
        """A block that reads one residual stream and adds to another."""
        numbered = self._numbered(block)
        inner = stream
        for k, (conv, norms) in enumerate(numbered, start=1):
            out = after if k == len(numbered) else conv
            self._norm(norms, inner if self.before else out)
            self.builder.conv(conv, out, inner)
            inner = out
        shortcut = self.shortcut(block)
        if shortcut is not None:
            self.builder.conv(shortcut, after, stream)
        known = {name for _, norms in numbered for name in norms}
        for norm in self.norms:
            if norm.startswith(f"{block}.") and norm not in known and shortcut is not None:
                self._norm([norm], stream if self.before else after)

    def shortcut(self, block: str) -> str | None:
        """The projection on the shortcut of a block."""
        found = [
            c for c in self.convs if c.startswith(f"{block}.") and not re.fullmatch(r"conv\d+", c[len(block) + 1 :])
        ]
        return found[0] if len(found) == 1 else None

    def build(self) -> PermutationSpec:
        """The spec."""
        (stem,) = [name for name in self.outside if name in self.convs]
        (head,) = [name for name in self.outside if name in self.linears]
        sizes = [self._size(self._numbered(block)[-1][0]) for block in self.blocks]
        starts = [self._size(stem), *sizes[:-1]]
        padded = any(
            size != start and self.shortcut(block) is None
            for block, start, size in zip(self.blocks, starts, sizes, strict=True)
        )
        # Where a shortcut pads channels with zeros, the streams before and after it are one and stay as they are.
        stream: str | None = None if padded else "stem"
        self.builder.conv(stem, stream, None)
        for norm in self.outside:
            if norm in self.norms and not self.before:
                self._norm([norm], stream)
        for block in self.blocks:
            after = block if self.shortcut(block) is not None and not padded else stream
            self._block(block, stream, after)
            stream = after
        for norm in self.outside:
            if norm in self.norms and self.before:
                self._norm([norm], stream)
        channels = self._size(head, 1) // sizes[-1]
        return self.builder.linear(head, None, (stream, channels) if stream and channels > 1 else stream).build()


def resnet(state_dict: Mapping[str, Any]) -> PermutationSpec:
    """Residual networks of basic or bottleneck blocks, in any layout whose blocks have ``conv1``, ``conv2``, ....

    A block without a projection on its shortcut adds to the residual stream before it; one with a projection begins a
    new one. Norms may follow their convolutions or precede them.

    Raises:
        RebasinError: The state dict has no such blocks, not one stem or not one classifier.
    """
    network = _Residual(state_dict)
    try:
        return network.build()
    except ValueError as error:
        raise RebasinError("The state dict has not one stem and one classifier, as residual networks do.") from error


def vgg(state_dict: Mapping[str, Any]) -> PermutationSpec:
    """``features.{n}`` convolutions with or without batch norm, then ``classifier`` linears behind a flatten."""
    builder = PermutationSpecBuilder(state_dict)
    shapes = builder.shapes
    group: str | None = None
    for layer in _stages(shapes, r"((?:.*\.)?features\.\d+)\."):
        if len(shapes[f"{layer}.weight"]) == 4:
            before, group = group, layer
            builder.conv(layer, group, before)
        else:
            builder.norm(layer, group)
    linears = _stages(shapes, r"((?:.*\.)?classifier(?:\.\d+)?)\.(?:weight|bias)")
    channels = builder.size(group) if group else 1
    inp: Any = (group, shapes[f"{linears[0]}.weight"][1] // channels)
    for layer in linears:
        out = None if layer == linears[-1] else layer
        builder.linear(layer, out, inp)
        inp = out
    return builder.build()


# ---- transformers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Naming:
    """Names of a pre-norm transformer.

    Attributes:
        block: Regular expression whose first group is the prefix of a block.
        inside: ``norm1, qkv, out, norm2, up, down`` and optional ``scale1, scale2``: names inside a block; ``qkv`` is
            the fused weight, or the names of three projections.
        stream: Tensor name -> axis of the residual stream outside of the blocks; those that are absent are left out.
        head: The tensor in front of the outputs, its axis in ``stream``. A model without it puts the residual stream
            out, so that the stream stays as it is.
        fixed: Other tensors that no permutation moves.
    """

    block: str
    inside: Mapping[str, str | tuple[str, str, str]]
    stream: Mapping[str, int]
    head: str
    fixed: tuple[str, ...] = ()


def add_transformer(builder: PermutationSpecBuilder, heads: Heads, naming: Naming, prefix: str = "") -> None:
    """Add a transformer; ``prefix`` tells its groups from those of another one in the same builder."""
    shapes, names = builder.shapes, naming.inside
    residual = f"{prefix}residual" if naming.head in shapes else None
    for name, axis in naming.stream.items():
        if name in shapes:
            builder.axis(name, axis, residual)
    builder.fixed(*(name for name in naming.fixed if name in shapes))
    for block in _stages(shapes, naming.block):
        for norm in ("norm1", "norm2"):
            builder.norm(f"{block}.{names[norm]}", residual)
        qkv, out = names["qkv"], f"{block}.{names['out']}"
        width = shapes[f"{out}.weight"][1]
        if isinstance(qkv, str):
            builder.attention(block, heads.of(block, width), f"{block}.{qkv}", out, residual)
        else:
            q, k, v = (f"{block}.{name}" for name in qkv)
            builder.attention(block, heads.of(block, width), (q, k, v), out, residual)
        builder.linear(f"{block}.{names['up']}", f"{block}.mlp", residual)
        builder.linear(f"{block}.{names['down']}", residual, f"{block}.mlp")
        for scale in ("scale1", "scale2"):
            if (tensor := f"{block}.{names.get(scale, '-')}") in shapes:
                builder.tensor(tensor, residual)


Names = dict[str, str | tuple[str, str, str]]
_MHA: Names = {"norm1": "ln_1", "norm2": "ln_2"}
_TIMM: Names = {"norm1": "norm1", "qkv": "attn.qkv.weight", "out": "attn.proj", "norm2": "norm2", "up": "mlp.fc1"}
_TIMM |= {"down": "mlp.fc2", "scale1": "ls1.gamma", "scale2": "ls2.gamma"}
_CLIP: Names = {**_MHA, "qkv": "attn.in_proj_weight", "out": "attn.out_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
_CLIP |= {"scale1": "ls_1.gamma", "scale2": "ls_2.gamma"}
_VISION: Names = {**_MHA, "qkv": "self_attention.in_proj_weight", "out": "self_attention.out_proj"}
_HF_CLIP: Names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "out": "self_attn.out_proj", "up": "mlp.fc1"}
_HF_CLIP_BLOCK: Names = {
    **_HF_CLIP,
    "down": "mlp.fc2",
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}
_HF_ATTENTION = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
_HF_VIT: Names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "out": "attention.output.dense"}
_HF_VIT_BLOCK: Names = {**_HF_VIT, "qkv": _HF_ATTENTION, "up": "intermediate.dense", "down": "output.dense"}


def _ends(name: str) -> dict[str, int]:
    return {f"{name}.weight": 0, f"{name}.bias": 0}


def _timm(p: str) -> Naming:
    stream = {f"{p}cls_token": 2, f"{p}reg_token": 2, f"{p}dist_token": 2, f"{p}pos_embed": 2}
    stream |= {**_ends(f"{p}patch_embed.proj"), **_ends(f"{p}norm"), **_ends(f"{p}fc_norm"), **_ends(f"{p}norm_pre")}
    stream |= {f"{p}head.weight": 1, f"{p}head_dist.weight": 1}
    fixed = (f"{p}head.bias", f"{p}head_dist.bias")
    return Naming(rf"({re.escape(p)}blocks\.\d+)\.", _TIMM, stream, f"{p}head.weight", fixed)


def _torchvision(p: str, names: Iterable[str]) -> Naming:
    mlp = ("mlp.linear_1", "mlp.linear_2") if any(".mlp.linear_1." in n for n in names) else ("mlp.0", "mlp.3")
    stream = {f"{p}class_token": 2, f"{p}encoder.pos_embedding": 2, **_ends(f"{p}conv_proj"), **_ends(f"{p}encoder.ln")}
    stream |= {f"{p}heads.head.weight": 1}
    block = rf"({re.escape(p)}encoder\.layers\.encoder_layer_\d+)\."
    inside: Names = {**_VISION, "up": mlp[0], "down": mlp[1]}
    return Naming(block, inside, stream, f"{p}heads.head.weight", (f"{p}heads.head.bias",))


def _clip_visual(p: str) -> Naming:
    stream = {f"{p}class_embedding": 0, f"{p}positional_embedding": 1, f"{p}conv1.weight": 0, f"{p}proj": 0}
    stream |= {**_ends(f"{p}ln_pre"), **_ends(f"{p}ln_post")}
    return Naming(rf"({re.escape(p)}transformer\.resblocks\.\d+)\.", _CLIP, stream, f"{p}proj")


def _clip_text(p: str, names: Sequence[str]) -> Naming:
    stream = {f"{p}token_embedding.weight": 1, f"{p}positional_embedding": 1, f"{p}text_projection": 0}
    stream |= {f"{p}text_projection.weight": 1, **_ends(f"{p}ln_final")}
    fixed = (f"{p}attn_mask", "logit_scale", "logit_bias", f"{p}text_projection.bias")
    block = rf"({re.escape(p)}transformer\.resblocks\.\d+)\."
    head = f"{p}text_projection"
    return Naming(block, _CLIP, stream, head if head in names else f"{head}.weight", fixed)


def _hf_clip(p: str, head: str) -> Naming:
    e = f"{p}embeddings."
    stream = {f"{e}class_embedding": 0, f"{e}patch_embedding.weight": 0, f"{e}position_embedding.weight": 1}
    stream |= {f"{e}token_embedding.weight": 1, **_ends(f"{p}pre_layrnorm"), **_ends(f"{p}post_layernorm")}
    stream |= {**_ends(f"{p}final_layer_norm"), head: 1}
    fixed = (f"{e}position_ids", "logit_scale")
    return Naming(rf"({re.escape(p)}encoder\.layers\.\d+)\.", _HF_CLIP_BLOCK, stream, head, fixed)


def _hf_vit(p: str) -> Naming:
    root = p.removesuffix("vit.")
    stream = {f"{p}embeddings.cls_token": 2, f"{p}embeddings.position_embeddings": 2, **_ends(f"{p}layernorm")}
    stream |= {**_ends(f"{p}embeddings.patch_embeddings.projection"), f"{root}classifier.weight": 1}
    fixed = (f"{root}classifier.bias",)
    return Naming(rf"({re.escape(p)}encoder\.layer\.\d+)\.", _HF_VIT_BLOCK, stream, f"{root}classifier.weight", fixed)


def _prefix(names: Iterable[str], sign: str) -> str | None:
    """What stands before a sign of a layout in the names, None if it is not there."""
    return next((match.group(1) for name in names if (match := re.match(rf"(|.*?\.){sign}", name))), None)


def namings(names: Sequence[str]) -> dict[str, Naming]:
    """The transformers in a state dict, by the prefix of their groups.

    >>> list(namings(["visual.transformer.resblocks.0.ln_1.weight", "transformer.resblocks.0.ln_1.weight"]))
    ['visual.', '']
    """
    if (p := _prefix(names, r"blocks\.\d+\.attn\.qkv\.")) is not None:
        return {"": _timm(p)}
    if (p := _prefix(names, r"encoder\.layers\.encoder_layer_\d+\.")) is not None:
        return {"": _torchvision(p, names)}
    if (p := _prefix(names, r"encoder\.layer\.\d+\.attention\.attention\.query\.")) is not None:
        return {"": _hf_vit(p)}
    found: dict[str, Naming] = {}
    for prefix in dict.fromkeys(
        m.group(1) for n in names if (m := re.match(r"(.*?)encoder\.layers\.\d+\.self_attn\.", n))
    ):
        head = "visual_projection.weight" if "vision" in prefix else "text_projection.weight"
        found[prefix] = _hf_clip(prefix, head)
    for prefix in dict.fromkeys(m.group(1) for n in names if (m := re.match(r"(.*?)transformer\.resblocks\.\d+\.", n))):
        found[prefix] = _clip_visual(prefix) if f"{prefix}conv1.weight" in names else _clip_text(prefix, names)
    return found


def vision_transformer(state_dict: Mapping[str, Any], heads: Heads) -> PermutationSpec:
    """Vision transformers and CLIP models, whole or one tower, in the layouts of the libraries that publish them.

    Raises:
        RebasinError: The tensors are of none of these layouts.
    """
    builder = PermutationSpecBuilder(state_dict)
    found = namings(list(builder.shapes))
    if not found:
        raise RebasinError("The state dict has the blocks of no vision transformer or CLIP model that is known here.")
    for prefix, naming in found.items():
        add_transformer(builder, heads, naming, prefix)
    return builder.build()


SpecFactory: TypeAlias = Callable[[Mapping[str, Any]], PermutationSpec]
_REGISTRY: dict[str, SpecFactory] = {}
_SIZES = r"(ti|tiny|s|small|b|base|l|large|h|huge|g|giant|bigg)"
_PATCHED = rf"{_SIZES}(_?(patch)?\d+)?(_\d+)?"
_FAMILIES: dict[str, Callable[[Mapping[str, Any], Heads], PermutationSpec]] = {
    r"((wide_?)?resnet_?\d+(_\d+)?|wrn_?\d+_\d+)(_cifar\d+)?": lambda state, heads: resnet(state),
    r"(cifar\d+_)(resnet\d+)": lambda state, heads: resnet(state),
    r"vgg_?\d+(_bn)?": lambda state, heads: vgg(state),
    rf"(vit|vision_transformer|deit)(_?{_PATCHED})?(_.*)?": vision_transformer,
    rf"(open_?|openai_)?clip(_vit)?(_?{_PATCHED})?(_.*)?": vision_transformer,
}
"""Names of the literature, as people type them, to the family."""
_LISTED = (
    *(f"resnet{depth}" for depth in (18, 20, 32, 34, 44, 50, 56, 101, 110, 152)),
    *("wide_resnet50_2", "wide_resnet101_2"),
    *(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")),
    *("vit", "vit_b_16", "vit_b_32", "vit_l_14", "vit_l_16", "vit_l_32", "vit_h_14"),
    *(f"vit_{size}_patch{patch}_224" for size in ("tiny", "small", "base", "large") for patch in (14, 16, 32)),
    *(f"clip_vit_{size}" for size in ("b_16", "b_32", "l_14", "h_14")),
    *(f"open_clip_vit_{size}_{part}" for size in ("b_16", "b_32", "l_14") for part in ("visual", "text")),
)


def register_permutation_spec(*names: str) -> Callable[[SpecFactory], SpecFactory]:
    """Register a function ``state_dict -> PermutationSpec`` under architecture names.

    >>> @register_permutation_spec("my_net")
    ... def my_net(state_dict):
    ...     return PermutationSpecBuilder(state_dict).linear("a", "P", None).linear("b", None, "P").build()
    """

    def register(factory: SpecFactory) -> SpecFactory:
        for name in names:
            _REGISTRY[_key(name)] = factory
        return factory

    return register


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def registered_permutation_specs() -> tuple[str, ...]:
    """Names of the architectures that have a spec here; other spellings and sizes of these families are known, too."""
    return tuple(sorted({*_REGISTRY, *_LISTED}))


def permutation_spec(
    name: str,
    source: nn.Module | Mapping[str, Tensor] | Mapping[str, Sequence[int]],
    *,
    heads: int | None = None,
) -> PermutationSpec:
    """The registered spec of an architecture. It is not proven; ``verify_permutation_spec`` does that.

    Args:
        name: Name of the architecture or its family; case and punctuation do not matter (``"ViT-B-32"`` is
            ``"vit_b_32"``). Which library's layout it is, is seen from the names of the tensors: a ``"ViT-B-32"`` may
            be timm's, torchvision's, Hugging Face's, OpenCLIP's visual tower or its whole model.
        source: The model, its state dict, or name -> shape.
        heads: Number of attention heads, where the layout has some; by default the model's, else the published number.

    Raises:
        RebasinError: No spec has this name, the state dict is not of this architecture, has tensors that the spec knows
            nothing of, or nothing of it could be permuted.

    >>> shapes = {"features.0.weight": (8, 3, 3, 3), "classifier.weight": (5, 8), "classifier.bias": (5,)}
    >>> permutation_spec("VGG-11", shapes).groups["features.0"].size
    8
    """
    state = dict(source.state_dict() if isinstance(source, nn.Module) else source)
    factory = _find(name, Heads(heads, source if isinstance(source, nn.Module) else None))
    try:
        spec = factory(state)
    except KeyError as error:
        raise RebasinError(f"The state dict has no tensor {error}; is it a {name}?") from error
    except IndexError as error:
        raise RebasinError(f"The state dict lacks layers of a {name}, such as its classifier.") from error
    _account(name, spec, state)
    if not isinstance(source, nn.Module):
        return spec
    return replace(spec, parameters=PermutationSpecBuilder(source).parameters)


def _find(name: str, heads: Heads) -> SpecFactory:
    key = _key(name)
    if key in _REGISTRY:
        return _REGISTRY[key]
    for pattern, family in _FAMILIES.items():
        if re.fullmatch(pattern, key):
            return lambda state: family(state, heads)
    raise RebasinError(
        f"No permutation spec is registered for {name!r}. There are: {', '.join(registered_permutation_specs())}. "
        "infer_permutation_spec(model, example_args) makes one for any model."
    )


def _account(name: str, spec: PermutationSpec, state: Mapping[str, Any]) -> None:
    """Refuse a spec that is silent about a tensor, or that moves nothing."""
    silent = [tensor for tensor in state if tensor not in spec.axes and tensor not in spec.frozen]
    remedy = "infer_permutation_spec(model, example_args) makes a spec for any model"
    if silent:
        shape = tuple(getattr(state[silent[0]], "shape", state[silent[0]]))
        raise RebasinError(
            f"The spec of {name} says nothing of {len(silent)} tensors of this state dict, such as {silent[0]!r} of "
            f"shape {shape}: this is another architecture, or a variant of it. {remedy}."
        )
    if not spec.groups:
        raise RebasinError(f"The spec of {name} finds nothing in this state dict that can be permuted. {remedy}.")
