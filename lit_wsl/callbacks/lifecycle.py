"""When in Lightning's life cycle a model is completely built, and whether a run resumes or has trained it elsewhere.

``Trainer._run`` calls, in this order: ``DataModule.setup``, ``Callback.setup``, ``LightningModule.setup``,
``configure_model``, the restoring of a resumed checkpoint, ``Strategy.setup`` (device, wrapping, optimizers),
``on_fit_start``. A model built in ``__init__`` is complete at ``Callback.setup``; one that overrides ``setup`` or
``configure_model`` only after both, and Lightning has no callback hook there, so one call of ``Strategy.setup`` is
preceded by ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lit_wsl.structure.running import exchanged

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import Strategy


_BUILDERS = ("setup", "configure_model", "configure_sharded_model")


def is_whole(module: pl.LightningModule) -> bool:
    """Whether no later hook of the module itself may add parameters to it."""
    return not any(is_overridden(name, module) for name in _BUILDERS if hasattr(module, name))


def resumed_path(trainer: pl.Trainer) -> tuple[bool, str | None]:
    """Whether it can be told which checkpoint this run restores, and its path; ``None`` if it restores none.

    ``trainer.ckpt_path`` is set only when the restoring begins, after the setup hooks. Until then the path is an
    argument of ``Trainer._run`` and stored nowhere, so it is read from that frame. Should a future Lightning name
    things differently, this cannot be told yet; the restored weights win all the same, and are noticed afterwards.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            path = frame.f_locals.get("ckpt_path")
            return "ckpt_path" in frame.f_locals, str(path) if path else None
        frame = frame.f_back
    return False, None


def has_trained_elsewhere(trainer: pl.Trainer) -> bool:
    """Whether this trainer has run a fit in processes that it spawned and that are gone.

    They return their weights to the main process, and nothing of the callbacks; a ``test`` that follows starts new
    processes with the trained weights and a callback that knows nothing of the transfer that came before.
    """
    return bool(getattr(trainer.strategy.launcher, "_already_fit", False))


class _Setup:
    """Stands in for ``strategy.setup`` once: requests come before it, or behind it where they need memory."""

    def __init__(self, strategy: Strategy) -> None:
        self.queue: list[tuple[Callable[[], None], Callable[[], bool]]] = []
        self.original = strategy.setup
        self.put_back = exchanged(strategy, "setup", self)

    def __call__(self, trainer: pl.Trainer) -> Any:
        self.put_back()
        waiting = []
        for request, has_to_wait in self.queue:
            if has_to_wait():
                waiting.append(request)
            else:
                request()
        result = self.original(trainer)
        for request in waiting:
            request()
        return result


def when_whole(strategy: Strategy, run: Callable[[], None], needs_memory: Callable[[], bool]) -> Callable[[], None]:
    """Call ``run`` once when the next ``strategy.setup`` begins, or where it needs memory when tensors have some."""
    installed = vars(strategy).get("setup")
    setup = installed if isinstance(installed, _Setup) else _Setup(strategy)
    request = (run, needs_memory)
    setup.queue.append(request)

    def take_back() -> None:
        if request in setup.queue:
            setup.queue.remove(request)
        if not setup.queue:
            setup.put_back()

    return take_back


def needs_memory(module: nn.Module) -> bool:
    """Whether some parameters are on the meta device."""
    return any(p.is_meta for p in module.parameters())
