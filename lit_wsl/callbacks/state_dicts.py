"""What a LightningModule remembers of its transfers goes with its state dict: into checkpoints, to other processes.

``load_from_checkpoint`` makes a new module, often in a new process, and Lightning calls no callback there; nor does a
fit in processes of its own when it returns its weights. Only the state dict goes all these ways. Its metadata, where
torch keeps the versions of layers, has room for a line of ours; it is written with the names and read by nobody else.
So ``LightningModule.state_dict`` and ``LightningModule.load_state_dict`` are extended, once, when this package and
Lightning are both imported. What they return, raise and do is what it was.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

BY_LIGHTNING = {"load_from_checkpoint": "a checkpoint that load_from_checkpoint read"}
_READING = ("_load_state", "lightning.pytorch.core.saving")  # the function behind load_from_checkpoint
_DEPTH = 8  # frames between it and load_state_dict: overriding methods

_given: weakref.WeakSet[Any] = weakref.WeakSet()


def was_given_weights(model: Any) -> bool:
    """Whether somebody loaded a state dict of unknown origin into a whole model."""
    return model in _given


def extend_state_dicts() -> None:
    """Let state dicts of LightningModules tell what the modules remember; once, and only where Lightning is in use."""
    lightning = sys.modules.get("lightning.pytorch")
    kind = getattr(lightning, "LightningModule", None)
    if kind is None or hasattr(kind.load_state_dict, "lit_wsl"):
        return
    _extend(kind, "state_dict", _tell)
    _extend(kind, "load_state_dict", _learn)


def _extend(kind: type, name: str, then: Any) -> None:
    original = vars(kind).get(name)

    @functools.wraps(getattr(kind, name))
    def extended(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(super(kind, self), name) if original is None else functools.partial(original, self)
        result = method(*args, **kwargs)
        with suppress(Exception):  # the memory is ours; the state dict is the user's, and comes first
            then(self, result, *args, **kwargs)
        return result

    extended.lit_wsl = True  # type: ignore[attr-defined]
    setattr(kind, name, extended)


def _tell(module: Any, state: Any, *_: Any, prefix: str = "", **__: Any) -> None:
    from lit_wsl.transfer.memory import write_memory

    write_memory(module, state, prefix)


def _learn(module: Any, _result: Any, state_dict: Mapping[str, Any], *_: Any, **__: Any) -> None:
    from lit_wsl.transfer.memory import read_memory

    _given.discard(module)
    if read_memory(module, state_dict):
        return
    if all(name in state_dict for name, _ in module.named_parameters()):
        if _is_read_by_lightning(sys._getframe(2)):
            read_memory(module, state_dict, BY_LIGHTNING)
        else:
            _given.add(module)


def _is_read_by_lightning(frame: FrameType | None) -> bool:
    """Whether ``load_from_checkpoint`` is at work, which reads what a trainer has saved."""
    for _ in range(_DEPTH):
        if frame is None:
            return False
        if (frame.f_code.co_name, frame.f_globals.get("__name__")) == _READING:
            return True
        frame = frame.f_back
    return False
