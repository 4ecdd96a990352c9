"""What stands behind "all or nothing": a log of what was overwritten, signals held back, and one filler at a time."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lit_wsl.errors import TransferError, counted

UNDO_MEMORY = 32 << 20  # bytes a log takes before it goes to a file
_SHOWN = 20  # names in a message; the error has them all

_plainly = torch._C.DisableTorchFunctionSubclass  # without what a tensor's own class makes of an operation


class UndoLog:
    """Remembers what is overwritten: in memory up to a budget, then in a temporary file.

    Writes are of two kinds. Those that may fail (they allocate, read, or are a foreign class's own) have to be
    remembered. Others are not expected to fail, but where several processes fill a model together, one that fails all
    the same leaves the others with all of theirs done; then these are remembered too, as far as there is room.

    Args:
        memory: Bytes of memory the log may take.
        spill: Whether writes that are not expected to fail go to the file too, once there is no memory left.

    Attributes:
        lost: Bytes that were overwritten and not remembered.
        lost_names: The names of the tensors that held them.
    """

    def __init__(self, memory: int = UNDO_MEMORY, *, spill: bool = False) -> None:
        self._left, self._spill = memory, spill
        self._steps: list[tuple[str, Callable[[], None]]] = []
        self._file: Any = None
        self._moved: Mapping[str, Tensor] = {}
        self.lost = 0
        self.lost_names: list[str] = []

    def __enter__(self) -> UndoLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget everything: there is no way back any more."""
        self._steps.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def remember(self, target: Tensor, *, must: bool, name: str = "") -> None:
        """Keep a target's value."""
        if target.nbytes <= self._left:
            self._left -= target.nbytes
            with _plainly():
                value = target.detach().clone()
            self.later(name, lambda: _put_back(self._moved.get(name, target), value))
            return
        if must or self._spill:
            try:
                self._write(target, name)
                return
            except OSError as error:
                if must:
                    raise TransferError(
                        f"{tempfile.gettempdir()} has no room for the {target.nbytes} bytes that are overwritten, kept "
                        f"to take a failed transfer back ({error}). Set TMPDIR to a folder with more room."
                    ) from error
                self._spill = False
        self.lost += target.nbytes
        self.lost_names.append(name)

    def later(self, name: str, put_back: Callable[[], None]) -> None:
        """Keep a way back of any kind: of an optimizer, a scheduler, a loop."""
        self._steps.append((name, put_back))

    def moved(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back into these what was remembered of others of their names, as when an engine has replaced them."""
        self._moved = dict(tensors)

    def _write(self, target: Tensor, name: str) -> None:
        self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115  closed with the log
        file, start = self._file, self._file.seek(0, os.SEEK_END)
        with _plainly():
            file.write(target.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        file.flush()  # a full disk shows itself here, not when it is too late
        size, dtype, shape = target.nbytes, target.dtype, target.shape

        def put_back() -> None:
            file.seek(start)
            content = torch.frombuffer(bytearray(file.read(size)), dtype=torch.uint8)
            _put_back(self._moved.get(name, target), content.view(dtype).reshape(shape))

        self.later(name, put_back)

    def restore(self) -> tuple[str, ...]:
        """Put everything back, the last first, whatever fails; the names of what could not be."""
        failed = []
        with interrupt_later():
            while self._steps:
                name, put_back = self._steps.pop()
                try:
                    put_back()
                except BaseException:  # whatever it is, the others come first
                    failed.append(name)
        return tuple(failed)

    def take_back(self, error: BaseException, lost: Iterable[str] = ()) -> BaseException:
        """Put everything back after an error; what to raise then."""
        gone = [name for name in lost if name not in self._moved]
        return admit_loss(error, (*self.restore(), *self.lost_names, *gone))


def admit_loss(error: BaseException, names: tuple[str, ...], *, whole: bool = False) -> BaseException:
    """The error itself, or a :class:`TransferError` saying what is not as it was before it."""
    if not names:
        return error
    names = tuple(dict.fromkeys(names))
    known = isinstance(error, TransferError)
    message = (
        str(error).replace("The model is unchanged.", "").strip() if known else f"{type(error).__name__}: {error}."
    )
    end = (
        "It came when all had been written, so the model holds the new weights, all of them."
        if whole
        else "So the model is NOT as it was; build it again."
    )
    told = TransferError(f"{message} What these held before could not be put back: {counted(names, _SHOWN)}. {end}")
    told.not_restored = names
    told.__cause__ = error
    return told


def room_on_disk(size: int) -> bool:
    """Whether the folder of temporary files has room for twice as many bytes: others need some too."""
    try:
        return shutil.disk_usage(tempfile.gettempdir()).free >= 2 * size
    except OSError:
        return False


def _put_back(target: Tensor, value: Tensor) -> None:
    """Give a tensor its value again, also one whose class refuses ``copy_``, unless it has it still."""
    with torch.no_grad():
        try:
            target.copy_(value)
        except Exception:
            if not same_bits(target, value):
                with _plainly():
                    target.copy_(value)
    if not same_bits(target, value):
        raise TransferError("the value was not taken")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same, bit for bit, not-a-numbers included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    with torch.no_grad(), _plainly():
        try:
            return torch.equal(_bits(a), _bits(b))
        except (RuntimeError, NotImplementedError, TypeError):  # kinds of tensors that have no plain memory
            return bool(torch.equal(a, b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


@contextmanager
def interrupt_later() -> Iterator[Callable[[], None]]:
    """Hold back what signals would run, Ctrl-C first of all, while a model is half written."""
    held: list[tuple[Callable[[int, Any], Any], int, Any]] = []
    before: dict[int, Any] = {}

    def answer(*, with_interrupt: bool = False) -> None:
        for waiting in [w for w in held if with_interrupt or w[1] != signal.SIGINT]:
            held.remove(waiting)
            handler, number, frame = waiting
            handler(number, frame)

    if threading.current_thread() is not threading.main_thread():
        yield answer
        return
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if callable(handler):  # not what was installed from C, nor what is ignored

            def hold(number: int, frame: Any, handler: Any = handler) -> None:
                held.append((handler, number, frame))

            before[number] = handler
            signal.signal(number, hold)
    try:
        yield answer
    except BaseException:
        _install(before)
        with suppress(BaseException):  # one error is on its way already
            answer(with_interrupt=True)
        raise
    _install(before)
    answer(with_interrupt=True)


def _install(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


_fillers: dict[int, int] = {}  # module -> the thread that fills it
_fillers_lock = threading.Lock()


@contextmanager
def only_filler(model: nn.Module) -> Iterator[None]:
    """Refuse that two threads fill one model, or two models that share modules, at the same time."""
    me, mine = threading.get_ident(), {id(sub) for sub in model.modules()}
    with _fillers_lock:
        if any(_fillers.get(key, me) != me for key in mine):
            raise TransferError(
                f"another thread is filling {type(model).__name__}, or a model that shares modules with it. Wait for "
                "it, or give each thread a model of its own. Nothing was changed."
            )
        taken = [key for key in mine if key not in _fillers]
        _fillers.update(dict.fromkeys(taken, me))
    try:
        yield
    finally:
        with _fillers_lock:
            for key in taken:
                del _fillers[key]
