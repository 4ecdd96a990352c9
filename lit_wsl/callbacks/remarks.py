"""What a user should know of a transfer beside its coverage: which weights were replaced or kept, who has copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lit_wsl.callbacks.lifecycle import mind_copies
from lit_wsl.callbacks.state_dicts import given_while_built
from lit_wsl.errors import counted, listed
from lit_wsl.report.report import TransferReport
from lit_wsl.transfer.memory import given_by_hand, recall, was_trained_here

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lit_wsl.convert.resume import Resume

ON_PURPOSE = "give again=True, or call transfer_weights, to fill it on purpose"


class Before(NamedTuple):
    """What a model held before it was filled.

    Attributes:
        by_hand: The modules that somebody gave weights of unknown origin.
        trained: Whether it was trained in this process without a transfer, and loses that unasked.
        only: The tensors that are to be filled, because they were built anew; ``None`` for all.
    """

    by_hand: list[str]
    trained: bool
    only: frozenset[str] | None

    @classmethod
    def look(cls, model: nn.Module, only: frozenset[str] | None, *, again: bool) -> Before:
        """Look at a model that is about to be filled; ``again`` if that was asked for though it may be trained."""
        anew = only is None and not again
        return cls(given_by_hand(model), anew and recall(model) is None and was_trained_here(model), only)


def remarked(
    report: TransferReport,
    trainer: pl.Trainer,
    callback: pl.Callback,
    model: nn.Module,
    before: Before,
    *,
    late: bool,
    resuming: Resume | None,
) -> TransferReport:
    """The report of a filled model with its warnings and notes, which are printed too; copies get their share."""
    file = report.plan.source.label
    warnings, notes = mind_copies(trainer, model, callback, report.loaded, late=late, resuming=resuming)
    kept = given_by_hand(model)
    replaced = [path for path in (*before.by_hand, *given_while_built(model)) if path not in kept]
    if replaced := _written(replaced, report.loaded):
        warnings += (
            f"{given(replaced, model)}, now replaced by those of {file}; if they were trained, "
            "leave this callback out, or load them with load_from_checkpoint or ckpt_path=",
        )
    if kept:
        warnings += (f"{given(kept, model)}, and this run only evaluates it, so they were kept; {ON_PURPOSE}",)
    if before.trained:
        warnings += (
            f"weights of {type(model).__name__} that were trained before in this process were replaced by those "
            f"of {file}; if that was not intended, leave this callback out",
        )
    for warning in warnings:
        rank_zero_warn(f"Weight transfer: {warning}.")
    if before.only is not None:
        notes += (_of_a_part(report, before.only),)
        rank_zero_info(f"Weight transfer: {notes[-1]}.")
    return report.with_remarks(warnings=warnings, notes=notes)


def given(paths: Sequence[str], model: nn.Module) -> str:
    """That some modules were given weights by hand."""
    named = [path or type(model).__name__ for path in paths]
    return f"{counted(named, 3)} held weights that load_state_dict gave before"


def _written(paths: Sequence[str], loaded: Sequence[str]) -> list[str]:
    """Those modules into which something was loaded."""
    return [path for path in paths if any(not path or name.startswith(f"{path}.") for name in loaded)]


def _of_a_part(report: TransferReport, only: frozenset[str]) -> str:
    """What to say of a transfer into those layers only that were built anew."""
    filled = [name for name in report.loaded if name in only]
    empty = sorted(only - set(filled))
    note = f"the model was filled before; {len(filled)} tensors that are new in it since were filled, and no others"
    left = f" ({listed(empty, 5)} found no source)" if empty else ""
    return note + left
