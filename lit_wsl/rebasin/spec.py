"""Permutation specs as data: which axes of which tensors move together, and how permutations act on them.

A *group* is one independent permutation variable: ``size`` interchangeable units (channels, neurons, heads). A group
may be *nested* in a parent: inside every head there is a permutation of its own, so the permutation of a nested group
has one row per unit of the parent, ``(heads, head_dim)``.

An :class:`~lit_wsl.rebasin.spec_axis.AxisSpec` tells where groups stand on one axis of one tensor. The spec holds the
groups and axes of a whole architecture: it knows which group is nested in which, and how their permutations act.

Convention: a permutation ``p`` *takes*, ``new[i] = old[p[i]]``; with nested groups
``new[head, unit] = old[outer[head], inner[head, unit]]``, so the rows of ``inner`` belong to the new places.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.spec_axis import AxisSpec as AxisSpec
from lit_wsl.rebasin.spec_axis import AxisUse as AxisUse
from lit_wsl.rebasin.spec_axis import PermutationGroup as PermutationGroup
from lit_wsl.rebasin.spec_axis import Permutations as Permutations
from lit_wsl.rebasin.spec_axis import lexsort
from lit_wsl.rebasin.spec_check import validate


@dataclass(frozen=True, eq=False)
class PermutationSpec:
    """The permutation symmetries of one architecture, as data.

    Attributes:
        groups: Name -> group, parents before children.
        axes: Tensor name -> axis -> how it is moved. Axes that nothing moves are absent. Parameters and buffers.
        shapes: Tensor name -> shape of every tensor the spec knows (moved or not).
        parameters: Names of the tensors that are parameters (the others are buffers); the base of :attr:`coverage`.
        frozen: Tensor name -> axis -> why nothing moves (all of) it.
        dropped: Group name -> why verification removed it.
    """

    groups: Mapping[str, PermutationGroup]
    axes: Mapping[str, Mapping[int, AxisSpec]]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    frozen: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what is not consistent; see :func:`~lit_wsl.rebasin.spec_check.validate`."""
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
                for group in axis_spec.groups:
                    found[group].append(self._use(name, axis, group))
        return {name: tuple(uses) for name, uses in found.items()}

    def uses(self, group: str) -> tuple[AxisUse, ...]:
        """Every (tensor, axis) that ``group`` moves, with the positions of its units."""
        return self._uses[group]

    def _use(self, name: str, axis: int, group: str) -> AxisUse:
        axis_spec = self.axes[name][axis]
        family = (*self.ancestors(group), group)
        on_axis = [g for g in family if g in axis_spec.groups]
        keys = [axis_spec.coordinate(g) for g in on_axis]
        touched = torch.stack(keys).amin(dim=0) >= 0
        rest = [axis_spec.coordinate(g) for g in axis_spec.groups if g not in family]
        where = torch.nonzero(touched).flatten()
        order = lexsort([k[where] for k in (*keys, *rest, axis_spec.rank)])
        shape = [self.groups[g].size for g in on_axis]
        positions = where[order].reshape(*shape, -1)
        if axis_spec.outer_axis is None:
            return AxisUse(name, axis, positions)
        above = [g for g in family if g not in on_axis]
        outer = self.axes[name][axis_spec.outer_axis]
        outer_order = lexsort([*(outer.coordinate(g) for g in above), torch.arange(outer.length)])
        sizes = [self.groups[g].size for g in above]
        outer_positions = outer_order.reshape(*sizes, -1)
        positions = positions.expand(*sizes, *positions.shape)
        return AxisUse(name, axis, positions, axis_spec.outer_axis, outer_positions)

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
            index then belongs to the *new* position on that axis.

        Raises:
            RebasinError: A permutation has the wrong shape.
        """
        axis_spec = self.axes[name][axis]
        if axis_spec.outer_axis is None:
            return self._take(permutations, axis_spec, {})
        outer = self.axes[name][axis_spec.outer_axis]
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
        return PermutationSpec(
            groups={name: group for name, group in self.groups.items() if name not in removed},
            axes={tensor: by_axis for tensor, by_axis in axes.items() if by_axis},
            shapes=self.shapes,
            parameters=self.parameters,
            frozen=self.frozen,
            dropped={**self.dropped, **{name: reason for name in self.groups if name in removed}},
        )

    def summary(self) -> str:
        """Groups found, share of the parameters covered, and what stays fixed and why, as text."""
        from lit_wsl.rebasin.describe import describe

        return describe(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PermutationSpec):
            return NotImplemented
        return all(
            getattr(self, key) == getattr(other, key) for key in ("groups", "axes", "shapes", "frozen", "dropped")
        ) and tuple(self.parameters) == tuple(other.parameters)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"PermutationSpec({len(self.groups)} groups on {len(self.axes)} tensors, "
            f"{self.coverage:.1%} of the parameters)"
        )

    # ---- JSON --------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON-able data; see :mod:`lit_wsl.rebasin.spec_json`."""
        from lit_wsl.rebasin.spec_json import spec_to_dict

        return spec_to_dict(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """The spec as JSON text, also written to ``path`` where one is given."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PermutationSpec:
        """Inverse of :meth:`to_dict`."""
        from lit_wsl.rebasin.spec_json import spec_from_dict

        return spec_from_dict(data)

    @classmethod
    def from_json(cls, source: str | Path) -> PermutationSpec:
        """Read a spec from JSON text or from a file that holds it.

        Raises:
            RebasinError: The text is not a permutation spec.
        """
        text = str(source)
        if isinstance(source, Path) or not text.lstrip().startswith("{"):
            text = Path(source).read_text(encoding="utf-8")
        try:
            data = json.loads(text)
        except ValueError as error:
            raise RebasinError(f"{str(source)[:80]!r} is not JSON: {error}") from error
        return cls.from_dict(data)
