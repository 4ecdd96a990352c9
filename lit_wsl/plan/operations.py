"""The operations of a plan that rearrange tensors, as splits and transposes do: each small, pure, and data itself."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from fractions import Fraction
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from lit_wsl.errors import PlanError

Shape = tuple[int, ...]
MAX_TENSORS = 1_000_000  # results of one operation; a plan that asks for more is damaged, and would fill the memory


@dataclass(frozen=True)
class Operation(ABC):
    """One step from source tensors to target tensors.

    Attributes:
        name: The word for it in plans and reports.
        lossless: Whether no value is changed and nothing is invented.
        needs_target: Whether :meth:`apply` needs the target's present values (only value-changing operations).
        keeps_function: Whether the model computes the same after it as the source did (in evaluation mode).
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = True

    @abstractmethod
    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        """Shapes of the results for inputs of these shapes.

        Raises:
            PlanError: If the operation does not fit the shapes.
        """

    @abstractmethod
    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:
        """Transform the tensors; results are views of the inputs where possible."""

    @abstractmethod
    def reverse(self) -> Operation:
        """The inverse operation: ``op.reverse().apply(op.apply(x)) == x``.

        Raises:
            PlanError: If there is none.
        """

    @property
    def shares(self) -> tuple[Fraction, Fraction]:
        """Which share of the source's elements it uses, and of the target's it fills."""
        return Fraction(1), Fraction(1)

    def to_dict(self) -> dict[str, Any]:
        """The operation as plain data, ``{"op": name, ...}``."""
        return {"op": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}}

    def _misfit(self, inputs: Sequence[Shape], why: str) -> PlanError:
        shown = ", ".join(map(str, map(tuple, inputs[:4]))) + (f", ... ({len(inputs)} tensors)" if inputs[4:] else "")
        return PlanError(f"{self.name} does not fit shapes [{shown}]: {why}.")

    def _bound(self, inputs: Sequence[Shape], each: int) -> None:
        """Refuse to make millions of tensors of a few."""
        if len(inputs) * each > MAX_TENSORS:
            raise PlanError(f"{self.name} would make {len(inputs) * each:,} tensors; at most {MAX_TENSORS:,} may be.")

    def _check(self, inputs: Sequence[Tensor]) -> list[Shape]:
        """The shapes of the results; refuses tensors that it was not planned for, some of which torch would take."""
        return self.shapes([tuple(t.shape) for t in inputs])

    def _at_least(self, least: int, **values: object) -> None:
        """Check arguments that are integers, or tuples of them."""
        for argument, value in values.items():
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(n, bool) or not isinstance(n, int) or n < least for n in numbers):
                raise PlanError(f"{self.name}: {argument} must be at least {least}, got {value!r}.")


@dataclass(frozen=True)
class Permute(Operation):
    """Reorder the axes of each tensor, as ``Tensor.permute``."""

    dims: tuple[int, ...]
    name: ClassVar[str] = "permute"

    def __post_init__(self) -> None:
        if sorted(self.dims) != list(range(len(self.dims))):
            raise PlanError(f"permute: dims must name each axis from 0 once, got {self.dims}.")

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        if any(len(s) != len(self.dims) for s in inputs):
            raise self._misfit(inputs, f"the order {self.dims} is for {len(self.dims)} axes")
        return [tuple(s[d] for d in self.dims) for s in inputs]

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:
        self._check(inputs)
        return [t.permute(self.dims) for t in inputs]

    def reverse(self) -> Operation:
        return Permute(tuple(self.dims.index(i) for i in range(len(self.dims))))


@dataclass(frozen=True)
class Transpose(Operation):
    """Swap two axes of each tensor: ``Conv1D`` of GPT-2 against ``nn.Linear``."""

    dim0: int = 0
    dim1: int = 1
    name: ClassVar[str] = "transpose"

    def __post_init__(self) -> None:
        self._at_least(0, dim0=self.dim0, dim1=self.dim1)

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        if any(len(s) <= max(self.dim0, self.dim1) for s in inputs):
            raise self._misfit(inputs, f"axes {self.dim0} and {self.dim1} are needed")
        swapped = {self.dim0: self.dim1, self.dim1: self.dim0}
        return [tuple(s[swapped.get(d, d)] for d in range(len(s))) for s in inputs]

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:
        self._check(inputs)
        return [t.transpose(self.dim0, self.dim1) for t in inputs]

    def reverse(self) -> Operation:
        return self


