"""Checkpoints larger than memory are described without reading them; the files here are sparse."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch._subclasses import FakeTensorMode

from lit_wsl.checkpoint import open_checkpoint
from lit_wsl.checkpoint.allowlist import RefusedError
from lit_wsl.checkpoint.one_file import _read_larger_than_memory, read_safetensors
from lit_wsl.errors import CheckpointError


def write_sparse(path: Path, tensors: dict[str, tuple[int, ...]], missing: int = 0) -> Path:
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + offset - missing)
    return path


@pytest.fixture
def rows() -> int:
    """Rows of 4096 columns in bfloat16, so that a tensor is twice as large as this machine's memory and swap."""
    return 2 * (psutil.virtual_memory().total + psutil.swap_memory().total) // (2 * 4096)


def test_a_safetensors_file_larger_than_memory(tmp_path, rows):
    try:
        path = write_sparse(tmp_path / "huge.safetensors", {"small": (3, 4), "huge": (rows, 4096)})
    except OSError as error:
        pytest.skip(f"the file system has no sparse files of that size: {error}")
    before = psutil.Process().memory_info().rss
    checkpoint = open_checkpoint(path)
    assert checkpoint.meta("huge").shape == (rows, 4096)
    assert checkpoint["small"].tolist() == [[0.0] * 4] * 3
    assert checkpoint["huge"][rows - 1, :5].tolist() == [0.0] * 5  # only the page that is asked for is read
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_the_way_of_large_files_gives_what_the_library_gives(tmp_path):
    tensors = {
        "b.weight": torch.randn(5, 3),
        "a.half": torch.randn(7).half(),
        "a.flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    usual, large = read_safetensors(path), _read_larger_than_memory(path)
    assert list(usual.tree) == list(large.tree)
    assert usual.metadata == large.metadata
    for name, lazy in large.tree.items():
        assert lazy.dtype == tensors[name].dtype
        assert torch.equal(lazy.read(), tensors[name])


@pytest.mark.parametrize("missing", [1, 8, 30])
def test_a_truncated_large_file_is_refused(tmp_path, missing):
    path = write_sparse(tmp_path / "cut.safetensors", {"a": (3, 4), "b": (5,)}, missing)
    with pytest.raises(RefusedError, match="out of place"):
        _read_larger_than_memory(path)
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def test_a_torch_file_larger_than_memory(tmp_path, rows):
    path = tmp_path / "huge.ckpt"
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        tensors = {"small": torch.empty(3, 4), "huge": torch.empty(rows, 4096, dtype=torch.bfloat16)}
        try:
            torch.save({"state_dict": tensors}, path)  # a hole where the data would be
        except (OSError, RuntimeError) as error:
            pytest.skip(f"the file system has no sparse files of that size: {error}")
    assert path.stat().st_size > 2 * 4096 * rows
    before = psutil.Process().memory_info().rss
    checkpoint = open_checkpoint(path)
    assert checkpoint.meta("huge").shape == (rows, 4096)
    assert checkpoint["small"].shape == (3, 4)
    assert checkpoint["huge"][rows - 1, :5].tolist() == [0.0] * 5
    assert psutil.Process().memory_info().rss - before < 64 << 20
