"""Copies of one network in a checkpoint, of which a model takes one: averages, teachers, the best model so far.

They have the same names below two places and the same shapes. A model that is itself one network takes all of its
weights from one of them; which one, names may tell. Where nothing does, what fits is listed as a choice between them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from lit_wsl.matching.likeness import WHOLES, strength
from lit_wsl.matching.words import plain_words
from lit_wsl.plan.entries import AVERAGE, CANDIDATE, Ambiguity, Candidate, PlanEntry, Unmatched
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import ModelDescription, Shape
from lit_wsl.structure.families import find_average, speaks_of_average

DEPTH = 3  # of modules that may be copies
FEWEST = 8  # tensors of a copy; smaller modules are alike by chance
LARGE = 0.2  # of all elements: copies are of the model, or of most of it
SHORTEST = 4  # letters of a word that stands for another; fewer begin too many
ALIKE = 0.8  # of the tensors of the smaller copy: one may have a head that the other lacks
COPIED = frozenset(  # what a copy of a network is called, beside averages
    ("teacher", "target", "momentum", "frozen", "reference", "ref", "old")
)
COPIES = "copies of one network"
COPY = "stands in a copy of what is taken; source_prefix takes another"


@dataclass(frozen=True)
class Copies:
    """What is taken of a checkpoint that holds copies of one network."""

    others: tuple[str, ...]  # places of the copies that take no part in the matching, with a dot at their ends
    told: bool  # whether names tell which one does
    reason: str  # why those of the others found no partner
    note: str  # what to tell of them
    # name in the copy that is taken -> names in the others
    twins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def one_of_copies(source: ModelDescription, target: ModelDescription) -> tuple[ModelDescription, Copies | None]:
    """The source with one of its copies of a network, and what became of the others.

    A model that holds copies itself, or that needs as many tensors of these shapes, is left the choice.
    """
    shapes = {i.name: i.shape for i in source.parameters}
    kept, average = _without_average(source, target, shapes)
    if average is not None:
        return kept, average
    sizes = [sum(i.numel for i in side.parameters) for side in (source, target)]
    if LARGE * sizes[0] > 2 * (sizes[0] - sizes[1]):
        return source, None  # it needs all of them (:func:`_needs`)
    found = _find_copies(shapes)
    if found and _find_copies({i.name: i.shape for i in target.parameters}):  # it needs its own, no copies of all of it
        enough = ALIKE * len(target.parameters)
        found = [g for g in found if _is_outside(*g[:2]) or sum(n.startswith(g[-1]) for n in shapes) >= enough]
    for group in found:
        if sum(_has(target, p) for p in group) > 1:
            continue  # it holds both under their own names
        best = _chosen(group, shapes, target)
        taken = group[0] if best is None else best
        rows = ((n, n[len(taken) :], x) for n, x in shapes.items() if n.startswith(taken))
        twins = {n: tuple(p + own for p in group if p != taken and shapes.get(p + own) == x) for n, own, x in rows}
        others = tuple(p for p in group if p != taken)
        other = others[0].rstrip(".")
        second = Counter(s for n, s in shapes.items() if n.startswith(others[0]))
        if any(taken.startswith(p) for p in others):  # what is around a copy holds it, too
            others = tuple(dict.fromkeys(name for names in twins.values() for name in names))
            second = Counter(shapes[name] for name in others)
        if _needs(target, source, others, second):
            continue
        places = " and ".join(p.rstrip(".") or "outside of it" for p in reversed(group))
        note = f"{COPIES} stand in {places}: " + (
            f"choose with source_prefix={taken.rstrip('.')!r}, or let a proof decide"
            if best is None
            else f"source_prefix={other!r} takes what is not taken now"
        )
        return _only(source, others), Copies(others, best is not None, COPY, note, twins)
    return source, None


def settle(plan: TransferPlan, copies: Copies, whole: ModelDescription) -> TransferPlan:
    """A plan made of one copy, with what it says of the others."""
    taken = {s for s, twins in copies.twins.items() if twins}
    choices = {e.targets[0] for e in plan.entries if not (copies.told or taken.isdisjoint(e.sources))}
    doubts = tuple(_choice(e, copies) for e in plan.entries if e.targets[0] in choices)
    candidates = {s for d in doubts for c in d.candidates for s in c.sources}
    entries = tuple(e for e in plan.entries if e.targets[0] not in choices)
    known = {u.name for u in plan.unmatched_source}
    left = tuple(
        Unmatched(i.name, i.shape, i.kind, CANDIDATE if i.name in candidates else copies.reason)
        for i in whole.parameters
        if (i.name.startswith(copies.others) or i.name in candidates) and i.name not in known
    )
    return replace(
        plan,
        entries=entries,
        ambiguous=(*plan.ambiguous, *doubts),
        unmatched_source=(*plan.unmatched_source, *left),
        notes=(*plan.notes, copies.note),
    )


def _choice(entry: PlanEntry, copies: Copies) -> Ambiguity:
    rows = [entry.sources]
    for k in range(len(copies.others)):
        other = [copies.twins.get(s, ())[k : k + 1] for s in entry.sources]
        if all(other):
            rows.append(tuple(n for (n,) in other))
    found = tuple(Candidate(row, entry.score, entry.operations) for row in rows)
    return Ambiguity(entry.targets, found, entry.target_shapes[0], copies.note)


def _find_copies(shapes: Mapping[str, Shape]) -> list[tuple[str, ...]]:
    """Places that hold the same names and shapes, the largest first: beside each other, or one beside its own copy."""
    lowest: Counter[str] = Counter()
    for name, shape in shapes.items():
        lowest[name[: len(name) - len(name.split(".", DEPTH)[-1])]] += math.prod(shape)
    sizes: Counter[str] = Counter()
    for place, numel in lowest.items():
        for k in (k for k, c in enumerate(place) if c == "."):
            sizes[place[: k + 1]] += numel
    total = sum(n for place, n in sizes.items() if place.count(".") == 1)
    below = {
        place: {name[len(place) :]: shape for name, shape in shapes.items() if shape and name.startswith(place)}
        for place, numel in sizes.items()
        if numel >= LARGE * total
    }
    large = [place for place, inside in below.items() if len(inside) >= FEWEST]
    found: list[tuple[str, ...]] = []
    for place in large:
        around = place[:-1].rpartition(".")[0]
        around += "." if around else ""
        inside = _called({name.removeprefix("module."): shape for name, shape in below[place].items()})
        outside = _called({n[len(around) :]: x for n, x in shapes.items() if _is_around(n, around, place)})
        if (inside & outside).total() >= ALIKE * inside.total():
            found.append((around, place))
    for a, b in combinations(sorted(large, key=lambda place: place.count(".")), 2):
        if a.startswith(b) or b.startswith(a) or plain_words(a) == plain_words(b):
            continue
        fewer, more = sorted((below[a], below[b]), key=len)
        if sum(more.get(name) == shape for name, shape in fewer.items()) >= ALIKE * len(fewer):
            group = (
                (a,) if _is_outside(a, b) else next((g for g in found if g[0] == a and not _is_outside(*g[:2])), (a,))
            )
            if group in found:
                found.remove(group)
            found.append((*group, b))
    return sorted(found, key=lambda group: (-sizes[group[-1]], -group[-1].count("."), group))


def _chosen(places: Sequence[str], shapes: Mapping[str, Shape], target: ModelDescription) -> str | None:
    """The copy that is taken: what a copy was made of, the one that the rest of the model fits, or that names tell."""
    named = [p for p in places if p and _has(target, p)]
    if len(named) == 1:
        return named[0]
    own = _own_shapes(places, shapes)
    outside = _is_outside(*places[:2])
    apart = places[1].count(".") > places[0].count(".") + 1  # blocks, audio.frontend.blocks
    nested = outside and places[0] != "" and apart
    towers = all(own) or nested  # none of them was made of the other
    if towers and (best := _fitting(places, own, target)):
        return best
    return _told(places, target) if not outside else None if towers else places[0]


def _has(side: ModelDescription, place: str) -> bool:
    return any(i.name.startswith(place) for i in side.parameters)


def _is_around(name: str, around: str, place: str) -> bool:
    return name.startswith(around) and not name.startswith(place)


def _own_shapes(places: Sequence[str], shapes: Mapping[str, Shape]) -> list[set[Shape]]:
    """By each copy the shapes of matrices that the others don't have: of two towers each has an input of its own.

    Copies of one name (``transformer``, ``visual.transformer``) are asked for what stands beside them.
    """
    if places[0] and places[1].endswith(f".{places[0]}"):
        places = ("", places[1][: -len(places[0])])
    around = places[0] if _is_outside(*places[:2]) else None
    found = [
        {
            x
            for n, x in shapes.items()
            if len(x) > 1 and n.startswith(p) and (p != around or _is_around(n, p, places[1]))
        }
        for p in places
    ]
    return [mine.difference(*(other for other in found if other is not mine)) for mine in found]


def _fitting(places: Sequence[str], own: Sequence[set[Shape]], target: ModelDescription) -> str | None:
    """The copy of which the model has more that the others lack than it has of theirs."""
    needed = {i.shape for i in target.parameters}
    fits = [len(shapes & needed) for shapes in own]
    best = [p for p, fit in zip(places, fits) if fit == max(fits)]
    return best[0] if len(best) == 1 and max(fits) else None


def _called(shapes: Mapping[str, Shape]) -> Counter[tuple[str, Shape]]:
    """Names and shapes, where what is counted on in the copy has the same name: ``conv2d_1``, ``conv2d_12``."""
    return Counter((re.sub(r"_?\d+", "", name), shape) for name, shape in shapes.items())


def _is_outside(place: str, copy: str) -> bool:
    """Whether a copy stands in the module that it was made of, or in one that holds all of it once more."""
    return copy.startswith(place) or copy.endswith(f".{place}")


def _told(places: Sequence[str], target: ModelDescription) -> str | None:
    """The copy that names tell: the only one that is called like a part of the model, or by no word of its own."""
    words = [set(plain_words(p)) for p in places]
    common = set.intersection(*words)
    parts = {".".join(i.name.split(".")[:-1][:DEPTH]) for i in target.parameters}
    theirs = {w for part in parts for w in plain_words(part) if len(w) > 2}
    telling = [ws - common - WHOLES for ws in words]
    called = [p for p, ws in zip(places, telling) if any(_says(w, x) for w in ws for x in theirs)]
    copied = any(map(_is_copied, theirs))  # a model of the teacher alone
    plain = [p for p, ws in zip(places, telling) if not ws and not copied]
    return next((found[0] for found in (called, plain) if len(found) == 1), None)


def _is_copied(word: str) -> bool:
    """Whether a word says that a network was made of another."""
    return word in COPIED or speaks_of_average(word)


def _says(word: str, other: str) -> bool:
    """Whether a word of a copy is a word of the model, be it shortened; ``pre`` is no ``previous``."""
    return word == other or (min(len(word), len(other)) >= SHORTEST and strength(word, other)[0] >= 0.8)


def _needs(target: ModelDescription, source: ModelDescription, others: tuple[str, ...], second: Counter[Shape]) -> bool:
    """Whether a model needs what others hold a second time: by its shapes, or, if these changed, by its size."""
    kept = [i for i in source.parameters if not i.name.startswith(others)]
    needed = Counter(i.shape for i in target.parameters) - Counter(i.shape for i in kept)
    more = sum(i.numel for i in target.parameters) - sum(i.numel for i in kept)
    size = sum(math.prod(shape) * count for shape, count in second.items())
    return 2 * sum((second & needed).values()) > sum(second.values()) or 2 * more > size


def _only(source: ModelDescription, others: tuple[str, ...]) -> ModelDescription:
    return source.part(i for i in source.parameters if not i.name.startswith(others))


def _without_average(
    source: ModelDescription, target: ModelDescription, shapes: Mapping[str, Shape]
) -> tuple[ModelDescription, Copies | None]:
    """The source without a running average of its own weights."""
    average = find_average(shapes)
    if average is None or _has(target, average.prefix):
        return source, None
    theirs = {i.name: i.shape for i in target.parameters}
    if find_average(theirs) is not None:
        return source, None
    if all(any(map(_is_copied, plain_words(name.partition(".")[0]))) for name in theirs):
        return source, None  # it is an average, or a teacher
    second = Counter(shape for name, shape in shapes.items() if name.startswith(average.prefix))
    if _needs(target, source, (average.prefix,), second):
        return source, None
    or_so = f" or source_prefix={average.prefix.rstrip('.')!r}" if average.prefix.endswith(".") else ""
    note = (
        f"averaged (EMA) weights stand under {average.prefix!r}, beside the weights themselves, which are taken; "
        + (f"checkpoint_weights='ema'{or_so} takes the average" if average.pairs else "it has lost its order")
    )
    return _only(source, (average.prefix,)), Copies((average.prefix,), True, AVERAGE, note)
