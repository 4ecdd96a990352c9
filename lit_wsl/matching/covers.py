"""All ways to assign the layers of one side to those of the other, alone or as parts of a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from lit_wsl.matching.layers import Unit, core
from lit_wsl.matching.shapes import join_axis, operations_between
from lit_wsl.matching.tree import role_of

MAX_OPTIONS = 1024

Cover = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # (wholes or sources, targets)


def fits(s: Unit, t: Unit) -> list[tuple[int, int]] | None:
    """Which tensor of one layer goes to which of another, or None."""
    if len(s.shapes) != len(t.shapes) or operations_between(s.main, t.main) is None:
        return None
    if s.times != t.times and min(s.times, t.times) != 1:
        return None
    pairs = [(0, 0)]
    free = list(range(1, len(t.shapes)))
    for k in range(1, len(s.shapes)):
        shape = (s.times, *s.shapes[k]) if s.times > 1 else s.shapes[k]
        fit = [j for j in free if core(shape) == core((t.times, *t.shapes[j]) if t.times > 1 else t.shapes[j])]
        if not fit:
            return None
        best = next((j for j in fit if role_of(t.names[j][0][0]) == role_of(s.names[k][0][0])), fit[0])
        free.remove(best)
        pairs.append((k, best))
    return pairs


def joins(whole: Unit, parts: Sequence[Unit]) -> tuple[int, bool] | None:
    """Along which axis parts make up a whole, and whether they are turned for it, or None."""
    if whole.times != 1 or any(p.times != 1 for p in parts):
        return None
    if {len(p.shapes) for p in parts} != {len(whole.shapes)} or len(whole.shapes[0]) < 2:
        return None
    if any(sum(p.shapes[j][0] for p in parts) != whole.shapes[j][0] for j in range(1, len(whole.shapes))):
        return None
    shapes = [p.shapes[0] for p in parts]
    if len(whole.shapes[0]) == 2:
        return join_axis(whole.shapes[0], shapes)
    is_joined = {s[1:] for s in shapes} == {whole.shapes[0][1:]} and sum(s[0] for s in shapes) == whole.shapes[0][0]
    return (0, False) if is_joined else None


def covers(source: Sequence[Unit], target: Sequence[Unit], limit: int = MAX_OPTIONS) -> list[Cover]:
    """All ways to assign the layers of one side to those of the other, each used once; parts may make up a whole.

    Where these are too many, parts of one whole are taken from one module.
    """
    found = _covers(source, target, limit, together=False)
    return found if len(found) <= limit else _covers(source, target, limit, together=True)


def _covers(source: Sequence[Unit], target: Sequence[Unit], limit: int, together: bool) -> list[Cover]:
    fuse = len(source) >= len(target)
    wholes, parts = (target, source) if fuse else (source, target)
    found: list[Cover] = []
    spare = len(parts) - len(wholes)
    modules = [p.path.rpartition(".")[0] for p in parts]

    def options(w: int, free: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        for p in free:
            s, t = (parts[p], wholes[w]) if fuse else (wholes[w], parts[p])
            if fits(s, t) is not None:
                yield (p,)
        for m in range(2, min(4, spare + 1) + 1):
            for group in combinations(free, m):
                if together and len({modules[p] for p in group}) > 1:
                    continue
                if joins(wholes[w], [parts[p] for p in group]) is not None:
                    yield group

    def recurse(w: int, free: tuple[int, ...], chosen: list) -> None:
        if len(found) > limit:
            return
        if w == len(wholes):
            if not free:
                found.append(tuple((g, (i,)) if fuse else ((i,), g) for i, g in enumerate(chosen)))
            return
        for group in options(w, free):
            recurse(w + 1, tuple(p for p in free if p not in group), [*chosen, group])

    recurse(0, tuple(range(len(parts))), [])
    return found


def _may_join(part: Unit, whole: Unit) -> bool:
    """Whether a layer is like a whole but for one axis, which is shorter."""
    p, w = part.shapes[0], whole.shapes[0]
    if len(p) != len(w) or len(w) < 2 or len(part.shapes) != len(whole.shapes):
        return False
    if len(w) > 2:
        return p[1:] == w[1:] and p[0] < w[0]
    return any((a == w[0] and b < w[1]) or (b == w[1] and a < w[0]) for a, b in (p, p[::-1]))


def components(source: Sequence[Unit], target: Sequence[Unit]) -> list[tuple[list[Unit], list[Unit]]]:
    """Layers that may take one another's place, directly or in a whole."""
    s_n, t_n = len(source), len(target)
    link = list(range(s_n + t_n))

    def find(i: int) -> int:
        while link[i] != i:
            i = link[i]
        return i

    def join(i: int, j: int) -> None:
        link[find(i)] = find(j)

    for i, s in enumerate(source):
        for j, t in enumerate(target):
            if fits(s, t) is not None:
                join(i, s_n + j)
    for wholes, parts, offset_w, offset_p in ((target, source, s_n, 0), (source, target, 0, s_n)):
        for w, whole in enumerate(wholes):
            fitting = [p for p, part in enumerate(parts) if _may_join(part, whole)]
            for m in (2, 3, 4):
                for group in combinations(fitting, m):
                    if joins(whole, [parts[p] for p in group]) is not None:
                        for p in group:
                            join(offset_w + w, offset_p + p)
    groups: dict[int, tuple[list[Unit], list[Unit]]] = {}
    for i, s in enumerate(source):
        groups.setdefault(find(i), ([], []))[0].append(s)
    for j, t in enumerate(target):
        groups.setdefault(find(s_n + j), ([], []))[1].append(t)
    return [g for g in groups.values() if g[0] and g[1]]
