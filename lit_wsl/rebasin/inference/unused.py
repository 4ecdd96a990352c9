"""What the example call does not run: an expert that no row was sent to is moved like its siblings.

Such a module reads and writes what they do. If that took another order without it, the function would be another one as
soon as an input reaches it. Siblings are modules of one class, or parameters, with the same shapes that stand side by
side in a list or dictionary, or under names that differ in a number. Elements of equal key (the third of the first
matrices, the third of the second ones) are taken together. Groups that live inside of them are made anew. Where the
siblings that were run are not all moved alike, nothing is concluded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from torch import nn

from lit_wsl.rebasin.inference.groups import UNUSED
from lit_wsl.rebasin.spec.axis import AxisSpec, PermutationGroup
from lit_wsl.rebasin.spec.spec import PermutationSpec
from lit_wsl.structure.description import Shape

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
    """How the tensors of some elements are moved.

    Attributes:
        own: The groups that move nothing else, by their numbers.
        axes: Number of the element, and name in it -> how its axes are moved; groups of its own by their numbers.
        frozen: Why others are not.
        names: What these groups are called.
        elements: Names of the elements.
    """

    own: Mapping[str, PermutationGroup]
    axes: Mapping[tuple[int, str], Mapping[int, AxisSpec]]
    frozen: Mapping[tuple[int, str], Mapping[int, str]] = field(compare=False)
    names: Mapping[str, str] = field(compare=False)
    elements: Sequence[str] = field(compare=False)

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
