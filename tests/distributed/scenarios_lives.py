"""The lives of ``tests/helpers/lives.py`` under DDP in two processes; judged by ``test_lives_ddp.py``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import runs_dist
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from lives import BUILT, LIVES, World, lead


def _trainer(folder: Path, *callbacks: Callback) -> Trainer:
    strategy = DDPStrategy(process_group_backend="gloo")
    return runs_dist.quiet_trainer(folder, *callbacks, strategy=strategy, logger=False)


def all_lives(folder: Path) -> dict[str, Any]:
    """What went wrong in each life with each way of building the module."""
    wrong = {}
    for life in LIVES:
        for built in BUILT:
            own = folder / f"{life}-{built}"
            own.mkdir(exist_ok=True)
            if dist.get_rank() == 0:
                World(own, built, _trainer)  # writes the old checkpoint
            dist.barrier()
            wrong[f"{life}, {built}"] = lead(life, built, own, _trainer)
            dist.barrier()
    return wrong
