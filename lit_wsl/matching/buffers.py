"""Buffers follow their modules: what the matching of the weights says about running statistics and tables."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lit_wsl.matching.words import token_similarity
from lit_wsl.structure.description import ModelDescription, ParameterInfo, tokenize

if TYPE_CHECKING:
    from lit_wsl.matching.entries import EntryWriter


def split_kinds(
    source: ModelDescription, target: ModelDescription
) -> tuple[list[ParameterInfo], list[ParameterInfo], list[ParameterInfo], list[ParameterInfo]]:
    """Tell weights from buffers on both sides.

    A bare state dict doesn't say which tensors are buffers. Where the target knows, it helps: a source tensor whose
    own name (its last part) and shape only buffers of the target have is a buffer too.

    Returns:
        Source weights, source buffers, target weights, target buffers.
    """
    weights_t = [i for i in target.parameters if i.kind == "parameter"]
    buffers_t = [i for i in target.parameters if i.kind == "buffer"]
    as_buffer: set[tuple[str, tuple[int, ...]]] = set()
    if not source.is_module and target.is_module:
        leaves = {i.leaf for i in weights_t}
        as_buffer = {(i.leaf, i.shape) for i in buffers_t if i.leaf not in leaves}
    weights_s: list[ParameterInfo] = []
    buffers_s: list[ParameterInfo] = []
    for info in source.parameters:
        is_buffer = info.kind == "buffer" or (info.leaf, info.shape) in as_buffer
        (buffers_s if is_buffer else weights_s).append(info)
    return weights_s, buffers_s, weights_t, buffers_t


def match_buffers(
    pairs: Iterable[tuple[ParameterInfo, ParameterInfo]],
    source: ModelDescription,
    buffers_s: Sequence[ParameterInfo],
    buffers_t: Sequence[ParameterInfo],
) -> list[tuple[ParameterInfo, ParameterInfo, str]]:
    """Match buffers by the modules that their weights were matched to.

    Args:
        pairs: Matched weights.
        source: The source's side.
        buffers_s: Buffers of the source.
        buffers_t: Buffers of the target.

    Returns:
        ``(source, target, reason)``, one to one, shapes equal.
    """
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for s, t in pairs:
        a, b = s.module_path, t.module_path
        votes[b][a] += 1
    below: dict[str, list[ParameterInfo]] = defaultdict(list)
    for info in buffers_s:
        below[info.module_path].append(info)
    used: set[str] = set()
    found: list[tuple[ParameterInfo, ParameterInfo, str]] = []
    open_t: list[ParameterInfo] = []
    groups: dict[str, list[ParameterInfo]] = defaultdict(list)
    for info in buffers_t:
        groups[info.module_path].append(info)
    for path, members in groups.items():
        home = _winner(votes.get(path))
        candidates = below.get(home, []) if home is not None else []
        for t, s in _within_module(candidates, members):
            found.append((s, t, "buffer of a matched module"))
            used.add(s.name)
        taken = {t.name for _, t, _ in found[-len(members) :]} if members else set()
        open_t += [t for t in members if t.name not in taken]
    found += _by_ancestors(votes, [b for b in buffers_s if b.name not in used], open_t)
    return _counters_with_their_statistics(found, groups)


def _counters_with_their_statistics(
    found: list[tuple[ParameterInfo, ParameterInfo, str]], groups: Mapping[str, Sequence[ParameterInfo]]
) -> list[tuple[ParameterInfo, ParameterInfo, str]]:
    """A counter (``num_batches_tracked``) without all that it counts for would vouch for what it did not see."""
    filled = {t.name for _, t, _ in found}

    def alone(info: ParameterInfo) -> bool:
        return _is_counter(info) and any(
            not _is_counter(other) and other.name not in filled for other in groups[info.module_path]
        )

    return [(s, t, reason) for s, t, reason in found if not alone(t)]


def _is_counter(info: ParameterInfo) -> bool:
    return not info.shape and not info.dtype.is_floating_point and not info.dtype.is_complex


def _winner(votes: Counter[str] | None) -> str | None:
    if not votes:
        return None
    return min(votes, key=lambda path: (-votes[path], path))


def _within_module(
    sources: Sequence[ParameterInfo], targets: Sequence[ParameterInfo]
) -> list[tuple[ParameterInfo, ParameterInfo]]:
    """Pair the buffers of two matched modules: equal names, then the only ones of a shape, then words in common."""
    pairs: list[tuple[ParameterInfo, ParameterInfo]] = []
    free = list(sources)
    for t in targets:
        alike = [s for s in free if s.shape == t.shape and s.dtype.is_floating_point == t.dtype.is_floating_point]
        same = [s for s in alike if s.leaf == t.leaf]
        if not same and len(alike) > 1:
            scored = sorted(alike, key=lambda s: (-_leaf_similarity(s.leaf, t.leaf), s.index))
            best, second = (_leaf_similarity(s.leaf, t.leaf) for s in scored[:2])
            same = scored[:1] if best > second else []
        elif not same:
            rivals = [o for o in targets if o.shape == t.shape and o is not t]
            same = alike if not rivals else []
        if same:
            pairs.append((t, same[0]))
            free.remove(same[0])
    return pairs


def _leaf_similarity(a: str, b: str) -> float:
    words_a, words_b = tokenize(a), tokenize(b)
    return max((token_similarity(x, y) for x in words_a for y in words_b if x not in ("running", "moving")), default=0)


def _by_ancestors(
    votes: dict[str, Counter[str]], sources: Sequence[ParameterInfo], targets: Sequence[ParameterInfo]
) -> list[tuple[ParameterInfo, ParameterInfo, str]]:
    """Match buffers of modules without matched weights: same own name and shape below matched ancestors."""
    above: dict[str, Counter[str]] = defaultdict(Counter)
    for path_t, homes in votes.items():
        for path_s, n in homes.items():
            up_t, up_s = path_t, path_s
            while True:
                above[up_t][up_s] += n
                if not up_t or not up_s:
                    break
                up_t, up_s = up_t.rpartition(".")[0], up_s.rpartition(".")[0]
    by_leaf: dict[tuple[str, tuple[int, ...]], list[ParameterInfo]] = defaultdict(list)
    for s in sources:
        by_leaf[s.leaf, s.shape].append(s)
    rivals: Counter[tuple[str, tuple[int, ...]]] = Counter((t.leaf, t.shape) for t in targets)
    found, used = [], set()
    for t in targets:
        alike = [s for s in by_leaf[t.leaf, t.shape] if s.name not in used]
        if not alike:
            continue
        if len(alike) == 1 and rivals[t.leaf, t.shape] == 1:
            best = alike[0]
        else:
            near = [s for s in alike if _share_home(s.module_path, t.module_path, above)]
            if len(near) != 1:
                continue
            best = near[0]
        used.add(best.name)
        found.append((best, t, "buffer of the same name and shape in a matched part of the model"))
    return found


def _share_home(path_s: str, path_t: str, above: dict[str, Counter[str]]) -> bool:
    """Whether the nearest matched ancestor of the target's module leads to an ancestor of the source's."""
    while True:
        homes = above.get(path_t)
        if homes:
            home = _winner(homes)
            return home is not None and (path_s == home or path_s.startswith(home + ".") or home == "")
        if not path_t:
            return False
        path_t = path_t.rpartition(".")[0]


def refuse_modules(writer: EntryWriter, source: ModelDescription, target: ModelDescription) -> None:
    """Strict mode: a module whose buffers don't all match is not matched at all."""
    filled = writer.filled()
    homes: dict[str, set[str]] = defaultdict(set)
    for s, t in writer.pairs():
        homes[t.module_path].add(s.module_path)
    groups_s = {g.module_path: g for g in source.groups}
    for group in target.groups:
        lacking = [b.name for b in group.buffers if b.name not in filled]
        for home in sorted(homes.get(group.module_path, ())):
            there = groups_s.get(home)
            lacking += [b.name for b in (there.buffers if there else ()) if b.name not in writer.used()]
        if lacking and group.module_path in homes:
            writer.refuse(
                group.module_path,
                f"buffers='strict' and the module's buffers don't all match ({', '.join(sorted(set(lacking))[:3])})",
            )
