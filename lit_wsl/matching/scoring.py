"""Scores that users see: shape, name and hierarchy of one pair of tensors, and how they add up.

``score = 0.5 * shape + 0.3 * name + 0.2 * hierarchy`` with the default weights. The scores say how alike two tensors
are; whether a pair is loaded is decided by the alignment of the whole models and its margin.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from rapidfuzz.distance import Levenshtein

from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.words import Dictionary, best_pairs_similarity
from lit_wsl.structure.description import ParameterInfo, Shape, tokenize

SAME_SHAPE, REARRANGED, TRANSPOSED, NEAR_BUFFER = 1.0, 0.85, 0.7, 0.2
NAME_PARTS: Mapping[str, float] = {"token": 0.4, "edit": 0.2, "substring": 0.15, "type": 0.25}
CONTEXT_SHARE = 0.2


@dataclass(frozen=True)
class ScoreBreakdown:
    """The score of one pair and all that went into it; every part is between 0 and 1.

    Attributes:
        source: Name in the checkpoint.
        target: Name in the model.
        shape: 1.0 the same, 0.7 transposed, 0.85 another lossless operation (reshape, split, concat, stack), 0.2 a
            buffer of other shape in lenient mode, or of near shape in any, else 0.0.
        name: Weighted mean of ``name_parts``.
        hierarchy: Mean of ``hierarchy_parts``.
        name_parts: ``token`` (Jaccard), ``edit`` (Levenshtein), ``substring`` (longest common), ``type``.
        hierarchy_parts: ``depth``, ``path``, ``parents`` and ``order``; parts without evidence are absent.
        weights: Weights of shape, name and hierarchy, summing to 1.
        parents: The parents' match (:meth:`Context.parents`), ``None`` without context.
        total: ``sum(weights * parts)``; in context 80 % of it and 20 % ``parents``.
    """

    source: str
    target: str
    shape: float
    name: float
    hierarchy: float
    name_parts: Mapping[str, float] = field(default_factory=dict)
    hierarchy_parts: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    parents: float | None = None
    total: float = 0.0


class Context:
    """What the matches of two models tell about any pair of their tensors: which words and modules became which."""

    def __init__(self, matches: Iterable[tuple[Sequence[str], Sequence[str]]]) -> None:
        rows = list(matches)
        self.dictionary = Dictionary.of((s[0], t[0]) for s, t in rows if len(s) == len(t) == 1)
        self._moved = sorted({(s, t) for sources, targets in rows for s in sources for t in targets})
        self._sources = [s for s, _ in self._moved]
        self._targets = sorted(t for _, t in self._moved)
        self._known: dict[tuple[str, str], float | None] = {}

    def parents(self, source: str, target: str) -> float | None:
        """How far the modules around two tensors' groups correspond, 0 to 1.

        The matches from inside the one into the other, as a share of all matches of that one of them which has fewer:
        1 where everything in one module became part of the other. ``None`` if neither has any.
        """
        around = _around(source), _around(target)
        if around not in self._known:
            s, t = (f"{path}." if path else "" for path in around)
            inside = self._moved[slice(*_range(self._sources, s))]
            first, last = _range(self._targets, t)
            counts = [count for count in (len(inside), last - first) if count]
            both = sum(name.startswith(t) for _, name in inside)
            self._known[around] = both / min(counts) if counts else None
        return self._known[around]


def _around(name: str) -> str:
    """Path of the module around a tensor's group; nothing for the whole model."""
    return name.rpartition(".")[0].rpartition(".")[0]


def _range(names: Sequence[str], prefix: str) -> tuple[int, int]:
    """Which of the sorted names start with this."""
    return (bisect_left(names, prefix), bisect_left(names, prefix[:-1] + "/")) if prefix else (0, len(names))


