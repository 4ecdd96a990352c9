"""What a transfer did, or would have done: the report."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lit_wsl.errors import MappingError, ShownInNotebooks, printable
from lit_wsl.plan.coverage import Coverage
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.report.rows import describe_from_plan, left_over, percent
from lit_wsl.structure.description import ModelDescription, require_module

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True, repr=False)
class TransferReport(ShownInNotebooks):
    """What was loaded, what was not, and why.

    The four lists hold names, each tensor once (tied tensors under their first name); scores, operations, candidates
    and reasons are in :attr:`plan`.

    Attributes:
        plan: The plan that was applied.
        coverage: Shares of both sides, by tensors and by elements.
        loaded: Names in the model that were filled, in registration order.
        missing: Names in the model that kept what they had, although they were asked for.
        ambiguous: Names in the model left alone because nothing decides between the candidates.
        unused: Names in the checkpoint that were not used.
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
        """Sort both sides' tensors into loaded, missing, ambiguous and unused."""
        filled = {target.tied.get(name, name) for entry in plan.entries for name in entry.targets}
        unsure = {target.tied.get(name, name) for item in plan.ambiguous for name in item.targets} - filled
        return cls(
            plan=plan,
            coverage=coverage,
            loaded=tuple(info.name for info in target.parameters if info.name in filled),
            missing=tuple(item.name for item in left_over(plan, "target", target)),
            ambiguous=tuple(info.name for info in target.parameters if info.name in unsure),
            unused=tuple(item.name for item in left_over(plan, "source", source)),
            warnings=warnings,
            notes=notes,
            source=source,
            target=target,
        )

    def with_remarks(self, *, warnings: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> TransferReport:
        """The same report with more warnings and notes."""
        return replace(self, warnings=self.warnings + warnings, notes=self.notes + notes)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, in the layout of :func:`lit_wsl.report.saving.report_dict`."""
        from lit_wsl.report.saving import report_dict

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
        from lit_wsl.report.saving import report_text

        text = report_text(self)
        if path is not None:
            from lit_wsl.files import atomic_write_text

            atomic_write_text(path, text)
        return text

    def save_html(self, path: str | Path) -> Path:
        """Write the report as one HTML page that needs nothing else.

        Args:
            path: Where to write it.
        """
        from lit_wsl.report.saving import save_html

        return save_html(self, path)

    @property
    def sides(self) -> tuple[ModelDescription, ModelDescription]:
        """Both sides, rebuilt from the plan where the report holds none."""
        return (
            self.source or describe_from_plan(self.plan, "source"),
            self.target or describe_from_plan(self.plan, "target"),
        )

    def parameters(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """The model's parameters by whether this transfer filled them, for parameter groups and for freezing.

        Args:
            model: The model that was filled, or a copy of it; wrappers around it are looked through.

        Returns:
            ``{"loaded": [...], "fresh": [...]}``, each parameter once, in the model's order. A parameter that was
            filled in part (a copied head with new rows) counts as fresh.

        Raises:
            MappingError: If the model has none of the names that were filled.

        >>> from lit_wsl import transfer_weights
        >>> old, new = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> groups = transfer_weights(new, old).parameters(new)
        >>> len(groups["loaded"]), len(groups["fresh"])
        (2, 0)
        """
        require_module(model, "model", "")
        whole = {
            name
            for entry in self.plan.entries
            if entry.kind == "parameter" and not any(op.needs_target for op in entry.operations)
            for name in entry.targets
        }
        known = dict(model.named_parameters(remove_duplicate=False))
        while whole and not whole & set(known) and len(inner := list(model.children())) == 1:  # DDP, compiled modules
            model = inner[0]
            known = dict(model.named_parameters(remove_duplicate=False))
        if whole and not whole & set(known):
            raise MappingError(
                f"this is another model than the one that was filled: it has no parameter {min(whole)!r}. Pass the "
                "model that the report is about."
            )
        filled = {id(known[name]) for name in whole if name in known}
        groups: dict[str, list[nn.Parameter]] = {"loaded": [], "fresh": []}
        for parameter in model.parameters():
            groups["loaded" if id(parameter) in filled else "fresh"].append(parameter)
        return groups

    def __repr__(self) -> str:
        names = ("loaded", "missing", "ambiguous", "unused")
        counts = ", ".join(f"{len(getattr(self, name))} {name}" for name in names)
        state = "" if self.applied else "not applied, "
        share = percent(self.coverage.target.share)
        sides = f"{self.plan.source.label} -> {self.plan.target.label}"
        return printable(f"<TransferReport {sides}: {state}{share} of the model, {counts}>")

    def __str__(self) -> str:
        from lit_wsl.report.drawing import plain
        from lit_wsl.report.terminal import ReportView

        return plain(ReportView(self))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from lit_wsl.report.terminal import ReportView

        yield ReportView(self)

    def _repr_html_(self) -> str:
        from lit_wsl.report.drawing import as_html
        from lit_wsl.report.terminal import ReportView

        return as_html(ReportView(self))
