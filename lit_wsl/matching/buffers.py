"""Buffers follow their modules: what the matching of the weights says about running statistics and tables."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice, pairwise
from os.path import commonprefix
from typing import TYPE_CHECKING

from lit_wsl.matching.likeness import WHOLES
from lit_wsl.matching.scoring import near
from lit_wsl.matching.words import ABBREVIATION, counted, lists_along, plain_words, token_similarity, unlike_lists
from lit_wsl.structure.description import ModelDescription, ParameterInfo, Shape, tokenize

FOLLOWS, SAME_PATH = "buffer of a matched module", "buffer at the same path"
WRAPPERS = 2  # levels of modules that may stand around all of a model

if TYPE_CHECKING:
    from lit_wsl.matching.entries import EntryWriter


def split_kinds(
    source: ModelDescription, target: ModelDescription, *, alone: bool = True
) -> tuple[list[ParameterInfo], list[ParameterInfo], list[ParameterInfo], list[ParameterInfo]]:
    """Tell what is aligned like weights from the buffers that follow them, on both sides.

    A bare state dict doesn't say which tensors are buffers. Where the target knows, it helps: a source tensor whose
    own name (its last part) and shape only buffers of the target have is a buffer too, and so is one whose name the
    target does not have, but shares a word with such a name (``moving_mean``, ``running_mean``). What is a buffer on
    one side and a parameter on the other, and modules that hold nothing but buffers (frozen norms, norms without
    weights, codebooks), are aligned like weights: they have nothing to follow.

    Returns:
        Source weights, source buffers, target weights, target buffers.
    """
    if not any(i.kind == "buffer" for side in (source, target) for i in side.parameters):
        return list(source.parameters), [], list(target.parameters), []
    leaves_t = {i.leaf for i in target.parameters if i.kind == "parameter"}
    as_buffer: set[tuple[str, tuple[int, ...]]] = set()
    if not source.is_module and target.is_module and any(i.kind == "buffer" for i in target.parameters):
        known = {(i.leaf, i.shape) for i in target.parameters if i.kind == "buffer" and i.leaf not in leaves_t}
        named = {leaf for leaf, _ in known} | leaves_t
        unknown = {(i.leaf, i.shape) for i in source.parameters if i.leaf not in named}
        as_buffer = known | {
            (leaf, shape)
            for leaf, shape in unknown
            if any(shape == other and _leaf_similarity(leaf, name) >= ABBREVIATION for name, other in known)
        }
    buffers = (
        [i for i in source.parameters if i.kind == "buffer" or (as_buffer and (i.leaf, i.shape) in as_buffer)],
        [i for i in target.parameters if i.kind == "buffer"],
    )
    names = {i.name for i in buffers[0]}
    leaves_s = {i.leaf for i in source.parameters if i.name not in names}
    aligned: list[set[str]] = [set(), set()]
    if alone:
        aligned = [_aligned(source, buffers[0], leaves_t), _aligned(target, buffers[1], leaves_s)]
        like = {(i.leaf, i.shape) for i in buffers[1] if i.name in aligned[1]}
        follow = {i.module_path for i in source.parameters if i.leaf in leaves_t}
        aligned[0] |= {i.name for i in buffers[0] if (i.leaf, i.shape) in like and i.module_path not in follow}
    left = [{i.name for i in side if i.name not in names} for side, names in zip(buffers, aligned)]
    return (
        [i for i in source.parameters if i.name not in left[0]],
        [i for i in buffers[0] if i.name in left[0]],
        [i for i in target.parameters if i.name not in left[1]],
        [i for i in buffers[1] if i.name in left[1]],
    )


def _aligned(side: ModelDescription, buffers: Sequence[ParameterInfo], leaves: set[str]) -> set[str]:
    """Names of the buffers of one side that are aligned like weights."""
    names = {i.name for i in buffers}
    follow = {i.module_path for i in side.parameters if i.name not in names}
    return {
        i.name
        for i in buffers
        if i.dtype.is_floating_point and i.shape and (i.leaf in leaves or i.module_path not in follow)
    }


def averaging_norms(side: ModelDescription, buffers: Sequence[ParameterInfo]) -> set[str]:
    """Paths of the batch norms: by their class, or by two buffers of the size of their weights, which are vectors."""
    vectors = [i for i in buffers if i.dtype.is_floating_point and len(i.shape) == 1]
    statistics: Counter[tuple[str, Shape]] = Counter((i.module_path, i.shape) for i in vectors)
    names = {i.name for i in buffers}

    def averages(info: ParameterInfo) -> bool:
        beside = bool(statistics) and statistics[info.module_path, info.shape] >= 2
        return beside or "BatchNorm" in info.module_type

    weights = [i for i in side.parameters if i.name not in names]
    found = {i.module_path for i in weights if averages(i)}
    return found and found - {i.module_path for i in weights if not averages(i)}


def match_buffers(
    pairs: Iterable[tuple[ParameterInfo, ParameterInfo]],
    known: Collection[str],
    buffers_s: Sequence[ParameterInfo],
    buffers_t: Sequence[ParameterInfo],
    units: Collection[str],
    twins: Mapping[str, ParameterInfo],
) -> list[tuple[ParameterInfo, ParameterInfo, str]]:
    """Match buffers by the modules that their weights were matched to; where there are none, by the same path.

    ``twins`` has what stands at the same path of the whole models: seen alone, the buffers of one of two networks may
    look like all that there is.

    Returns:
        ``(source, target, evidence)``, one to one, shapes equal.
    """
    pairs = list(pairs)
    homes: tuple[dict[str, Counter[str]], dict[str, Counter[str]]] = (defaultdict(Counter), defaultdict(Counter))
    for s, t in pairs:
        homes[0][t.module_path][s.module_path] += 1
        homes[1][s.module_path][t.module_path] += 1
    below: dict[str, list[ParameterInfo]] = defaultdict(list)
    for info in buffers_s:
        below[info.module_path].append(info)
    groups: dict[str, list[ParameterInfo]] = defaultdict(list)
    for info in buffers_t:
        groups[info.module_path].append(info)
    found: list[tuple[ParameterInfo, ParameterInfo, str]] = []
    for path, members in groups.items():
        home = next(iter(homes[0][path])) if len(homes[0].get(path, ())) == 1 else None
        if home is not None and len(homes[1][home]) == 1:
            leaves = {t.leaf for t in members}
            candidates = [s for s in below.get(home, []) if s.name in known or s.leaf in leaves]
            found += [(s, t, FOLLOWS) for t, s in _within_module(candidates, members)]
    taken = {s.name for s, _, _ in found}
    filled = {t.name for _, t, _ in found}
    free = {s.name: s for s in buffers_s if s.name not in taken}
    left = [t for t in buffers_t if t.name not in filled and t.module_path not in units]
    around = _as_seen_from_neighbours([t.name for t in left], [(s.name, t.name) for s, t in pairs]) if left else {}
    for t in left:
        twin = twins.get(t.name)
        place = around.get(t.name, "")
        place = place if place in free else twin.name if twin else ""
        if place in free and free[place].shape == t.shape:
            found.append((free.pop(place), t, SAME_PATH))
    return _counters_with_their_statistics(found, groups)


def _as_seen_from_neighbours(names: Sequence[str], pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """For names of the target the same paths in the source, where the nearest that is matched around them agrees."""
    moved: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for source, target in pairs:
        ours, theirs = source.split("."), target.split(".")
        same = next(
            (k for k, (a, b) in enumerate(zip(ours[::-1], theirs[::-1])) if a != b), min(len(ours), len(theirs))
        )
        places = ".".join(ours[: len(ours) - same]), ".".join(theirs[: len(theirs) - same])
        for k in range(len(theirs)):
            moved[".".join(theirs[:k])].add(places)
    found = {}
    for name in names:
        parts = name.split(".")
        module = next((m for k in range(len(parts) - 2, -1, -1) if (m := ".".join(parts[:k])) in moved), None)
        if module is not None and len(moved[module]) == 1:
            ((there, here),) = moved[module]
            if f"{module}.".startswith(f"{here}." if here else ""):
                found[name] = f"{there}.{name[len(here) :].lstrip('.')}".lstrip(".")
    return found


def _counters_with_their_statistics(
    found: list[tuple[ParameterInfo, ParameterInfo, str]], groups: Mapping[str, Sequence[ParameterInfo]]
) -> list[tuple[ParameterInfo, ParameterInfo, str]]:
    """A counter (``num_batches_tracked``) without all that it counts for would vouch for what it did not see."""
    filled = {t.name for _, t, _ in found}

    def alone(info: ParameterInfo) -> bool:
        return info.counts and any(not other.counts and other.name not in filled for other in groups[info.module_path])

    return [(s, t, reason) for s, t, reason in found if not alone(t)]


Paths = tuple[dict[str, str], dict[str, str]]


def twins_of(
    source: Sequence[ParameterInfo], target: Sequence[ParameterInfo], paths: Paths, *, within: bool = False
) -> dict[str, ParameterInfo]:
    """By the target's names the source tensors of the same path and shape, where both sides count alike along it."""
    paths_s, paths_t = paths
    by_path = {paths_s[s.name]: s for s in source}
    found = ((path, t, by_path[path]) for t in target if (path := paths_t[t.name]) in by_path)
    twins = [(path, t, s) for path, t, s in found if s.shape == t.shape]
    if not twins:
        return {}
    lists = [lists_along((path, 1) for path in paths.values()) for paths in (paths_s, paths_t)]
    unlike = unlike_lists(lists[0], lists[1], within=within)
    return {t.name: s for path, t, s in twins if unlike.isdisjoint(place for place, _ in counted(path))}


