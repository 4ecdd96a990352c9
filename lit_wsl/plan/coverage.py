"""Coverage: which share of both sides a plan moves, and the most likely cause where it is less than asked for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from lit_wsl.errors import CoverageError, MappingError
from lit_wsl.plan.entries import ITS_PLACE, LEFT_ALONE, OUTSIDE, PlanData, Side
from lit_wsl.structure.description import ModelDescription, ParameterInfo


@dataclass(frozen=True)
class Count:
    """How many of a set of tensors were moved.

    Attributes:
        tensors: Number of tensors moved.
        of_tensors: Of how many.
        elements: Number of elements moved.
        of_elements: Of how many.
    """

    tensors: int
    of_tensors: int
    elements: int
    of_elements: int

    @property
    def tensor_share(self) -> float:
        """Share of the tensors, 0 to 1; 1 of an empty set."""
        return self.tensors / self.of_tensors if self.of_tensors else 1.0

    @property
    def share(self) -> float:
        """Share of the elements, 0 to 1; 1 of an empty set."""
        return self.elements / self.of_elements if self.of_elements else 1.0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.tensors + other.tensors,
            self.of_tensors + other.of_tensors,
            self.elements + other.elements,
            self.of_elements + other.of_elements,
        )


@dataclass(frozen=True)
class ModuleCoverage:
    """One row of the coverage table: a top-level module of the target.

    Attributes:
        module: Path of the module; ``(root)`` for the root's own tensors. A module with only one module in it (a
            ``LightningModule`` with its ``model``) is opened, so that the rows tell something.
        loaded: Tensors and elements loaded, of how many, buffers included whatever the mode: a module without its
            buffers is not loaded in full.
        missing: Number of tensors without a source, of those that were asked for.
        missing_elements: Number of their elements.
        ambiguous: Number of tensors left alone because nothing decides.
        ambiguous_elements: Number of their elements.
        excluded: Number of tensors that were not asked for and keep the model's values.
    """

    module: str
    loaded: Count
    missing: int
    missing_elements: int
    ambiguous: int
    ambiguous_elements: int
    excluded: int = 0


@dataclass(frozen=True)
class Coverage:
    """Coverage of both sides.

    Attributes:
        source: Trainable parameters of the checkpoint that found a place.
        target: Trainable parameters of the model that were filled.
        source_buffers: The same for the checkpoint's buffers.
        target_buffers: The same for the model's buffers.
        modules: The target's coverage per top-level module, parameters and buffers.
        buffers_asked: Whether buffers were to be transferred at all.
    """

    source: Count
    target: Count
    source_buffers: Count
    target_buffers: Count
    modules: tuple[ModuleCoverage, ...]
    buffers_asked: bool = True

    @property
    def both(self) -> tuple[Count, Count]:
        """What was to be moved of the checkpoint and of the model: parameters, and buffers unless they are excluded."""
        if not self.buffers_asked:
            return self.source, self.target
        return self.source + self.source_buffers, self.target + self.target_buffers

    @property
    def floor_share(self) -> float:
        """What ``min_coverage`` is compared with: the larger share of elements of the two sides."""
        return max(count.share if count.of_elements else 0.0 for count in self.both)


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        tensors: Number of tensors in the new state dict.
        optimizers: Number of optimizers whose states were carried.
        states: Number of parameters that have an optimizer state in the new checkpoint.
        notes: Remarks, one line each.
        coverage: What of both models the plan moves; ``None`` where a plan without shapes doesn't tell.
    """

    tensors: int
    optimizers: int
    states: int
    notes: tuple[str, ...] = ()
    coverage: Coverage | None = None


def _count(infos: Iterable[ParameterInfo], moved: Mapping[str, Fraction | int]) -> Count:
    listed = list(infos)
    hit = [info for info in listed if info.name in moved]
    elements = sum(int(info.numel * moved[info.name]) for info in hit)
    return Count(len(hit), len(listed), elements, sum(i.numel for i in listed))


