"""The options of a matching, in one place for the function, the callback, the mapper and the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from lit_wsl.errors import ArgumentTypeError, MappingError, did_you_mean

BufferMode = Literal["exclude", "lenient", "strict"]
Strategy = Literal["best_match", "conservative", "shape_only"]
Adaptation = Literal["resize_position_embedding", "partial_head", "fold_batchnorm", "new_input_channels"]

DEFAULT_WEIGHTS: Mapping[str, float] = {"shape": 0.5, "name": 0.3, "hierarchy": 0.2}
CONSERVATIVE_FLOOR = 0.75


@dataclass(frozen=True)
class MatchingOptions:
    """How to match: the one list of options of the function, the callback, the mapper and the command.

    Lists may stand for tuples and sets, one name for a list of one, and ``None`` for the default.

    Attributes:
        buffers: ``"exclude"`` ignores buffers, ``"lenient"`` takes them along where they fit, ``"strict"`` asks that
            all of a module's buffers match.
        strategy: ``"best_match"``, ``"conservative"`` (scores of at least 0.75) or ``"shape_only"`` (ignores names).
        threshold: Minimum score of a match, 0 to 1.
        weights: Weights of ``shape``, ``name`` and ``hierarchy`` in the score, scaled to a sum of 1.
        incompatible_pairs: Pairs of sets of name chunks that must not match across, both ways, such as
            ``[({"backbone"}, {"head"})]``.
        shape_tolerance: Relative difference up to which the sizes of two buffers count as near (0.1: a tenth). What
            is near is not loaded, but ``"strict"`` does not refuse its module for it. Parameters never match across
            different shapes.
        adapt: Operations that change values, asked for by name.
        assume_layouts: You know that both models order the rows of queries and keys alike, and cut patches alike.
            Without, what only the function could show stays ambiguous, unless the old model and a sample prove it.
        only: Patterns (``"encoder.*"``) of names of the model, or of its modules: only these are filled.
        skip: Patterns of names of the model that are never filled.
        source_prefix: Only what stands under this name in the checkpoint takes part, such as ``"student.backbone"``.

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
        if not isinstance(self.weights, Mapping | None):
            raise ArgumentTypeError(f"weights takes {dict(DEFAULT_WEIGHTS)}, or other numbers; got {self.weights!r}.")
        given = {k: _number(f"weights[{k!r}]", v) for k, v in sorted((self.weights or {}).items())}
        for name, value in (
            ("threshold", _number("threshold", self.threshold)),
            ("weights", dict(DEFAULT_WEIGHTS) if self.weights is None or given == DEFAULT_WEIGHTS else given),
            ("incompatible_pairs", tuple(_pair(pair) for pair in self.incompatible_pairs or ())),
            ("shape_tolerance", _number("shape_tolerance", self.shape_tolerance)),
            ("assume_layouts", bool(self.assume_layouts)),
            *((option, _names(option, getattr(self, option))) for option in ("adapt", "only", "skip")),
        ):
            object.__setattr__(self, name, value)
        if not isinstance(self.source_prefix, str | None):
            raise ArgumentTypeError(f"source_prefix must be a name, got {self.source_prefix!r}.")
        one_of("buffers", self.buffers, get_args(BufferMode))
        one_of("strategy", self.strategy, get_args(Strategy))
        for name in self.adapt:
            one_of("adapt", name, get_args(Adaptation))
        if not 0.0 <= self.threshold <= 1.0:
            raise MappingError(f"threshold must lie between 0 and 1, got {self.threshold!r}.")
        if not self.shape_tolerance >= 0.0:
            raise MappingError(f"shape_tolerance must be at least 0, got {self.shape_tolerance!r}.")
        unknown = sorted(set(self.weights) - set(DEFAULT_WEIGHTS))
        if unknown:
            known = ", ".join(map(repr, DEFAULT_WEIGHTS))
            raise MappingError(
                f"weights must give numbers for {known}; got {unknown[0]!r}.{did_you_mean(unknown[0], DEFAULT_WEIGHTS)}"
            )
        if any(w < 0 for w in self.weights.values()) or not sum(self.weights.values()) > 0:
            raise MappingError(
                f"weights must give non-negative numbers, not all zero, for {sorted(DEFAULT_WEIGHTS)}; "
                f"got {dict(self.weights)!r}."
            )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> MatchingOptions:
        """The options among the arguments of a function, of a command, or of a plan."""
        return cls(**{option.name: given[option.name] for option in fields(cls) if option.name in given})

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
        """Minimum score of a match under the strategy."""
        return max(self.threshold, CONSERVATIVE_FLOOR) if self.strategy == "conservative" else self.threshold

    @property
    def excludes_buffers(self) -> bool:
        """Whether nobody asked for buffers."""
        return self.buffers == "exclude"

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data, for plans and reports."""
        return {
            "buffers": self.buffers,
            "strategy": self.strategy,
            "threshold": self.threshold,
            "weights": dict(self.weights),
            "incompatible_pairs": [[sorted(a), sorted(b)] for a, b in self.incompatible_pairs],
            "adapt": list(self.adapt),
            **({"shape_tolerance": self.shape_tolerance} if self.shape_tolerance else {}),
            **({"assume_layouts": True} if self.assume_layouts else {}),
            **({"only": list(self.only)} if self.only else {}),
            **({"skip": list(self.skip)} if self.skip else {}),
            **({"source_prefix": self.source_prefix} if self.source_prefix else {}),
        }


def one_of(option: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a value that an option does not know."""
    if value not in allowed:
        known = ", ".join(map(repr, allowed))
        raise MappingError(f"{option} must be one of {known}; got {value!r}.{did_you_mean(str(value), allowed)}")


def _number(option: str, value: Any) -> float:
    """A number, also one that is written as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ArgumentTypeError(f"{option} must be a number, got {value!r}.") from None


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
