"""What a transfer did, or would have done: the report."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_wsl.structure.info import ModelDescription
from lit_wsl.transfer.coverage import Coverage
from lit_wsl.transfer.plan import TransferPlan

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class TransferReport:
    """What was loaded, what was not, and why.

    The four lists hold names, each tensor once (tied tensors under their first name); scores, operations, candidates
    and reasons are in :attr:`plan`.

    Attributes:
        plan: The plan that was applied.
        coverage: Shares of both sides, by tensors and by elements.
        loaded: Names in the model that were filled, in registration order.
        missing: Names in the model that kept what they had, although they were asked for.
        ambiguous: Names in the model left alone because nothing decides between the candidates.
        unused: Names in the checkpoint that went nowhere.
        warnings: What the user should look at.
        notes: What is worth a line.
        applied: Whether the model was filled; false where a resumed checkpoint won.
        source: The checkpoint's side, for reports that show whole models.
        target: The model's side, likewise.
    """

    plan: TransferPlan
    coverage: Coverage
    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    ambiguous: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    applied: bool = True
    source: ModelDescription | None = field(default=None, repr=False, compare=False)
    target: ModelDescription | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        plan: TransferPlan,
        coverage: Coverage,
        source: ModelDescription,
        target: ModelDescription,
        *,
        warnings: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> TransferReport:
        """Sort both sides' tensors into loaded, missing, ambiguous and unused.

        Args:
            plan: The plan.
            coverage: Its coverage.
            source: The checkpoint's side.
            target: The model's side.
            warnings: What the user should look at.
            notes: What is worth a line.
        """
        buffers = plan.options.get("buffers") != "exclude"
        filled = {target.tied.get(name, name) for entry in plan.entries for name in entry.targets}
        unsure = {target.tied.get(name, name) for item in plan.ambiguous for name in item.targets} - filled
        used = {source.tied.get(name, name) for entry in plan.entries for name in entry.sources}
        asked = [info.name for info in target.parameters if buffers or info.kind == "parameter"]
        return cls(
            plan=plan,
            coverage=coverage,
            loaded=tuple(info.name for info in target.parameters if info.name in filled),
            missing=tuple(name for name in asked if name not in filled and name not in unsure),
            ambiguous=tuple(info.name for info in target.parameters if info.name in unsure),
            unused=tuple(
                info.name
                for info in source.parameters
                if info.name not in used and (buffers or info.kind == "parameter")
            ),
            warnings=warnings,
            notes=notes,
            source=source,
            target=target,
        )

    def with_remarks(self, *, warnings: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> TransferReport:
        """The same report with more warnings and notes."""
        return replace(self, warnings=self.warnings + warnings, notes=self.notes + notes)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, in the layout of :func:`lit_wsl.report.json_report.report_dict`."""
        from lit_wsl.report.json_report import report_dict

        return report_dict(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON; also written to a file, atomically, where a path is given.

        Args:
            path: Where to write it, if anywhere.

        Returns:
            The JSON text; its schema is ``lit_wsl/report/assets/schema.json``.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        from lit_wsl.report.json_report import report_text

        text = report_text(self)
        if path is not None:
            from lit_wsl.checkpoint import atomic_write_text

            atomic_write_text(path, text)
        return text

    def save_html(self, path: str | Path) -> None:
        """Write the report as one HTML page that needs nothing else.

        Args:
            path: Where to write it.
        """
        from lit_wsl.report.html import save_html

        save_html(self, path)

    def __str__(self) -> str:
        from lit_wsl.report.coverage import plain_text

        return plain_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from lit_wsl.report.coverage import renderables

        yield from renderables(self)
