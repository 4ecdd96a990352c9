"""What takes part, as the user says: ``source_prefix``, ``only``, ``skip``, and ``incompatible_pairs`` of words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

from lit_wsl.errors import MappingError, listed
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.plan.entries import ITS_PLACE, LEFT_ALONE, OUTSIDE, Unmatched
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import ModelDescription, tokenize

Pair = tuple[frozenset[str], frozenset[str]]


class IncompatiblePairs:
    """Which module paths must not match each other.

    Paths are cut into words, and so is what the user wrote: ``"mlp_head"`` stands for ``mlp`` followed by ``head``.

    Args:
        pairs: Pairs of sets of words; a path with a word of one must not match a path with a word of the other.

    >>> forbidden = IncompatiblePairs([(frozenset({"encoder"}), frozenset({"mlp_head"}))])
    >>> forbidden("yolo_encoder.0", "mlp_head"), forbidden("encoder", "mlp"), forbidden("mlpHead", "encoder2")
    (True, False, True)
    """

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self._pairs = [
            tuple([(word, tokenize(word)) for word in sorted(side) if tokenize(word)] for side in pair)
            for pair in pairs
        ]

    def __call__(self, source: str, target: str) -> bool:
        """Whether two paths must not match."""
        return self.between(source, target) is not None

    def between(self, source: str, target: str) -> tuple[str, str] | None:
        """The words that keep two paths apart, if any do."""
        if not self._pairs:
            return None
        s, t = tokenize(source), tokenize(target)
        for first, second in self._pairs:
            for one, other in ((first, second), (second, first)):
                found = _any_in(one, s), _any_in(other, t)
                if found[0] and found[1]:
                    return found
        return None

    def explain(self, plan: TransferPlan) -> TransferPlan:
        """Say of tensors without a partner that a pair keeps them from one of their shape, where it does."""
        if not self._pairs:
            return plan
        why: dict[tuple[str, str], str] = {}
        by_shape: dict[tuple[int, ...], list[Unmatched]] = {}
        for item in plan.unmatched_source:
            by_shape.setdefault(item.shape, []).append(item)
        for target in plan.unmatched_target:
            for source in by_shape.get(target.shape, ()):
                words = self.between(_module(source), _module(target))
                if words and source.name.rpartition(".")[2] == target.name.rpartition(".")[2]:
                    said = f"incompatible_pairs keeps {words[0]!r} from {words[1]!r}: "
                    why.setdefault(("target", target.name), f"{said}not filled from {source.name}")
                    why.setdefault(("source", source.name), f"{said}does not go to {target.name}")

        def told(side: str, left: tuple[Unmatched, ...]) -> tuple[Unmatched, ...]:
            return tuple(replace(item, reason=why.get((side, item.name), item.reason)) for item in left)

        return replace(
            plan,
            unmatched_source=told("source", plan.unmatched_source),
            unmatched_target=told("target", plan.unmatched_target),
        )


def _module(item: Unmatched) -> str:
    return item.name.rpartition(".")[0]


def _any_in(words: list[tuple[str, tuple[str, ...]]], tokens: tuple[str, ...]) -> str:
    """The first of the user's words that stands in a path, or nothing."""
    for word, cut in words:
        if any(tokens[i : i + len(cut)] == cut for i in range(len(tokens) - len(cut) + 1)):
            return word
    return ""


def part_of(source: ModelDescription, prefix: str | None) -> ModelDescription:
    """The part of a source under one name."""
    if not prefix:
        return source
    under = prefix.rstrip(".") + "."
    kept = [i for i in source.parameters if i.name.startswith(under) or i.name == prefix]
    if not kept:
        names = [i.name for i in source.parameters]
        found = sorted({".".join(n.split(".")[:k]) for n in names for k in (1, 2) if n.count(".") >= k})
        raise MappingError(
            f"source_prefix={prefix!r}: no tensor of {source.label} stands under this name; "
            f"there are {listed(found, 12)}."
        )
    return source.part(kept)


def selected(target: ModelDescription, options: MatchingOptions) -> frozenset[str]:
    """Names of the target's tensors that may be filled."""
    names = [i.name for i in target.parameters]
    aliases: dict[str, list[str]] = {}
    for alias, first in target.tied.items():
        aliases.setdefault(first, []).append(alias)
    chosen = [
        {n for n in names if any(_matches(name, patterns) for name in (n, *aliases.get(n, ())))}
        for patterns in (options.only, options.skip)
    ]
    for option, patterns in (("only", options.only), ("skip", options.skip)):
        for pattern in patterns:
            if not any(_matches(name, (pattern,)) for name in (*names, *target.tied)):
                raise MappingError(f"{option}: no tensor of {target.label} matches {pattern!r}; one is {names[0]!r}.")
    return frozenset((chosen[0] if options.only else set(names)) - chosen[1])


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name, or a module around it, matches one of the patterns."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def without(plan: TransferPlan, whole: ModelDescription, part: ModelDescription, reason: str) -> TransferPlan:
    """A plan that was made of a part of the source, telling why the rest took no part."""
    known = {i.name for i in part.parameters} | {u.name for u in plan.unmatched_source}
    more = tuple(Unmatched(i.name, i.shape, i.kind, reason) for i in whole.parameters if i.name not in known)
    return replace(plan, unmatched_source=(*plan.unmatched_source, *more))


def restrict(
    plan: TransferPlan, source: ModelDescription, target: ModelDescription, options: MatchingOptions
) -> TransferPlan:
    """A plan that fills only what may be filled, and tells what stays out.

    What is left alone has taken part in the matching, so that nothing else takes its place.
    """
    if options.source_prefix:
        part = part_of(source, options.source_prefix)
        plan = without(plan, source, part, f"{OUTSIDE}{options.source_prefix!r}")
    if not (options.only or options.skip):
        return plan
    free = selected(target, options)
    kept = tuple(e for e in plan.entries if free.issuperset(target.tied.get(t, t) for t in e.targets))
    ambiguous = tuple(a for a in plan.ambiguous if free.issuperset(a.targets))
    filled = {t for e in kept for t in e.targets} | {t for a in ambiguous for t in a.targets}
    reasons = {u.name: u for u in plan.unmatched_target if u.name in free}
    left = tuple(
        reasons.get(i.name, Unmatched(i.name, i.shape, i.kind, LEFT_ALONE))
        for i in target.parameters
        if i.name not in filled
    )
    used = {s for e in kept for s in e.sources} | {u.name for u in plan.unmatched_source}
    unused = [source[s] for e in plan.entries for s in e.sources if s not in used]
    more = tuple(Unmatched(i.name, i.shape, i.kind, ITS_PLACE) for i in dict.fromkeys(unused))
    return replace(
        plan,
        entries=kept,
        ambiguous=ambiguous,
        unmatched_target=left,
        unmatched_source=(*plan.unmatched_source, *more),
    )
