"""Apply a plan: verify everything, then copy in place, all or nothing, one tensor at a time.

Peak memory. Nothing of the model's size is held beside the model: sources are read one by one (views of the mapped
file where the format allows), transformed as views where the operation allows, and copied straight into the target.
The undo log that stands behind "all or nothing" takes a fixed amount of memory: what exceeds it goes to a temporary
file. Copies that allocate nothing from sources that are open already do not fail, so they come last; in one process
they are not logged once the memory is used up. Several processes log them too, each its own part: while one is still
copying, another may have failed for reasons of its own, and then all of them have to go back.
"""

from __future__ import annotations

import math
import platform
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lit_wsl.errors import LitWslError, TransferError
from lit_wsl.plan.entries import PlanEntry
from lit_wsl.plan.operations import Cast, run_operations
from lit_wsl.plan.plan import TransferPlan, describe_entry
from lit_wsl.structure.description import HasMeta, dtype_text
from lit_wsl.structure.running import has_sharded_tensors, is_sharded
from lit_wsl.transfer.ranks import ALONE, Ranks, copy_into_shard, held_part, local_part
from lit_wsl.transfer.undo import UndoLog, admit_loss, interrupt_later, only_filler, room_on_disk, same_bits

_PIECE = 1 << 18  # bytes; one of the target and one of the source fit every second-level cache
_THREADS_PIECE = 1 << 20  # threads wait for the interpreter between two pieces, so theirs are larger
_STRETCH = 1 << 23  # bytes that a thread takes at a time
_MOST_THREADS = 8  # more do not copy faster: the memory is the limit, and they wait for each other between two pieces
_CHUNK = 1 << 24  # elements looked at in one go; bounds the temporary memory of a check
_Array = np.ndarray  # one-dimensional


def copy_into(target: Tensor, value: Tensor) -> None:
    """Copy a value into a tensor of the model, in place; dtype, device, identity and ``requires_grad`` stay."""
    if is_sharded(target):
        copy_into_shard(target, value)
        return
    with torch.no_grad():
        target.copy_(value)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity, by sums, which are finite only if every term is.

    False also where a sum overflows though no term does, so that whoever asks looks closely then. True for what is not
    floating point, and for sharded tensors, at which nobody looks here.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0 or is_sharded(tensor):
        return True
    with torch.no_grad():
        chunks = tensor.view(-1).split(_CHUNK) if tensor.is_contiguous() else (tensor,)
        # torch sums no 8-bit numbers, and sums of 16-bit numbers in 16 bits overflow
        wide = (chunk.float() if chunk.element_size() < 4 else chunk for chunk in chunks)
        return bool(torch.isfinite(torch.stack([chunk.sum() for chunk in wide])).all())


def look_at(name: str, value: Tensor, wanted: torch.dtype) -> Iterator[str]:
    """Yield a warning for values that are not finite, or that the target's dtype cannot hold."""
    if not value.is_floating_point() or value.numel() == 0:
        return
    flat = value.detach().reshape(-1)
    narrow = wanted.is_floating_point and torch.finfo(wanted).max < torch.finfo(value.dtype).max
    bad = over = 0
    for chunk in flat.split(_CHUNK):
        wide = chunk.float() if chunk.dtype.itemsize < 4 else chunk
        if not bool(torch.isfinite(wide.sum())):
            bad += int((~torch.isfinite(wide)).sum())
        if narrow:
            over += int((chunk.to(wanted).isinf() & ~chunk.isinf()).sum())
    if bad:
        yield f"{name} {tuple(value.shape)}: {bad} of {value.numel()} values are not finite (NaN or infinite)"
    if over:
        shape, kind = tuple(value.shape), dtype_text(wanted)
        yield f"{name} {shape}: {over} values are out of the range of {kind} and become infinite"


def is_plain(target: Tensor, value: Tensor) -> bool:
    """Whether :func:`copy_in_pieces` takes this pair: large, in main memory, dense, floating point, in one order."""
    return (
        target.dtype in _CHECKS
        and target.nbytes > _PIECE
        and target.shape == value.shape
        and all(
            type(t) in (Tensor, nn.Parameter)
            and t.device.type == "cpu"
            and t.layout is torch.strided
            and t.is_contiguous()
            and not t.is_neg()
            for t in (target, value)
        )
    )