def unwrapped(source: Sequence[ParameterInfo], target: Sequence[ParameterInfo]) -> Paths:
    """Relative paths; where most of one side is all of a module of the other (``backbone.``), as seen from there."""
    paths = relative_paths(source), relative_paths(target)
    shapes = [{path[i.name]: i.shape for i in infos} for path, infos in zip(paths, (source, target))]
    same = sum([shapes[1].get(path) == shape for path, shape in shapes[0].items()])
    if any(name != path for side in paths for name, path in islice(side.items(), 1)):  # all stand in one module
        whole = [{i.name: i.shape for i in infos} for infos in (source, target)]
        named = len(whole[0].items() & whole[1].items())
        if named > same and 2 * named > min(map(len, whole)):  # the part that one side is has its name on the other
            return {name: name for name in whole[0]}, {name: name for name in whole[1]}
    if 2 * same > min(map(len, shapes)):
        return paths
    for ours, theirs in ((0, 1), (1, 0)):
        alike: Counter[str] = Counter()
        firsts = {path.partition(".")[0] for path in shapes[theirs]}
        for path, shape in shapes[ours].items():
            parts = path.split(".")
            cut = 0
            for part, first in pairwise(parts[: WRAPPERS + 1]):
                cut += len(part) + 1
                if first in firsts and shapes[theirs].get(path[cut:]) == shape:
                    alike[path[:cut]] += 1
        prefix, count = max(alike.items(), key=lambda item: (item[1], item[0]), default=("", 0))
        rivals = [p for p, c in alike.items() if c == count and p.count(".") == prefix.count(".")]
        if len(rivals) > 1:  # of two copies none is all of it, but for one that is called so
            rivals = [p for p in rivals if WHOLES.issuperset(plain_words(p))]
        if 2 * count > min(map(len, shapes)) and len(rivals) == 1:
            prefix = rivals[0]
            inner = {n: p.removeprefix(prefix) if p.startswith(prefix) else f"/{p}" for n, p in paths[ours].items()}
            return (inner, paths[1]) if ours == 0 else (paths[0], inner)
    return paths


