"""Looking at a mapping: what ``WeightMapper`` prints on the terminal and writes into files.

The views themselves are in :mod:`lit_wsl.report`, which is imported when the first of them is asked for.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from rich.console import Console

from lit_wsl.errors import MappingError
from lit_wsl.mapper.options import MatchingOptions
from lit_wsl.mapper.result import MappingResult
from lit_wsl.report.rows import By
from lit_wsl.structure.info import ModelDescription


class MappingViews(ABC):
    """The views of a mapping, for a class that holds both sides and makes the mapping when it is first asked for.

    Attributes:
        source: The source's side.
        target: The target's side.
        options: How the mapping was made; up to date once ``result`` has been asked for.
    """

    source: ModelDescription
    target: ModelDescription
    options: MatchingOptions
    _notes: list[str]  # what the user should know beside the mapping

    @property
    @abstractmethod
    def result(self) -> MappingResult:
        """The mapping to look at."""

    def visualize_mapping(
        self,
        result: MappingResult | None = None,
        show_unmatched: bool = True,
        max_matches: int | None = 30,
        max_unmatched: int | None = 15,
        *,
        by: By = "group",
        folded: bool = True,
        console: Console | None = None,
    ) -> None:
        """Print coverage, the mapping, what is ambiguous and what is left over.

        Args:
            result: The mapping to show; the last one by default.
            show_unmatched: Also show what found no partner.
            max_matches: At most so many lines of mappings; the lowest scores always stay. ``None`` for all.
            max_unmatched: At most so many lines of leftovers per side; ``None`` for all.
            by: One line per pair of modules (``"group"``) or per step (``"tensor"``).
            folded: Fold lines that differ only by indices into ``blocks.{0..11}``.
            console: Where to print.
        """
        from lit_wsl.report.tables import ResultView

        shown = result if result is not None else self.result
        view = ResultView(
            shown.plan,
            shown.coverage,
            notes=tuple(self._notes),
            by=by,
            folded=folded,
            show_unmatched=show_unmatched,
            max_rows=max_matches,
            max_unmatched=max_unmatched,
        )
        (console or Console()).print(view)

    def visualize_hierarchies(
        self, max_depth: int = 5, show_matches: bool = False, *, folded: bool = True, console: Console | None = None
    ) -> None:
        """Print both module trees side by side.

        Args:
            max_depth: Number of levels to show.
            show_matches: Mark what is matched, and name the partner beside each module of the source.
            folded: Fold repeated modules into one line, ``{0..11} x12``.
            console: Where to print.
        """
        from lit_wsl.report.trees import HierarchyView

        plan = self.result.plan if show_matches else None
        view = HierarchyView(self.source, self.target, plan, max_depth=max_depth, folded=folded)
        (console or Console()).print(view)

    def visualize_score_breakdown(self, name: str, *, console: Console | None = None) -> None:
        """Print how the score of a tensor's match comes about, and who the runner-up was.

        Args:
            name: Name of a source or target tensor.
            console: Where to print.

        Raises:
            MappingError: If neither model has a tensor of this name; the message names the nearest ones.
        """
        from lit_wsl.report.breakdown import BreakdownView

        self._check_name(name)
        view = BreakdownView(name, self.result.plan, self.source, self.target, self.options)
        (console or Console()).print(view)

    def print_analysis(self, top_n: int = 10, show_unmatched: bool = True, *, console: Console | None = None) -> None:
        """Print coverage by module, the matches to look at first, and what is left over by reason.

        Args:
            top_n: Number of lines in each list.
            show_unmatched: Also show what found no partner.
            console: Where to print.
        """
        from lit_wsl.report.analysis import AnalysisView

        view = AnalysisView(self.result.plan, self.result.coverage, top_n=top_n, show_unmatched=show_unmatched)
        (console or Console()).print(view)

    def export_mapping_report(self, path: str | os.PathLike[str]) -> Path:
        """Write the mapping as JSON: models, counts, coverage, every step with scores, shapes and operation, leftovers.

        Args:
            path: The file to write, atomically. The schema is ``lit_wsl/report/assets/schema.json``.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        from lit_wsl.report.json_report import save_json

        return save_json(self.result, path, **self._context())

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the interactive report: one file that needs no network.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        from lit_wsl.report.html import save_html

        return save_html(self.result, path, **self._context())

    def _context(self) -> dict[str, Any]:
        """What a saved report shows besides the result, once that is there: making it adds notes."""
        return {"source": self.source, "target": self.target, "notes": self._notes, "options": self.options}

    def _check_name(self, name: str) -> None:
        if name in self.source or name in self.target:
            return
        from rapidfuzz import process

        known = [info.name for side in (self.source, self.target) for info in side.parameters]
        near = [match[0] for match in process.extract(name, list(dict.fromkeys(known)), limit=3)]
        raise MappingError(f"neither model has a tensor named {name!r}; the nearest names are {', '.join(near)}.")
