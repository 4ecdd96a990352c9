"""No file runs code, crashes the interpreter, or takes unbounded time or memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hostile_corpus import CANARY, bad_archives, bad_safetensors, bad_tensors, bombs, files, folders, payloads

PROBE = Path(__file__).with_name("probe_reader.py")


def warm_up(folder: Path) -> None:
    """Honest and dishonest files that make the readers import all they ever need."""
    warm = folder / "warm"
    warm.mkdir(parents=True)
    torch.save({"state_dict": {"w": torch.ones(2)}}, warm / "zip.ckpt")
    torch.save({"w": torch.ones(2)}, warm / "legacy.ckpt", _use_new_zipfile_serialization=False)
    torch.save({"w": torch.ones(2).to_sparse()}, warm / "sparse.ckpt")
    torch.save({"hp": Path("x"), "w": torch.ones(2), "z": torch.zeros(0)}, warm / "foreign.ckpt")
    for name in (
        "safetensors-not_json.safetensors",
        "bomb-deep_lists.ckpt",
        "zip-truncated_5.ckpt",
        "stream-text.ckpt",
    ):
        (warm / name).write_bytes(files()[name])
    for name in ("dcp-inst", "index-shard", "index-deep", "deepspeed"):
        (warm / name).mkdir()
        for member, data in folders()[name].items():
            (warm / name / member).write_bytes(data)
    (warm / "inline.pkl").write_bytes(b"S'abc'\n.")


def run_probe(folder: Path, timeout: float) -> list[dict]:
    """Open every file of the folder in a process of its own, under an audit hook and a memory limit."""
    done = subprocess.run(
        [sys.executable, str(PROBE), str(folder)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, f"exit {done.returncode} after {rows[-1:]}: {done.stderr[-3000:]}"
    return rows


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("hostile")
    for name, data in files().items():
        (folder / name).write_bytes(data)
    for name, members in folders().items():
        (folder / name).mkdir()
        for member, data in members.items():
            (folder / name / member).write_bytes(data)
    warm_up(folder)
    rows = run_probe(folder, 240)
    assert not (folder / CANARY).exists()
    return {row["file"]: row for row in rows}


def test_the_corpus_is_large_enough() -> None:
    assert len(files()) >= 60


def test_every_file_gives_tensors_or_a_checkpoint_error(outcomes: dict[str, dict]) -> None:
    assert set(outcomes) == set(files()) | set(folders())
    assert all(("tensors" in row) != ("error" in row) for row in outcomes.values())


def test_every_file_is_answered_quickly(outcomes: dict[str, dict]) -> None:
    slow = {name: row["seconds"] for name, row in outcomes.items() if row["seconds"] > 20}
    assert not slow


@pytest.mark.parametrize("name", sorted(payloads()))
def test_weights_beside_a_payload_come_out(outcomes: dict[str, dict], name: str) -> None:
    row = outcomes[f"payload-{name}.ckpt"]
    assert row.get("good") or "error" in row
    if name != "reduce_codec":  # a known function used in an impossible way condemns the file
        assert row["good"], row
        assert row["stubbed"], row


@pytest.mark.parametrize("name", sorted(set(bad_tensors()) - {
    # these are records or harmless: no tensor is built from them, and the good one comes out
    "wrapper_subclass", "from_type", "from_type_itself", "numpy_device", "hooks_call", "legacy_tensor_class",
    "conj_of_float", "numpy_overrun", "meta_tensor", "bool_size", "storage_other_dtype"}))  # fmt: skip
def test_tensors_outside_their_storage_are_refused(outcomes: dict[str, dict], name: str) -> None:
    assert "error" in outcomes[f"tensor-{name}.ckpt"]


REFUSED_ARCHIVES = [
    *("crc_of_pickle", "pickle_flipped", "duplicate", "duplicate_storage", "absolute", "parent", "backslash"),
    *("deflate_bomb", "encrypted", "size_beyond", "two_sizes", "overlap", "other_local_name", "offset_beyond"),
    *("no_pickle", "nested", "npz"),
]


@pytest.mark.parametrize("name", REFUSED_ARCHIVES)
def test_zip_tricks_are_refused(outcomes: dict[str, dict], name: str) -> None:
    assert name in bad_archives()
    assert "error" in outcomes[f"zip-{name}.ckpt"]


@pytest.mark.parametrize("name", sorted(bad_safetensors()))
def test_damaged_safetensors_are_refused(outcomes: dict[str, dict], name: str) -> None:
    assert "error" in outcomes[f"safetensors-{name}.safetensors"]


@pytest.mark.parametrize("name", sorted(bombs()))
def test_bombs_end_in_an_error_or_in_the_good_weights(outcomes: dict[str, dict], name: str) -> None:
    row = outcomes[f"bomb-{name}.ckpt"]
    assert "error" in row or row["good"]


def test_errors_name_the_file_and_a_remedy(outcomes: dict[str, dict]) -> None:
    for name, row in outcomes.items():
        if "error" in row:
            assert name in row["error"], row
            assert len(row["error"]) > len(name) + 40, row
