"""``transfer_weights``: put the weights of one model into another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lit_wsl.checkpoint import Checkpoint
from lit_wsl.errors import ArgumentTypeError, listed
from lit_wsl.matching.judge import judge_by_loss
from lit_wsl.matching.layouts import hidden_layouts
from lit_wsl.matching.options import BufferMode, MatchingOptions, Strategy
from lit_wsl.matching.planner import build_plan
from lit_wsl.matching.proof import prove
from lit_wsl.matching.selection import restrict, selected
from lit_wsl.plan.coverage import Coverage, check_floor, measure_coverage, valid_floor
from lit_wsl.plan.entries import PlanEntry
from lit_wsl.plan.plan import TransferPlan, check_plan, describe_entry, left_alone, loses_values
from lit_wsl.report.report import TransferReport
from lit_wsl.structure import ModelDescription
from lit_wsl.structure.description import require_batches, require_module, require_sample
from lit_wsl.structure.losses import Loss, LossMeter
from lit_wsl.structure.running import has_sharded_tensors
from lit_wsl.transfer.apply import Progress, apply_plan, live_tensors
from lit_wsl.transfer.memory import remember, shown, transfer_key
from lit_wsl.transfer.ranks import ALONE, Ranks, check_same_source
from lit_wsl.transfer.sides import OLD_MODEL, Source, Target
from lit_wsl.transfer.undo import UndoLog, only_filler


@dataclass(frozen=True)
class OnData:
    """A way to measure the model's loss."""

    loss: Loss  # ``loss(model, batch)``, a scalar, the lower the better
    batches: Iterable[Any]
    count: int = 8  # maximum number of batches
    seconds: float = 60.0  # most time
    world: Callable[[], AbstractContextManager[Any]] = nullcontext  # what to stand in while the loss is measured
    # shows how far the trials are; yields what to call with the passes so far, or ``None``
    shown: Callable[[], AbstractContextManager[Callable[[float], None] | None]] = nullcontext


@dataclass(frozen=True)
class Prepared:
    """A transfer that is planned and checked, and not yet done. Made of names, shapes and structure only."""

    plan: TransferPlan  # the plan, which fits both sides
    coverage: Coverage  # what it moves
    source: ModelDescription  # the checkpoint's side
    target: ModelDescription  # the model's side
    notes: tuple[str, ...] = ()  # remarks for the report

    def restricted(self, targets: frozenset[str]) -> Prepared:
        """The part of this transfer that fills some of these targets."""
        plan = replace(self.plan, entries=tuple(e for e in self.plan.entries if not targets.isdisjoint(e.targets)))
        return replace(self, plan=plan, coverage=measure_coverage(plan, self.source, self.target))

    def report(self, *, warnings: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> TransferReport:
        """The report of this transfer."""
        return TransferReport.of(
            self.plan,
            self.coverage,
            self.source,
            self.target,
            warnings=warnings,
            notes=(*self.notes, *self.plan.notes, *notes),
        )


def transfer_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor] | nn.Module,
    *,
    example_args: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    buffers: BufferMode = "lenient",
    strategy: Strategy = "best_match",
    threshold: float = 0.6,
    weights: Mapping[str, float] | None = None,
    incompatible_pairs: Sequence[tuple[Any, Any]] | None = None,
    plan: TransferPlan | str | Path | None = None,
    min_coverage: float = 0.5,
    source_module: nn.Module | None = None,
    shape_tolerance: float = 0.0,
    adapt: Sequence[str] = (),
    assume_layouts: bool = False,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    source_prefix: str | None = None,
    checkpoint_weights: Literal["auto", "model", "ema"] = "auto",
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
) -> TransferReport:
    """Put the weights of one model into another, in place, all or nothing.

    The model remembers it: a callback that comes later fills what is new in it only, and nothing that was trained. This
    function itself always does what it is asked for.

    Args:
        model: The model to fill.
        source: A checkpoint file of any format, a state dict, or a module.
        example_args: Positional arguments of one sample call of ``model``, from which its execution order is read.
            A call that fails costs nothing but a note in the report.
        example_kwargs: Keyword arguments of that call.
        buffers: ``"exclude"`` ignores buffers, ``"lenient"`` takes them along where they fit, ``"strict"`` asks that
            all of a module's buffers match.
        strategy: ``"best_match"``, ``"conservative"`` (scores of at least 0.75) or ``"shape_only"`` (ignores names).
        threshold: Minimum score of a match, 0 to 1.
        weights: Weights of ``shape``, ``name`` and ``hierarchy`` in the score, scaled to a sum of 1.
        incompatible_pairs: Pairs of sets of name chunks that must not match across, both ways, such as
            ``[({"backbone"}, {"head"})]``.
        shape_tolerance: Relative difference up to which the sizes of two buffers count as near (0.1: a tenth). What
            is near is not loaded, but ``"strict"`` does not refuse its module for it. Parameters never match across
            different shapes.
        plan: A plan, or the path of one, to replay instead of matching.
        min_coverage: Minimum share, 0 to 1, of the elements that must find a place (of the checkpoint's or of the
            model's, whichever share is larger); buffers count unless they are excluded.
        source_module: The module the checkpoint was saved from, for users who still have the old code.
        adapt: Operations that change values, asked for by name.
        assume_layouts: You know that both models order the rows of queries and keys alike, and cut patches alike.
            Without, what only the function could show stays ambiguous, unless the old model and a sample prove it.
        only: Patterns (``"encoder.*"``) of names of the model, or of its modules: only these are filled.
        skip: Patterns of names of the model that are never filled.
        source_prefix: Only what stands under this name in the checkpoint takes part, such as ``"student.backbone"``.
        checkpoint_weights: Which weights of the file: the ``"model"``'s, its ``"ema"``, or what it marks as its own.
        loss: The model's loss on one batch, ``loss(model, batch)``, a scalar, the lower the better: proof on data. What
            names leave open is tried on ``batches``, and taken where every rival is significantly worse.
        batches: Batches of the training data, of which at most the first eight are used.

    Returns:
        What was loaded, what was not, and why.

    Raises:
        CheckpointError: If the file cannot be read.
        MappingError: If an option is wrong or a side holds no tensors.
        PlanError: If the given plan does not fit.
        CoverageError: If too little matches.
        TransferError: If something fails while the weights are copied. After any error the model is as it was.

    >>> import torch
    >>> old = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> new = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> report = transfer_weights(new, old.state_dict())
    >>> report.coverage.target.share, report.missing
    (1.0, ())
    >>> x = torch.randn(5, 3)
    >>> torch.equal(old(x), new(x))
    True
    """
    options = MatchingOptions.of(locals())
    require_module(model, "model")
    require_sample(example_args, example_kwargs)
    if source_module is not None:
        require_module(source_module, "source_module", OLD_MODEL)
    if (loss is None) != (batches is None) or not callable(loss or print):
        raise ArgumentTypeError(
            "a proof on data needs both: loss=, a function of the model and a batch, and batches=, a DataLoader."
        )
    if batches is not None:
        require_batches(batches)
    floor = valid_floor(min_coverage)
    with only_filler(model):
        ranks = Ranks.of_model(model)
        samples = [(example_args, dict(example_kwargs or {}))] if example_args or example_kwargs else []
        opened = ranks.together(lambda: Source.open(source, checkpoint_weights, old=source_module, samples=samples))
        target = Target.of(model, samples)
        data = [OnData(loss, batches if batches is not None else ())] if loss is not None else []
        prepared = prepare_transfer(opened, target, options, plan=plan, min_coverage=floor, ranks=ranks, data=data)
        report = finish_transfer(prepared, opened.tensors, target, ranks=ranks)
        remember(model, transfer_key(source, options.to_dict(), plan, checkpoint_weights), shown(source), filled=True)
        return report