def relative_paths(infos: Sequence[ParameterInfo]) -> dict[str, str]:
    """Names, and what they are without the modules that all of the tensors stand in."""
    ends = [edge((info.name for info in infos), default="") for edge in (min, max)]  # what both share, all share
    shared = commonprefix(ends).rpartition(".")[0]  # noqa: RUF071 - letters, then cut at a dot
    skipped = len(shared) + 1 if shared else 0
    return {info.name: info.name[skipped:] for info in infos}


def _within_module(
    sources: Sequence[ParameterInfo], targets: Sequence[ParameterInfo]
) -> list[tuple[ParameterInfo, ParameterInfo]]:
    """Pair the buffers of two matched modules: equal names, then the only ones of a shape, then words in common."""
    pairs: list[tuple[ParameterInfo, ParameterInfo]] = []
    free = list(sources)
    for t in targets:
        alike = [s for s in free if s.shape == t.shape and s.dtype.is_floating_point == t.dtype.is_floating_point]
        same = [s for s in alike if s.leaf == t.leaf]
        if not same and any(o.shape == t.shape and o is not t for o in targets):
            shared = set.intersection(*({*tokenize(i.leaf)} for i in (*sources, *targets) if i.shape == t.shape))
            scored = sorted(alike, key=lambda s: (-_leaf_similarity(s.leaf, t.leaf, shared), s.index))
            best, second = (*(_leaf_similarity(s.leaf, t.leaf, shared) for s in scored[:2]), 0.0, 0.0)[:2]
            same = scored[:1] if best > second else []
        elif not same:
            same = alike if len(alike) == 1 and not _tell_apart(alike[0].leaf, t.leaf) else []
        if same:
            pairs.append((t, same[0]))
            free.remove(same[0])
    return pairs


