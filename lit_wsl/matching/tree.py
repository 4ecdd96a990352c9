"""The tree that the alignment works on: modules, units and tensors, with signatures that operations don't change.

The number of elements of a subtree is the same before and after a rename, transpose, reshape, split, concat or stack
of what is inside, so equal counts find the same subtree on both sides whatever was done to it. A *unit* holds the
tensors that belong to one linear map or norm: ``weight`` and ``bias`` of a module, or ``in_proj_weight`` and
``in_proj_bias``. Chains of modules with one child collapse, so wrappers don't count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain

from lit_wsl.matching.words import Lists, counted, lists_along, split_numbers
from lit_wsl.plan.operations import Operation
from lit_wsl.structure.description import ParameterInfo, Shape, cached_property

ROLES = ("weight", "bias")


@dataclass(eq=False)  # never changed; not frozen, as thousands are made and freezing takes longer than all else of it
class Item:
    """A module, a unit or a tensor of one side."""

    path: str  # dotted path; of a tensor its full name
    children: tuple[Item, ...]  # parts in registration order; none for a tensor
    positions: tuple[int, ...]  # ordinals of all tensors below, in registration order
    numel: int  # number of elements below
    structure: int  # number that is equal exactly for items of one side with the same relative names and shapes
    level: int  # 0 for a tensor, 1 for a unit, 2 for a module
    shape: Shape = ()  # shape, for a tensor
    # what makes a virtual tensor out of the real tensors at ``positions`` (stacked experts)
    operations: tuple[Operation, ...] = ()
    virtual: bool = False  # whether operations make any of the tensors below
    # the first item of this structure, which knows what follows from shapes and relative names alone
    like: Item | None = None
    averaging: bool = False  # whether a tensor belongs to a norm that keeps running statistics
    # which units below are what in an attention, once letters_below told
    letters: Mapping[str, frozenset[str]] | None = None

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
        return tuple([t for c in self.children for t in (c.tensors if c.level else (c,))]) if self.level else (self,)

    @cached_property
    def units(self) -> tuple[Item, ...]:
        """All units below, in registration order."""
        found: list[Item] = []
        left = [self]
        while left:
            item = left.pop()
            if item.level < 2:
                found.append(item)
            else:
                left += reversed(item.children)
        return tuple(found)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Paths of all tensors below, as seen from here."""
        if self.like and self.level == 2:
            return self.like.names
        prefix = f"{self.path}." if self.path else ""
        return tuple([t.path.removeprefix(prefix) for t in self.tensors])

    @cached_property
    def lists(self) -> Lists:
        """By each place where these paths count the sizes of what stands there, by number."""
        if self.level < 2:
            return lists_along(zip(self.names, (t.numel for t in self.tensors)))
        if self.like:
            return self.like.lists
        found: dict[str, dict[str, int]] = {}
        for item in chain.from_iterable([c] if c.level == 2 else c.tensors for c in self.children):
            path = relative(item, self)
            for place, number in counted(path):
                members = found.setdefault(place, {})
                members[number] = members.get(number, 0) + item.numel
            for place, sizes in (item.like or item).lists.items() if item.level == 2 else ():
                found[f"{path}.{place}"] = dict(sizes)
        return found

    @cached_property
    def largest(self) -> dict[str, Item]:
        """The largest tensor of each unit, by its path; the first of equals."""
        found: dict[str, Item] = {}
        for name, t in zip(self.names, self.tensors):
            path = owner_path(name)
            if path not in found or found[path].numel < t.numel:
                found[path] = t
        return found

    @cached_property
    def profile(self) -> Counter[Shape]:
        """How many tensors of each shape are below; sizes of one and the order of axes don't count."""
        return self.like.profile if self.like else Counter([shape_key(t.shape) for t in self.tensors])

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of all tensors below, sorted."""
        return self.like.shapes if self.like else tuple(sorted(t.shape for t in self.tensors))

    @cached_property
    def core(self) -> Counter[Shape]:
        """The profile without the vectors: what biases and norms that come and go leave as it is."""
        if self.like:
            return self.like.core
        return Counter({shape: count for shape, count in self.profile.items() if len(shape) >= 2})

    @cached_property
    def core_numel(self) -> int:
        """Number of elements below that are not in vectors."""
        return sum(math.prod(shape) * count for shape, count in self.core.items())

    @cached_property
    def profile_key(self) -> tuple[tuple[Shape, int], ...]:
        """The profile as something to compare and to look up."""
        return self.like.profile_key if self.like else tuple(sorted(self.profile.items()))

    @cached_property
    def rank(self) -> int:
        """Largest number of axes (sizes of one left out) of any tensor below."""
        return self.like.rank if self.like else max(len(key) for key in self.profile)

    @cached_property
    def called(self) -> str:
        """The path of a module, or of the one that a layer's tensors stand in."""
        return owner_path(self.main.path) if self.level < 2 else self.path

    @cached_property
    def main(self) -> Item:
        """The largest tensor below; the first of equals."""
        return max(self.tensors, key=lambda t: (t.numel, -t.start)) if self.children else self