def copy_in_pieces(target: Tensor, value: Tensor) -> bool:
    """:func:`copy_into` for a pair that :func:`is_plain`, and whether all that the target holds then is finite.

    False also where squares of single precision, or sums of double, overflow though no value is infinite, so that
    whoever asks looks closely then. As many threads work as torch would use for the copy.
    """
    flat, source = target.detach().view(-1), value.detach().view(-1)
    threads = min(torch.get_num_threads(), _MOST_THREADS, target.nbytes // _STRETCH)
    if threads > 1 and source.dtype == flat.dtype:
        finite = _copy_shared(flat, source, threads)
    else:
        with torch.no_grad():
            finite = _copy_stretch(flat, source, _PIECE)
    if not target.is_inference():  # autograd notices a write that comes too early, as it does with copy_
        torch.autograd.graph.increment_version(target)
    return finite


def _copy_shared(target: Tensor, value: Tensor, threads: int) -> bool:
    """Several threads, this one among them, take stretch after stretch: none waits for one that came late.

    They pay where the pages of a mapped file have to be brought in, which is most of the time that a checkpoint takes;
    of what is in memory already they copy no more (``python -m benchmarks.decisions copying``).
    """
    length = _STRETCH // target.element_size()
    left = deque(zip(target.split(length), value.split(length), strict=True))

    def work() -> bool:
        finite = True
        while True:
            try:
                into, source = left.popleft()
            except IndexError:
                return finite
            finite = _copy_stretch(into, source, _THREADS_PIECE) and finite

    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work) for _ in range(threads - 1)]
        return all([work(), *(other.result() for other in others)])


def _copy_stretch(target: Tensor, value: Tensor, piece: int) -> bool:
    """Copy and check by pieces of so many bytes; both are one-dimensional."""
    check, step = _CHECKS[target.dtype], piece // target.element_size()
    into = _as_array(target)
    source = _as_array(value) if value.dtype == target.dtype else None
    finite = True
    with np.errstate(all="ignore"):
        for start in range(0, len(into), step):
            copied = into[start : start + step]
            if source is not None:
                np.copyto(copied, source[start : start + step])
            else:
                target[start : start + step].copy_(value[start : start + step])
            finite = finite and check(copied)
    return finite


def _as_array(tensor: Tensor) -> _Array:
    """The same memory as an array; 16-bit numbers as integers, since NumPy knows no bfloat16."""
    return (tensor.view(torch.int16) if tensor.element_size() == 2 else tensor).numpy()


def _squares_finite(piece: _Array) -> bool:
    return math.isfinite(piece.dot(piece))


def _sum_finite(piece: _Array) -> bool:
    """For doubles: their products are shared among threads, which a busy machine makes a thousand times slower."""
    return math.isfinite(piece.sum())


def _exponents_below(limit: int) -> Callable[[_Array], bool]:
    """A check for 16-bit numbers in their bits: from ``limit`` on, sign apart, they are infinite or not a number."""

    def check(piece: _Array) -> bool:
        # as signed integers the positive numbers are the largest, as unsigned ones the negative
        return bool(piece.max() < limit and piece.view(np.uint16).max() < 0x8000 | limit)

    return check


_CHECKS: dict[torch.dtype, Callable[[_Array], bool]] = {
    torch.float32: _squares_finite,
    torch.float64: _sum_finite,
    torch.float16: _exponents_below(0x7C00),
    torch.bfloat16: _exponents_below(0x7F80),
}

_UNDO_MEMORY = 16 << 20  # bytes the undo log may take
_VIEWS = frozenset({"permute", "transpose", "reshape", "split", "unstack", "fan_out"})  # allocate nothing, cannot fail
Progress = Callable[[str, int], None]
Look = Callable[[PlanEntry, Sequence[Tensor]], None]


@dataclass(frozen=True)
class Applied:
    """What was noticed while a plan was applied."""

    # things the user should look at: not a number, infinite, out of the range of the new data type
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # things worth a line: casts


