"""Copying into the tensors of a model, and noticing on the way whether what was copied is finite.

A weight that is not a number ruins a training run hours later, so every value is looked at. Reading a large model a
second time would take half as long as copying it; looking at each piece while it lies in the processor's cache costs a
tenth. Pieces of that size are so many that the calls count, and NumPy's cost a third of torch's.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn

from lit_wsl.transfer.distributed import copy_into_shard, is_sharded

_PIECE = 1 << 18  # bytes; one of the target and one of the source fit every second-level cache
_THREADS_PIECE = 1 << 20  # threads wait for the interpreter between two pieces, so theirs are larger
_STRETCH = 1 << 23  # bytes that a thread takes at a time
_MOST_THREADS = 8  # more do not copy faster: the memory is the limit, and they wait for each other between two pieces
_CHUNK = 1 << 24  # elements looked at in one go; bounds the temporary memory of a check

_Array = np.ndarray  # one-dimensional


def copy_into(target: Tensor, value: Tensor) -> None:
    """Copy a value into a tensor of the model, in place; dtype, device, identity and ``requires_grad`` stay.

    Args:
        target: The model's tensor; of a sharded one, each rank fills the part that it holds.
        value: A tensor of the same shape, on any device, of any dtype.
    """
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
        kind = str(wanted).removeprefix("torch.")
        yield f"{name} {tuple(value.shape)}: {over} values are out of the range of {kind} and become infinite"


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

    False also where squares of single or double precision overflow though no value is infinite, so that whoever asks
    looks closely then. As many threads work as torch would use for the copy.
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
    """Several threads, this one among them, take stretch after stretch: none waits for one that came late."""
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


def _exponents_below(limit: int) -> Callable[[_Array], bool]:
    """A check for 16-bit numbers in their bits: from ``limit`` on, sign apart, they are infinite or not a number."""

    def check(piece: _Array) -> bool:
        # as signed integers the positive numbers are the largest, as unsigned ones the negative
        return bool(piece.max() < limit and piece.view(np.uint16).max() < 0x8000 | limit)

    return check


_CHECKS: dict[torch.dtype, Callable[[_Array], bool]] = {
    torch.float32: _squares_finite,
    torch.float64: _squares_finite,
    torch.float16: _exponents_below(0x7C00),
    torch.bfloat16: _exponents_below(0x7F80),
}