def _node(prefix: str, nodes: dict[str, dict[str, object]]) -> dict[str, object]:
    """What stands below a prefix of names; prefixes and the keys of modules end with a dot."""
    if prefix not in nodes:
        part = prefix[:-1].rpartition(".")[2] + "."
        nodes[prefix] = {}
        _node(prefix[: len(prefix) - len(part)], nodes)[part] = nodes[prefix]
    return nodes[prefix]


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
        self._first: dict[object, Item] = {}
        self._averaging: Container[str] = ()

    def _number(self, key: object) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def build(self, infos: Sequence[ParameterInfo], averaging: Container[str] = ()) -> tuple[Item, list[ParameterInfo]]:
        """Build the tree of a side.

        Args:
            infos: Its tensors.
            averaging: Paths of the norms that keep running statistics.

        Returns:
            The root, and the tensors in the order of the tree: positions are ordinals in this list. It is the order
            of registration, except that the tensors of a module (and of a unit) stand together.
        """
        nested: dict[str, object] = {}
        nodes = {"": nested}
        for info in infos:
            path, dot, leaf = info.name.rpartition(".")
            _node(path + dot, nodes)[leaf] = info
        order: list[ParameterInfo] = []
        self._averaging = averaging
        return self._module("", nested, order), order

    def tensor(
        self, path: str, shape: Shape, positions: tuple[int, ...], operations: tuple[Operation, ...] = ()
    ) -> Item:
        """A tensor, virtual if operations make it."""
        averaging = bool(self._averaging) and path.rpartition(".")[0] in self._averaging
        key = ("tensor", shape, averaging)
        like = self._first.get(key)
        number, numel = (like.structure, like.numel) if like else (self._number(key), math.prod(shape))
        item = Item(path, (), positions, numel, number, 0, shape, operations, bool(operations), like, averaging)
        return item if like else self._first.setdefault(key, item)

    def group(self, path: str, children: Sequence[Item], level: int) -> Item:
        """A unit or module of these children."""
        offset = len(path) + 1 if path else 0
        key = (level, tuple([(c.path[offset:], c.structure) for c in children]))
        positions = tuple(chain.from_iterable(c.positions for c in children))
        virtual = any(c.virtual for c in children)
        like = self._first.get(key)
        number = like.structure if like else self._number(key)
        numel = like.numel if like else sum(c.numel for c in children)
        item = Item(path, tuple(children), positions, numel, number, level, virtual=virtual, like=like)
        return item if like else self._first.setdefault(key, item)

    def without_vectors(self, item: Item, kinds: Container[object] | None = None) -> tuple[Item | None, list[Item]]:
        """A module without the vectors and norms in it (or those of these profiles), and these."""
        if item.level < 2:
            return (None, [item]) if item.rank < 2 and (kinds is None or item.profile_key in kinds) else (item, [])
        found = [self.without_vectors(c, kinds) for c in item.children]
        vectors = [v for _, vs in found for v in vs]
        kept = [core for core, _ in found if core is not None]
        if not vectors or not kept:
            return (None, vectors) if vectors else (item, [])
        if len(kept) == 1:
            return kept[0], vectors
        core = self.group(item.path, kept, 2)
        gaps = tuple(p - core.start for p in core.positions)  # what was taken out shifts the rest
        return replace(core, structure=self._number((core.structure, gaps))), vectors

    def _module(self, path: str, nested: dict[str, object], order: list[ParameterInfo]) -> Item:
        if len(nested) == 1:
            ((key, value),) = nested.items()
            if isinstance(value, dict):
                return self._module(f"{path}.{key[:-1]}" if path else key[:-1], value, order)
            assert isinstance(value, ParameterInfo)
            order.append(value)
            return self.tensor(value.name, value.shape, (len(order) - 1,))
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
    return "_".join(part for part in leaf.split("_") if part.lower() not in ROLES)


def role_of(name: str) -> str:
    """``weight`` or ``bias`` if the name of a tensor says so, else its last part.

    >>> role_of("attn.in_proj_weight"), role_of("norm.bias"), role_of("gamma")
    ('weight', 'bias', 'gamma')
    """
    return _role(name.rpartition(".")[2])


