"""Prove a permutation spec on a model: a random element of the whole group must leave the outputs as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.inference.trace import named_tensors, output_tensors, undisturbed
from lit_wsl.rebasin.spec.apply import apply_permutation
from lit_wsl.rebasin.spec.spec import PermutationSpec

NOISE = float(torch.finfo(torch.float64).eps)
MARGIN = 1e3
FLOOR = 1e-9
CEILING = 1e-4


@dataclass(frozen=True)
class Verification:
    """Result of :func:`verify_permutation_spec`.

    Attributes:
        spec: The spec, without the groups that break the function.
        difference: Largest relative difference of the outputs under a random element of the remaining group.
        tolerance: What was allowed, from the model's own noise.
        dropped: Names of the groups that were removed.
        passes: Number of forward passes that were needed.
    """

    spec: PermutationSpec
    difference: float
    tolerance: float
    dropped: tuple[str, ...]
    passes: int

    @property
    def ok(self) -> bool:
        """Whether all groups keep the function."""
        return not self.dropped


def to_double(value: Any) -> Any:
    """Floating tensors of nested containers as float64."""
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: to_double(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(to_double(item) for item in value)
    return value


def perturbed_state(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A float64 copy of all parameters and statistics in which nothing is zero, one or equal to its neighbour.

    A norm gain of one or a bias of zero hides a wrong permutation; so every tensor gets noise of its own scale, and
    variances stay positive.
    """
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    drawn: dict[int, Tensor] = {}
    for name, tensor in named_tensors(model).items():
        if id(tensor) not in drawn:
            value = tensor.detach().double().cpu()
            noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            spread = float(value.std()) if value.numel() > 1 else 0.0
            if bool((value > 0).all()):
                value = value * (0.75 + 0.5 * noise)
            else:
                value = value + (noise - 0.5) * (spread if spread > 0 else 0.2)
            drawn[id(tensor)] = value.to(tensor.device)
        state[name] = drawn[id(tensor)]
    return state


class _Function:
    """The model as a function of its state, in float64."""

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        outputs: Callable[[Any], Any] | None,
    ) -> None:
        self.outputs = outputs
        self.model, self.args, self.kwargs = model, to_double(tuple(args)), to_double(dict(kwargs or {}))
        self.rest = {
            name: buffer.detach().double() if buffer.is_floating_point() else buffer.detach().clone()
            for name, buffer in model.named_buffers(remove_duplicate=False)
        }
        self.calls = 0

    def __call__(self, state: Mapping[str, Tensor], scale: float = 1.0) -> list[Tensor]:
        self.calls += 1
        args, kwargs = self.args, self.kwargs
        if scale != 1.0:
            args, kwargs = _scaled(args, scale), _scaled(kwargs, scale)
        full = {name: buffer.clone() for name, buffer in self.rest.items()}
        full.update(state)
        self.model.train()  # drops attention biases that were cached in evaluation mode
        self.model.eval()
        torch.manual_seed(0)
        with double_default(), _DoubleKernels():
            output = functional_call(self.model, full, args, kwargs, tie_weights=False)
        return [tensor.detach().double() for tensor in output_tensors(self.outputs(output) if self.outputs else output)]


@contextmanager
def double_default() -> Iterator[None]:
    """Tensors that the model makes on the way are float64, too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _DoubleKernels(TorchDispatchMode):
    """All in float64: casts to less become casts to float64, and what has no float64 kernel is written out.

    Norms and softmaxes of language models cast to float32 by themselves; a permutation changes the order of a sum, so
    their rounding would hide what is to be seen.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or what it stands for."""
        kwargs = kwargs or {}
        dtype = kwargs.get("dtype")
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            kwargs = {**kwargs, "dtype": torch.float64}
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float64:
            return _grouped_product(*args, **kwargs)
        return func(*args, **kwargs)


def _grouped_product(one: Tensor, two: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Rows of ``one``, segment by segment, times the matrices of ``two``: ``(rows, k), (segments, k, m)``."""
    if offs is None or one.ndim != 2 or two.ndim != 3:
        raise RebasinError(f"A grouped product of shapes {tuple(one.shape)} and {tuple(two.shape)} is not known here.")
    ends = [int(end) for end in offs]
    parts = [one[a:b] @ matrix for a, b, matrix in zip([0, *ends[:-1]], ends, two, strict=True)]
    return torch.cat([*parts, one.new_zeros(one.shape[0] - ends[-1], two.shape[2])])


