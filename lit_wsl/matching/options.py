"""The options of a matching, in one place for the callback, the function, the mapper and the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lit_wsl.errors import MappingError, did_you_mean

BufferMode = Literal["exclude", "lenient", "strict"]
Strategy = Literal["best_match", "conservative", "shape_only"]
Adaptation = Literal["resize_position_embedding", "partial_head", "fold_batchnorm", "new_input_channels"]

DEFAULT_WEIGHTS: Mapping[str, float] = {"shape": 0.5, "name": 0.3, "hierarchy": 0.2}
CONSERVATIVE_FLOOR = 0.75


@dataclass(frozen=True)
class MatchingOptions:
    """How to match; validated when made.

    Attributes:
        buffers: ``exclude`` ignores buffers, ``lenient`` takes them along where they fit, ``strict`` asks that all
            of a module's buffers match.
        strategy: ``best_match``, ``conservative`` (a score of at least 0.75) or ``shape_only`` (names are ignored).
        threshold: Least score of a match, 0 to 1.
        weights: Weights of ``shape``, ``name`` and ``hierarchy`` in the score; scaled to a sum of 1.
        incompatible_pairs: Pairs of chunk sets that forbid a match across them, both ways.
        shape_tolerance: Kept for callers of older versions; trainable parameters never match across different
            shapes, so it only widens which buffers count as near.
        adapt: Value-changing operations the user asks for by name.
        assume_layouts: Whether rows of queries and keys, and flattened patches, may be taken to mean the same on both
            sides where nothing shows it (:mod:`lit_wsl.matching.layouts`); without, they are ambiguous.
        only: Patterns (``encoder.*``) of names of the target, or of its modules: only these are filled.
        skip: Patterns of names of the target that are never filled.
        source_prefix: Only what stands under this name in the checkpoint takes part.

    Raises:
        MappingError: If an option has a value that is not allowed; the message names it.
    """

    buffers: BufferMode = "lenient"
    strategy: Strategy = "best_match"
    threshold: float = 0.6
    weights: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    incompatible_pairs: tuple[tuple[frozenset[str], frozenset[str]], ...] = ()
    shape_tolerance: float = 0.0
    adapt: tuple[Adaptation, ...] = ()
    assume_layouts: bool = False
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    source_prefix: str | None = None

    def __post_init__(self) -> None:
        _one_of("buffers", self.buffers, get_args(BufferMode))
        _one_of("strategy", self.strategy, get_args(Strategy))
        for name in self.adapt:
            _one_of("adapt", name, get_args(Adaptation))
        if not 0.0 <= self.threshold <= 1.0:
            raise MappingError(f"threshold must lie between 0 and 1, got {self.threshold!r}.")
        unknown = sorted(set(self.weights) - set(DEFAULT_WEIGHTS))
        if unknown or any(w < 0 for w in self.weights.values()) or not sum(self.weights.values()) > 0:
            raise MappingError(
                f"weights must give non-negative numbers, not all zero, for {sorted(DEFAULT_WEIGHTS)}; "
                f"got {dict(self.weights)!r}."
            )

    @classmethod
    def make(
        cls,
        *,
        buffers: str = "lenient",
        strategy: str = "best_match",
        threshold: float = 0.6,
        weights: Mapping[str, float] | None = None,
        incompatible_pairs: Sequence[tuple[Any, Any]] | None = None,
        shape_tolerance: float = 0.0,
        adapt: Sequence[str] = (),
        assume_layouts: bool = False,
        only: Sequence[str] = (),
        skip: Sequence[str] = (),
        source_prefix: str | None = None,
    ) -> MatchingOptions:
        """Build options from what users write: lists for sets, missing weights, ``None`` for the default."""
        pairs = tuple(_pair(pair) for pair in incompatible_pairs or ())
        return cls(
            buffers=buffers,  # type: ignore[arg-type]
            strategy=strategy,  # type: ignore[arg-type]
            threshold=float(threshold),
            weights=dict(DEFAULT_WEIGHTS) if weights is None else {k: float(v) for k, v in sorted(weights.items())},
            incompatible_pairs=pairs,
            shape_tolerance=float(shape_tolerance),
            adapt=_names("adapt", adapt),  # type: ignore[arg-type]
            assume_layouts=bool(assume_layouts),
            only=_names("only", only),
            skip=_names("skip", skip),
            source_prefix=source_prefix,
        )

    @property
    def score_weights(self) -> dict[str, float]:
        """The weights of shape, name and hierarchy, scaled to a sum of 1; ``shape_only`` counts the shape alone."""
        raw = {key: self.weights.get(key, 0.0) for key in DEFAULT_WEIGHTS}
        if self.strategy == "shape_only":  # the hierarchy is made of names, too
            raw = {"shape": 1.0, "name": 0.0, "hierarchy": 0.0}
        total = sum(raw.values())
        return {key: value / total for key, value in raw.items()}

    @property
    def floor(self) -> float:
        """Least score of a match under the strategy."""
        return max(self.threshold, CONSERVATIVE_FLOOR) if self.strategy == "conservative" else self.threshold

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data, for plans and reports."""
        return {
            "buffers": self.buffers,
            "strategy": self.strategy,
            "threshold": self.threshold,
            "weights": dict(self.weights),
            "incompatible_pairs": [[sorted(a), sorted(b)] for a, b in self.incompatible_pairs],
            "adapt": list(self.adapt),
            **({"assume_layouts": True} if self.assume_layouts else {}),
            **({"only": list(self.only)} if self.only else {}),
            **({"skip": list(self.skip)} if self.skip else {}),
            **({"source_prefix": self.source_prefix} if self.source_prefix else {}),
        }


def _one_of(option: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        known = ", ".join(map(repr, allowed))
        raise MappingError(f"{option} must be one of {known}; got {value!r}.{did_you_mean(str(value), allowed)}")


def _names(option: str, value: Sequence[str] | str) -> tuple[str, ...]:
    """One name stands for a list of one."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, (Sequence, set, frozenset)):
        raise MappingError(f"{option} takes a list of names, got {value!r}.")
    return tuple(value)


def _pair(pair: Any) -> tuple[frozenset[str], frozenset[str]]:
    try:
        first, second = pair
        sides = tuple(frozenset([s] if isinstance(s, str) else s) for s in (first, second))
    except (TypeError, ValueError) as error:
        raise MappingError(f"incompatible_pairs takes pairs of sets of name chunks; got {pair!r}.") from error
    return sides[0], sides[1]
