"""Prove a permutation spec on a model: random elements of the whole group must leave the outputs as they are.

What keeps the outputs is a subgroup. If it is not the whole group, a uniformly drawn element lies in it with a
probability of at most one half (one over its index), so twenty draws bring the risk that a wrong spec passes below
1e-6, whatever is wrong with it: the parities of two large groups that are coupled, too. Before them comes an element
that is not uniform: it moves every group and every nested row, each by an odd permutation, and what is wrong with one
group alone is seen at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.inference.additions import candidates, on_own_axes, with_slots
from lit_wsl.rebasin.inference.trace import named_tensors, traceable
from lit_wsl.rebasin.spec.axis import Permutations
from lit_wsl.rebasin.spec.spec import PermutationSpec, Proof, apply_permutation
from lit_wsl.structure.description import require_module, require_sample
from lit_wsl.structure.running import cuda_devices, nested_tensors, seed

NOISE = float(torch.finfo(torch.float64).eps)
MARGIN = 1e3
FLOOR = 1e-9
CEILING = 1e-4
RISK = 1e-6
"""Highest probability with which a wrong spec may pass."""


@dataclass(frozen=True)
class Verification:
    """Result of :func:`verify_permutation_spec`.

    Attributes:
        spec: The spec, without the groups that break the function.
        difference: Largest relative difference of the outputs under a random element of the remaining group.
        tolerance: What was allowed, from the model's own noise.
        dropped: Names of the groups that were removed.
        passes: Number of forward passes that were needed.
        draws: Number of elements of the whole remaining group that were tried.
        risk: Probability that a group that breaks the function on this sample passed nevertheless.
    """

    spec: PermutationSpec
    difference: float
    tolerance: float
    dropped: tuple[str, ...]
    passes: int
    draws: int = 0
    risk: float = 1.0

    @property
    def ok(self) -> bool:
        """Whether all groups keep the function."""
        return not self.dropped


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested containers with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _each(item, change) for key, item in value.items()}
    return type(value)(_each(item, change) for item in value) if type(value) in (list, tuple) else value


def _double(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def perturbed_state(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A double-precision copy of all parameters and statistics in which nothing is zero, one or equal to its neighbour.

    A norm gain of one or a bias of zero hides a wrong permutation; so every tensor gets noise of its own scale, and
    variances stay positive.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model).items():
        if id(tensor) not in drawn:
            drawn[id(tensor)] = _perturbed(_double(tensor.detach()).cpu(), generator).to(tensor.device)
        state[name] = drawn[id(tensor)]
    return state


def _perturbed(value: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.rand(value.shape, generator=generator, dtype=value.dtype)
    if value.is_complex():
        noise = torch.view_as_complex(torch.rand((*value.shape, 2), generator=generator, dtype=torch.float64))
        noise = noise - (0.5 + 0.5j)
    elif bool((value > 0).all()):
        return value * (0.75 + 0.5 * noise)
    else:
        noise = noise - 0.5
    spread = float(value.std()) if value.numel() > 1 else 0.0
    return value + noise * (spread if spread > 0 else 0.2)


def _other_input(value: Tensor, generator: torch.Generator) -> Tensor:
    """An input of the same kind without equal values: an image of ones or zeros would hide a wrong permutation."""
    if not value.is_floating_point() or value.layout != torch.strided:
        return value
    noise = torch.rand(value.shape, generator=generator, dtype=value.dtype).to(value.device)
    return value * (0.75 + 0.5 * noise) if bool(value.any()) else noise - 0.5


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
        model(*args, **(kwargs or {}))  # the first call of some models initialises weights: not in what is compared
        given = tuple(args), dict(kwargs or {})
        self.model, (self.args, self.kwargs) = model, _each(given, lambda tensor: _double(tensor.detach()))
        self.rest = {
            name: _double(buffer.detach()).clone() for name, buffer in model.named_buffers(remove_duplicate=False)
        }
        self.calls = 0
        self.seen: set[int] | None = None

    def used(self, state: Mapping[str, Tensor]) -> set[str]:
        """Names of the tensors that take part in a call; the call is not counted."""
        self.seen, calls = set(), self.calls
        try:
            self(state)
            return {name for name, tensor in state.items() if id(tensor) in self.seen}
        finally:
            self.seen, self.calls = None, calls

    def vary_inputs(self, state: Mapping[str, Tensor], seed: int) -> list[Tensor]:
        """Go over to inputs without equal values, if the model takes them; the outputs for the inputs from now on."""
        plain, generator = (self.args, self.kwargs), torch.Generator().manual_seed(seed)
        self.args, self.kwargs = _each(plain, lambda tensor: _other_input(tensor, generator))
        try:
            outputs = self(state)
            if all(bool(torch.isfinite(tensor).all()) for tensor in outputs):
                return outputs
        except Exception:
            pass
        self.args, self.kwargs = plain
        return self(state)

    def __call__(self, state: Mapping[str, Tensor], scale: float = 1.0) -> list[Tensor]:
        self.calls += 1
        args, kwargs = self.args, self.kwargs
        if scale != 1.0:
            args, kwargs = _each((args, kwargs), lambda t: t * scale if t.is_floating_point() else t)
        full = {name: buffer.clone() for name, buffer in self.rest.items()}
        full.update(state)
        model = self.model
        while isinstance(model, nn.DataParallel):  # torch calls what is inside of it with other weights, but not itself
            model, full = model.module, {name.removeprefix("module."): value for name, value in full.items()}
        self.model.train()  # drops attention biases that were cached in evaluation mode
        self.model.eval()
        seed(0, cuda_devices(self.model))
        with double_default(), _DoubleKernels(self.seen):
            output = functional_call(model, full, args, kwargs, tie_weights=False)
        found = [tensor.detach() for tensor in nested_tensors(self.outputs(output) if self.outputs else output)]
        if not any(tensor.is_floating_point() or tensor.is_complex() for tensor in found):
            raise RebasinError("The model returned no floating tensor, so there is nothing to compare.")
        return [_double(tensor) if tensor.is_complex() else tensor.double() for tensor in found]


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

    def __init__(self, seen: set[int] | None) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or what it stands for; its tensors are noted where somebody asks."""
        kwargs = kwargs or {}
        if self.seen is not None:
            self.seen.update(id(tensor) for tensor in nested_tensors([args, kwargs]))
        dtype = kwargs.get("dtype")
        if isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex):
            kwargs = {**kwargs, "dtype": torch.complex128 if dtype.is_complex else torch.float64}
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


