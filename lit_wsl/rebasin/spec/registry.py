"""Permutation specs by architecture name, for architectures that everybody knows, and for your own.

A registered function makes the spec from the shapes of a state dict. Inference needs no registration; this is for state
dicts without a model at hand, and for architectures that cannot be traced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.spec.builder import PermutationSpecBuilder
from lit_wsl.rebasin.spec.spec import PermutationSpec

SpecFactory: TypeAlias = Callable[[Mapping[str, Any]], PermutationSpec]
_REGISTRY: dict[str, SpecFactory] = {}


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
    """Names of all architectures that have a spec here."""
    return tuple(sorted(_REGISTRY))


def permutation_spec(
    name: str, source: nn.Module | Mapping[str, Tensor] | Mapping[str, Sequence[int]]
) -> PermutationSpec:
    """The registered spec of an architecture.

    Args:
        name: Architecture name; case and punctuation do not matter (``"ViT-B-32"`` is ``"vit_b_32"``).
        source: The model, its state dict, or name -> shape.

    Raises:
        RebasinError: No spec has this name, or the state dict is not of this architecture.
    """
    factory = _REGISTRY.get(_key(name))
    if factory is None:
        raise RebasinError(
            f"No permutation spec is registered for {name!r}. There are: {', '.join(registered_permutation_specs())}. "
            "infer_permutation_spec(model, example_args) makes one for any model."
        )
    try:
        spec = factory(source.state_dict() if isinstance(source, nn.Module) else source)
    except KeyError as error:
        raise RebasinError(f"The state dict has no tensor {error}; is it a {name}?") from error
    except IndexError as error:
        raise RebasinError(f"The state dict lacks layers of a {name}, such as its classifier.") from error
    if not isinstance(source, nn.Module):
        return spec
    parameters = PermutationSpecBuilder(source).parameters
    return PermutationSpec(spec.groups, spec.axes, spec.shapes, parameters, spec.frozen, spec.dropped)


def _stages(names: Sequence[str], pattern: str) -> list[str]:
    """Distinct first groups of a pattern over names, in natural order."""
    found = {match.group(1) for name in names if (match := re.match(pattern, name))}
    return sorted(found, key=lambda text: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)])


@register_permutation_spec("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet20", "resnet32")
def resnet(state_dict: Mapping[str, Any]) -> PermutationSpec:
    """Residual networks with ``conv1``, ``layer{i}.{j}.conv{k}``, ``downsample`` or ``shortcut``, ``fc`` or ``linear``.

    A block without a projection on its shortcut adds to the residual stream before it; one with a projection begins a
    new one. Where a shortcut pads channels with zeros instead (CIFAR option A), both streams are one and stay fixed.
    """
    builder = PermutationSpecBuilder(state_dict)
    shapes = builder.shapes
    stream: str | None = "stem"
    builder.conv("conv1", stream, None).norm("bn1", stream)
    width = shapes["conv1.weight"][0]
    for block in _stages(list(shapes), r"(layer\d+\.\d+)\."):
        convs = _stages(list(shapes), rf"{re.escape(block)}\.(conv\d+)\.")
        out = shapes[f"{block}.{convs[-1]}.weight"][0]
        shortcut = next((s for s in ("downsample", "shortcut") if f"{block}.{s}.0.weight" in shapes), None)
        before = stream
        if shortcut is not None:
            stream = block
            builder.conv(f"{block}.{shortcut}.0", stream, before).norm(f"{block}.{shortcut}.1", stream)
        elif out != width:
            return _padded_resnet(state_dict)
        width = out
        inner = before
        for k, conv in enumerate(convs, start=1):
            after = stream if k == len(convs) else f"{block}.{conv}"
            builder.conv(f"{block}.{conv}", after, inner).norm(f"{block}.bn{k}", after)
            inner = after
    head = "fc" if "fc.weight" in shapes else "linear"
    return builder.linear(head, None, stream).build()


def _padded_resnet(state_dict: Mapping[str, Any]) -> PermutationSpec:
    """Residual networks whose shortcuts pad with zeros: only the channels inside of the blocks move."""
    builder = PermutationSpecBuilder(state_dict)
    shapes = builder.shapes
    for block in _stages(list(shapes), r"(layer\d+\.\d+)\."):
        convs = _stages(list(shapes), rf"{re.escape(block)}\.(conv\d+)\.")
        inner: str | None = None
        for k, conv in enumerate(convs, start=1):
            after = None if k == len(convs) else f"{block}.{conv}"
            builder.conv(f"{block}.{conv}", after, inner).norm(f"{block}.bn{k}", after)
            inner = after
    return builder.build()


@register_permutation_spec("vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn")
def vgg(state_dict: Mapping[str, Any]) -> PermutationSpec:
    """``features.{n}`` convolutions with or without batch norm, then ``classifier`` linears behind a flatten."""
    builder = PermutationSpecBuilder(state_dict)
    shapes = builder.shapes
    group: str | None = None
    for layer in _stages(list(shapes), r"(features\.\d+)\."):
        if len(shapes[f"{layer}.weight"]) == 4:
            before, group = group, layer
            builder.conv(layer, group, before)
        else:
            builder.norm(layer, group)
    linears = _stages(list(shapes), r"(classifier(?:\.\d+)?)\.")
    channels = builder.size(group) if group else 1
    inp: Any = (group, shapes[f"{linears[0]}.weight"][1] // channels)
    for layer in linears:
        out = None if layer == linears[-1] else layer
        builder.linear(layer, out, inp)
        inp = out
    return builder.build()


def transformer(
    state_dict: Mapping[str, Any],
    heads: int,
    *,
    block: str,
    names: Mapping[str, str],
    stream: Mapping[str, int],
    head: str,
) -> PermutationSpec:
    """A pre-norm transformer with fused q, k, v.

    Args:
        state_dict: Tensors or shapes.
        heads: Number of heads.
        block: Regular expression whose first group is the prefix of a block.
        names: ``norm1, qkv, out, norm2, up, down`` and optional ``scale1, scale2``: names inside a block.
        stream: Tensor name -> axis of the residual stream outside of the blocks; those that are absent are left out.
        head: The tensor in front of the outputs, its axis in ``stream``. A model without it puts the residual stream
            out, so that the stream stays as it is.
    """
    builder = PermutationSpecBuilder(state_dict)
    shapes = builder.shapes
    residual = "residual" if head in shapes else None
    for name, axis in stream.items():
        if name in shapes:
            builder.axis(name, axis, residual)
    for prefix in _stages(list(shapes), block):
        for norm in ("norm1", "norm2"):
            builder.norm(f"{prefix}.{names[norm]}", residual)
        builder.attention(prefix, heads, f"{prefix}.{names['qkv']}", f"{prefix}.{names['out']}", residual)
        builder.linear(f"{prefix}.{names['up']}", f"{prefix}.mlp", residual)
        builder.linear(f"{prefix}.{names['down']}", residual, f"{prefix}.mlp")
        for scale in ("scale1", "scale2"):
            if (tensor := f"{prefix}.{names.get(scale, '-')}") in shapes:
                builder.tensor(tensor, residual)
    return builder.build()


_MHA = {"norm1": "ln_1", "norm2": "ln_2"}
_TIMM = {"norm1": "norm1", "qkv": "attn.qkv.weight", "out": "attn.proj", "norm2": "norm2", "up": "mlp.fc1"}
_TIMM |= {"down": "mlp.fc2", "scale1": "ls1.gamma", "scale2": "ls2.gamma"}
_CLIP = {**_MHA, "qkv": "attn.in_proj_weight", "out": "attn.out_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
_CLIP |= {"scale1": "ls_1.gamma", "scale2": "ls_2.gamma"}
_VISION = {**_MHA, "qkv": "self_attention.in_proj_weight", "out": "self_attention.out_proj"}


def _ends(name: str) -> dict[str, int]:
    return {f"{name}.weight": 0, f"{name}.bias": 0}


def timm_vit(state_dict: Mapping[str, Any], heads: int) -> PermutationSpec:
    """Vision transformers as timm names them (``blocks.{i}.attn.qkv``)."""
    stream = {"cls_token": 2, "reg_token": 2, "pos_embed": 2, **_ends("patch_embed.proj"), **_ends("norm")}
    stream |= {**_ends("fc_norm"), **_ends("norm_pre"), "head.weight": 1}
    return transformer(state_dict, heads, block=r"(blocks\.\d+)\.", names=_TIMM, stream=stream, head="head.weight")


def torchvision_vit(state_dict: Mapping[str, Any], heads: int) -> PermutationSpec:
    """Vision transformers as torchvision names them (``encoder.layers.encoder_layer_{i}``)."""
    mlp = ("mlp.linear_1", "mlp.linear_2") if any(".mlp.linear_1." in n for n in state_dict) else ("mlp.0", "mlp.3")
    stream = {"class_token": 2, "encoder.pos_embedding": 2, **_ends("conv_proj"), **_ends("encoder.ln")}
    stream |= {"heads.head.weight": 1}
    names = {**_VISION, "up": mlp[0], "down": mlp[1]}
    block = r"(encoder\.layers\.encoder_layer_\d+)\."
    return transformer(state_dict, heads, block=block, names=names, stream=stream, head="heads.head.weight")


def open_clip_visual(state_dict: Mapping[str, Any], heads: int) -> PermutationSpec:
    """Visual towers of OpenCLIP, with or without the prefix ``visual.``."""
    p = "visual." if "visual.conv1.weight" in state_dict else ""
    stream = {f"{p}class_embedding": 0, f"{p}positional_embedding": 1, f"{p}conv1.weight": 0, f"{p}proj": 0}
    stream |= {**_ends(f"{p}ln_pre"), **_ends(f"{p}ln_post")}
    block = rf"({re.escape(p)}transformer\.resblocks\.\d+)\."
    return transformer(state_dict, heads, block=block, names=_CLIP, stream=stream, head=f"{p}proj")


def open_clip_text(state_dict: Mapping[str, Any], heads: int) -> PermutationSpec:
    """Text towers of OpenCLIP."""
    stream = {"token_embedding.weight": 1, "positional_embedding": 1, "text_projection": 0, **_ends("ln_final")}
    block = r"(transformer\.resblocks\.\d+)\."
    return transformer(state_dict, heads, block=block, names=_CLIP, stream=stream, head="text_projection")


def _with_heads(factory: Callable[[Mapping[str, Any], int], PermutationSpec], heads: int) -> SpecFactory:
    return lambda state_dict: factory(state_dict, heads)


for _size, _heads in (("tiny", 3), ("small", 6), ("base", 12), ("large", 16)):
    for _patch in (14, 16, 32):
        register_permutation_spec(f"vit_{_size}_patch{_patch}_224")(_with_heads(timm_vit, _heads))
for _name, _heads in (("vit_b_16", 12), ("vit_b_32", 12), ("vit_l_16", 16), ("vit_l_32", 16)):
    register_permutation_spec(_name)(_with_heads(torchvision_vit, _heads))
for _name, _vision, _text in (("vit_b_32", 12, 8), ("vit_b_16", 12, 8), ("vit_l_14", 16, 12)):
    register_permutation_spec(f"open_clip_{_name}_visual")(_with_heads(open_clip_visual, _vision))
    register_permutation_spec(f"open_clip_{_name}_text")(_with_heads(open_clip_text, _text))
