"""Coverage: which share of both sides a plan moves, by tensors and by elements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

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


def _row_of(info: ParameterInfo, trunk: tuple[str, ...]) -> str:
    path = info.name.split(".")[:-1]
    inside = path[: len(trunk) + 1] if tuple(path[: len(trunk)]) == trunk else path
    return ".".join(inside) or "(root)"


def excluded_names(plan: PlanData, side: Side, described: ModelDescription) -> frozenset[str]:
    """The tensors of a side that nobody asked for: they keep what they have, and are neither missing nor unused.

    Buffers under ``buffers="exclude"``, and what ``only``, ``skip`` and ``source_prefix`` leave out.
    """
    left = plan.unmatched(side)
    names = {item.name for item in left if item.reason in (LEFT_ALONE, ITS_PLACE) or item.reason.startswith(OUTSIDE)}
    if plan.options.get("buffers") == "exclude":
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
        rows.setdefault(_row_of(info, trunk), []).append(info)

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
        buffers_asked=plan.options.get("buffers") != "exclude",
    )
