"""Permutation specs by architecture name, for architectures that everybody knows, and for your own.

A registered function makes the spec from the shapes of a state dict. Inference needs no registration; this is for state
dicts without a model at hand, and for architectures that cannot be traced. The name says the family, and the tensors
which of its layouts it is (:mod:`~lit_wsl.rebasin.spec.layouts`). What is registered is not proven until
``verify_permutation_spec`` has proven it on a model and a sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor, nn

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.spec import layouts
from lit_wsl.rebasin.spec.builder import PermutationSpecBuilder
from lit_wsl.rebasin.spec.spec import PermutationSpec

SpecFactory: TypeAlias = Callable[[Mapping[str, Any]], PermutationSpec]
_REGISTRY: dict[str, SpecFactory] = {}
_SIZES = r"(ti|tiny|s|small|b|base|l|large|h|huge|g|giant|bigg)"
_PATCHED = rf"{_SIZES}(_?(patch)?\d+)?(_\d+)?"
_FAMILIES: dict[str, Callable[[Mapping[str, Any], layouts.Heads], PermutationSpec]] = {
    r"((wide_?)?resnet_?\d+(_\d+)?|wrn_?\d+_\d+)(_cifar\d+)?": lambda state, heads: layouts.resnet(state),
    r"(cifar\d+_)(resnet\d+)": lambda state, heads: layouts.resnet(state),
    r"vgg_?\d+(_bn)?": lambda state, heads: layouts.vgg(state),
    rf"(vit|vision_transformer|deit)(_?{_PATCHED})?(_.*)?": layouts.vision_transformer,
    rf"(open_?|openai_)?clip(_vit)?(_?{_PATCHED})?(_.*)?": layouts.vision_transformer,
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
    factory = _find(name, layouts.Heads(heads, source if isinstance(source, nn.Module) else None))
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


def _find(name: str, heads: layouts.Heads) -> SpecFactory:
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
    """Refuse a spec that is silent about a tensor, or that moves nothing.

    Raises:
        RebasinError: It does.
    """
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
