"""What the tests of the whole job share: tiny trainers and models."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("busy machine", deadline=None)  # how long an example takes says nothing there
settings.load_profile("busy machine")
warnings.filterwarnings("ignore", message=".*does not have many workers.*")


@pytest.fixture
def trainer_kwargs(tmp_path: Path) -> dict:
    """Options of a Trainer that does little and writes under ``tmp_path``."""
    return {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(tmp_path),
        "log_every_n_steps": 1,
    }


def same_tensors(a, b) -> bool:
    """Whether two state dicts hold bitwise equal tensors of the same dtype under the same names."""
    return list(a) == list(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a.values(), b.values()))


@pytest.fixture(name="same_tensors")
def _same_tensors():
    return same_tensors
