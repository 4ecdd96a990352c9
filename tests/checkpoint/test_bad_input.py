"""What is not a checkpoint gets an error that names the file, what it looks like, and what to do."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_wsl.checkpoint import load_checkpoint_as_dict, open_checkpoint
from lit_wsl.errors import CheckpointError, LitWslError

FILES = {
    "empty": (b"", "empty"),
    "text": (b"hello, this is my model card\n", "text file"),
    "prose": (b"I am a model card. Call me later.", "text file"),
    "yaml": (b"epoch: 3\nlr: 0.1\n", "text file"),
    "json": (b'{"weight_map": {}}', "text file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n", "git lfs pull"),
    "html": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "web page"),
    "zeros": (b"\0" * 4096, "zeros"),
    "gzip": (b"\x1f\x8b\x08\x00" + b"x" * 100, "gzip"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "HDF5"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 100, "GGUF"),
    "npy": (b"\x93NUMPY\x01\x00" + b"x" * 100, "NumPy"),
    "png": (b"\x89PNG\r\n\x1a\n" + b"x" * 100, "PNG"),
    "noise": (bytes(range(256)) * 10, "cannot be read as a checkpoint"),
}


@pytest.mark.parametrize("kind", sorted(FILES))
def test_files_of_other_kinds(tmp_path: Path, kind: str) -> None:
    data, words = FILES[kind]
    path = tmp_path / f"{kind}.ckpt"
    path.write_bytes(data)
    for read in (open_checkpoint, load_checkpoint_as_dict):
        with pytest.raises(CheckpointError, match=words) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert isinstance(caught.value, LitWslError)


def test_no_such_file_suggests_a_near_one(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.pt does not exist.*last\.ckpt"):
        open_checkpoint(tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere" / "a.ckpt")


@pytest.mark.parametrize("address", ["https://example.com/a.ckpt", "s3://bucket/a.ckpt"])
def test_web_addresses(address: str) -> None:
    with pytest.raises(CheckpointError, match="ownload the file"):
        open_checkpoint(address)


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="folder without a checkpoint"):
        open_checkpoint(tmp_path)


def test_a_folder_with_several_checkpoints_lists_them(tmp_path: Path) -> None:
    for name in ("a.ckpt", "b.ckpt"):
        torch.save({"w": torch.ones(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"a\.ckpt, b\.ckpt"):
        open_checkpoint(tmp_path)


def test_truncated_files(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    for zip_form in (True, False):
        torch.save({"state_dict": {"w": torch.randn(100)}}, path, _use_new_zipfile_serialization=zip_form)
        data = path.read_bytes()
        for length in range(1, len(data), 97):
            path.write_bytes(data[:length])
            with pytest.raises(CheckpointError, match=r"a\.ckpt"):
                open_checkpoint(path)


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}
WITHOUT = [{}, {"epoch": 3}, [], None, 5, "text", {"state_dict": {}}, {1: torch.ones(2)}, {"optimizer": OPTIMIZER}]


@pytest.mark.parametrize("content", WITHOUT)
def test_a_checkpoint_without_tensors(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"a\.ckpt.*no tensors"):
        open_checkpoint(tmp_path / "a.ckpt")


def test_archives_of_other_kinds(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.ones(2))
    with pytest.raises(CheckpointError, match="NumPy archive"):
        open_checkpoint(tmp_path / "a.npz")
    torch.save({"w": torch.ones(2)}, tmp_path / "model.ckpt")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as opened:
        opened.write(tmp_path / "model.ckpt", "model.ckpt")
    with pytest.raises(CheckpointError, match="unpack it first"):
        open_checkpoint(tmp_path / "a.zip")
    with tarfile.open(tmp_path / "a.tar", "w") as opened_tar:
        opened_tar.add(tmp_path / "model.ckpt", "model.ckpt")
    with pytest.raises(CheckpointError, match="tar archive"):
        open_checkpoint(tmp_path / "a.tar")


def test_weights_saved_on_the_meta_device(tmp_path: Path) -> None:
    torch.save({"a.w": torch.empty(3, device="meta")}, tmp_path / "a.ckpt")
    checkpoint = open_checkpoint(tmp_path / "a.ckpt")
    assert checkpoint.meta("a.w").shape == (3,)
    with pytest.raises(CheckpointError, match=r"'a\.w'.*\(3,\).*without data"):
        checkpoint["a.w"]


def test_an_unknown_choice_of_weights(tmp_path: Path) -> None:
    torch.save({"a.w": torch.ones(3)}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"'best'.*'auto', 'model', 'ema'"):
        open_checkpoint(tmp_path / "a.ckpt", weights="best")  # type: ignore[arg-type]


def test_a_missing_name_is_a_key_error(tmp_path: Path) -> None:
    torch.save({"a.w": torch.ones(3)}, tmp_path / "a.ckpt")
    with pytest.raises(KeyError):
        open_checkpoint(tmp_path / "a.ckpt")["b"]
