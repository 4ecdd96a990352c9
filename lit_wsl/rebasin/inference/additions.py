"""What rules alone do not find, added to an inferred spec: orders of slots, what was not run, another labelling.

*Slots.* Where several positions belong to one unit (the same dimension of every query head that reads one key head),
rules say that they move together and keep their order, their slots. If two groups inside the same block have as many
slots each, queries and keys on one side and what the heads put out on the other, the slots themselves may be
interchangeable: a group of their own, beside the two. Nothing but the model can tell, so one odd permutation of them is
tried; what passes is proven with everything else. Where a weight has an axis for them, the same is tried of that axis.

*What the example call does not run*: an expert that no row was sent to reads and writes what its siblings do. If that
took another order without it, the function would be another one as soon as an input reaches it. Siblings are modules of
one class, or parameters, with the same shapes that stand side by side in a list or dictionary, or under names that
differ in a number. Elements of equal key (the third of the first matrices, the third of the second ones) are taken
together. Groups that live inside of them are made anew. Where the siblings that were run are not all moved alike,
nothing is concluded.

*Another labelling.* Where two orders are in each other's way (heads and the dimensions that all heads share, the two
sides of an outer product, experts and what they put out), one labelling follows the one, another labelling the other.
Both keep the function, and so does one after the other. On an axis that both move, the two are independent where a unit
of the one has positions of every unit of the other, in the same order in each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from lit_wsl.rebasin.inference.groups import UNUSED, free_name
from lit_wsl.rebasin.spec.axis import AxisSpec, PermutationGroup
from lit_wsl.rebasin.spec.spec import PermutationSpec
from lit_wsl.structure.description import Shape

Place = tuple[str, int]


@dataclass(frozen=True)
class Slots:
    """Slots of two groups that may be interchangeable."""

    count: int
    parent: str | None  # the group that both are nested in
    places: Mapping[Place, str]  # the axes on which they stand, each with the group that has them there


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
                # so many slots, or more: a fused projection has the keys behind the queries
                places = {
                    place: name
                    for name in (first, second)
                    for size, those in found[name].items()
                    for place in (those if size >= count else ())
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


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class Element:
    """A module or a tensor that stands beside others: its name is made of three parts, of which siblings share two."""

    before: str
    key: str
    after: str

    @property
    def name(self) -> str:
        """Its full name."""
        return self.before + self.key + self.after

    @classmethod
    def of(cls, name: str, modules: Mapping[str, nn.Module]) -> Element | None:
        """The element of this name; None where nothing can stand beside it."""
        above, _, own = name.rpartition(".")
        before = f"{above}." if above else ""
        if isinstance(modules[above], _CONTAINERS):
            return cls(before, own, "")
        number = re.search(r"\d+(?=\D*$)", own)
        return number and cls(before + own[: number.start()], number[0], own[number.end() :])


def with_unused_siblings(spec: PermutationSpec, model: nn.Module) -> PermutationSpec:
    """The spec with what was not run moved like its siblings."""
    unused = unused_tensors(spec)
    if not unused:
        return spec
    modules = dict(model.named_modules())
    shapes: dict[str, dict[str, Shape]] = {}
    for tensor, shape in spec.shapes.items():
        for name in _above(tensor):
            shapes.setdefault(name, {})[tensor[len(name) :]] = shape

    def alike(one: str, two: str) -> bool:
        """Whether two modules, or two tensors, are of one class and of the same shapes."""
        same = bool(shapes.get(one)) and shapes[one] == shapes.get(two)
        return same and type(modules.get(one)) is type(modules.get(two))

    by_key: dict[str, list[Element]] = {}
    for name in _outermost(spec, unused, modules):
        if (element := Element.of(name, modules)) is not None:
            by_key.setdefault(element.key, []).append(element)
    for together in by_key.values():
        for elements in (together, *([one] for one in together)):
            spec = _like_siblings(spec, elements, alike)
    return spec


def unused_tensors(spec: PermutationSpec) -> set[str]:
    """Names of the tensors that took no part in the example call."""
    return {name for name, reasons in spec.frozen.items() if UNUSED in reasons.values()}


def _is_in(tensor: str, name: str) -> bool:
    return tensor == name or tensor.startswith(f"{name}.")


def _above(name: str) -> Iterator[str]:
    """The names that a name stands under, and itself."""
    return accumulate(name.split("."), "{}.{}".format)


def _all_above(names: Iterable[str]) -> set[str]:
    return {above for name in names for above in _above(name)}


def _outermost(spec: PermutationSpec, unused: set[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The modules that were not run, and what was not used of those that were; without what is inside of them."""
    wide = (tensor for tensor, shape in spec.shapes.items() if any(size > 1 for size in shape))
    run, idle = _all_above(tensor for tensor in wide if tensor not in unused), _all_above(unused)
    found: dict[str, None] = {}
    for name in (*(name for name in modules if name and name not in run), *sorted(unused)):
        if name in idle and found.keys().isdisjoint(_above(name)):
            found[name] = None
    return list(found)


def _like_siblings(
    spec: PermutationSpec, elements: list[Element], alike: Callable[[str, str], bool]
) -> PermutationSpec:
    """The spec with some elements moved like those of another key, where all of these are moved alike."""
    idle = _all_above(unused_tensors(spec))
    if not all(element.name in idle for element in elements):
        return spec  # concluded before
    found = []
    for key in _keys_beside(spec, elements[0]):
        beside = [replace(element, key=key) for element in elements]
        same = all(alike(a.name, b.name) for a, b in zip(beside, elements, strict=True))
        if same and not any(one.name in idle for one in beside):
            found.append(Inside.of(spec, [one.name for one in beside]))
    agree = found and all(one == found[0] for one in found)
    return found[0].moved_to(spec, [element.name for element in elements]) if agree else spec


