"""What a module remembers of its transfers goes with its state dict: into files, to other modules and processes.

``load_from_checkpoint`` makes a new module, often in a new process, and Lightning calls no callback there; nor does a
fit in processes of its own when it returns its weights; and a trained backbone is often saved and loaded alone. Only
the state dict goes all these ways. Its metadata, where torch keeps the versions of layers, has room for a line of ours;
it is written with the names and read by nobody else. So ``nn.Module.state_dict`` and ``nn.Module.load_state_dict`` are
extended, once, when this package and Lightning are both imported. What they return, raise and do is what it was.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

BY_LIGHTNING = {"load_from_checkpoint": "a checkpoint that load_from_checkpoint read"}
_READING = ("_load_state", "lightning.pytorch.core.saving")  # the function behind load_from_checkpoint
_DEPTH = 8  # frames between it and load_state_dict: overriding methods
_BUILDING = ("__init__", "setup", "configure_model", "configure_sharded_model")

_built_with: weakref.WeakSet[Any] = weakref.WeakSet()  # modules that a LightningModule loaded while it was built


def given_while_built(model: Any) -> list[str]:
    """The parts into which a model's own constructor or ``setup`` loaded a state dict of unknown origin; told once."""
    found = {path: sub for path, sub in model.named_modules() if sub in _built_with}
    for sub in found.values():
        _built_with.discard(sub)
    return list(found)


def extend_state_dicts() -> None:
    """Let state dicts tell what modules remember; once, and only where Lightning is in use."""
    torch = sys.modules.get("torch")
    if "lightning.pytorch" not in sys.modules or torch is None:
        return
    kind = torch.nn.Module
    if not hasattr(kind.load_state_dict, "lit_wsl"):
        _extend(kind, "state_dict", _tell)
        _extend(kind, "load_state_dict", _learn)


def _extend(kind: type, name: str, then: Any) -> None:
    original = vars(kind)[name]

    @functools.wraps(original)
    def extended(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        with suppress(Exception):  # the memory is ours; the state dict is the user's, and comes first
            then(self, result, *args, **kwargs)
        return result

    extended.lit_wsl = True  # type: ignore[attr-defined]
    setattr(kind, name, extended)


def _tell(module: Any, state: Any, *args: Any, destination: Any = None, prefix: str = "", **_: Any) -> None:
    inner = bool(args) or destination is not None  # the state dict of something around it
    if not inner or _is_lightning(module):
        from lit_wsl.transfer.memory import write_memory

        write_memory(module, state, prefix)


def _learn(module: Any, _result: Any, state_dict: Mapping[str, Any], *_: Any, **__: Any) -> None:
    from lit_wsl.transfer.memory import note_given, read_memory

    for sub in module.modules():
        _built_with.discard(sub)
    if read_memory(module, state_dict):
        return
    whole = all(name in state_dict for name, _ in module.named_parameters())
    frames = list(_frames(sys._getframe(2)))
    if whole and _is_lightning(module) and any(map(_is_reading, frames[:_DEPTH])):
        read_memory(module, state_dict, BY_LIGHTNING)
    elif any(map(_is_building, frames)):
        _built_with.add(module)
    else:
        note_given(module, state_dict)


def _is_lightning(module: Any) -> bool:
    return isinstance(module, sys.modules["lightning.pytorch"].LightningModule)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_reading(frame: FrameType) -> bool:
    """Whether this is ``load_from_checkpoint``, which reads what a trainer has saved."""
    return (frame.f_code.co_name, frame.f_globals.get("__name__")) == _READING


def _is_building(frame: FrameType) -> bool:
    """Whether this is a LightningModule that makes its parts: what it loads there belongs to what it is made of."""
    code = frame.f_code
    if code.co_name not in _BUILDING or not code.co_argcount:
        return False
    return _is_lightning(frame.f_locals.get(code.co_varnames[0]))
