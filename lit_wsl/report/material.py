"""What a report is made from: a plan, both sides, coverage and remarks, gathered from whatever a caller has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from lit_wsl.mapper.names import Dictionary, split_numbers
from lit_wsl.mapper.options import MatchingOptions
from lit_wsl.mapper.scoring import ScoreBreakdown, score_pair
from lit_wsl.report.rows import describe_from_plan
from lit_wsl.structure.info import ModelDescription, ParameterInfo, Shape
from lit_wsl.transfer.coverage import Coverage, measure_coverage
from lit_wsl.transfer.plan import PlanEntry, Side, TransferPlan

MOST_EXPLAINED = 600  # steps of a report with a runner-up each; of more, the least certain ones
_CERTAIN = 0.3  # least margin of a step that words are learned from, as in the matching itself


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

    @cached_property
    def dictionary(self) -> Dictionary:
        """Words of the source that stand for words of the target, learned from the plan; families count once."""
        dictionary, seen = Dictionary(), set()
        for entry in self.plan.entries:
            if len(entry.sources) == len(entry.targets) == 1 and entry.margin >= _CERTAIN and entry.kind == "parameter":
                key = split_numbers(entry.sources[0])[0], split_numbers(entry.targets[0])[0]
                if key not in seen:
                    seen.add(key)
                    dictionary.learn([w for w in key[0] if w != "#"], [w for w in key[1] if w != "#"])
        return dictionary

    @cached_property
    def module_pairs(self) -> frozenset[tuple[str, str]]:
        """Paths of the modules whose tensors the plan matches."""
        return frozenset(
            (source.rpartition(".")[0], target.rpartition(".")[0])
            for entry in self.plan.entries
            for source, target in pairs(entry)
        )

    @cached_property
    def alike(self) -> dict[Side, dict[tuple[str, Shape], tuple[ParameterInfo, ...]]]:
        """The tensors of each side by kind and by shape, whose axes may stand in any order."""
        found: dict[Side, dict[tuple[str, Shape], tuple[ParameterInfo, ...]]] = {"source": {}, "target": {}}
        for side, described in (("source", self.source), ("target", self.target)):
            groups: dict[tuple[str, Shape], list[ParameterInfo]] = {}
            for info in described.parameters:
                groups.setdefault((info.kind, tuple(sorted(info.shape))), []).append(info)
            found[side] = {key: tuple(infos) for key, infos in groups.items()}  # type: ignore[index]
        return found

    @cached_property
    def partner_modules(self) -> dict[Side, dict[str, frozenset[str]]]:
        """For modules of the other side: the modules of this side that share a step with them."""
        found: dict[Side, dict[str, set[str]]] = {"source": {}, "target": {}}
        for source, target in self.module_pairs:
            found["source"].setdefault(target, set()).add(source)
            found["target"].setdefault(source, set()).add(target)
        return {side: {path: frozenset(paths) for path, paths in known.items()} for side, known in found.items()}

    @cached_property
    def questioned(self) -> frozenset[int]:
        """Numbers of the steps whose runner-up a report names: all, or the least certain ones of very many."""
        entries = self.plan.entries
        if len(entries) <= MOST_EXPLAINED:
            return frozenset(range(len(entries)))
        doubt = sorted(range(len(entries)), key=lambda i: (entries[i].margin, entries[i].score, i))
        return frozenset(doubt[:MOST_EXPLAINED])

    def score(self, source: ParameterInfo, target: ParameterInfo, *, operation: bool = False) -> ScoreBreakdown:
        """Score any pair of tensors as the plan's steps are scored: with learned words, and with the parents' match.

        The agreement in execution order, where both sides have one, is shown among the parts of the hierarchy; it is
        evidence for the alignment and no part of the sum.
        """
        together = (source.module_path, target.module_path) in self.module_pairs
        found = score_pair(
            source,
            target,
            self.options,
            operation=operation,
            parents=1.0 if together else 0.0,
            dictionary=self.dictionary,
        )
        order = order_agreement(self, source, target)
        if order is None:
            return found
        return replace(found, hierarchy_parts={**found.hierarchy_parts, "order": order})

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
    known = [field.name for field in fields(MatchingOptions)]
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
    return material.score(one, other, operation=entry.badge not in ("exact", "cast"))


def order_agreement(material: Material, source: ParameterInfo, target: ParameterInfo) -> float | None:
    """How well two places in the execution order agree, 0 to 1; ``None`` where either has none."""
    if source.execution_order is None or target.execution_order is None:
        return None
    first, second = material.last_places
    return 1.0 - abs(source.execution_order / first - target.execution_order / second)


def _info(side: ModelDescription, name: str) -> ParameterInfo:
    return side[name] if name in side else ParameterInfo(name, ())