def _copy_watching(target: Tensor, value: Tensor) -> bool:
    """:func:`copy_into`, and whether all that the target holds then is finite; may be False where it is, not True."""
    if is_plain(target, value):
        return copy_in_pieces(target, value)
    copy_into(target, value)
    return all_finite(target)


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model under their state-dict names: the objects themselves, aliases of tied ones included."""
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


@dataclass(frozen=True)
class _Job:
    """What is copied where; the same for all steps of one application."""

    entries: Sequence[PlanEntry]
    tensors: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    progress: Progress
    ranks: Ranks
    look: Look | None
    only: Container[str] | None

    def written(self, entry: PlanEntry) -> list[str]:
        """The targets of an entry that are written."""
        return [name for name in entry.targets if self.only is None or name in self.only]


def apply_plan(
    plan: TransferPlan,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    *,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    only: Container[str] | None = None,
    undo: UndoLog | None = None,
) -> Applied:
    """Fill a model in place by a plan that fits (:func:`lit_wsl.plan.plan.check_plan`), all or nothing.

    First every source is read and looked at and every target is checked; then everything is copied. Signals during
    the copying are answered between two tensors as long as all can be taken back, Ctrl-C when every tensor is written.
    """
    targets = live_tensors(model)
    note_progress = progress or (lambda stage, size: None)
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

    with only_filler(model):
        counted = ranks.gather(ranks.together(verify))
        _copy(_Job(plan.entries, tensors, targets, note_progress, ranks, None if divided else look, only), undo)
    warnings = dict.fromkeys(text for texts in ranks.gather(looks) for text in texts)
    casts: Counter[tuple[str, str]] = Counter()
    for counts in counted if divided else counted[:1]:
        casts.update(counts)
    rounds = {kinds: ", which rounds them" if Cast(*kinds).rounds else "" for kinds in casts}
    told = (f"cast {n} tensors from {a} to {b}{rounds[a, b]}" for (a, b), n in sorted(casts.items()))
    return Applied(tuple(warnings), tuple(told))


def holds(plan: TransferPlan, tensors: Mapping[str, Tensor], model: nn.Module, apart_from: Container[str] = ()) -> bool:
    """Whether a model has every value that a plan would give it, in the parts of them that this process holds."""
    targets = live_tensors(model)
    for entry in plan.entries:
        if all(name in apart_from for name in entry.targets):
            continue
        if entry.changes_values:
            return False
        outputs = [targets[name] for name in entry.targets]
        values = run_operations(entry.operations, [tensors[name] for name in entry.sources], outputs)
        for name, value in zip(entry.targets, values, strict=True):
            part = local_part(value, targets[name]) if is_sharded(targets[name]) else value
            if name not in apart_from and not _holds(held_part(targets[name]), part):
                return False
    return True


def _holds(target: Tensor, value: Tensor) -> bool:
    return same_bits(target, value.to(target.device, target.dtype))


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
        dtype, wanted = dtype_text(values[0].dtype), dtype_text(targets[entry.targets[0]].dtype)
        if dtype != wanted:
            casts[dtype, wanted] = casts.get((dtype, wanted), 0) + len(entry.targets)
        del values, value  # before the next is read
        progress("verify", size)
    return casts


def _copy(job: _Job, given: UndoLog | None) -> None:
    """Copy everything; on any failure, on any rank, put back what was there."""
    # What can fail comes first, while little has to be taken back: for want of memory, or of the file.
    stages = [e for e in job.entries if _allocates(e)], [e for e in job.entries if not _allocates(e)]
    # Sources that are the model's own tensors (a model filled from itself) must all be read before any is written.
    own = {_storage(t) for t in job.targets.values()} - {0}
    held = job.ranks.together(partial(_own_values, job.entries, job.tensors, own))
    shared = _sharing({name: job.targets[name] for entry in job.entries for name in job.written(entry)})
    spill = _spills(job) or _reads(job.tensors)
    with interrupt_later() as answer, ExitStack() as stack:
        undo = given or stack.enter_context(UndoLog(_UNDO_MEMORY, spill=spill))

        def copy_all(stage: Sequence[PlanEntry]) -> None:
            for entry in stage:
                if not undo.lost:
                    answer()
                with _named(entry):
                    values = [held[n] if n in held else job.tensors[n] for n in entry.sources]
                    outputs = [job.targets[name] for name in entry.targets]
                    results = run_operations(entry.operations, values, outputs)
                    for name, target, result in zip(entry.targets, outputs, results, strict=True):
                        if job.only is not None and name not in job.only:
                            continue
                        must = given is not None or name in shared or _allocates(entry) or _is_foreign(target)
                        undo.remember(held_part(target), must=must, name=name)
                        if job.look is None:
                            copy_into(target, result)
                        elif not _copy_watching(target, result):
                            job.look(entry, values)
                    del values, results, result  # before the next is read
                job.progress("copy", sum(target.nbytes for target in outputs))

        def end() -> None:
            _check_shared(job, held, shared)
            if not undo.lost:
                answer()

        try:
            for stage in stages:
                job.ranks.together(partial(copy_all, stage))
            job.ranks.together(end)
        except BaseException as error:
            told = _take_back(error, undo, job.ranks)
            if told is error:
                raise
            raise told from error
        try:
            answer()
        except BaseException as error:  # too late to take back, and every tensor is written
            names = tuple(name for entry in job.entries for name in job.written(entry))
            raise admit_loss(error, names, whole=True) from error


def _take_back(error: BaseException, undo: UndoLog, ranks: Ranks) -> BaseException:
    """Put back what was there; the error to raise names what is not as it was, on any rank."""
    names = (*undo.restore(), *undo.lost_names)
    with suppress(RuntimeError):  # a rank that is gone tells nothing
        names = tuple(name for told in ranks.gather(names) for name in told)
    return admit_loss(error, names)


def _sharing(targets: Mapping[str, Tensor]) -> frozenset[str]:
    """The names of targets that may share memory with another: their spans in it overlap."""
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for name, target in targets.items():
        place = 0 if is_sharded(target) else _storage(target)
        if place and target.numel():
            start = int(target.storage_offset()) * target.element_size()
            length = int(1 + sum((size - 1) * stride for size, stride in zip(target.shape, target.stride())))
            spans.setdefault(place, []).append((start, start + length * target.element_size(), name))
    found: set[str] = set()
    for those in spans.values():
        end, last = -1, ""
        for start, stop, name in sorted(those):
            if start < end:
                found |= {last, name}
            if stop > end:
                end, last = stop, name
    return frozenset(found)


def _check_shared(job: _Job, held: Mapping[str, Tensor], shared: frozenset[str]) -> None:
    """Refuse tensors that share memory and want different values in it."""
    for entry in job.entries if shared else ():
        if shared.isdisjoint(entry.targets) or any(op.needs_target for op in entry.operations):
            continue
        values = [held[n] if n in held else job.tensors[n] for n in entry.sources]
        outputs = [job.targets[name] for name in entry.targets]
        for name, target, result in zip(entry.targets, outputs, run_operations(entry.operations, values, outputs)):
            if name in shared and name in job.written(entry) and not _holds(target, result):
                others = ", ".join(sorted(n for n in shared - {name} if _storage(job.targets[n]) == _storage(target)))
                raise TransferError(
                    f"{name} {tuple(target.shape)} and {others} share memory in the model, and the checkpoint has "
                    "different values for it, so they cannot all be filled. Give one memory of its own (clone() where "
                    "it is made), or take it out of the plan. The model is unchanged."
                )


def _spills(job: _Job) -> bool:
    """Whether all that is overwritten is remembered: several processes do, where the disk has room for all on it."""
    if job.ranks.size == 1:
        return False
    size = sum(held_part(job.targets[name]).nbytes for entry in job.entries for name in job.written(entry))
    told = job.ranks.gather((platform.node(), size))
    return room_on_disk(sum(other for node, other in told if node == platform.node()))


def _reads(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a source may have to be read anew when its tensors are asked for again, which may fail."""
    in_memory = isinstance(tensors, dict) and type(tensors).__getitem__ is dict.__getitem__
    return not in_memory and getattr(tensors, "lazy", True)


def _is_foreign(target: Tensor) -> bool:
    """Whether writing to a tensor is its own class's business."""
    return not is_sharded(target) and type(target) not in (Tensor, nn.Parameter, nn.Buffer)


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
