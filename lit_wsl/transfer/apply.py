"""Apply a plan: verify everything, then copy in place, all or nothing, one tensor at a time.

Peak memory. Nothing of the model's size is held beside the model: sources are read one by one (views of the mapped
file where the format allows), transformed as views where the operation allows, and copied straight into the target.
The undo log that stands behind "all or nothing" takes a fixed amount of memory: what exceeds it goes to a temporary
file. Copies that allocate nothing from sources that are open already do not fail, so they come last; in one process
they are not logged once the memory is used up. Several processes log them too, each its own part: while one is still
copying, another may have failed for reasons of its own, and then all of them have to go back.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lit_wsl.errors import LitWslError, TransferError
from lit_wsl.structure.describe import HasMeta
from lit_wsl.transfer.checks import describe_entry
from lit_wsl.transfer.copying import all_finite, copy_in_pieces, copy_into, is_plain, look_at
from lit_wsl.transfer.distributed import ALONE, Ranks, has_sharded_tensors, held_part, is_sharded
from lit_wsl.transfer.operations import run_operations
from lit_wsl.transfer.plan import PlanEntry, TransferPlan
from lit_wsl.transfer.undo import UndoLog, interrupt_later, room_on_disk

_UNDO_MEMORY = 32 << 20  # bytes the undo log may take
_VIEWS = frozenset({"permute", "transpose", "reshape", "split", "unstack", "fan_out"})  # allocate nothing, cannot fail

Progress = Callable[[str, int], None]
Look = Callable[[PlanEntry, Sequence[Tensor]], None]


@dataclass(frozen=True)
class Applied:
    """What was noticed while a plan was applied.

    Attributes:
        warnings: Things the user should look at: not a number, infinite, out of the range of the new data type.
        notes: Things worth a line: casts.
    """

    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _copy_watching(target: Tensor, value: Tensor) -> bool:
    """:func:`copy_into`, and whether all that the target holds then is finite; may be False where it is, not True."""
    if is_plain(target, value):
        return copy_in_pieces(target, value)
    copy_into(target, value)
    return all_finite(target)


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model under their state-dict names: the objects themselves, aliases of tied ones included."""
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def apply_plan(
    plan: TransferPlan,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    *,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Applied:
    """Fill a model in place by a plan that fits (:func:`lit_wsl.transfer.checks.check_plan`), all or nothing.

    First every source is read and looked at and every target is checked; then everything is copied. Ctrl-C during
    the copying is answered when the model is whole.

    Args:
        plan: The plan.
        tensors: The checkpoint's tensors by name; may read them lazily.
        model: The model to fill.
        progress: Called with ``("verify" | "copy", bytes)`` after each entry.
        ranks: The processes that fill the model together; what fails on one of them is undone on all.

    Returns:
        What was noticed on the way.

    Raises:
        TransferError: If something fails; the model is as it was before, bit for bit.
    """
    targets = live_tensors(model)
    note_progress = progress or _silent
    # The ranks of a sharded model divide the looking too; replicas each look at all that they are going to copy.
    divided = has_sharded_tensors(model)

    looks: list[str] = []

    def look(entry: PlanEntry, values: Sequence[Tensor]) -> None:
        wanted = targets[entry.targets[0]].dtype
        looks.extend(text for name, value in zip(entry.sources, values) for text in look_at(name, value, wanted))

    def verify() -> dict[tuple[str, str], int]:
        _check_targets(plan, targets, model)
        share = ranks.share(plan.entries) if divided else plan.entries
        return _verify(share, tensors, targets, note_progress, look if divided else None)

    counted = ranks.gather(ranks.together(verify))
    with interrupt_later():
        _copy(plan.entries, tensors, targets, note_progress, ranks, None if divided else look)
    warnings = dict.fromkeys(text for texts in ranks.gather(looks) for text in texts)
    casts: Counter[tuple[str, str]] = Counter()
    for counts in counted if divided else counted[:1]:
        casts.update(counts)
    return Applied(tuple(warnings), tuple(f"cast {n} tensors from {a} to {b}" for (a, b), n in sorted(casts.items())))


def _silent(stage: str, size: int) -> None:
    """Report nothing."""


def _check_targets(plan: TransferPlan, targets: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse targets that cannot be written in place."""
    held = {id(t) for t in model.parameters()} | {id(t) for t in model.buffers()}
    for entry in plan.entries:
        for name in entry.targets:
            target = targets[name]
            if nn.parameter.is_lazy(target):
                raise TransferError(
                    f"{name} belongs to a lazy module and has no shape yet. Give a sample (example_args, "
                    "example_input_array, or a datamodule), or call the model once before the transfer."
                )
            if target.is_meta:
                raise TransferError(
                    f"{name} of shape {tuple(target.shape)} is on the meta device, so there is no memory to fill. "
                    "Materialise the model first: model.to_empty(device='cpu') and its reset_parameters()."
                )
            if id(target) not in held:
                raise TransferError(
                    f"{name} is made up by the model's state_dict() and is no tensor of the model itself, so it cannot "
                    "be filled in place. Load into the inner module instead."
                )
            if target.is_inference() and not torch.is_inference_mode_enabled():
                raise TransferError(
                    f"{name} was made in torch.inference_mode() and cannot be written outside of it. Build the model "
                    "outside of it."
                )
            if any(size > 1 and stride == 0 for size, stride in zip(target.shape, target.stride())):
                raise TransferError(
                    f"{name} of shape {tuple(target.shape)} is an expanded view, several elements of which share one "
                    "place in memory, so it cannot be filled. Register it as expand(...).clone(), or leave it out with "
                    "buffers='exclude' or an edited plan."
                )
            if is_sharded(target) and any(op.needs_target for op in entry.operations):
                raise TransferError(
                    f"{entry.badge} needs the present values of {name}, which are spread over several processes. Make "
                    "the adapted checkpoint in one process first (plan.convert_checkpoint, or the convert command)."
                )


def _verify(
    entries: Sequence[PlanEntry],
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    progress: Progress,
    look: Look | None,
) -> dict[tuple[str, str], int]:
    """Open every source and run what can fail on data, so that failures surface before the first write.

    Opening reads whatever the format cannot map into memory. Mapped pages are left for the copy: touching them twice
    would take as long as the copy itself.
    """
    casts: dict[tuple[str, str], int] = {}
    for entry in entries:
        size = 0
        with _named(entry):
            values = [tensors[name] for name in entry.sources]
            for name, value in zip(entry.sources, values):
                if is_sharded(value):
                    raise TransferError(
                        f"the source's {name} is sharded. Give whole tensors: get_model_state_dict(model, "
                        "options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict."
                    )
                size += value.nbytes
            if look is not None:
                look(entry, values)
            if any(op.name == "tie" or not op.lossless for op in entry.operations):
                run_operations(entry.operations, values, [targets[name] for name in entry.targets])
        dtype, wanted = _short(values[0].dtype), _short(targets[entry.targets[0]].dtype)
        if dtype != wanted:
            casts[dtype, wanted] = casts.get((dtype, wanted), 0) + len(entry.targets)
        del values, value  # before the next is read
        progress("verify", size)
    return casts


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _copy(
    entries: Sequence[PlanEntry],
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    progress: Progress,
    ranks: Ranks,
    look: Look | None,
) -> None:
    """Copy everything; on any failure, on any rank, put back what was there."""
    own = {_storage(t) for t in targets.values()} - {0}
    # Copies that allocate can fail for want of memory, so they go first, while little has to be taken back.
    stages = [entry for entry in entries if _allocates(entry)], [entry for entry in entries if not _allocates(entry)]
    # Sources that are the model's own tensors (a model filled from itself) must all be read before any is written.
    held = ranks.together(partial(_own_values, entries, tensors, own))
    with UndoLog(_UNDO_MEMORY, spare=_UNDO_MEMORY, spill=_spills(entries, targets, ranks)) as undo:

        def copy_all(stage: Sequence[PlanEntry]) -> None:
            for entry in stage:
                with _named(entry):
                    values = [held[n] if n in held else tensors[n] for n in entry.sources]
                    outputs = [targets[name] for name in entry.targets]
                    results = run_operations(entry.operations, values, outputs)
                    for target, result in zip(outputs, results, strict=True):
                        undo.remember(held_part(target), must=_allocates(entry))
                        if look is None:
                            copy_into(target, result)
                        elif not _copy_watching(target, result):
                            look(entry, values)
                    del values, results, result  # before the next is read
                progress("copy", sum(target.nbytes for target in outputs))

        try:
            for stage in stages:
                ranks.together(partial(copy_all, stage))
        except BaseException as error:
            undo.restore()
            _admit_loss(error, undo, ranks)
            raise


def _spills(entries: Sequence[PlanEntry], targets: Mapping[str, Tensor], ranks: Ranks) -> bool:
    """Whether all that is overwritten is remembered: several processes do, where the disk has room for all on it."""
    if ranks.size == 1:
        return False
    size = sum(held_part(targets[name]).nbytes for entry in entries for name in entry.targets)
    return room_on_disk(sum(other for node, other in ranks.gather((platform.node(), size)) if node == platform.node()))


def _admit_loss(error: BaseException, undo: UndoLog, ranks: Ranks) -> None:
    """Say so if the model could not be put back as a whole; what failed failed where nothing was expected to.

    Raises:
        TransferError: If bytes were overwritten that nobody remembered.
    """
    lost = [undo.lost]
    with suppress(RuntimeError):  # a rank that is gone tells nothing
        lost = ranks.gather(undo.lost)
    if any(lost) and isinstance(error, TransferError):
        message = str(error).replace("The model is unchanged.", "").strip()
        raise TransferError(
            f"{message} This came when {sum(lost)} bytes had been overwritten for which the log that takes a failed "
            "transfer back had no room: the model is NOT as it was. Build it again."
        ) from error


def _own_values(entries: Sequence[PlanEntry], tensors: Mapping[str, Tensor], own: set[int]) -> dict[str, Tensor]:
    """Copies of the sources that share memory with the model."""
    held: dict[str, Tensor] = {}
    for entry in () if isinstance(tensors, HasMeta) else entries:  # a file's tensors are never the model's
        with _named(entry):
            held.update({n: tensors[n].clone() for n in entry.sources if _storage(tensors[n]) in own})
    return held


def _allocates(entry: PlanEntry) -> bool:
    return any(op.name not in _VIEWS for op in entry.operations)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError, ValueError):  # no one storage: sharded, lazy, sparse
        return 0


@contextmanager
def _named(entry: PlanEntry) -> Iterator[None]:
    """Say which entry failed; errors of our own that already name things pass as they are."""
    try:
        yield
    except LitWslError as error:
        raise TransferError(f"{describe_entry(entry)}: {error} The model is unchanged.") from error
    except Exception as error:
        raise TransferError(
            f"{describe_entry(entry)} failed: {type(error).__name__}: {error}. The model is unchanged."
        ) from error