def _keys_beside(spec: PermutationSpec, element: Element) -> list[str]:
    pattern = re.compile(rf"{re.escape(element.before)}([^.]+){re.escape(element.after)}(\.|$)")
    keys = (match[1] for tensor in spec.shapes if (match := pattern.match(tensor)))
    return [key for key in dict.fromkeys(keys) if key != element.key and key.isdigit() >= element.key.isdigit()]


@dataclass(frozen=True)
class Inside:
    """How the tensors of some elements are moved."""

    own: Mapping[str, PermutationGroup]  # the groups that move nothing else, by their numbers
    # number of the element, and name in it -> how its axes are moved; groups of its own by their numbers
    axes: Mapping[tuple[int, str], Mapping[int, AxisSpec]]
    frozen: Mapping[tuple[int, str], Mapping[int, str]] = field(compare=False)  # why others are not
    names: Mapping[str, str] = field(compare=False)  # what these groups are called
    elements: Sequence[str] = field(compare=False)  # names of the elements

    @classmethod
    def of(cls, spec: PermutationSpec, elements: Sequence[str]) -> Inside:
        """How these elements are moved."""
        place = {
            tensor: (number, tensor[len(name) :])
            for tensor in spec.shapes
            for number, name in enumerate(elements)
            if _is_in(tensor, name)
        }
        inside = [group for group in spec.groups if all(use.tensor in place for use in spec.uses(group))]
        numbers = {group: f"\0{number}" for number, group in enumerate(inside)}
        return cls(
            own={numbers[group]: _renamed(spec.groups[group], numbers) for group in inside},
            axes={
                place[t]: {axis: _with_groups(one, numbers) for axis, one in by_axis.items()}
                for t, by_axis in spec.axes.items()
                if t in place
            },
            frozen={place[t]: dict(why) for t, why in spec.frozen.items() if t in place},
            names={number: group for group, number in numbers.items()},
            elements=elements,
        )

    def moved_to(self, spec: PermutationSpec, elements: Sequence[str]) -> PermutationSpec:
        """The spec with other elements moved like these."""

        def renamed(group: str) -> str:
            for old, new in zip(self.elements, elements, strict=True):
                if _is_in(group.partition(":")[0], old):
                    return new + group[len(old) :]
            return f"{group}@{elements[0]}"

        names = {number: renamed(group) for number, group in self.names.items()}
        groups = {names[number]: _renamed(group, names) for number, group in self.own.items()}
        if spec.groups.keys() & groups.keys():
            return spec
        axes = {
            elements[number] + name: {axis: _with_groups(one, names) for axis, one in by_axis.items()}
            for (number, name), by_axis in self.axes.items()
        }
        still = {t: why for t, why in spec.frozen.items() if not any(_is_in(t, name) for name in elements)}
        frozen = {**still, **{elements[number] + name: why for (number, name), why in self.frozen.items()}}
        return replace(spec, groups={**spec.groups, **groups}, axes={**spec.axes, **axes}, frozen=frozen)


def _renamed(group: PermutationGroup, names: Mapping[str, str]) -> PermutationGroup:
    parent = None if group.parent is None else names.get(group.parent, group.parent)
    return PermutationGroup(names.get(group.name, group.name), group.size, parent)


def _with_groups(axis: AxisSpec, names: Mapping[str, str]) -> AxisSpec:
    return replace(axis, groups=tuple(names.get(group, group) for group in axis.groups))


def united(first: PermutationSpec, second: PermutationSpec) -> PermutationSpec:
    """The first spec, and what only the second one moves."""
    for name in second.groups:
        first = _with_group(first, second, name)
    return first


def _with_group(first: PermutationSpec, second: PermutationSpec, name: str) -> PermutationSpec:
    group = second.groups[name]
    used = {(use.tensor, use.axis) for use in second.uses(name)}
    known = {(tensor, axis): first.axes.get(tensor, {}).get(axis) for tensor, axis in sorted(used)}
    like = {(tensor, axis): second.axes[tensor][axis] for tensor, axis in known}
    new = any(
        axis is None or bool(((like[place].coordinate(name) >= 0) & ~axis.touched).any())
        for place, axis in known.items()
    )
    if not new or group.parent is not None or second.children(name):
        return first
    group = PermutationGroup(free_name(name, first.groups), group.size)
    made = {place: _beside(axis, group, like[place].coordinate(name), like[place]) for place, axis in known.items()}
    axes = {place: axis for place, axis in made.items() if axis is not None}
    return first.with_group(group, axes) if len(axes) == len(made) else first


def _beside(axis: AxisSpec | None, group: PermutationGroup, coordinate: Tensor, like: AxisSpec) -> AxisSpec | None:
    """An axis that a further group moves; None where that is in the way of what moves it already."""
    if axis is None:
        return AxisSpec((group.name,), coordinate[None], like.outer_axis, like.stack_axis)
    if (axis.outer_axis, axis.stack_axis) != (None, None) or (like.outer_axis, like.stack_axis) != (None, None):
        return None
    cells: dict[tuple[int, ...], list[int]] = {}
    for position in torch.nonzero(coordinate >= 0).flatten().tolist():
        cells.setdefault(tuple(axis.coords[:, position].tolist()), []).append(int(coordinate[position]))
    orders: dict[tuple[bool, ...], list[int]] = {}
    for cell, order in cells.items():
        counts = torch.bincount(torch.tensor(order), minlength=group.size)
        kind = tuple(unit >= 0 for unit in cell)
        if len(set(counts.tolist())) > 1 or orders.setdefault(kind, order) != order:
            return None
    return AxisSpec((*axis.groups, group.name), torch.cat([axis.coords, coordinate[None]]))
