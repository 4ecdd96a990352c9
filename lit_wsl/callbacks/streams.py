"""Batches of what can be read only once: a forked copy of the process reads them, so nothing is taken from the run.

A stream (``IterableDataset``, generator, a loader that is not PyTorch's) moves on when it is read. The copy has its
own memory, as a data loader's worker has, so generators and counters of the run stay where they are. What both
processes share is put back or cut off: positions in open files; pipes and sockets, which the copy does not have.
"""

from __future__ import annotations

import os
import pickle
import signal
import stat
import sys
import time
import warnings
from collections.abc import Generator, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any

import torch

from lit_wsl.errors import reason
from lit_wsl.structure.losses import NoDataError

WAIT = 30.0  # seconds for the first batch and for all others together


class NoSampleError(NoDataError):
    """A place that could have had a sample has none; the reason in words."""


def stream(loader: Any, seconds: float = WAIT) -> Generator[Any, None, None]:
    """Yield a loader's batches, read by a copy of this process that ends with the iterator.

    A ``DataLoader`` is read without workers of its own. Refused where no batch comes in time, or no copy can be made.
    """
    if not sys.platform.startswith("linux"):
        raise NoSampleError("the data set is a stream, and reading from it would take samples away from the run")
    positions = _positions()
    ours, theirs = Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of several threads; workers fork all the same
        child = os.fork()
    if child == 0:
        _serve(loader, theirs)
    theirs.close()
    try:
        with ours:
            yield from _received(ours, seconds)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for number, position in positions.items():
            with suppress(OSError):
                os.lseek(number, position, os.SEEK_SET)


def first_of_stream(loader: Any) -> Any:
    """The first batch of a stream."""
    batches = stream(loader)
    try:
        return next(batches)
    finally:
        batches.close()


def _received(pipe: Connection, seconds: float) -> Iterator[Any]:
    """What the copy sends, until it has no more or something fails."""
    count = 0
    while True:
        started = time.monotonic()
        if not pipe.poll(seconds):
            error = f"no batch of the stream within {seconds:.0f} seconds"
        else:
            try:
                batch, error = pickle.loads(pipe.recv_bytes())
            except EOFError:
                batch, error = None, "the process that read the stream has ended"
            if not error:
                yield batch
                count += 1
                seconds = max(0.0, seconds - (time.monotonic() - started))
                continue
        if count == 0:
            raise NoSampleError(error)
        return


def _serve(loader: Any, pipe: Connection) -> None:
    """The copy's work: send batches until there is no more, and end without anything that a process does at its end."""
    try:
        _cut_off(pipe.fileno())
        torch.set_num_threads(1)
        for name, value in (("num_workers", 0), ("timeout", 0), ("pin_memory", False), ("prefetch_factor", None)):
            if isinstance(loader, torch.utils.data.DataLoader):
                setattr(loader, name, value)
        for batch in loader:
            pipe.send_bytes(pickle.dumps((batch, "")))
        pipe.send_bytes(pickle.dumps((None, "the stream is at its end")))
    except BaseException as error:
        with suppress(BaseException):
            pipe.send_bytes(pickle.dumps((None, reason(error))))
    finally:
        os._exit(0)


def _open_files() -> Iterator[tuple[int, int]]:
    """Numbers and modes of the open files, sockets and pipes of this process."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            yield int(name), os.fstat(int(name)).st_mode


def _positions() -> dict[int, int]:
    """Where each open file is being read."""
    found = {}
    for number, mode in _open_files():
        if stat.S_ISREG(mode):
            with suppress(OSError):
                found[number] = os.lseek(number, 0, os.SEEK_CUR)
    return found


def _cut_off(kept: int) -> None:
    """Let nothing that both processes share be read or written by this one but its pipe and plain files."""
    import fcntl

    nothing = os.open(os.devnull, os.O_RDWR)
    for number, mode in list(_open_files()):
        if number in (kept, nothing):
            continue
        is_written = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
        if number in (1, 2) or is_written or not stat.S_ISREG(mode):
            os.dup2(nothing, number)
