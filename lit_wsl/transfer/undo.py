"""What stands behind "all or nothing": a log of what was overwritten, and Ctrl-C held back while it matters."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lit_wsl.errors import TransferError


class UndoLog:
    """Remembers what is overwritten: in memory up to a budget, then in a temporary file.

    Copies are of two kinds. Those that may fail, because they allocate, have to be remembered. Others are not expected
    to fail, but where several processes fill a model together, one that fails all the same leaves the others with all
    of theirs done; then these are remembered too, as far as there is room.

    Args:
        memory: Bytes of memory the log may take in all.
        spare: Bytes of these for copies that are not expected to fail.
        spill: Whether these go to the file too, once there is no memory to spare.

    Attributes:
        lost: Bytes that were overwritten and not remembered.
    """

    def __init__(self, memory: int, spare: int, *, spill: bool = False) -> None:
        self._left, self._spare, self._spill = memory, spare, spill
        self._memory: list[tuple[Tensor, Tensor]] = []
        self._spilled: list[tuple[Tensor, int]] = []
        self._file: Any = None
        self.lost = 0

    def __enter__(self) -> UndoLog:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def remember(self, target: Tensor, *, must: bool) -> None:
        """Keep a target's value.

        Args:
            target: What is overwritten next.
            must: Whether its copy may fail.

        Raises:
            TransferError: If it must be remembered, and there is no room for it on the disk either.
        """
        if target.nbytes <= (self._left if must else min(self._left, self._spare)):
            self._left -= target.nbytes
            self._spare -= 0 if must else target.nbytes
            self._memory.append((target, target.detach().clone()))
            return
        if must or self._spill:
            try:
                self._write(target)
                return
            except OSError as error:
                if must:
                    raise TransferError(
                        f"{tempfile.gettempdir()} has no room for the {target.nbytes} bytes that are overwritten, kept "
                        f"to take a failed transfer back ({error}). Set TMPDIR to a folder with more room."
                    ) from error
                self._spill = False
        self.lost += target.nbytes

    def _write(self, target: Tensor) -> None:
        self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115  closed with the log
        start = self._file.seek(0, os.SEEK_END)
        self._file.write(target.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        self._file.flush()  # a full disk shows itself here, not when it is too late
        self._spilled.append((target, start))

    def restore(self) -> None:
        """Put everything back, the last first."""
        for target, offset in reversed(self._spilled):
            self._file.seek(offset)
            content = torch.frombuffer(bytearray(self._file.read(target.nbytes)), dtype=torch.uint8)
            _put_back(target, content.view(target.dtype).reshape(target.shape))
        for target, value in reversed(self._memory):
            _put_back(target, value)


def room_on_disk(size: int) -> bool:
    """Whether the folder of temporary files has room for twice as many bytes: others need some too."""
    try:
        return shutil.disk_usage(tempfile.gettempdir()).free >= 2 * size
    except OSError:
        return False


def _put_back(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(value)


@contextmanager
def interrupt_later() -> Iterator[None]:
    """Hold back Ctrl-C until the model is whole again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[tuple[int, Any]] = []
    before = signal.getsignal(signal.SIGINT)
    if before is None:  # installed from C; not ours to replace
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed and callable(before):
        before(*pressed[0])
