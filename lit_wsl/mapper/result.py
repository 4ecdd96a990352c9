"""The outcome of :meth:`lit_wsl.WeightMapper.suggest_mapping`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property

from rich.console import Console, ConsoleOptions, RenderResult

from lit_wsl.errors import ShownInNotebooks, printable
from lit_wsl.plan.coverage import Coverage, excluded_names
from lit_wsl.plan.entries import Side
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.report.drawing import as_html
from lit_wsl.report.report import TransferReport
from lit_wsl.report.rows import describe_from_plan, percent
from lit_wsl.report.terminal import MappingView, ReportView


class MappingResult(ShownInNotebooks, Mapping[str, str]):
    """Source name -> target name, as a read-only mapping, and the plan that it stands for.

    The mapping holds the steps that take *one* tensor to *one* tensor under a new name: exact copies, casts,
    transposes, permutes and reshapes. A step with several sources or targets (``q, k, v -> qkv``) cannot be said as
    a name for a name; those are in :attr:`plan`, and :attr:`composite` lists their names. So renaming a
    checkpoint's keys with this mapping never invents a name for half a tensor.

    Attributes:
        plan: Everything that would be loaded, as data.
        coverage: The share of both sides that the plan moves.

    >>> import torch
    >>> from lit_wsl import WeightMapper
    >>> result = WeightMapper(torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)).suggest_mapping()
    >>> dict(result)
    {'weight': 'weight', 'bias': 'bias'}
    >>> result.coverage.target.share
    1.0
    """

    def __init__(self, plan: TransferPlan, coverage: Coverage) -> None:
        self.plan = plan
        self.coverage = coverage

    @cached_property
    def _scored(self) -> dict[str, tuple[str, float]]:
        return {
            entry.sources[0]: (entry.targets[0], entry.score)
            for entry in self.plan.entries
            if len(entry.sources) == len(entry.targets) == 1
        }

    def __getitem__(self, source: str) -> str:
        return self._scored[source][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scored)

    def __len__(self) -> int:
        return len(self._scored)

    @property
    def composite(self) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
        """Sources and targets of the steps with several names on a side, in the plan's order."""
        return tuple(
            (entry.sources, entry.targets)
            for entry in self.plan.entries
            if not len(entry.sources) == len(entry.targets) == 1
        )

    def get_mapping_with_scores(self) -> dict[str, tuple[str, float]]:
        """Source name -> (target name, score from 0 to 1)."""
        return dict(self._scored)

    def get_mapping_dict(self) -> dict[str, str]:
        """The mapping as a plain dict, which is yours to change."""
        return dict(self)

    copy = get_mapping_dict

    def __or__(self, other: Mapping[str, str]) -> dict[str, str]:
        return {**self, **other} if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: Mapping[str, str]) -> dict[str, str]:
        return {**other, **self} if isinstance(other, Mapping) else NotImplemented

    def get_unmatched(self) -> dict[str, list[str]]:
        """Names without a partner: ``{"source": [...], "target": [...]}``.

        Ambiguous targets are among them; excluded buffers, which nobody asked for, are not.
        """
        aside = self._excluded("source"), self._excluded("target")
        source = [left.name for left in self.plan.unmatched_source if left.name not in aside[0]]
        target = dict.fromkeys(left.name for left in self.plan.unmatched_target if left.name not in aside[1])
        target.update(dict.fromkeys(name for case in self.plan.ambiguous for name in case.targets))
        return {"source": source, "target": list(target)}

    def _excluded(self, side: Side) -> frozenset[str]:
        return excluded_names(self.plan, side, describe_from_plan(self.plan, side))

    def __repr__(self) -> str:
        sides = f"{self.plan.source.label} -> {self.plan.target.label}"
        steps = f"{len(self)} one-to-one, {len(self.composite)} composite"
        return printable(f"<MappingResult {sides}: {percent(self.coverage.target.share)} of the model, {steps}>")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._view()

    def _repr_html_(self) -> str:
        return as_html(self._view())

    def _view(self) -> ReportView:
        source, target = describe_from_plan(self.plan, "source"), describe_from_plan(self.plan, "target")
        report = TransferReport.of(self.plan, self.coverage, source, target, notes=self.plan.notes)
        shown = MappingView(self.plan, max_rows=10)
        return ReportView(replace(report, applied=False), "Mapping", modules=False, mapping=shown)
