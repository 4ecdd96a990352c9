"""What the example call does not run: an expert that no row was sent to is moved like its siblings.

Such a module reads and writes what they do. If that took another order without it, the function would be another one as
soon as an input reaches it. Modules are siblings where they have the same class, the same tensors, and stand side by
side in a list or dictionary of modules or under names that differ in a number. Groups that live inside a sibling are
made anew. Where those that were run are not all moved alike, nothing is concluded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from lit_wsl.rebasin.inference.groups import UNUSED
from lit_wsl.rebasin.spec.axis import AxisSpec, PermutationGroup
from lit_wsl.rebasin.spec.spec import PermutationSpec


def with_unused_siblings(spec: PermutationSpec, model: nn.Module) -> PermutationSpec:
    """The spec with what was not run moved like its siblings."""
    unused = unused_tensors(spec)
    if not unused:
        return spec
    modules = dict(model.named_modules())
    for prefix in _unused_modules(spec, unused, modules):
        found = [_Inside.of(spec, one) for one in _siblings(prefix, spec, unused, modules)]
        if found and all(one == found[0] for one in found):
            spec = found[0].moved_to(spec, prefix)
    return spec


def unused_tensors(spec: PermutationSpec) -> set[str]:
    """Names of the tensors that took no part in the example call."""
    return {name for name, reasons in spec.frozen.items() if UNUSED in reasons.values()}


def _tensors(spec: PermutationSpec, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a module, by their names in it."""
    return {name.removeprefix(prefix): shape for name, shape in spec.shapes.items() if name.startswith(prefix)}


def _unused_modules(spec: PermutationSpec, unused: set[str], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Prefixes of the outermost modules that were not run."""
    done: tuple[str, ...] = ()
    for name in modules:
        prefix = f"{name}."
        of = [tensor for tensor in spec.shapes if tensor.startswith(prefix)]
        big = [tensor for tensor in of if any(size > 1 for size in spec.shapes[tensor])]
        if name and big and unused.issuperset(big) and not prefix.startswith(done or "\0"):
            done = (*done, prefix)
            yield prefix


def _siblings(prefix: str, spec: PermutationSpec, unused: set[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Prefixes of the modules beside one that are like it and were run as a whole."""
    above, _, own = prefix[:-1].rpartition(".")
    parent, module = modules[above], modules[prefix[:-1]]
    found = []
    for key, other in parent.named_children():
        one = f"{above}.{key}." if above else f"{key}."
        beside = isinstance(parent, (nn.ModuleList, nn.ModuleDict)) or re.sub(r"\d+", "", key) == re.sub(
            r"\d+", "", own
        )
        if other is module or not beside or type(other) is not type(module):
            continue
        tensors = _tensors(spec, one)
        if tensors == _tensors(spec, prefix) and not any(one + name in unused for name in tensors):
            found.append(one)
    return found


@dataclass(frozen=True)
class _Inside:
    """How the tensors of one module are moved, by their names in it.

    Attributes:
        own: The groups that move nothing else, by their names without the module's.
        axes: How axes are moved; groups of its own by these names.
        frozen: Why the others are not.
    """

    own: Mapping[str, PermutationGroup]
    axes: Mapping[str, Mapping[int, AxisSpec]]
    frozen: Mapping[str, Mapping[int, str]] = field(compare=False)

    @classmethod
    def of(cls, spec: PermutationSpec, prefix: str) -> _Inside:
        inside = [name for name in spec.groups if all(use.tensor.startswith(prefix) for use in spec.uses(name))]
        names = {name: f"\0{name.removeprefix(prefix)}" for name in inside}
        own = {names[name]: _renamed(spec.groups[name], names) for name in inside}
        axes = {
            name.removeprefix(prefix): {axis: _with_groups(one, names) for axis, one in by_axis.items()}
            for name, by_axis in spec.axes.items()
            if name.startswith(prefix)
        }
        frozen = {n.removeprefix(prefix): dict(why) for n, why in spec.frozen.items() if n.startswith(prefix)}
        return cls(own, axes, frozen)

    def moved_to(self, spec: PermutationSpec, prefix: str) -> PermutationSpec:
        """The spec with another module moved like this one."""
        names = {name: prefix + name[1:] for name in self.own}
        if any(name in spec.groups for name in names.values()):
            return spec
        groups = {names[name]: _renamed(group, names) for name, group in self.own.items()}
        axes = {
            prefix + name: {axis: _with_groups(one, names) for axis, one in by_axis.items()}
            for name, by_axis in self.axes.items()
        }
        still = {name: why for name, why in spec.frozen.items() if not name.startswith(prefix)}
        frozen = {**still, **{prefix + name: why for name, why in self.frozen.items()}}
        return replace(spec, groups={**spec.groups, **groups}, axes={**spec.axes, **axes}, frozen=frozen)


def _renamed(group: PermutationGroup, names: Mapping[str, str]) -> PermutationGroup:
    parent = None if group.parent is None else names.get(group.parent, group.parent)
    return PermutationGroup(names.get(group.name, group.name), group.size, parent)


def _with_groups(axis: AxisSpec, names: Mapping[str, str]) -> AxisSpec:
    return replace(axis, groups=tuple(names.get(group, group) for group in axis.groups))