def _tell_apart(a: str, b: str) -> bool:
    """Whether two names share nothing and each says something: ``betas`` were computed, not renamed ``alphas``."""
    told = all(any(len(word) > 2 for word in tokenize(name)) for name in (a, b))
    return told and _leaf_similarity(a, b) < ABBREVIATION


def _leaf_similarity(a: str, b: str, shared: Collection[str] = ()) -> float:
    """How alike two names are, but for words that say nothing here: ``weight_v`` is no ``weight_sigma``."""
    words_a, words_b = ([w for w in tokenize(n) if w not in ("running", "moving") and w not in shared] for n in (a, b))
    return max((token_similarity(x, y) for x in words_a for y in words_b), default=0)


def refuse_modules(writer: EntryWriter, source: ModelDescription, target: ModelDescription) -> None:
    """Strict mode: a module whose buffers don't all match is not matched at all; those of near sizes count as met."""
    filled, tolerance = writer.filled(), writer.options.shape_tolerance
    homes: dict[str, set[str]] = defaultdict(set)
    for s, t in writer.pairs():
        homes[t.module_path].add(s.module_path)
    groups_s = {g.module_path: g for g in source.groups}
    for group in target.groups:
        here = [b for b in group.buffers if b.name not in filled]
        there = [
            b
            for home in sorted(homes.get(group.module_path, ()))
            for b in (groups_s[home].buffers if home in groups_s else ())
            if b.name not in writer.used()
        ]
        alike = ((a.shape, b.shape, b.leaf) for b in here for a in there if a.leaf == b.leaf)
        met = {leaf for old, new, leaf in alike if old != new and near(old, new, tolerance)}
        lacking = [b.name for b in (*here, *there) if b.leaf not in met]
        if lacking and group.module_path in homes:
            writer.refuse(
                group.module_path,
                f"buffers='strict' and the module's buffers don't all match ({', '.join(sorted(set(lacking))[:3])})",
            )
