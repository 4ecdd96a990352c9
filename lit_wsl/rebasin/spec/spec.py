"""Permutation specs as data: which axes of which tensors move together, and how permutations act on them.

A *group* is one independent permutation variable: ``size`` interchangeable units (channels, neurons, heads). A group
may be *nested* in a parent: inside every head there is a permutation of its own, so the permutation of a nested group
has one row per unit of the parent, ``(heads, head_dim)``.

An :class:`~lit_wsl.rebasin.spec.axis.AxisSpec` tells where groups stand on one axis of one tensor. The spec holds the
groups and axes of a whole architecture: it knows which group is nested in which, and how their permutations act.

Convention: a permutation ``p`` *takes*, ``new[i] = old[p[i]]``; with nested groups
``new[head, unit] = old[outer[head], inner[head, unit]]``, so the rows of ``inner`` belong to the new places.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_wsl.errors import ArgumentTypeError, RebasinError, Summarised, listed
from lit_wsl.files import not_found
from lit_wsl.rebasin.spec.axis import (
    FORMAT,
    VERSION,
    PermutationGroup,
    Permutations,
    axis_from_segments,
    axis_to_segments,
    lexsort,
    stacked,
)
from lit_wsl.rebasin.spec.axis import AxisSpec as AxisSpec
from lit_wsl.rebasin.spec.axis import AxisUse as AxisUse
from lit_wsl.structure.description import require_path, require_state_dict, what_it_is

#: Groups that a summary shows.
SHOWN = 20


def _proof(spec: PermutationSpec) -> str:
    if spec.proof is None:
        return "Not proven: verify_permutation_spec(spec, model, example_args) proves it on a model and a sample."
    told = (
        f"Proven on a model and a sample by {spec.proof.draws} draws: a group that breaks the function passes with a "
        f"probability of at most {spec.proof.risk:.0e}."
    )
    if spec.proof.unseen:
        told += f" Nothing is proven of what the sample does not use: {listed(spec.proof.unseen)}."
    return told


def validate(spec: PermutationSpec) -> None:
    """Check that a spec is consistent in itself.

    Raises:
        RebasinError: A group is unknown or misses its parent, a coordinate is out of range, the units of a group have
            different numbers of positions, or an axis does not have the length that ``shapes`` says.
    """
    seen: set[str] = set()
    for name, group in spec.groups.items():
        if group.name != name or group.size < 1:
            raise RebasinError(f"Group {name!r} is listed with name {group.name!r} and size {group.size}.")
        if group.parent is not None and group.parent not in seen:
            raise RebasinError(f"Group {name!r} is nested in {group.parent!r}, which must be listed before it.")
        seen.add(name)
    for tensor, by_axis in spec.axes.items():
        for axis, axis_spec in by_axis.items():
            for place, part in axis_spec.slices():
                _validate_axis(spec, tensor, axis, part, place)


def _validate_axis(spec: PermutationSpec, tensor: str, axis: int, axis_spec: AxisSpec, stacked: int | None) -> None:
    place = f"axis {axis} of {tensor!r}"
    shape = spec.shapes.get(tensor)
    if shape is not None and (axis >= len(shape) or shape[axis] != axis_spec.length):
        raise RebasinError(f"{place} has length {axis_spec.length} in the spec, but the tensor's shape is {shape}.")
    if axis_spec.coords.shape[0] != len(axis_spec.groups) or len(set(axis_spec.groups)) != len(axis_spec.groups):
        raise RebasinError(f"{place}: one row of coordinates for each group, each group once.")
    outer: AxisSpec | None = None
    if axis_spec.outer_axis is not None and axis_spec.outer_axis in spec.axes[tensor]:
        outer = spec._slice(tensor, axis_spec.outer_axis, stacked)
    for row, group in enumerate(axis_spec.groups):
        if group not in spec.groups:
            raise RebasinError(f"{place} is moved by {group!r}, which is not among the groups.")
        coordinate = axis_spec.coords[row]
        touched = coordinate >= 0
        for ancestor in spec.ancestors(group):
            if ancestor in axis_spec.groups[:row]:
                if bool((axis_spec.coordinate(ancestor)[touched] < 0).any()):
                    raise RebasinError(f"{place}: {group!r} acts where its parent {ancestor!r} does not.")
            elif outer is None or ancestor not in outer.groups or bool((outer.coordinate(ancestor) < 0).any()):
                raise RebasinError(f"{place}: {group!r} is nested in {ancestor!r}, which must come before it there.")
        family = [g for g in (*spec.ancestors(group), group) if g in axis_spec.groups]
        code = torch.zeros(int(touched.sum()), dtype=torch.long)
        cells = 1
        for member in family:
            values, size = axis_spec.coordinate(member)[touched], spec.groups[member].size
            if values.numel() and int(values.max()) >= size:
                raise RebasinError(f"{place}: unit {int(values.max())} of group {member!r}, which has {size}.")
            code, cells = code * size + values, cells * size
        counts = torch.bincount(code, minlength=cells)
        if bool((counts != counts[0]).any()) or int(counts[0]) == 0:
            raise RebasinError(f"{place}: the units of group {group!r} do not have the same number of positions.")


@dataclass(frozen=True)
class Proof:
    """What :func:`~lit_wsl.rebasin.verify_permutation_spec` has shown of a spec on a model and a sample.

    Attributes:
        draws: Elements of the group that were seen to keep the outputs.
        risk: Probability that a group that breaks the function on that sample passed nevertheless.
        unseen: Groups of which nothing was shown: the sample uses none of their tensors.
    """

    draws: int
    risk: float
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class PermutationSpec(Summarised):
    """The permutation symmetries of one architecture, as data.

    Attributes:
        groups: Name -> group, parents before children.
        axes: Tensor name -> axis -> how it is moved. Axes that nothing moves are absent. Parameters and buffers.
        shapes: Tensor name -> shape of every tensor the spec knows (moved or not).
        parameters: Names of the tensors that are parameters (the others are buffers); the base of :attr:`coverage`.
        frozen: Tensor name -> axis -> why nothing moves (all of) it.
        dropped: Group name -> why verification removed it.
        proof: What was shown of it on a model; None for a spec that nothing has proven yet.
    """

    groups: Mapping[str, PermutationGroup]
    axes: Mapping[str, Mapping[int, AxisSpec]]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    frozen: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    proof: Proof | None = None

    def __post_init__(self) -> None:
        """Refuse what is not consistent; see :func:`~lit_wsl.rebasin.spec.spec.validate`."""
        validate(self)

    # ---- groups ------------------------------------------------------------------------------------------------------

    def ancestors(self, group: str) -> tuple[str, ...]:
        """Names of the groups ``group`` is nested in, the outermost first."""
        chain: list[str] = []
        parent = self.groups[group].parent
        while parent is not None:
            chain.append(parent)
            parent = self.groups[parent].parent
        return tuple(reversed(chain))

    def children(self, group: str) -> tuple[str, ...]:
        """Names of the groups nested directly in ``group``."""
        return tuple(name for name, other in self.groups.items() if other.parent == group)

    def permutation_shape(self, group: str) -> tuple[int, ...]:
        """Shape of the permutation tensor of ``group``: sizes of its ancestors, then its own."""
        return (*(self.groups[name].size for name in self.ancestors(group)), self.groups[group].size)

    @cached_property
    def _uses(self) -> dict[str, tuple[AxisUse, ...]]:
        found: dict[str, list[AxisUse]] = {name: [] for name in self.groups}
        for name, axes in self.axes.items():
            for axis, axis_spec in axes.items():
                for place, part in axis_spec.slices():
                    for group in part.groups:
                        found[group].append(self._use(name, axis, group, part, place))
        return {name: tuple(uses) for name, uses in found.items()}

    def uses(self, group: str) -> tuple[AxisUse, ...]:
        """Every (tensor, axis) that ``group`` moves, with the positions of its units."""
        return self._uses[group]

    def _slice(self, name: str, axis: int, place: int | None) -> AxisSpec:
        """An axis at a place of the stack that another axis of the tensor is moved differently along."""
        axis_spec = self.axes[name][axis]
        return axis_spec if axis_spec.stack_axis is None else axis_spec.slices()[place or 0][1]

    def _use(self, name: str, axis: int, group: str, axis_spec: AxisSpec, place: int | None) -> AxisUse:
        family = (*self.ancestors(group), group)
        on_axis = [g for g in family if g in axis_spec.groups]
        keys = [axis_spec.coordinate(g) for g in on_axis]
        touched = torch.stack(keys).amin(dim=0) >= 0
        rest = [axis_spec.coordinate(g) for g in axis_spec.groups if g not in family]
        where = torch.nonzero(touched).flatten()
        order = lexsort([k[where] for k in (*keys, *rest, axis_spec.rank)])
        shape = [self.groups[g].size for g in on_axis]
        positions = where[order].reshape(*shape, -1)
        stack = None if place is None else (self.axes[name][axis].stack_axis or 0, place)
        above = [g for g in family if g not in on_axis]
        if axis_spec.outer_axis is None or not above:
            return AxisUse(name, axis, positions, stack=stack)
        outer = self._slice(name, axis_spec.outer_axis, place)
        outer_order = lexsort([*(outer.coordinate(g) for g in above), torch.arange(outer.length)])
        sizes = [self.groups[g].size for g in above]
        outer_positions = outer_order.reshape(*sizes, -1)
        positions = positions.expand(*sizes, *positions.shape)
        return AxisUse(name, axis, positions, axis_spec.outer_axis, outer_positions, stack)

    # ---- permutations ------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Tensor]:
        """The permutations that move nothing."""
        shapes = {name: self.permutation_shape(name) for name in self.groups}
        return {name: torch.arange(shape[-1]).expand(shape).clone() for name, shape in shapes.items()}

    def random_permutations(self, seed: int = 0) -> dict[str, Tensor]:
        """A uniformly drawn element of the whole group, the same for the same seed; torch's RNG is not touched."""
        generator = torch.Generator().manual_seed(seed)
        shapes = {name: self.permutation_shape(name) for name in self.groups}
        return {
            name: torch.rand(shape, generator=generator, dtype=torch.float64).argsort(dim=-1)
            for name, shape in shapes.items()
        }

    def index(self, permutations: Permutations, name: str, axis: int) -> Tensor:
        """Positions that axis ``axis`` of tensor ``name`` takes from.

        Args:
            permutations: Group name -> permutation; groups that are absent stay as they are.
            name: Name of a tensor in :attr:`axes`.
            axis: One of its moved axes.

        Returns:
            LongTensor ``(length,)``; ``(length of the outer axis, length)`` if the axis has an ``outer_axis``: the
            index then belongs to the *new* position on that axis. With a ``stack_axis`` one of these for each place.

        Raises:
            RebasinError: A permutation has the wrong shape.
        """
        slices = self.axes[name][axis].slices()
        found = [self._index(permutations, name, part, place) for place, part in slices]
        return found[0] if slices[0][0] is None else torch.stack(found)

    def _index(self, permutations: Permutations, name: str, axis_spec: AxisSpec, place: int | None) -> Tensor:
        if axis_spec.outer_axis is None:
            return self._take(permutations, axis_spec, {})
        outer = self._slice(name, axis_spec.outer_axis, place)
        rows, inverse = torch.unique(outer.coords, dim=1, return_inverse=True)
        table = [
            self._take(permutations, axis_spec, dict(zip(outer.groups, column.tolist(), strict=True)))
            for column in rows.T
        ]
        return torch.stack(table)[inverse]

    def _take(self, permutations: Permutations, axis_spec: AxisSpec, given: Mapping[str, int]) -> Tensor:
        source = axis_spec.coords.clone()
        for row, group in enumerate(axis_spec.groups):
            permutation = permutations.get(group)
            if permutation is None:
                continue
            if tuple(permutation.shape) != self.permutation_shape(group):
                raise RebasinError(
                    f"The permutation of group {group!r} has shape {tuple(permutation.shape)}, "
                    f"the spec asks for {self.permutation_shape(group)}."
                )
            where = axis_spec.coords[row] >= 0
            path = []
            for ancestor in (*self.ancestors(group), group):
                if ancestor in axis_spec.groups:
                    path.append(axis_spec.coordinate(ancestor)[where])
                else:
                    path.append(torch.full((int(where.sum()),), given[ancestor], dtype=torch.long))
            source[row, where] = permutation.to("cpu", torch.long)[tuple(path)]
        return axis_spec.index_from(source)

    # ---- what the user sees ------------------------------------------------------------------------------------------

    def touched_share(self, name: str) -> float:
        """Share of the elements of tensor ``name`` that some group moves, 0 to 1."""
        untouched = 1.0
        for axis_spec in self.axes.get(name, {}).values():
            untouched *= 1.0 - float(axis_spec.touched.double().mean())
        return 1.0 - untouched

    @property
    def coverage(self) -> float:
        """Share of the parameters' elements that some group permutes, 0 to 1 (tied parameters count once per name)."""
        total = moved = 0.0
        for name in self.parameters:
            size = float(torch.Size(self.shapes[name]).numel())
            total += size
            moved += size * self.touched_share(name)
        return moved / total if total else 0.0

    @property
    def axis_coverage(self) -> float:
        """Share of the parameters' axes (those with several positions) that groups permute, 0 to 1.

        Elements alone say little of a weight ``(heads, dim, width)``: moving its width touches all of them. An axis of
        which some positions move counts by their share.
        """
        total = moved = 0.0
        for name in self.parameters:
            by_axis = self.axes.get(name, {})
            total += sum(size > 1 for size in self.shapes[name])
            moved += sum(float(axis_spec.touched.double().mean()) for axis_spec in by_axis.values())
        return moved / total if total else 0.0

    def without(self, names: Iterable[str], reason: str = "") -> PermutationSpec:
        """The spec without some groups and all that is nested in them; they are listed in :attr:`dropped`."""
        removed = set(names)
        for name in self.groups:
            if removed.intersection(self.ancestors(name)):
                removed.add(name)
        axes = {
            tensor: {axis: kept for axis, spec in by_axis.items() if (kept := spec.without(removed)).groups}
            for tensor, by_axis in self.axes.items()
        }
        return replace(
            self,
            groups={name: group for name, group in self.groups.items() if name not in removed},
            axes={tensor: by_axis for tensor, by_axis in axes.items() if by_axis},
            dropped={**self.dropped, **{name: reason for name in self.groups if name in removed}},
        )

    def with_group(self, group: PermutationGroup, axes: Mapping[tuple[str, int], AxisSpec]) -> PermutationSpec:
        """The spec with a further group, and what it makes of some axes ``(tensor, axis)``."""
        made = {tensor: dict(by_axis) for tensor, by_axis in self.axes.items()}
        frozen = {tensor: dict(reasons) for tensor, reasons in self.frozen.items()}
        for (tensor, number), axis in axes.items():
            made.setdefault(tensor, {})[number] = axis
            if bool(axis.touched.all()):
                frozen.get(tensor, {}).pop(number, None)
        return replace(self, groups={**self.groups, group.name: group}, axes=made, frozen=frozen)

    def summary(self) -> str:
        """Groups found, share of the parameters covered, and what stays fixed and why, as text."""
        nested = sum(group.parent is not None for group in self.groups.values())
        lines = [
            f"{len(self.groups)} permutation groups ({nested} nested) move {len(self.axes)} of {len(self.shapes)} "
            f"tensors: {self.coverage:.1%} of the parameters' elements, {self.axis_coverage:.1%} of their axes.",
            _proof(self),
        ]
        for name, group in list(self.groups.items())[:SHOWN]:
            inside = f" inside {group.parent}" if group.parent else ""
            lines.append(f"  {name}: {group.size} units{inside}, {len(self.uses(name))} axes")
        if len(self.groups) > SHOWN:
            lines.append(f"  ... and {len(self.groups) - SHOWN} more")
        reasons = Counter(reason for by_axis in self.frozen.values() for reason in by_axis.values())
        if reasons:
            lines.append(f"Fixed: {sum(reasons.values())} axes.")
            lines += [f"  {count} x {reason}" for reason, count in sorted(reasons.items(), key=lambda i: (-i[1], i[0]))]
        if self.dropped:
            lines.append(f"Dropped: {len(self.dropped)} groups.")
            lines += [f"  {name}: {reason}" for name, reason in self.dropped.items()]
        return "\n".join(lines)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PermutationSpec):
            return NotImplemented
        return all(
            getattr(self, key) == getattr(other, key) for key in ("groups", "axes", "shapes", "frozen", "dropped")
        ) and tuple(self.parameters) == tuple(other.parameters)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        state = "proven" if self.proof is not None else "unproven"
        return (
            f"PermutationSpec({len(self.groups)} groups on {len(self.axes)} tensors, {self.coverage:.1%} of the "
            f"parameters, {self.axis_coverage:.1%} of their axes, {state})"
        )

    # ---- JSON --------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON-able data; see :mod:`lit_wsl.rebasin.spec.axis`."""
        axes: dict[str, Any] = {}
        for tensor, by_axis in self.axes.items():
            axes[tensor] = {}
            for axis, axis_spec in by_axis.items():
                parts = [axis_to_segments(part) for _, part in axis_spec.slices()]
                entry: dict[str, Any] = {"segments": parts[0]}
                if axis_spec.stack_axis is not None:
                    entry = {"stack_axis": axis_spec.stack_axis, "slices": parts}
                if axis_spec.outer_axis is not None:
                    entry["outer_axis"] = axis_spec.outer_axis
                axes[tensor][str(axis)] = entry
        return {
            "format": FORMAT,
            "version": VERSION,
            "groups": {
                name: {"size": g.size, **({"parent": g.parent} if g.parent else {})} for name, g in self.groups.items()
            },
            "axes": axes,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "parameters": list(self.parameters),
            "frozen": {name: {str(axis): why for axis, why in by.items()} for name, by in self.frozen.items()},
            "dropped": dict(self.dropped),
            **({"proof": asdict(self.proof)} if self.proof is not None else {}),
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The spec as JSON text, also written to ``path`` where one is given."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PermutationSpec:
        """Inverse of :meth:`to_dict`.

        Raises:
            RebasinError: The data is not a permutation spec, or of a newer version.
        """
        if data.get("format") != FORMAT or int(data.get("version", 0)) > VERSION:
            raise RebasinError(
                f"Not a permutation spec this version reads: format {data.get('format')!r}, "
                f"version {data.get('version')!r}; expected {FORMAT!r}, at most {VERSION}."
            )
        try:
            groups = {n: PermutationGroup(n, int(g["size"]), g.get("parent")) for n, g in data["groups"].items()}
            axes = {
                tensor: {int(axis): _axis_from_dict(entry, list(groups)) for axis, entry in by_axis.items()}
                for tensor, by_axis in data["axes"].items()
            }
            proof = data.get("proof")
            return cls(
                groups,
                axes,
                shapes={name: tuple(shape) for name, shape in data.get("shapes", {}).items()},
                parameters=tuple(data.get("parameters", ())),
                frozen={n: {int(a): why for a, why in by.items()} for n, by in data.get("frozen", {}).items()},
                dropped=dict(data.get("dropped", {})),
                proof=Proof(**{**proof, "unseen": tuple(proof.get("unseen", ()))}) if proof else None,
            )
        except RebasinError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise RebasinError(f"The permutation spec is damaged: {type(error).__name__}: {error}") from error

    @classmethod
    def from_json(cls, source: str | Path) -> PermutationSpec:
        """Read a spec from JSON text or from a file that holds it.

        Raises:
            RebasinError: The text is not a permutation spec.
            CheckpointNotFoundError: There is no such file.
        """
        text = str(source)
        if isinstance(source, Path) or not text.lstrip().startswith("{"):
            require_path(source, "spec")
            if not Path(source).is_file():
                raise not_found(Path(source))
            text = Path(source).read_text(encoding="utf-8")
        try:
            data = json.loads(text)
        except ValueError as error:
            raise RebasinError(f"{str(source)[:80]!r} is not JSON: {error}") from error
        return cls.from_dict(data)


def _axis_from_dict(entry: Mapping[str, Any], order: Sequence[str]) -> AxisSpec:
    outer_axis, stack_axis = entry.get("outer_axis"), entry.get("stack_axis")
    if stack_axis is None:
        return axis_from_segments(entry["segments"], order, outer_axis)
    return stacked([axis_from_segments(part, order, outer_axis) for part in entry["slices"]], int(stack_axis), order)


def permute_tensor(spec: PermutationSpec, permutations: Permutations, name: str, tensor: Tensor) -> Tensor:
    """One tensor with all its moved axes permuted; the tensor itself if nothing moves it.

    Raises:
        RebasinError: The tensor does not have the shape the spec knows.
    """
    by_axis = spec.axes.get(name)
    if not by_axis:
        return tensor
    shape = spec.shapes.get(name, tuple(tensor.shape))
    if tuple(tensor.shape) != tuple(shape):
        raise RebasinError(
            f"{name!r} has shape {tuple(tensor.shape)}, the permutation spec was made for {tuple(shape)}."
        )
    return permute_axes(spec, name, tensor, {axis: spec.index(permutations, name, axis) for axis in by_axis})


def permute_axes(spec: PermutationSpec, name: str, tensor: Tensor, indices: Mapping[int, Tensor]) -> Tensor:
    """One tensor with some of its axes taken from given positions (see :meth:`PermutationSpec.index`)."""
    by_axis = spec.axes[name]
    # Plain axes first: an index with an outer axis belongs to the new positions on that axis.
    for axis in sorted(indices, key=lambda a: (by_axis[a].outer_axis is not None, a)):
        index, spec_of = indices[axis].to(tensor.device), by_axis[axis]
        places = [a for a in (spec_of.stack_axis, spec_of.outer_axis) if a is not None] + [axis]
        if len(places) == 1:
            tensor = tensor.index_select(axis, index)
            continue
        order = sorted(range(len(places)), key=places.__getitem__)
        view = [n if a in places else 1 for a, n in enumerate(tensor.shape)]
        tensor = torch.take_along_dim(tensor, index.permute(order).reshape(view), dim=axis)
    return tensor


def require_spec(value: Any) -> None:
    """Refuse what is not a spec, with what was given."""
    if not isinstance(value, PermutationSpec):
        raise ArgumentTypeError(
            f"spec must be a PermutationSpec, but it is {what_it_is(value)}. The spec comes first; "
            "infer_permutation_spec(model, example_args) makes one."
        )


def apply_permutation(
    spec: PermutationSpec, permutations: Permutations, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Permute the units of a network; its function stays exactly the same.

    Args:
        spec: Permutation spec of the architecture.
        permutations: Group name -> permutation, from ``weight_matching``, ``spec.random_permutations`` or by hand.
        state_dict: Weights and buffers. Not changed. Entries that the spec does not move are passed on as they are.

    Returns:
        A new state dict with the same keys in the same order.

    Raises:
        RebasinError: A tensor that the spec moves is missing or has another shape; a permutation has the wrong shape,
            lacks a unit, or belongs to no group.
    """
    require_spec(spec)
    require_state_dict(state_dict, "state_dict")
    if unknown := sorted(set(permutations) - set(spec.groups)):
        raise RebasinError(f"No group of the spec is called {', '.join(map(repr, unknown[:5]))}.")
    for name, permutation in permutations.items():
        if (permutation.sort(dim=-1).values != torch.arange(permutation.shape[-1], device=permutation.device)).any():
            raise RebasinError(f"What is given for group {name!r} is no permutation: not every unit is there once.")
    if missing := sorted(set(spec.axes) - set(state_dict)):
        raise RebasinError(
            f"The state dict misses {len(missing)} tensors that the permutation spec moves: {', '.join(missing[:5])}."
        )
    return {name: permute_tensor(spec, permutations, name, tensor) for name, tensor in state_dict.items()}


def invert_permutations(spec: PermutationSpec, permutations: Permutations) -> dict[str, Tensor]:
    """The permutations that undo ``permutations``: applying both, in either order, changes nothing."""
    result = {name: permutations[name].argsort(dim=-1) for name in spec.groups if name in permutations}
    for name, rows in result.items():
        if ancestors := spec.ancestors(name):  # row ``i``, of the new place, goes to where the unit came from
            result[name] = torch.empty_like(rows)
            result[name][path_to(permutations, ancestors, rows.shape[:-1])] = rows
    return result


def path_to(permutations: Permutations, family: Sequence[str], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Where each unit of groups inside each other comes from, an index for each level; what is absent stays."""
    grid = torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij")
    return tuple(
        permutations[member][tuple(grid[: level + 1])] if member in permutations else grid[level]
        for level, member in enumerate(family)
    )


def compose_permutations(spec: PermutationSpec, first: Permutations, second: Permutations) -> dict[str, Tensor]:
    """The permutations whose application equals applying ``first`` and then ``second``."""
    one = {**spec.identity(), **first}
    return {name: one[name][path_to(second, (*spec.ancestors(name), name), one[name].shape)] for name in spec.groups}
