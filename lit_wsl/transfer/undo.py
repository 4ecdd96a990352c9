"""What stands behind "all or nothing": a log of what was overwritten, and Ctrl-C held back while it matters."""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class UndoLog:
    """Remembers what is overwritten: in memory up to a budget, then, for copies that may fail, in a temporary file.

    Args:
        budget: Bytes of memory the log may take in all.
        spare: Bytes of these for copies that are not expected to fail.
    """

    def __init__(self, budget: int, spare: int) -> None:
        self._left, self._spare = budget, spare
        self._memory: list[tuple[Tensor, Tensor]] = []
        self._spilled: list[tuple[Tensor, int]] = []
        self._file: Any = None

    def __enter__(self) -> UndoLog:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def remember(self, target: Tensor, *, must: bool) -> None:
        """Keep a target's value if its copy may fail (``must``), else only while there is memory to spare."""
        if target.nbytes <= (self._left if must else min(self._left, self._spare)):
            self._left -= target.nbytes
            self._spare -= 0 if must else target.nbytes
            self._memory.append((target, target.detach().clone()))
        elif must:
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115  closed with the log
            self._spilled.append((target, self._file.tell()))
            self._file.write(target.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    def restore(self) -> None:
        """Put everything back, the last first."""
        for target, offset in reversed(self._spilled):
            self._file.seek(offset)
            content = torch.frombuffer(bytearray(self._file.read(target.nbytes)), dtype=torch.uint8)
            _put_back(target, content.view(target.dtype).reshape(target.shape))
        for target, value in reversed(self._memory):
            _put_back(target, value)


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