def _scaled(value: Any, scale: float) -> Any:
    if isinstance(value, Tensor):
        return value * scale if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _scaled(item, scale) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_scaled(item, scale) for item in value)
    return value


def relative_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Largest over the outputs of ``max |a - b| / max |a|``; infinite where they are not comparable."""
    worst = 0.0
    if len(first) != len(second):
        return float("inf")
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel() == 0:
            continue
        finite = torch.isfinite(a)
        if not torch.equal(finite, torch.isfinite(b)):
            return float("inf")
        scale = float(a[finite].abs().max()) if bool(finite.any()) else 0.0
        gap = float((a[finite] - b[finite]).abs().max()) if bool(finite.any()) else 0.0
        worst = max(worst, gap / scale if scale > 0 else gap)
    return worst


def verify_permutation_spec(
    spec: PermutationSpec,
    model: nn.Module,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> Verification:
    """Check that a random element of the whole group keeps the outputs; drop the groups that do not.

    The check runs in float64 on a copy of the weights in which gains, biases and statistics are perturbed first, so
    that errors cannot hide behind ones and zeros. What counts as equal comes from the model's own noise: how far its
    outputs move when input and weights are perturbed by about 1e-16 of themselves. A right spec takes
    two forward passes and one for the noise; a wrong one is bisected.

    Args:
        spec: The permutation spec.
        model: The model it was made for; not changed.
        example_args: Positional arguments of one call.
        example_kwargs: Keyword arguments of the call.
        outputs: Picks what counts from what the model returns; see :func:`infer_permutation_spec`.
        seed: Seed of the permutations and the perturbation.

    Returns:
        The verification; its ``spec`` is safe to use.

    Raises:
        RebasinError: The model fails in float64, or its outputs are not finite or not repeatable.
    """
    with undisturbed(model):
        try:
            function = _Function(model, example_args, example_kwargs, outputs)
            return _verify(spec, function, perturbed_state(model, seed), seed)
        except RebasinError:
            raise
        except Exception as error:
            raise RebasinError(
                f"The permutation spec cannot be verified: {type(model).__name__} failed in float64 "
                f"({type(error).__name__}: {error}). Pass verify=False to use the spec unverified."
            ) from error


def _verify(spec: PermutationSpec, function: _Function, state: dict[str, Tensor], seed: int) -> Verification:
    before = function(state)
    if not before:
        raise RebasinError("The model returned no floating tensor, so there is nothing to compare.")
    noise = relative_difference(before, function(_nudged(state, seed), 1.0 + 2 * NOISE))
    tolerance = min(max(FLOOR, MARGIN * noise), CEILING)
    permutations = spec.random_permutations(seed + 1)

    def difference(names: Sequence[str]) -> float:
        chosen = {name: permutations[name] for name in names}
        after = function({**state, **apply_permutation(spec, chosen, state)})
        return relative_difference(before, after)

    names = list(spec.groups)
    worst = difference(names)
    bad: list[str] = []
    while worst > tolerance:
        bad.append(_first_bad(difference, [n for n in names if n not in bad], tolerance))
        keep = spec.without(bad).groups
        bad = [name for name in names if name not in keep]
        worst = difference(list(keep)) if keep else 0.0
        if function.calls > 400:
            raise RebasinError("Too many groups of the permutation spec break the function; the model is not handled.")
    return Verification(
        spec.without(bad, "breaks the function") if bad else spec, worst, tolerance, tuple(bad), function.calls
    )


def _nudged(state: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Every weight moved by about its last bit: models that read only tokens have no input to perturb."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in state.items():
        sign = torch.randint(-1, 2, tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        moved[name] = tensor * (1.0 + NOISE * sign)
    return moved


def _first_bad(difference: Any, names: list[str], tolerance: float) -> str:
    """Bisect for the shortest beginning of the list that breaks the function; its last group is to blame."""
    low, high = 0, len(names)  # names[:low] is right, names[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        if difference(names[:middle]) > tolerance:
            high = middle
        else:
            low = middle
    return names[high - 1]
