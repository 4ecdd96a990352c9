"""What the mapper knows of its two sides under the names that its users' notes have: read-only data.

``mapper.source_params``, ``mapper.source_groups``, ``mapper.source_hierarchy`` and their like. Inside the package the
same is a :class:`~lit_wsl.structure.description.ModelDescription`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from lit_wsl.structure.description import ModelDescription, ParameterInfo


@dataclass(frozen=True)
class Group:
    """The tensors of one module.

    Attributes:
        module_path: Dotted path of the module.
        params: Kind of tensor (``"weight"``, ``"bias"``, ``"running_mean"``) -> the tensor.
    """

    module_path: str
    params: Mapping[str, ParameterInfo]

    @property
    def param_types(self) -> frozenset[str]:
        """The kinds of tensors in it."""
        return frozenset(self.params)


@dataclass(frozen=True, eq=False)
class HierarchyNode:
    """A module in the tree of modules.

    Attributes:
        name: Last part of its path; ``""`` for the root.
        full_path: Dotted path.
        depth: Number of modules above it.
        parent: The module that holds it.
        parameter_group: Its own tensors, if it has any.
        children: Name -> module inside it.
    """

    name: str
    full_path: str
    depth: int
    parent: HierarchyNode | None = field(repr=False)
    parameter_group: Group | None = field(default=None, repr=False)
    children: Mapping[str, HierarchyNode] = field(default_factory=dict, repr=False)

    def walk(self) -> Iterator[HierarchyNode]:
        """The node and all below it, parents first."""
        yield self
        for child in self.children.values():
            yield from child.walk()


def parameters_of(side: ModelDescription, *, buffers: bool) -> Mapping[str, ParameterInfo]:
    """Name -> tensor, in registration order.

    Args:
        side: A model.
        buffers: Whether buffers take part.
    """
    return MappingProxyType({i.name: i for i in side.parameters if buffers or i.kind == "parameter"})


def groups_of(side: ModelDescription, *, buffers: bool) -> Mapping[str, Group]:
    """Path of a module -> its tensors, for modules that have any; arguments as in :func:`parameters_of`."""
    found: dict[str, dict[str, ParameterInfo]] = {}
    for info in parameters_of(side, buffers=buffers).values():
        found.setdefault(info.module_path, {})[info.leaf] = info
    return MappingProxyType({path: Group(path, MappingProxyType(params)) for path, params in found.items()})


def groups_by_types(groups: Mapping[str, Group]) -> Mapping[frozenset[str], list[str]]:
    """Kinds of tensors -> paths of the modules that have exactly these."""
    found: dict[frozenset[str], list[str]] = {}
    for path, group in groups.items():
        found.setdefault(group.param_types, []).append(path)
    return MappingProxyType(found)


def hierarchy_of(groups: Mapping[str, Group]) -> HierarchyNode:
    """The tree of modules above the groups, from its root down."""
    below: dict[str, dict[str, None]] = {"": {}}
    for path in groups:
        while path:
            parent = path.rpartition(".")[0]
            below.setdefault(parent, {})[path] = None
            path = parent

    def node(path: str, depth: int, parent: HierarchyNode | None) -> HierarchyNode:
        inside: dict[str, HierarchyNode] = {}
        made = HierarchyNode(path.rpartition(".")[2], path, depth, parent, groups.get(path), MappingProxyType(inside))
        inside.update({child.rpartition(".")[2]: node(child, depth + 1, made) for child in below.get(path, ())})
        return made

    return node("", 0, None)
