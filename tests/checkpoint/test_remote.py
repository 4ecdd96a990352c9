"""Addresses are read through fsspec and printed as given; a colon in a local name is a letter like any other."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from pathlib import Path

import fsspec
import pytest
import torch

from lit_wsl import WeightRenamer, load_checkpoint_as_dict
from lit_wsl.checkpoint import open_checkpoint
from lit_wsl.checkpoint.reader import is_address
from lit_wsl.checkpoint.saving import save_safetensors
from lit_wsl.errors import CheckpointError

CONTENT = {"state_dict": {"fc.weight": torch.arange(6.0).view(2, 3)}, "epoch": 3}


@pytest.fixture
def bucket(tmp_path):
    """A folder of ``memory://`` with a file of each kind."""
    files = fsspec.filesystem("memory")
    name = f"/bucket-{tmp_path.name}"

    def put(path, local):
        files.put(str(local), f"{name}/{path}", recursive=Path(local).is_dir())
        return f"memory:/{name}/{path}"

    yield put
    files.rm(name, recursive=True)


def same(checkpoint):
    return torch.equal(checkpoint["fc.weight"], CONTENT["state_dict"]["fc.weight"])


def test_a_file_at_an_address_is_read_like_a_local_one(bucket, tmp_path):
    torch.save(CONTENT, tmp_path / "old.ckpt")
    address = bucket("run/old.ckpt", tmp_path / "old.ckpt")
    checkpoint = open_checkpoint(address)
    tensor = checkpoint["fc.weight"]
    assert same(checkpoint)
    assert checkpoint.content == {"epoch": 3}
    assert str(checkpoint.path) == address
    assert checkpoint.verify() > 0
    copy = checkpoint.file
    del checkpoint
    gc.collect()
    assert not copy.exists()
    assert torch.equal(tensor, CONTENT["state_dict"]["fc.weight"])  # it lies over the mapped file, which is still there
    assert load_checkpoint_as_dict(address)["epoch"] == 3
    assert WeightRenamer(address).list_keys() == ["fc.weight"]


def test_a_folder_and_an_index_with_its_shards(bucket, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    save_safetensors({"fc.weight": CONTENT["state_dict"]["fc.weight"]}, folder / "a.safetensors")
    index = {"weight_map": {"fc.weight": "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    address = bucket("shards", folder)
    for given in (address, f"{address}/", f"{address}/model.safetensors.index.json"):
        checkpoint = open_checkpoint(given)
        assert checkpoint.format == "safetensors-sharded"
        assert same(checkpoint)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("memory://nowhere/old.ckpt", "nothing at this address"),
        ("nosuch://bucket/old.ckpt", "fsspec"),
        ("s3://bucket/run/old.ckpt", "install|access"),
        ("hf://user/repo/model.safetensors", "install|access"),
    ],
)
def test_what_cannot_be_fetched_is_named_as_given(address, words, monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=f"(?i)^{address} .*({words})"):
        open_checkpoint(address)


def test_errors_about_the_content_name_the_address_and_no_temporary_copy(bucket, tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    address = bucket("text.ckpt", tmp_path / "text.ckpt")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(address)
    assert address in str(caught.value)
    assert tempfile.gettempdir() not in str(caught.value).replace(address, "")


def test_an_address_that_went_through_pathlib_is_explained():
    with pytest.raises(CheckpointError, match=r"memory:/bucket/old\.ckpt.*as a string, memory://"):
        open_checkpoint(Path("memory://bucket/old.ckpt"))


@pytest.mark.parametrize(
    "name",
    [
        "model-abc:v3.ckpt",
        "model-abc:v3/model.ckpt",
        "hf:x/model.ckpt",
        "s3:/b/old.ckpt",
        "a b=1,val_loss=0.10.ckpt",
        "m:1.ckpt",
    ],
)
def test_a_colon_in_a_local_name_is_no_matter(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True, parents=True)
    torch.save(CONTENT, name)
    for given in (name, Path(name), Path(name).absolute(), f"file://{Path(name).absolute()}"):
        checkpoint = open_checkpoint(given)
        assert same(checkpoint)
        assert str(checkpoint.path) == str(given)


def test_what_exists_is_a_name_whatever_it_looks_like(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s3:").mkdir()
    assert is_address("s3://old.ckpt")
    torch.save(CONTENT, Path("s3:", "old.ckpt"))
    assert same(open_checkpoint("s3://old.ckpt"))


def test_a_home_is_found_and_shown_as_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(CONTENT, tmp_path / "old.ckpt")
    assert str(open_checkpoint("~/old.ckpt").path) == "~/old.ckpt"
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("~/none.ckpt")
    assert "~/none.ckpt" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
