"""The coverage floor, and the most likely cause when a transfer falls below it."""

from __future__ import annotations

import math
from collections import Counter

from lit_wsl.errors import CoverageError, MappingError
from lit_wsl.plan.coverage import Coverage
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import ModelDescription, ParameterInfo


def valid_floor(min_coverage: float) -> float:
    """Give ``min_coverage`` back if it is a share."""
    if isinstance(min_coverage, bool) or not isinstance(min_coverage, (int, float)) or not 0 <= min_coverage <= 1:
        raise MappingError(f"min_coverage must be a number between 0 and 1, got {min_coverage!r}.")
    return float(min_coverage)


def check_floor(
    plan: TransferPlan, coverage: Coverage, source: ModelDescription, target: ModelDescription, min_coverage: float
) -> None:
    """Raise if fewer weights found a place than asked for."""
    if coverage.floor_share >= min_coverage:
        return
    found, filled = coverage.both
    raise CoverageError(
        f"{source.label} -> {target.label}: {found.share:.1%} of the checkpoint's elements found a place "
        f"({found.tensors} of {found.of_tensors} tensors) and {filled.share:.1%} of the model's were filled "
        f"({filled.tensors} of {filled.of_tensors}); "
        f"min_coverage={min_coverage:g} asks for more. {likely_cause(plan, source, target)} "
        f"{''.join(f'Note: {note}. ' for note in plan.notes[:3])}"
        "Nothing was changed. If so little is meant to match, lower min_coverage."
    )


def likely_cause(plan: TransferPlan, source: ModelDescription, target: ModelDescription) -> str:
    """Say in one or two sentences why so little matched, from names and shapes."""
    ours = [i for i in target.parameters if i.kind == "parameter"]
    theirs = [i for i in source.parameters if i.kind == "parameter"]
    if not theirs:
        return "The checkpoint holds no trainable weights, only buffers: was the optimizer or a metric saved alone?"
    if not ours:
        return "The model has no trainable parameters yet: is it built later, in setup or configure_model?"
    common = _multiset_share(theirs, ours)
    if plan.ambiguous:
        waiting = sum(len(a.targets) for a in plan.ambiguous)
        elements = sum(math.prod(a.shape) * len(a.targets) for a in plan.ambiguous)
        if waiting * 2 >= len(ours) or elements * 2 >= sum(i.numel for i in ours):
            first = plan.ambiguous[0]
            return (
                f"{waiting} tensors are ambiguous, first {first.targets[0]}: {first.reason}. A sample batch "
                "(execution order), source_module or an edited plan decides."
            )
    widths = _same_names_other_shapes(theirs, ours)
    if widths:
        return widths
    if common >= 0.9:
        refused = _strict_options(plan)
        lengths = "" if refused else _other_lengths(theirs, ours)
        return (
            lengths
            or f"The shapes are nearly the same on both sides ({common:.0%}), so this looks like the same network"
            + (f", and the options refused the matches: {refused}." if refused else " under other names.")
        )
    sizes = sum(i.numel for i in theirs), sum(i.numel for i in ours)
    if sizes[0] * 10 < sizes[1]:
        return (
            f"The checkpoint is much smaller than the model ({sizes[0]:,} against {sizes[1]:,} parameter elements): "
            "it may hold only a part, such as a head or an adapter."
        )
    return (
        f"Only {common:.0%} of the tensors have a shape that the other side knows too (largest in the checkpoint: "
        f"{_largest(theirs)}; in the model: {_largest(ours)}): the checkpoint is probably of another model."
    )


def _multiset_share(theirs: list[ParameterInfo], ours: list[ParameterInfo]) -> float:
    """Share of the smaller side's tensors whose shape, axes in any order, has a partner on the other side."""
    a, b = (Counter(tuple(sorted(i.shape)) for i in side) for side in (theirs, ours))
    return sum((a & b).values()) / min(len(theirs), len(ours))