def relative_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Largest over the outputs of ``max |a - b| / max |a|``; infinite where they are not comparable."""
    worst = 0.0
    if [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        return math.inf
    for a, b in zip(first, second):
        finite = torch.isfinite(a)
        if not torch.equal(finite, torch.isfinite(b)):
            return math.inf
        if bool(finite.any()):
            scale, gap = float(a[finite].abs().max()), float((a[finite] - b[finite]).abs().max())
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
    risk: float = RISK,
) -> Verification:
    """Check that random elements of the whole group keep the outputs; drop the groups that do not.

    The check runs in float64 on a copy of the weights in which gains, biases and statistics are perturbed first, and on
    inputs like the example without equal values, so that errors cannot hide behind ones and zeros. What counts as equal
    comes from the model's own noise: how far its outputs move when input and weights are perturbed by about 1e-16 of
    themselves. A right spec takes 23 forward passes: two, and one for each draw. A wrong one is bisected.

    Args:
        spec: The permutation spec, inferred, registered or written by hand.
        model: The model it was made for; not changed.
        example_args: Positional arguments of one call.
        example_kwargs: Keyword arguments of the call.
        outputs: Picks what counts from what the model returns; see :func:`infer_permutation_spec`.
        seed: Seed of the permutations and the perturbation.
        risk: Highest probability with which a wrong group may pass; the fewer draws, the higher.

    Returns:
        The verification; its ``spec`` is safe to use, and carries the proof.

    Raises:
        RebasinError: The model fails in float64, or its outputs are not finite or not repeatable.
    """
    require_module(model, "model", "")
    require_sample(example_args, example_kwargs)
    with traceable(model):
        try:
            function = _Function(model, example_args, example_kwargs, outputs)
            return _Proving(function, perturbed_state(model, seed), seed, risk).prove(spec)
        except RebasinError:
            raise
        except Exception as error:
            raise RebasinError(
                f"The permutation spec cannot be verified: {type(model).__name__} failed in float64 "
                f"({type(error).__name__}: {error}). Pass verify=False to use the spec unverified."
            ) from error


def with_interchangeable_slots(
    spec: PermutationSpec,
    model: nn.Module,
    example_args: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None,
    outputs: Callable[[Any], Any] | None,
) -> PermutationSpec:
    """The spec with the orders that only a trial can tell, see :mod:`lit_wsl.rebasin.inference.additions`."""
    if next(candidates(spec), None) is None and next(on_own_axes(spec), None) is None:
        return spec
    try:
        with traceable(model):
            function = _Function(model, example_args, example_kwargs, outputs)
            return with_slots(spec, _Proving(function, perturbed_state(model), 0, RISK).keeps)
    except Exception:  # the proof fails on it, too, and says why
        return spec


class _Proving:
    """Draws elements of a group until the risk is small enough, and takes out what breaks the function."""

    def __init__(self, function: _Function, state: dict[str, Tensor], seed: int, risk: float) -> None:
        self.function, self.state, self.seed, self.risk = function, state, seed, risk
        self.before = function.vary_inputs(state, seed)
        noise = relative_difference(self.before, self._nudged())
        self.tolerance = min(max(FLOOR, MARGIN * noise), CEILING)

    def keeps(self, spec: PermutationSpec, name: str) -> bool:
        """Whether an odd permutation of one group keeps the outputs."""
        return self._change(spec, {name: odd_permutations(spec, self.seed)[name]}) <= self.tolerance

    def _change(self, spec: PermutationSpec, permutations: Permutations) -> float:
        """How much permutations change the outputs."""
        # Nothing of the state is the model's, so who guards the model need not look on, which takes most of the time.
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            moved = apply_permutation(spec, permutations, self.state)
        return relative_difference(self.before, self.function({**self.state, **moved}))

    def _nudged(self) -> list[Tensor]:
        """The outputs for weights and inputs that are moved by about their last bit."""
        weights = _nudged(self.state, self.seed)
        try:
            return self.function(weights, 1.0 + 2 * NOISE)
        except Exception:  # whole numbers that may not be moved
            return self.function(weights)

    def prove(self, spec: PermutationSpec) -> Verification:
        bad: tuple[str, ...] = ()
        remaining, drawn = spec, 0
        while True:
            # uniform draws, which a wrong spec passes with at most this risk
            count = max(1, math.ceil(-math.log2(self.risk))) if remaining.groups else 0
            found: tuple[str, ...] = ()
            worst = 0.0
            for number in range(count + 1 if count else 0):
                drawn += 1  # a new draw each time: what was seen to pass says nothing of what remains after a loss
                draw = odd_permutations if number == 0 else PermutationSpec.random_permutations
                change, found = self._try(remaining, draw(remaining, self.seed + drawn))
                if found:
                    break
                worst = max(worst, change)
            if not found:
                break
            bad = tuple(name for name in spec.groups if name in {*bad, *found})
            remaining = spec.without(bad, "breaks the function")
        risk = 2.0**-count if count else 0.0
        used = self.function.used(self.state) if count else set()
        unseen = tuple(n for n in remaining.groups if not any(use.tensor in used for use in remaining.uses(n)))
        proof = Proof(draws=count + 1 if count else 0, risk=risk, unseen=unseen)
        remaining = replace(remaining, proof=proof)
        return Verification(remaining, worst, self.tolerance, bad, self.function.calls, proof.draws, proof.risk)

    def _try(self, spec: PermutationSpec, permutations: dict[str, Tensor]) -> tuple[float, tuple[str, ...]]:
        """How much a draw changes the outputs, and the groups that go if it is too much."""

        def difference(names: Sequence[str]) -> float:
            return self._change(spec, {name: permutations[name] for name in names})

        bad: list[str] = []
        names = list(spec.groups)
        change = worst = difference(names)
        while worst > self.tolerance:
            bad.append(_first_bad(difference, [n for n in names if n not in bad], self.tolerance))
            keep = spec.without(bad).groups
            bad = [name for name in names if name not in keep]
            worst = difference(list(keep)) if keep else 0.0
            if self.function.calls > 400:
                raise RebasinError(
                    "Too many groups of the permutation spec break the function; the model is not handled."
                )
        return change, tuple(bad)


def odd_permutations(spec: PermutationSpec, seed: int) -> dict[str, Tensor]:
    """An element of the group that moves every group and every nested row, each by an odd permutation.

    Nothing that is wrong with one group alone can pass it but by chance; the identity is even.
    """
    drawn = spec.random_permutations(seed)
    for permutation in drawn.values():
        for row in permutation.reshape(-1, permutation.shape[-1]):
            if len(row) > 1 and not _is_odd(row):
                row[:2] = row[:2].flip(0)
    return drawn


def _is_odd(permutation: Tensor) -> bool:
    """Whether the permutation is made of an odd number of exchanges: units less cycles."""
    where = permutation.tolist()
    cycles, seen = 0, [False] * len(where)
    for start in range(len(where)):
        if not seen[start]:
            cycles += 1
            place = start
            while not seen[place]:
                seen[place], place = True, where[place]
    return (len(where) - cycles) % 2 == 1


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