def _moved(plan: PlanData, side: Side, described: ModelDescription) -> dict[str, Fraction | int]:
    """Which share of each tensor a plan moves; all of it but for a head that is copied in part."""
    moved: dict[str, Fraction | int] = {}
    for entry in plan.entries:
        share: Fraction | int = 1
        for operation in entry.operations:
            share *= operation.shares[side == "target"]
        for name in entry.names(side):
            canonical = described.tied.get(name, name)
            moved[canonical] = max(share, moved.get(canonical, share))
    return moved


def _trunk(infos: Iterable[ParameterInfo]) -> tuple[str, ...]:
    """The path of the module in which the hierarchy first branches into several modules, or ends.

    >>> names = ("model.encoder.weight", "model.head.weight", "model.scale", "temperature")
    >>> _trunk(ParameterInfo(name, (1,)) for name in names)
    ('model',)
    """
    paths = [info.name.split(".")[:-1] for info in infos]
    trunk: tuple[str, ...] = ()
    while True:
        inside = [path for path in paths if len(path) > len(trunk)]
        heads = {path[len(trunk)] for path in inside}
        # what lies beside the only module (tensors of its owner) has a row of its own; a leaf is not opened
        if len(heads) != 1 or not any(len(path) > len(trunk) + 1 for path in inside):
            return trunk
        trunk += tuple(heads)
        paths = inside


def excluded_names(plan: PlanData, side: Side, described: ModelDescription) -> frozenset[str]:
    """The tensors of a side that nobody asked for: they keep what they have, and are neither missing nor unused.

    Buffers under ``buffers="exclude"``, and what ``only``, ``skip`` and ``source_prefix`` leave out.
    """
    left = plan.unmatched(side)
    names = {item.name for item in left if item.reason in (LEFT_ALONE, ITS_PLACE) or item.reason.startswith(OUTSIDE)}
    if plan.excludes_buffers:
        names.update(info.name for info in described.parameters if info.kind == "buffer")
    return frozenset(names - {described.tied.get(name, name) for e in plan.entries for name in e.names(side)})


def measure_coverage(plan: PlanData, source: ModelDescription, target: ModelDescription) -> Coverage:
    """Count what a plan moves."""
    used, filled = _moved(plan, "source", source), _moved(plan, "target", target)
    unsure = frozenset(name for a in plan.ambiguous for name in a.targets)
    excluded = excluded_names(plan, "target", target)
    rows: dict[str, list[ParameterInfo]] = {}
    trunk = _trunk(target.parameters)
    for info in target.parameters:
        path = info.name.split(".")[:-1]
        inside = path[: len(trunk) + 1] if tuple(path[: len(trunk)]) == trunk else path
        rows.setdefault(".".join(inside) or "(root)", []).append(info)

    def row(module: str, infos: list[ParameterInfo]) -> ModuleCoverage:
        doubtful = [i for i in infos if i.name in unsure and i.name not in filled]
        missing = [i for i in infos if i.name not in filled and i.name not in unsure | excluded]
        return ModuleCoverage(
            module,
            _count(infos, filled),
            len(missing),
            sum(i.numel for i in missing),
            len(doubtful),
            sum(i.numel for i in doubtful),
            sum(i.name in excluded for i in infos),
        )

    return Coverage(
        source=_count((i for i in source.parameters if i.kind == "parameter"), used),
        target=_count((i for i in target.parameters if i.kind == "parameter"), filled),
        source_buffers=_count((i for i in source.parameters if i.kind == "buffer"), used),
        target_buffers=_count((i for i in target.parameters if i.kind == "buffer"), filled),
        modules=tuple(row(module, infos) for module, infos in rows.items()),
        buffers_asked=not plan.excludes_buffers,
    )


def valid_floor(min_coverage: float) -> float:
    """Give ``min_coverage`` back if it is a share."""
    if isinstance(min_coverage, bool) or not isinstance(min_coverage, (int, float)) or not 0 <= min_coverage <= 1:
        raise MappingError(f"min_coverage must be a number between 0 and 1, got {min_coverage!r}.")
    return float(min_coverage)


def check_floor(
    plan: PlanData, coverage: Coverage, source: ModelDescription, target: ModelDescription, min_coverage: float
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


def likely_cause(plan: PlanData, source: ModelDescription, target: ModelDescription) -> str:
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


def _strict_options(plan: PlanData) -> str:
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
