"""Orders that rules do not follow: query heads that share a key head, tried by function.

Where several positions belong to one unit (the same dimension of every query head that reads one key head), rules say
that they move together and keep their order, their *slots*. If two groups inside the same block have as many slots
each, queries and keys on one side and what the heads put out on the other, the slots themselves may be interchangeable:
a group of their own, beside the two. Nothing but the model can tell, so one odd permutation of them is tried; what
passes is proven with everything else. Where a weight has an axis for them, the same is tried of that axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lit_wsl.rebasin.spec.axis import AxisSpec, PermutationGroup
from lit_wsl.rebasin.spec.spec import PermutationSpec

Place = tuple[str, int]


@dataclass(frozen=True)
class Slots:
    """Slots of two groups that may be interchangeable.

    Attributes:
        count: Their number.
        parent: The group that both are nested in.
        places: The axes on which they stand, each with the group that has them there.
    """

    count: int
    parent: str | None
    places: Mapping[Place, str]


def with_slots(spec: PermutationSpec, keeps: Callable[[PermutationSpec, str], bool]) -> PermutationSpec:
    """The spec with a group for all slots that turn out to be interchangeable."""
    for slots in candidates(spec):
        if any(len(_leaves(spec, spec.axes[name][axis])) > 1 for name, axis in slots.places):
            continue  # these axes have such a group already
        name = "{}:{}/order".format(*next(iter(slots.places)))
        extended = _extended(spec, name, slots)
        if keeps(extended, name):
            spec = extended
    for size, parent, places in on_own_axes(spec):
        name = "{}:{}/order".format(*next(iter(places)))
        order = torch.arange(size)[None]
        axes = {place: AxisSpec((name,), order, outer) for place, outer in places.items()}
        extended = spec.with_group(PermutationGroup(name, size, parent), axes)
        if keeps(extended, name):
            spec = extended
    return spec


def on_own_axes(spec: PermutationSpec) -> Iterator[tuple[int, str, dict[Place, int]]]:
    """Axes of equal length that stay, beside one that a group moves and one that is moved inside of it.

    Query heads of weights ``(key heads, query heads, dim, width)``: their number, the group, and the axes, each with
    the axis that the group is on.
    """
    found: dict[tuple[int, str], dict[Place, int]] = {}
    for name, by_axis in spec.axes.items():
        for outer in {axis.outer_axis for axis in by_axis.values()}:
            around = by_axis.get(-1 if outer is None else outer)
            if outer is None or around is None or len(around.groups) != 1 or not bool(around.touched.all()):
                continue
            for axis, size in enumerate(spec.shapes[name]):
                if size > 1 and axis not in by_axis:
                    found.setdefault((size, around.groups[0]), {})[name, axis] = outer
    for (size, parent), places in found.items():
        if len({name for name, _ in places}) == len(places) > 1:
            yield size, parent, places


def candidates(spec: PermutationSpec) -> Iterator[Slots]:
    """Pairs of groups of one parent, as close to each other as can be, that have the same number of slots."""
    by_parent: dict[str | None, list[str]] = {}
    for name, group in spec.groups.items():
        if not spec.children(name):
            by_parent.setdefault(group.parent, []).append(name)
    for parent, names in by_parent.items():
        found = {name: slots for name in names if (slots := _slots_of(spec, name))}
        for first, second in pairwise(found):
            for count in sorted(set(found[first]) | set(found[second])):
                places = {
                    place: name for name in (first, second) for size, place in _reaching(found[name], count) if size
                }
                if {first, second} == set(places.values()):
                    yield Slots(count, parent, places)
                    break


def _slots_of(spec: PermutationSpec, name: str) -> dict[int, list[Place]]:
    """The axes on which each unit of a group has several positions, by their number."""
    found: dict[int, list[Place]] = {}
    for use in spec.uses(name):
        axis = spec.axes[use.tensor][use.axis]
        if axis.outer_axis is None and axis.stack_axis is None and use.positions.shape[-1] > 1:
            found.setdefault(int(use.positions.shape[-1]), []).append((use.tensor, use.axis))
    return found


def _reaching(slots: Mapping[int, list[Place]], count: int) -> Iterator[tuple[int, Place]]:
    """Axes with so many slots, or with more: a fused projection has the keys behind the queries."""
    for size, places in slots.items():
        if size >= count:
            yield from ((size, place) for place in places)


def _leaves(spec: PermutationSpec, axis: AxisSpec) -> list[str]:
    """The innermost groups that move the same positions, where there are several."""
    inner = [name for name in axis.groups if not set(spec.children(name)) & set(axis.groups)]
    return [
        one
        for one in inner
        if any(bool(((axis.coordinate(one) >= 0) & (axis.coordinate(two) >= 0)).any()) for two in inner if two != one)
    ]


def _extended(spec: PermutationSpec, name: str, slots: Slots) -> PermutationSpec:
    axes = {}
    for (tensor, number), group in slots.places.items():
        axis = spec.axes[tensor][number]
        coords = torch.cat([axis.coords, _row(axis, group, slots)[None]])
        axes[tensor, number] = AxisSpec((*axis.groups, name), coords)
    return spec.with_group(PermutationGroup(name, slots.count, slots.parent), axes)


def _row(axis: AxisSpec, group: str, slots: Slots) -> Tensor:
    """The slot of each position, -1 where there is none."""
    here = (axis.coordinate(group) >= 0) & (axis.rank < slots.count)
    return torch.where(here, axis.rank, -1)
