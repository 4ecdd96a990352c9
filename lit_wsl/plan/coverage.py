"""Coverage: which share of both sides a plan moves, by tensors and by elements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lit_wsl.plan.plan import TransferPlan
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


@dataclass(frozen=True)
class ModuleCoverage:
    """One row of the coverage table: a top-level module of the target.

    Attributes:
        module: Path of the module; ``(root)`` for the root's own tensors. Wrappers that hold everything in one child
            (a ``LightningModule`` with its ``model``) are passed through, so that the rows tell something.
        loaded: Tensors and elements loaded, of how many.
        missing: Number of tensors without a source.
        missing_elements: Number of their elements.
        ambiguous: Number of tensors left alone because nothing decides.
        ambiguous_elements: Number of their elements.
    """

    module: str
    loaded: Count
    missing: int
    missing_elements: int
    ambiguous: int
    ambiguous_elements: int


@dataclass(frozen=True)
class Coverage:
    """Coverage of both sides.

    Attributes:
        source: Trainable parameters of the checkpoint that found a place.
        target: Trainable parameters of the model that were filled.
        source_buffers: The same for the checkpoint's buffers.
        target_buffers: The same for the model's buffers.
        modules: The target's coverage per top-level module, parameters and considered buffers.
    """

    source: Count
    target: Count
    source_buffers: Count
    target_buffers: Count
    modules: tuple[ModuleCoverage, ...]

    @property
    def floor_share(self) -> float:
        """What ``min_coverage`` is compared with: the larger share of parameter elements of the two sides."""
        source = self.source.share if self.source.of_elements else 0.0
        target = self.target.share if self.target.of_elements else 0.0
        return max(source, target)


def _count(infos: Iterable[ParameterInfo], moved: frozenset[str]) -> Count:
    listed = list(infos)
    hit = [info for info in listed if info.name in moved]
    return Count(len(hit), len(listed), sum(i.numel for i in hit), sum(i.numel for i in listed))


def _trunk(infos: Iterable[ParameterInfo]) -> str:
    """The dotted prefix, ``""`` or ending in a dot, below which the hierarchy first branches.

    >>> _trunk([ParameterInfo("model.encoder.weight", (1,)), ParameterInfo("model.head.weight", (1,))])
    'model.'
    """
    paths = [info.name.split(".")[:-1] for info in infos]
    trunk: list[str] = []
    while paths and all(len(path) > len(trunk) for path in paths):
        heads = sorted({path[len(trunk)] for path in paths})
        if len(heads) > 1:
            break
        trunk += heads
    return "".join(f"{part}." for part in trunk)


def _row_of(info: ParameterInfo, trunk: str) -> str:
    head, _, rest = info.name[len(trunk) :].partition(".")
    return trunk + head if rest else trunk.rstrip(".") or "(root)"


def measure_coverage(plan: TransferPlan, source: ModelDescription, target: ModelDescription) -> Coverage:
    """Count what a plan moves.

    Args:
        plan: The plan.
        source: The checkpoint's side.
        target: The model's side.
    """
    used = frozenset(source.tied.get(name, name) for entry in plan.entries for name in entry.sources)
    filled = frozenset(target.tied.get(name, name) for entry in plan.entries for name in entry.targets)
    unsure = frozenset(name for a in plan.ambiguous for name in a.targets)
    with_buffers = plan.options.get("buffers") != "exclude"
    rows: dict[str, list[ParameterInfo]] = {}
    trunk = _trunk(target.parameters)
    for info in target.parameters:
        if info.kind == "parameter" or with_buffers:
            rows.setdefault(_row_of(info, trunk), []).append(info)

    def row(module: str, infos: list[ParameterInfo]) -> ModuleCoverage:
        doubtful = [i for i in infos if i.name in unsure and i.name not in filled]
        missing = [i for i in infos if i.name not in filled and i.name not in unsure]
        return ModuleCoverage(
            module,
            _count(infos, filled),
            len(missing),
            sum(i.numel for i in missing),
            len(doubtful),
            sum(i.numel for i in doubtful),
        )

    return Coverage(
        source=_count((i for i in source.parameters if i.kind == "parameter"), used),
        target=_count((i for i in target.parameters if i.kind == "parameter"), filled),
        source_buffers=_count((i for i in source.parameters if i.kind == "buffer"), used),
        target_buffers=_count((i for i in target.parameters if i.kind == "buffer"), filled),
        modules=tuple(row(module, infos) for module, infos in rows.items()),
    )