@lru_cache(maxsize=4096)
def _role(leaf: str) -> str:
    first, *_, last = (part.lower() for part in (leaf.split("_") * 2))  # relative_position_bias_table is no bias
    return next((part for part in (first, last) if part in ROLES), leaf)


_SHIFTS, _SCALES = frozenset(("bias", "beta", "shift")), frozenset(("weight", "gamma", "scale", "kernel", "matrix"))


@lru_cache(maxsize=4096)
def kind_of(name: str) -> str:
    """``scale`` or ``shift`` where the last part of a name says which; these never become one another.

    >>> kind_of("norm.gamma"), kind_of("fc.bias"), kind_of("pos_embed")
    ('scale', 'shift', '')
    """
    parts = name.rpartition(".")[2].lower().split("_")
    words = {parts[0], parts[-1]}  # a table of position biases is no bias
    shift, scale = bool(words & _SHIFTS), bool(words & _SCALES)
    return "" if shift == scale else "shift" if shift else "scale"


def layer_kind(leaf: str) -> str:
    """``scale`` or ``shift`` if a layer may call its own weight or bias so: by a word of these, or by a letter.

    >>> layer_kind("gamma"), layer_kind("b"), layer_kind("gamma_1")
    ('scale', 'shift', '')
    """
    leaf = leaf.lower()
    return "scale" if leaf in _SCALES or leaf in ("w", "g") else "shift" if leaf in _SHIFTS or leaf == "b" else ""


def same_kind(s: Item, t: Item) -> bool:
    """Whether a tensor may become another by kind: no weight becomes a bias, no batch norm a layer norm."""
    if s.averaging != t.averaging:
        return False
    kinds = {kind_of(s.path), kind_of(t.path)}
    if role_of(s.path) == role_of(t.path) == "weight" and {len(s.shape), len(t.shape)} == {1, 2}:
        return False  # a linear map of one output is no scale of a norm
    return kinds != {"scale", "shift"} and not ("shift" in kinds and len(kinds) == 2 and max(s.rank, t.rank) >= 2)


def owner_path(name: str) -> str:
    """Path of the module that owns a weight or bias; the name itself of any other tensor.

    >>> owner_path("attn.q.weight"), owner_path("pos_embed")
    ('attn.q', 'pos_embed')
    """
    path, dot, leaf = name.rpartition(".")
    return path if dot and _role(leaf) in ROLES else name


def relative(item: Item, root: Item) -> str:
    """Path of an item below another."""
    if root.path and item.path.startswith(root.path + "."):
        return item.path[len(root.path) + 1 :]
    return item.path


def place_in(item: Item, root: Item) -> str:
    """Path of an item below another, without a last part that only says weight or bias."""
    return _without_role(relative(item, root))


def _without_role(path: str) -> str:
    head, _, leaf = path.rpartition(".")
    return head if head and leaf in ROLES else path


