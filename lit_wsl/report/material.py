"""What a report is made from: a plan, both sides, coverage and remarks, gathered from whatever a caller has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lit_wsl.mapper.options import MatchingOptions
from lit_wsl.mapper.scoring import ScoreBreakdown, score_pair
from lit_wsl.report.rows import describe_from_plan
from lit_wsl.structure.info import ModelDescription, ParameterInfo
from lit_wsl.transfer.coverage import Coverage, measure_coverage
from lit_wsl.transfer.plan import PlanEntry, TransferPlan


@dataclass(frozen=True)
class Material:
    """Everything that a report shows.

    Attributes:
        plan: The plan.
        source: The checkpoint's side.
        target: The model's side.
        coverage: The plan's coverage.
        options: The options of the matching.
        warnings: What the reader should look at.
        notes: What is worth a line.
    """

    plan: TransferPlan
    source: ModelDescription
    target: ModelDescription
    coverage: Coverage
    options: MatchingOptions
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def last_places(self) -> tuple[int, int]:
        """Last place in the execution order of each side, at least 1."""
        return _last_place(self.source), _last_place(self.target)

    @classmethod
    def gather(
        cls,
        result: Any,
        *,
        source: ModelDescription | None = None,
        target: ModelDescription | None = None,
        coverage: Coverage | None = None,
        options: MatchingOptions | None = None,
        warnings: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> Material:
        """Gather from a :class:`~lit_wsl.TransferReport`, a :class:`~lit_wsl.MappingResult` or a plan.

        Args:
            result: A plan, or an object that has one as ``plan``.
            source: The checkpoint's side; rebuilt from the plan where it is not given.
            target: The model's side; likewise.
            coverage: The coverage; taken from ``result`` or counted where it is not given.
            options: The options of the matching; read from the plan where they are not given.
            warnings: Further warnings.
            notes: Further notes.
        """
        plan: TransferPlan = result if isinstance(result, TransferPlan) else result.plan
        source = source or _description(result, "source") or describe_from_plan(plan, "source")
        target = target or _description(result, "target") or describe_from_plan(plan, "target")
        counted = coverage or getattr(result, "coverage", None) or measure_coverage(plan, source, target)
        remarks = plan.notes if result is plan else getattr(result, "notes", plan.notes)
        return cls(
            plan=plan,
            source=source,
            target=target,
            coverage=counted,
            options=options or options_of(plan),
            warnings=(*getattr(result, "warnings", ()), *warnings),
            notes=tuple(dict.fromkeys((*remarks, *notes))),
        )


def _last_place(side: ModelDescription) -> int:
    return max((i.execution_order for i in side.parameters if i.execution_order is not None), default=0) or 1


def _description(result: Any, side: str) -> ModelDescription | None:
    found = getattr(result, side, None)
    return found if isinstance(found, ModelDescription) else None


def options_of(plan: TransferPlan) -> MatchingOptions:
    """The options that a plan was made with, its defaults where it doesn't say."""
    known = ("buffers", "strategy", "threshold", "weights", "incompatible_pairs", "shape_tolerance", "adapt")
    return MatchingOptions.make(**{key: plan.options[key] for key in known if key in plan.options})


def pairs(entry: PlanEntry) -> Iterator[tuple[str, str]]:
    """The pairs of tensors of one step that belong together, for scores: ``q -> qkv``, ``k -> qkv``, ``v -> qkv``."""
    if len(entry.sources) == len(entry.targets):
        yield from zip(entry.sources, entry.targets)
    else:
        yield from ((source, target) for source in entry.sources for target in entry.targets)


def breakdown(material: Material, entry: PlanEntry, source: str, target: str) -> ScoreBreakdown:
    """Score one pair of a step, with the evidence that both descriptions give."""
    one, other = _info(material.source, source), _info(material.target, target)
    return score_pair(
        one,
        other,
        material.options,
        operation=entry.badge not in ("exact", "cast"),
        order=order_agreement(material, one, other),
    )


def order_agreement(material: Material, source: ParameterInfo, target: ParameterInfo) -> float | None:
    """How well two places in the execution order agree, 0 to 1; ``None`` where either has none."""
    if source.execution_order is None or target.execution_order is None:
        return None
    first, second = material.last_places
    return 1.0 - abs(source.execution_order / first - target.execution_order / second)


def _info(side: ModelDescription, name: str) -> ParameterInfo:
    return side[name] if name in side else ParameterInfo(name, ())