def prepare_transfer(
    source: Source,
    target: Target,
    options: MatchingOptions,
    *,
    plan: TransferPlan | str | Path | None = None,
    min_coverage: float = 0.5,
    ranks: Ranks = ALONE,
    data: Sequence[OnData] = (),
) -> Prepared:
    """Match both sides or take the given plan, and check it. Changes nothing, reads no tensor data.

    Of several processes all have made the sample call, since it may communicate (a sharded model is run as a copy
    without memory, which does not); rank zero makes the plan, and the others check that it fits what they see.
    """
    prepared = ranks.once(lambda: _plan_transfer(source, target, options, plan, min_coverage, data))
    ranks.together(lambda: None if ranks.is_zero else check_plan(prepared.plan, source.file, target.description))
    check_same_source(ranks, source.tensors, [name for entry in prepared.plan for name in entry.sources])
    remarks = [remark for remark in (target.remark, _outside_state_dict(target.model)) if remark]
    return replace(prepared, notes=(*prepared.notes, *remarks))


def _outside_state_dict(model: nn.Module) -> str:
    """Which parameters a model's own ``state_dict`` leaves out, as for a frozen part that is loaded elsewhere."""
    inside = {id(tensor) for tensor in live_tensors(model).values()}
    outside = [name for name, parameter in model.named_parameters() if id(parameter) not in inside]
    count = f"{len(outside)} parameters are" if len(outside) > 1 else "1 parameter is"
    return f"{count} not in the model's state_dict() and left as before: {listed(outside, 5)}" if outside else ""


def _plan_transfer(
    source: Source,
    target: Target,
    options: MatchingOptions,
    plan: TransferPlan | str | Path | None,
    min_coverage: float,
    data: Sequence[OnData],
) -> Prepared:
    """The part of :func:`prepare_transfer` that one process does for all."""
    notes: list[str] = list(source.tensors.notes) if isinstance(source.tensors, Checkpoint) else []
    theirs, ours = source.description, target.description
    if plan is not None:
        chosen = plan if isinstance(plan, TransferPlan) else TransferPlan.load(plan)
    else:
        chosen = _match(source, target, options)
        if data and not options.source_prefix:
            chosen = restrict(_prove_on_data(chosen, source, target, data), theirs, ours, options)
        chosen, dropped = _without_losses(chosen, theirs, ours)
        notes += dropped
    chosen, dropped = _leave_alone(chosen, ours)
    notes += dropped
    check_plan(chosen, theirs, ours)
    coverage = measure_coverage(chosen, theirs, ours)
    asked = coverage
    if plan is None and (options.only or options.skip):
        free = selected(ours, options)
        part = replace(ours, parameters=tuple(i for i in ours.parameters if i.name in free))
        asked = measure_coverage(chosen, theirs, part)
    check_floor(chosen, asked, theirs, ours, min_coverage)
    return Prepared(chosen, coverage, theirs, ours, tuple(notes))