@dataclass(frozen=True)
class Family:
    """Items whose paths differ only by numbers, ordered by them."""

    pattern: tuple[str, ...]  # the words of the path, numbers replaced by ``#``
    members: tuple[Item, ...]  # the items, ordered by their numbers
    numbers: tuple[tuple[int, ...], ...]  # the numbers of each member

    @cached_property
    def start(self) -> int:
        """Place of the first member in registration order."""
        return min(m.start for m in self.members)

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the pattern; of a family of one also its numbers, and numbers all members share."""
        fixed = [len({n[i] for n in self.numbers}) == 1 for i in range(len(self.numbers[0]))] if self.numbers else []
        out, axis = [], 0
        for word in self.pattern:
            if word == "#":
                if fixed[axis]:
                    out.append(str(self.numbers[0][axis]))
                axis += 1
            else:
                out.append(word)
        return tuple(out)

    def axes(self) -> list[int]:
        """Number positions along which the members differ."""
        return [i for i in range(len(self.numbers[0])) if len({n[i] for n in self.numbers}) > 1]

    def split(self, axis: int) -> list[Family]:
        """Cut the family along one number position."""
        parts: dict[int, list[int]] = {}
        for i, n in enumerate(self.numbers):
            parts.setdefault(n[axis], []).append(i)
        return [self.pick(indices) for _, indices in sorted(parts.items())]

    def pick(self, indices: Sequence[int]) -> Family:
        """The family of some of the members."""
        return Family(self.pattern, tuple(self.members[i] for i in indices), tuple(self.numbers[i] for i in indices))


def families_of(items: Sequence[Item], root: Item) -> list[Family]:
    """Group items by the pattern of their path below a root, in registration order of the first members."""
    found: dict[tuple[str, ...], list[tuple[tuple[int, ...], int, Item]]] = {}
    for place, item in enumerate(items):
        pattern, numbers = split_numbers(relative(item, root))
        found.setdefault(pattern, []).append((numbers, place, item))
    families = []
    for pattern, members in found.items():
        members.sort(key=lambda m: (m[0], m[1]))
        families.append(Family(pattern, tuple(m[2] for m in members), tuple(m[0] for m in members)))
    families.sort(key=lambda f: f.start)
    return families


def telling_words(families: Sequence[Family]) -> list[tuple[str, ...]]:
    """The words that tell each family from its rivals: what is left when what all have is taken away, once each."""
    words = [f.words for f in families]
    if len(words) < 2:
        return words
    common = {w: min(ws.count(w) for ws in words) for w in words[0]}
    out = []
    for ws in words:
        left = dict(common)
        kept = []
        for w in reversed(ws):  # the last parts of a path are the common ones more often than the first
            if left.get(w, 0) > 0:
                left[w] -= 1
            else:
                kept.append(w)
        out.append(tuple(reversed(kept)))
    return out


def words_apart(families: Sequence[Family], others: Sequence[Family]) -> list[tuple[str, ...]]:
    """The words that tell families from their rivals; where there is no rival, those that tell the other side's."""
    common = set.intersection(*(set(f.words) for f in others)) if len(families) == 1 < len(others) else set()
    return [tuple(w for w in ws if not w.isdigit() and w not in common) for ws in telling_words(families)]


def evened(fs: list[Family], ft: list[Family]) -> tuple[list[Family], list[Family]]:
    """Cut families along a number that plays a role (``norm1``, ``norm2``) until both sides have as many."""
    for _ in range(3):
        if len(fs) == len(ft):
            break
        fewer, more = (fs, ft) if len(fs) < len(ft) else (ft, fs)
        wanted = Counter(len(f.members) for f in more)
        cut = _cut_one(fewer, wanted)
        if cut is None:
            break
        fs, ft = (cut, ft) if fewer is fs else (fs, cut)
    return fs, ft


def _cut_one(families: list[Family], wanted: Counter[int]) -> list[Family] | None:
    have = Counter(len(f.members) for f in families)
    for k, family in enumerate(families):
        if have[len(family.members)] <= wanted[len(family.members)]:
            continue
        for axis in reversed(family.axes()):
            parts = family.split(axis)
            if all(wanted[len(p.members)] >= len(parts) for p in parts):
                out = [*families[:k], *parts, *families[k + 1 :]]
                return sorted(out, key=lambda f: f.start)
    return None


def uniform(families: Sequence[Family]) -> list[Family]:
    """Cut families until all members of each have one structure."""
    out: list[Family] = []
    for family in families:
        if len({m.structure for m in family.members}) == 1 or not family.axes():
            out.append(family)
            continue
        by_structure: dict[int, list[int]] = {}
        for i, m in enumerate(family.members):
            by_structure.setdefault(m.structure, []).append(i)
        out += [family.pick(indices) for indices in by_structure.values()]
    return out


def of_size(families: Sequence[Family], size: int) -> list[Family]:
    """Families of ``size`` members, larger ones cut along a number where that gives the size."""
    out: list[Family] = []
    for family in families:
        if len(family.members) == size:
            out.append(family)
            continue
        for axis in reversed(family.axes()):
            parts = family.split(axis)
            if all(len(p.members) == size for p in parts):
                out += parts
                break
    return sorted(out, key=lambda f: f.start)


def literal_if_needed(fs: list[Family], ft: list[Family]) -> tuple[list[Family], list[Family]]:
    """Families of one member each, unless whole families stand against each other."""
    sizes = {len(f.members) for f in (*fs, *ft)}
    if len(sizes) == 1 and all(f.numbers == ft[0].numbers or sizes == {1} for f in (*fs, *ft)):
        return fs, ft
    return literal(fs), literal(ft)


def literal(families: Sequence[Family]) -> list[Family]:
    """Families of one member each, in order."""
    singles = [Family(f.pattern, (m,), (n,)) for f in families for m, n in zip(f.members, f.numbers)]
    return sorted(singles, key=lambda f: f.start)


def is_strong(item: Item) -> bool:
    """Whether so much structure is below that an equal one elsewhere can't be chance."""
    return len(item.tensors) >= 4 and len(item.profile) >= 2