def shape_score(source: Shape, target: Shape, *, buffer: bool = False, operation: bool = False) -> float:
    """Score two shapes.

    >>> shape_score((2, 3), (2, 3)), shape_score((2, 3), (3, 2)), shape_score((2, 3), (4, 3))
    (1.0, 0.7, 0.0)
    """
    if source == target and not operation:
        return SAME_SHAPE
    if len(source) == len(target) == 2 and source == target[::-1]:
        return TRANSPOSED
    if operation:
        return REARRANGED
    return NEAR_BUFFER if buffer else 0.0


def near(source: Shape, target: Shape, tolerance: float) -> bool:
    """Whether all sizes differ by at most this part of the larger.

    >>> near((10, 4), (8, 4), 0.2), near((10, 4), (7, 4), 0.2)
    (True, False)
    """
    return len(source) == len(target) and all(abs(a - b) <= tolerance * max(a, b) for a, b in zip(source, target))


def name_parts(source: str, target: str, dictionary: Dictionary | None = None) -> dict[str, float]:
    """Score two names: token overlap, edit distance, longest common substring and the parameter's type.

    >>> name_parts("a.weight", "a.weight")["token"]
    1.0
    """
    ws, wt = ([t for t in tokenize(n) if not t.isdigit()] for n in (source, target))
    leaf_s, leaf_t = source.rpartition(".")[2].lower(), target.rpartition(".")[2].lower()
    longest = max(len(source), len(target)) or 1
    return {
        "token": best_pairs_similarity(ws, wt, dictionary) if ws or wt else 1.0,
        "edit": Levenshtein.normalized_similarity(source, target),
        "substring": SequenceMatcher(None, source, target, autojunk=False).find_longest_match().size / longest,
        "type": 1.0 if leaf_s == leaf_t else best_pairs_similarity(tokenize(leaf_s), tokenize(leaf_t), dictionary),
    }


def hierarchy_parts(source: ParameterInfo, target: ParameterInfo, parents: float | None = None) -> dict[str, float]:
    """Score two places in the hierarchy."""
    ps, pt = source.module_path.split("."), target.module_path.split(".")
    deepest = max(source.depth, target.depth)
    common = len(set(ps) & set(pt)) / max(1, len(set(ps) | set(pt)))
    return {
        "depth": 1.0 - abs(source.depth - target.depth) / deepest if deepest else 1.0,
        "path": best_pairs_similarity(ps, pt) if ps != pt else 1.0,
        "parents": common if parents is None else parents,
    }


def score_pair(
    source: ParameterInfo,
    target: ParameterInfo,
    options: MatchingOptions | None = None,
    *,
    operation: bool = False,
    context: Context | None = None,
) -> ScoreBreakdown:
    """Score one pair of tensors.

    Args:
        source: The checkpoint's tensor.
        target: The model's tensor.
        options: Weights and buffer mode.
        operation: Whether a lossless operation takes the one into the other.
        context: What the matches around tell.

    Returns:
        The breakdown; ``total`` is the score.

    >>> a = ParameterInfo("fc.weight", (2, 3))
    >>> score_pair(a, a).total
    1.0
    """
    options = options or MatchingOptions()
    buffer = source.kind == target.kind == "buffer"
    buffer &= options.buffers == "lenient" or near(source.shape, target.shape, options.shape_tolerance)
    shape = shape_score(source.shape, target.shape, buffer=buffer, operation=operation)
    parents = context.parents(source.name, target.name) if context else None
    names = name_parts(source.name, target.name, context.dictionary if context else None)
    places = hierarchy_parts(source, target, parents)
    name = sum(NAME_PARTS[k] * v for k, v in names.items())
    hierarchy = sum(places.values()) / len(places)
    weights = options.score_weights
    base = weights["shape"] * shape + weights["name"] * name + weights["hierarchy"] * hierarchy
    total = base if parents is None else (1 - CONTEXT_SHARE) * base + CONTEXT_SHARE * parents
    return ScoreBreakdown(source.name, target.name, shape, name, hierarchy, names, places, weights, parents, total)