@dataclass(frozen=True)
class Reshape(Operation):
    """Give each tensor another shape of as many elements: Linear <-> 1x1 conv, ``(C, 1, 1)`` <-> ``(C,)``.

    Each shape may leave one size open as ``-1``, for tensors that differ along that axis: the parts of a fused
    projection have the same heads and unequal numbers of them.

    >>> Reshape((2, -1, 4), (-1, 4)).shapes([(2, 3, 4), (2, 1, 4)])
    [(6, 4), (2, 4)]
    """

    source: Shape
    target: Shape
    name: ClassVar[str] = "reshape"

    def __post_init__(self) -> None:
        self._at_least(-1, source=self.source, target=self.target)
        is_open = [shape.count(-1) for shape in (self.source, self.target)]
        if max(is_open) > 1 or is_open[0] != is_open[1]:
            raise PlanError(f"reshape from {self.source} to {self.target}: both shapes or none may have one open size.")
        if not is_open[0] and math.prod(self.source) != math.prod(self.target):
            raise PlanError(f"reshape from {self.source} to {self.target} changes the number of elements.")

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        return [self._shape(tuple(s), inputs) for s in inputs]

    def _shape(self, shape: Shape, inputs: Sequence[Shape]) -> Shape:
        fits = len(shape) == len(self.source) and all(want in (-1, got) for got, want in zip(shape, self.source))
        if not fits:
            raise self._misfit(inputs, f"it was planned for shape {self.source}")
        if -1 not in self.target:
            return tuple(self.target)
        known = math.prod(size for size in self.target if size != -1)
        if known == 0 or math.prod(shape) % known:
            raise self._misfit(inputs, f"no size takes the open axis of {self.target}")
        return tuple(math.prod(shape) // known if size == -1 else size for size in self.target)

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:
        return [t.reshape(shape) for t, shape in zip(inputs, self._check(inputs))]

    def reverse(self) -> Operation:
        return Reshape(self.target, self.source)


@dataclass(frozen=True)
class Cast(Operation):
    """Convert each tensor from one data type to another, e.g. ``float16`` -> ``float32``.

    Only a cast to a type that holds every value of the first can be reversed: rounding cannot be undone.
    """

    source: str
    target: str
    name: ClassVar[str] = "cast"

    def __post_init__(self) -> None:
        for dtype in (self.source, self.target):
            if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
                raise PlanError(f"cast: {dtype!r} is not a torch data type such as 'float32' or 'bfloat16'.")

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        return [tuple(s) for s in inputs]

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:
        return [t.to(getattr(torch, self.target)) for t in inputs]

    @property
    def rounds(self) -> bool:
        """Whether the target holds fewer values than the source."""
        return not _holds(getattr(torch, self.source), getattr(torch, self.target))

    def reverse(self) -> Operation:
        if self.rounds:
            raise PlanError(
                f"cast: {self.source} -> {self.target} rounds, which cannot be undone. To go back all the same, remove "
                "the cast from the plan's entry first."
            )
        return Cast(self.target, self.source)


def _holds(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether every value of one data type has an exact counterpart in another."""
    if source == target or source == torch.bool:
        return True
    if source.is_floating_point or source.is_complex:
        try:
            return torch.promote_types(source, target) == target
        except RuntimeError:  # torch promotes no 8-bit floating-point types
            return target in (torch.float32, torch.float64)
    low, high = torch.iinfo(source).min, torch.iinfo(source).max
    if target.is_floating_point or target.is_complex:
        return high <= 2 / torch.finfo(target).eps
    return target != torch.bool and torch.iinfo(target).min <= low and high <= torch.iinfo(target).max


@dataclass(frozen=True)
class _Sized(Operation):
    """What has an axis and the sizes of parts along it."""

    dim: int
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        self._at_least(0, dim=self.dim, sizes=self.sizes)
        if not self.sizes:
            raise PlanError(f"{self.name}: sizes must give at least one size.")


@dataclass(frozen=True)
class Split(_Sized):
    """Cut each tensor along an axis into parts of the given sizes: qkv -> q, k, v."""

    name: ClassVar[str] = "split"

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        out: list[Shape] = []
        self._bound(inputs, len(self.sizes))
        for s in inputs:
            if len(s) <= self.dim or s[self.dim] != sum(self.sizes):
                raise self._misfit(inputs, f"axis {self.dim} must have {sum(self.sizes)} entries")
            out += [(*s[: self.dim], size, *s[self.dim + 1 :]) for size in self.sizes]
        return out

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:
        self._check(inputs)
        return [part for t in inputs for part in t.split(list(self.sizes), dim=self.dim)]

    def reverse(self) -> Operation:
        return Concat(self.dim, self.sizes)


@dataclass(frozen=True)
class Concat(_Sized):
    """Join consecutive runs of ``len(sizes)`` tensors along an axis: q, k, v -> qkv."""

    name: ClassVar[str] = "concat"

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        n = len(self.sizes)
        if not inputs or len(inputs) % n:
            raise self._misfit(inputs, f"it joins runs of {n} tensors")
        out: list[Shape] = []
        for start in range(0, len(inputs), n):
            run = inputs[start : start + n]
            rest = {(*s[: self.dim], *s[self.dim + 1 :]) for s in run}
            if any(len(s) <= self.dim for s in run) or len(rest) != 1:
                raise self._misfit(inputs, f"the other axes must agree to join along axis {self.dim}")
            if tuple(s[self.dim] for s in run) != tuple(self.sizes):
                raise self._misfit(inputs, f"axis {self.dim} must have the sizes {self.sizes}")
            out.append((*run[0][: self.dim], sum(self.sizes), *run[0][self.dim + 1 :]))
        return out

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:
        self._check(inputs)
        n = len(self.sizes)
        return [torch.cat(list(inputs[i : i + n]), dim=self.dim) for i in range(0, len(inputs), n)]

    def reverse(self) -> Operation:
        return Split(self.dim, self.sizes)


@dataclass(frozen=True)
class _Stacking(Operation):
    """What has an axis and the number of entries along it."""

    dim: int
    count: int

    def __post_init__(self) -> None:
        self._at_least(0, dim=self.dim)
        self._at_least(1, count=self.count)


@dataclass(frozen=True)
class Stack(_Stacking):
    """Stack consecutive runs of ``count`` tensors along a new axis: N experts -> one 3-D tensor."""

    name: ClassVar[str] = "stack"

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        if not inputs or len(inputs) % self.count:
            raise self._misfit(inputs, f"it stacks runs of {self.count} tensors")
        out: list[Shape] = []
        for start in range(0, len(inputs), self.count):
            run = inputs[start : start + self.count]
            if any(tuple(s) != tuple(run[0]) for s in run) or self.dim > len(run[0]):
                raise self._misfit(inputs, f"it stacks tensors of one shape, along a new axis {self.dim}")
            out.append((*run[0][: self.dim], self.count, *run[0][self.dim :]))
        return out

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:
        self._check(inputs)
        return [torch.stack(list(inputs[i : i + self.count]), dim=self.dim) for i in range(0, len(inputs), self.count)]

    def reverse(self) -> Operation:
        return Unstack(self.dim, self.count)


@dataclass(frozen=True)
class Unstack(_Stacking):
    """Take each tensor apart along an axis of ``count`` entries: one 3-D tensor -> N experts."""

    name: ClassVar[str] = "unstack"

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        out: list[Shape] = []
        self._bound(inputs, self.count)
        for s in inputs:
            if len(s) <= self.dim or s[self.dim] != self.count:
                raise self._misfit(inputs, f"axis {self.dim} must have {self.count} entries")
            out += [(*s[: self.dim], *s[self.dim + 1 :])] * self.count
        return out

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:
        self._check(inputs)
        return [part for t in inputs for part in t.unbind(self.dim)]

    def reverse(self) -> Operation:
        return Stack(self.dim, self.count)


@dataclass(frozen=True)
class FanOut(Operation):
    """Give one source to ``count`` targets that are tied in the source and separate in the target."""

    count: int
    name: ClassVar[str] = "fan_out"

    def __post_init__(self) -> None:
        self._at_least(1, count=self.count)

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        self._bound(inputs, self.count)
        return [tuple(s) for s in inputs for _ in range(self.count)]

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:
        self._check(inputs)
        return [t for t in inputs for _ in range(self.count)]

    def reverse(self) -> Operation:
        return Tie(self.count)


@dataclass(frozen=True)
class Tie(Operation):
    """Take one of each run of ``count`` equal tensors; refuse if they differ, since then nothing is tied."""

    count: int
    name: ClassVar[str] = "tie"

    def __post_init__(self) -> None:
        self._at_least(1, count=self.count)

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        if not inputs or len(inputs) % self.count:
            raise self._misfit(inputs, f"it ties runs of {self.count} tensors")
        if any(tuple(s) != tuple(inputs[i - i % self.count]) for i, s in enumerate(inputs)):
            raise self._misfit(inputs, "tensors that become one must have one shape")
        return [tuple(s) for s in inputs[:: self.count]]

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:
        self._check(inputs)
        if not all(_same_bits(t, inputs[i - i % self.count]) for i, t in enumerate(inputs)):
            raise PlanError(f"tie: the {self.count} tensors differ, so they cannot become one tensor.")
        return list(inputs[:: self.count])

    def reverse(self) -> Operation:
        return FanOut(self.count)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal values, where NaN equals itself; tensors without data count as equal."""
    if first is second or first.is_meta or second.is_meta:
        return True
    return torch.equal(first, second) or (
        first.is_floating_point() and torch.allclose(first, second, rtol=0.0, atol=0.0, equal_nan=True)
    )


@dataclass(frozen=True)
class Rotary(Operation):
    """Rows of queries or keys from rotary halves to neighbouring rotary pairs, head by head, or back.

    Attributes:
        head: Rows of a head.
        width: Rows of a head that are rotated, the first ones.
        to_pairs: From halves to pairs; back otherwise.
        only: Which tensors of the list, by place; all where it is empty.

    >>> Rotary(4, 4, True).apply([torch.arange(8)])
    [tensor([0, 2, 1, 3, 4, 6, 5, 7])]
    """

    head: int
    width: int
    to_pairs: bool
    only: tuple[int, ...] = ()
    name: ClassVar[str] = "rotary"

    def __post_init__(self) -> None:
        self._at_least(1, head=self.head, width=self.width)
        self._at_least(0, only=self.only)
        if self.width % 2 or self.width > self.head:
            raise PlanError(f"rotary: width must be even and at most the head's {self.head} rows, got {self.width}.")

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        for place, s in enumerate(inputs):
            if (not self.only or place in self.only) and (not s or s[0] % self.head):
                raise self._misfit(inputs, f"the rows must be whole heads of {self.head}")
        return [tuple(s) for s in inputs]

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:
        self._check(inputs)
        return [self._turn(t) if not self.only or place in self.only else t for place, t in enumerate(inputs)]

    def _turn(self, tensor: Tensor) -> Tensor:
        heads = tensor.reshape(-1, self.head, *tensor.shape[1:])
        rotated, rest = heads[:, : self.width], heads[:, self.width :]
        inner = (2, self.width // 2) if self.to_pairs else (self.width // 2, 2)
        turned = rotated.reshape(len(heads), *inner, *tensor.shape[1:]).transpose(1, 2).reshape(rotated.shape)
        return torch.cat((turned, rest), 1).reshape(tensor.shape)

    def reverse(self) -> Operation:
        return Rotary(self.head, self.width, not self.to_pairs, self.only)


@dataclass(frozen=True)
class Reorder(Operation):
    """Cut the first axis of each tensor into equal blocks and put them in another order: gates of recurrent cells.

    >>> Reorder((1, 0)).apply([torch.arange(4)])
    [tensor([2, 3, 0, 1])]
    """

    order: tuple[int, ...]
    name: ClassVar[str] = "reorder"

    def __post_init__(self) -> None:
        if not self.order or sorted(self.order) != list(range(len(self.order))):
            raise PlanError(f"reorder: order must name each block from 0 once, got {self.order}.")

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        if any(not s or s[0] % len(self.order) for s in inputs):
            raise self._misfit(inputs, f"the first axis must be {len(self.order)} equal blocks")
        return [tuple(s) for s in inputs]

    def apply(self, inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()) -> list[Tensor]:
        self._check(inputs)
        return [torch.cat([t.chunk(len(self.order))[block] for block in self.order]) for t in inputs]

    def reverse(self) -> Operation:
        return Reorder(tuple(self.order.index(block) for block in range(len(self.order))))


OPERATIONS: dict[str, type[Operation]] = {
    op.name: op
    for op in (Permute, Transpose, Reshape, Split, Concat, Stack, Unstack, FanOut, Tie, Rotary, Reorder, Cast)
}


def operation_from_dict(data: Mapping[str, Any]) -> Operation:
    """Rebuild an operation from :meth:`Operation.to_dict`; arguments that have defaults may be left out.

    Raises:
        PlanError: If the name is unknown, or an argument is missing, unknown or not allowed.

    >>> operation_from_dict({"op": "split", "dim": 0, "sizes": [2, 2]})
    Split(dim=0, sizes=(2, 2))
    """
    name = data.get("op")
    cls = OPERATIONS.get(name) if isinstance(name, str) else None
    if cls is None:
        raise PlanError(f"unknown operation {name!r}; known are {', '.join(sorted(OPERATIONS))}.")
    hints = get_type_hints(cls)
    args = {k: v for k, v in data.items() if k != "op"}
    known = {f.name for f in fields(cls)}
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    if not needed <= set(args) <= known:
        raise PlanError(f"operation {name!r} takes {sorted(known)}, but the plan gives {sorted(map(str, args))}.")
    return cls(**{key: _typed(value, hints[key], f"{name}: {key}") for key, value in args.items()})


def _typed(value: object, hint: Any, where: str) -> Any:
    """Take a plain value for an argument of the given type; lists become tuples."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(parts) == 2 and parts[1] is Ellipsis:
            return tuple(_typed(v, parts[0], where) for v in value)
        if len(parts) == len(value):
            return tuple(_typed(v, p, where) for v, p in zip(value, parts))
    elif origin in (Union, UnionType):
        for part in parts:
            try:
                return _typed(value, part, where)
            except PlanError:
                continue
    elif origin is Literal:
        if any(value == p and type(value) is type(p) for p in parts):
            return value
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif (
        origin is None  # Python 3.10 calls tuple[int] a type
        and isinstance(hint, type)
        and isinstance(value, hint)
        and (hint is bool or not isinstance(value, bool))
    ):
        return value
    shown = repr(value)
    wanted = hint.__name__ if isinstance(hint, type) and origin is None else str(hint)
    raise PlanError(f"{where} must be {wanted}, got {shown[:60] + '...' if len(shown) > 60 else shown}.")


def run_operations(
    operations: Sequence[Operation], inputs: Sequence[Tensor], targets: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Chain operations over a list of tensors.

    >>> import torch
    >>> run_operations([Transpose(), Split(0, (2, 2))], [torch.zeros(3, 4)])[0].shape
    torch.Size([2, 3])
    """
    tensors = list(inputs)
    for op in operations:
        tensors = op.apply(tensors, targets)
    return tensors


def run_shapes(operations: Sequence[Operation], inputs: Sequence[Shape]) -> list[Shape]:
    """Chain operations over shapes only.

    >>> run_shapes([Concat(0, (2, 2)), Transpose()], [(2, 3), (2, 3)])
    [(3, 4)]
    """
    shapes = [tuple(s) for s in inputs]
    for op in operations:
        shapes = op.shapes(shapes)
    return shapes
