"""Pairs of words that must not match each other: the user's ``incompatible_pairs``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lit_wsl.plan.entries import Unmatched
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import tokenize

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