def _match(source: Source, target: Target, options: MatchingOptions) -> TransferPlan:
    """The plan by structure and names, proven by function where the old code is at hand."""
    theirs, ours = source.description, target.description
    runs = bool(target.samples) and not has_sharded_tensors(target.model)  # this is rank zero alone
    old = source.module if runs and source.module is not target.model else None
    if old is None:
        return build_plan(theirs, ours, options)
    plan = build_plan(theirs, ours, options, assume_layouts=True)
    unseen = {} if options.assume_layouts else hidden_layouts(plan, theirs, ours)
    return restrict(prove(plan, old, target.model, target.samples, unseen=unseen), theirs, ours, options)


def _prove_on_data(plan: TransferPlan, source: Source, target: Target, data: Sequence[OnData]) -> TransferPlan:
    """Let the loss decide what is open, by the first way that works; what the function proved needs no other proof."""
    if plan.proof == "proven":
        return plan
    sides = source.description, target.description
    failed: list[TransferPlan] = []
    for way in data:
        with way.shown() as watch, way.world():
            meter = LossMeter(target.model, way.loss, islice(way.batches, way.count), watch)
            judged = judge_by_loss(plan, sides, source.tensors, meter, seconds=way.seconds)
        if judged.measured is not None:
            return judged
        failed.append(judged)
    return failed[0] if failed else plan


def finish_transfer(
    prepared: Prepared,
    tensors: Mapping[str, Tensor],
    target: Target,
    *,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    only: frozenset[str] | None = None,
    undo: UndoLog | None = None,
) -> TransferReport:
    """Apply a prepared transfer, all or nothing, and report."""
    if only is not None:
        prepared = prepared.restricted(only)
    make_lazy = target.materialise() if prepared.plan.entries else lambda: None
    if undo is not None:
        undo.later("lazy modules", make_lazy)
    try:
        applied = apply_plan(prepared.plan, tensors, target.model, progress=progress, ranks=ranks, only=only, undo=undo)
    except BaseException as error:
        if undo is None and not getattr(error, "not_restored", ()):  # filled whole, or in part: not lazy any more
            make_lazy()
        raise
    changing = [describe_entry(entry) for entry in prepared.plan.entries if entry.changes_values]
    changed = (f"values were changed, as asked for: {text}" for text in changing)
    warnings = (*_refuted(prepared.plan), *applied.warnings)
    return prepared.report(warnings=warnings, notes=(*changed, *applied.notes))


def _refuted(plan: TransferPlan) -> Iterator[str]:
    """Warnings about a plan that was found wrong, or that its data does not bear out."""
    if plan.proof == "refuted":
        yield f"the {plan.proof_by} check refuted this plan: {plan.notes[-1]}"
    if plan.measured is not None and plan.measured.rises:
        yield (
            f"the loss is no better than before the transfer ({plan.measured.fresh:.4g} fresh, "
            f"{plan.measured.transferred:.4g} transferred): the wrong checkpoint, or a broken mapping"
        )


def _without_losses(
    plan: TransferPlan, source: ModelDescription, target: ModelDescription
) -> tuple[TransferPlan, list[str]]:
    """Take entries out of a matched plan whose values the target's kind of number cannot hold.

    A script that halves every tensor of a checkpoint halves the counters too; that must not cost the whole transfer.
    """

    def loses(entry: PlanEntry) -> bool:
        return any(loses_values(source[s].dtype, target[t].dtype) for s in entry.sources for t in entry.targets)

    entries = tuple(entry for entry in plan.entries if not loses(entry))
    lost = [
        f"left alone: {describe_entry(e)}, since {source[e.sources[0]].dtype} does not fit into "
        f"{target[e.targets[0]].dtype}"
        for e in plan.entries
        if loses(e)
    ]
    shown = [*lost[:3], f"and {len(lost) - 3} more like these"] if len(lost) > 3 else lost
    return (replace(plan, entries=entries), shown) if lost else (plan, [])


def _leave_alone(plan: TransferPlan, target: ModelDescription) -> tuple[TransferPlan, list[str]]:
    """Take entries out of a plan that would write into packed or quantised weights."""
    packed = {info.name for info in target.parameters if left_alone(info)}
    entries = tuple(e for e in plan.entries if not any(target.tied.get(n, n) in packed for n in e.targets))
    if len(entries) == len(plan.entries):
        return plan, []
    names = sorted({n for e in plan.entries for n in e.targets if n in packed})
    note = f"left alone, quantised or packed: {listed(names, 5)}"
    return replace(plan, entries=entries), [note]