def _same_names_other_shapes(theirs: list[ParameterInfo], ours: list[ParameterInfo]) -> str:
    """The sentence for "same names, other widths", with or without a common prefix; empty if it does not apply."""
    pairs = _pairs_by_name(theirs, ours)
    other = [(a, b) for a, b in pairs if a.shape != b.shape and len(a.shape) == len(b.shape)]
    if len(pairs) * 2 < len(ours) or len(other) * 2 < len(pairs):
        return ""
    ratios = Counter(y / x for a, b in other for x, y in zip(a.shape, b.shape) if x != y and x)
    ratio, _ = max(ratios.items(), key=lambda item: (item[1], -item[0]))
    a, b = other[0]
    scale = f" (mostly {ratio:g} times as wide)" if math.isfinite(ratio) else ""
    return (
        f"The names agree but {len(other)} of {len(pairs)} shapes do not, e.g. {b.name} is {b.shape} in the model and "
        f"{a.shape} in the checkpoint: the model is of another width{scale}."
    )


def _other_lengths(theirs: list[ParameterInfo], ours: list[ParameterInfo]) -> str:
    """The sentence for "more blocks on one side"; empty if the longest lists are of one length."""
    longest = []
    for side in (theirs, ours):
        blocks: dict[str, tuple[set[str], str]] = {}
        for info in side:
            parts = info.name.split(".")
            for k in [k for k, part in enumerate(parts) if part.isdecimal()][:1]:
                path, rest = ".".join(parts[:k]), ".".join(parts[k + 1 :])
                blocks.setdefault(path, (set(), rest))[0].add(parts[k])
        longest.append(max(blocks.items(), key=lambda item: len(item[1][0]), default=("", (set(), ""))))
    (their_list, (had, their_rest)), (our_list, (has, our_rest)) = longest
    if len(had) == len(has) or not had or not has:
        return ""
    both = f"{{0..{min(len(had), len(has)) - 1}}}"
    line = " -> ".join(
        ".".join(filter(None, (path, both, rest))) for path, rest in ((their_list, their_rest), (our_list, our_rest))
    )
    return (
        f"The checkpoint has {len(had)} blocks in {their_list or 'its root'} and the model has {len(has)} in "
        f"{our_list or 'its root'}: names and shapes do not show which of them correspond. If you know, write a plan "
        f'by hand, with a line for every tensor of a block, such as {{"map": "{line}"}}.'
    )


def _pairs_by_name(theirs: list[ParameterInfo], ours: list[ParameterInfo]) -> list[tuple[ParameterInfo, ParameterInfo]]:
    """Pairs whose last components agree: as many components as give the most pairs, so prefixes don't matter."""
    best: list[tuple[ParameterInfo, ParameterInfo]] = []
    for length in range(1, 1 + max(i.depth + 1 for i in theirs + ours)):
        sides = [{".".join(i.name.split(".")[-length:]): i for i in side} for side in (theirs, ours)]
        if len(sides[0]) == len(theirs) and len(sides[1]) == len(ours):  # no two of one side share a tail
            pairs = [(sides[0][tail], info) for tail, info in sides[1].items() if tail in sides[0]]
            best = max(best, pairs, key=len)
    return best


def _strict_options(plan: TransferPlan) -> str:
    given = []
    if plan.options.get("strategy") == "conservative":
        given.append("strategy='conservative'")
    if float(plan.options.get("threshold", 0.6)) > 0.6:
        given.append(f"threshold={plan.options['threshold']}")
    if plan.options.get("incompatible_pairs"):
        given.append(f"incompatible_pairs={plan.options['incompatible_pairs']}")
    if plan.options.get("buffers") == "strict":
        given.append("buffers='strict'")
    return ", ".join(given)


def _largest(infos: list[ParameterInfo]) -> str:
    info = max(infos, key=lambda i: (i.numel, i.name))
    return f"{info.name} {info.shape}"
