"""The tree that the alignment works on: modules, units and tensors, with signatures that operations don't change.

The number of elements of a subtree is the same before and after a rename, transpose, reshape, split, concat or stack
of what is inside, so equal counts find the same subtree on both sides whatever was done to it. A *unit* holds the
tensors that belong to one linear map or norm: ``weight`` and ``bias`` of a module, or ``in_proj_weight`` and
``in_proj_bias``. Chains of modules with one child collapse, so wrappers don't count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from lit_wsl.structure.info import ParameterInfo, Shape
from lit_wsl.transfer.operations import Operation

_ROLES = ("weight", "bias")


@dataclass(frozen=True, eq=False)
class Item:
    """A module, a unit or a tensor of one side.

    Attributes:
        path: Dotted path; of a tensor its full name.
        children: Parts in registration order; none for a tensor.
        positions: Ordinals of all tensors below, in registration order.
        numel: Number of elements below.
        structure: Number that is equal exactly for items of one side with the same relative names and shapes.
        shape: Shape, for a tensor.
        operations: What makes a virtual tensor out of the real tensors at ``positions`` (stacked experts).
        level: 0 for a tensor, 1 for a unit, 2 for a module.
        virtual: Whether operations make any of the tensors below.
    """

    path: str
    children: tuple[Item, ...]
    positions: tuple[int, ...]
    numel: int
    structure: int
    level: int
    shape: Shape = ()
    operations: tuple[Operation, ...] = ()
    virtual: bool = False

    @property
    def start(self) -> int:
        """Ordinal of the first tensor: the place in registration order."""
        return self.positions[0]

    @property
    def undoing(self) -> tuple[Operation, ...]:
        """What makes the real tensors out of a virtual one again."""
        return tuple(op.reverse() for op in reversed(self.operations))

    @cached_property
    def tensors(self) -> tuple[Item, ...]:
        """All tensors below, in registration order."""
        if self.level == 0:
            return (self,)
        return tuple(t for child in self.children for t in child.tensors)

    @cached_property
    def profile(self) -> Counter[Shape]:
        """How many tensors of each shape are below; sizes of one and the order of axes don't count."""
        return Counter(shape_key(t.shape) for t in self.tensors)

    @cached_property
    def profile_key(self) -> tuple[tuple[Shape, int], ...]:
        """The profile as something to compare and to look up."""
        return tuple(sorted(self.profile.items()))

    @cached_property
    def rank(self) -> int:
        """Largest number of axes (sizes of one left out) of any tensor below."""
        return max(len(key) for key in self.profile)

    @cached_property
    def main(self) -> Item:
        """The largest tensor below; the first of equals."""
        return max(self.tensors, key=lambda t: (t.numel, -t.start))


@lru_cache(maxsize=4096)  # a model of many tensors has few shapes
def shape_key(shape: Shape) -> Shape:
    """A shape up to transposition and axes of size one.

    >>> shape_key((1, 1, 8)), shape_key((3, 8)) == shape_key((8, 3, 1, 1))
    ((8,), True)
    """
    return tuple(sorted(d for d in shape if d != 1))


class TreeBuilder:
    """Builds the items of one side; structure numbers are shared between sides built by one builder."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}

    def _number(self, key: object) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def build(self, infos: Sequence[ParameterInfo]) -> tuple[Item, list[ParameterInfo]]:
        """Build the tree of a side.

        Returns:
            The root, and the tensors in the order of the tree: positions are ordinals in this list. It is the order
            of registration, except that the tensors of a module (and of a unit) stand together.
        """
        nested: dict[str, object] = {}
        for info in infos:
            node = nested
            *modules, leaf = info.name.split(".")
            for part in modules:
                below = node.setdefault(part + ".", {})
                node = below  # type: ignore[assignment]
            node[leaf] = info
        order: list[ParameterInfo] = []
        return self._module("", nested, order), order

    def tensor(
        self, path: str, shape: Shape, positions: tuple[int, ...], operations: tuple[Operation, ...] = ()
    ) -> Item:
        """A tensor, virtual if operations make it."""
        numel = math.prod(shape)
        return Item(path, (), positions, numel, self._number(("tensor", shape)), 0, shape, operations, bool(operations))

    def group(self, path: str, children: Sequence[Item], level: int) -> Item:
        """A unit or module of these children."""
        offset = len(path) + 1 if path else 0
        key = (level, tuple((c.path[offset:], c.structure) for c in children))
        positions = tuple(p for c in children for p in c.positions)
        numel, virtual = sum(c.numel for c in children), any(c.virtual for c in children)
        return Item(path, tuple(children), positions, numel, self._number(key), level, virtual=virtual)

    def _module(self, path: str, nested: dict[str, object], order: list[ParameterInfo]) -> Item:
        own: dict[str, list[ParameterInfo]] = {}
        for key, value in nested.items():
            if isinstance(value, ParameterInfo):
                own.setdefault(stem_of(key), []).append(value)
        alone = len(own) == 1 and not any(isinstance(value, dict) for value in nested.values())
        children: list[Item] = []
        prefix = f"{path}." if path else ""
        for key, value in nested.items():
            if isinstance(value, dict):
                children.append(self._module(prefix + key[:-1], value, order))
                continue
            stem = stem_of(key)
            infos = own.pop(stem, [])  # a unit stands where its first tensor stands
            tensors = []
            for info in infos:
                tensors.append(self.tensor(info.name, info.shape, (len(order),)))
                order.append(info)
            if tensors:
                name = path if alone or not stem else prefix + stem
                children.append(tensors[0] if len(tensors) == 1 else self.group(name, tensors, 1))
        return children[0] if len(children) == 1 else self.group(path, children, 2)


@lru_cache(maxsize=4096)  # and few names of leaves
def stem_of(leaf: str) -> str:
    """The name of a tensor without the word that says weight or bias.

    >>> stem_of("in_proj_weight"), stem_of("weight"), stem_of("gamma_1")
    ('in_proj', '', 'gamma_1')
    """
    return "_".join(part for part in leaf.split("_") if part.lower() not in _ROLES)


def role_of(name: str) -> str:
    """``weight`` or ``bias`` if the name of a tensor says so, else its last part.

    >>> role_of("attn.in_proj_weight"), role_of("norm.bias"), role_of("gamma")
    ('weight', 'bias', 'gamma')
    """
    leaf = name.rpartition(".")[2]
    return next((part.lower() for part in leaf.split("_") if part.lower() in _ROLES), leaf)


def owner_path(name: str) -> str:
    """Path of the module that owns a weight or bias; the name itself of any other tensor.

    >>> owner_path("attn.q.weight"), owner_path("pos_embed")
    ('attn.q', 'pos_embed')
    """
    return name.rpartition(".")[0] if role_of(name) in _ROLES and "." in name else name


def relative(item: Item, root: Item) -> str:
    """Path of an item below another."""
    if root.path and item.path.startswith(root.path + "."):
        return item.path[len(root.path) + 1 :]
    return item.path


def place_in(item: Item, root: Item) -> str:
    """Path of an item below another, without a last part that only says weight or bias."""
    return _without_role(relative(item, root))


def place_end(item: Item) -> str:
    """The last two parts of a path, numbers of the upper one left out: what blocks of one make have in common."""
    upper, _, last = _without_role(item.path).rpartition(".")
    return ".".join(("".join(c for c in upper.rpartition(".")[2] if not c.isdigit()), last))


def _without_role(path: str) -> str:
    head, _, leaf = path.rpartition(".")
    return head if head and leaf in _ROLES else path
