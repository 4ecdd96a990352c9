"""Families: items whose paths differ only by numbers, and how families of two models are laid side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lit_wsl.mapper.names import split_numbers
from lit_wsl.mapper.tree import Item, relative


@dataclass(frozen=True)
class Family:
    """Items whose paths differ only by numbers, ordered by them.

    Attributes:
        pattern: The words of the path, numbers replaced by ``#``.
        members: The items, ordered by their numbers.
        numbers: The numbers of each member.
    """

    pattern: tuple[str, ...]
    members: tuple[Item, ...]
    numbers: tuple[tuple[int, ...], ...]

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
    common = Counter(words[0])
    for ws in words[1:]:
        common &= Counter(ws)
    out = []
    for ws in words:
        left = Counter(common)
        kept = []
        for w in reversed(ws):  # the last parts of a path are the common ones more often than the first
            if left[w] > 0:
                left[w] -= 1
            else:
                kept.append(w)
        out.append(tuple(reversed(kept)))
    return out


def same_numbering(
    s: list[tuple[str, ...]], t: list[tuple[str, ...]]
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Leave numbers out unless both sides use the same ones: counting from 0 and from 1 would cross."""
    numbers = [{w for ws in side for w in ws if w.isdigit()} for side in (s, t)]
    if numbers[0] == numbers[1]:
        return s, t
    plain = [[tuple(w for w in ws if not w.isdigit()) for ws in side] for side in (s, t)]
    return plain[0], plain[1]


def aligned_axes(f: Family, g: Family) -> tuple[Item, ...]:
    """The members of ``g`` in the order of ``f``, where the two number axes stand the other way round."""
    axes_f, axes_g = f.axes(), g.axes()
    if len(axes_f) == len(axes_g) == 2:
        size_f = [len({n[a] for n in f.numbers}) for a in axes_f]
        size_g = [len({n[a] for n in g.numbers}) for a in axes_g]
        if size_f != size_g and size_f == size_g[::-1]:
            order = sorted(range(len(g.members)), key=lambda i: (g.numbers[i][axes_g[1]], g.numbers[i][axes_g[0]]))
            return tuple(g.members[i] for i in order)
    return g.members


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
    return _literal(fs), _literal(ft)


def _literal(families: list[Family]) -> list[Family]:
    singles = [Family(f.pattern, (m,), (n,)) for f in families for m, n in zip(f.members, f.numbers)]
    return sorted(singles, key=lambda f: f.start)
