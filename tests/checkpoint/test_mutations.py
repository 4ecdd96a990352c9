"""A thousand damaged copies of honest files: none crashes the interpreter, each gives tensors or a CheckpointError."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_hostile import run_probe, warm_up

MUTATIONS = 1000


def originals(folder: Path) -> list[bytes]:
    """Honest files of each form; small, so that most damage hits structure and not weights."""
    folder.mkdir()
    weights = {
        "w": torch.arange(6.0).reshape(2, 3),
        "half": torch.ones(2, 2, dtype=torch.float16),
        "n": torch.tensor(3),
    }
    torch.save({"state_dict": weights, "epoch": 1, "hp": Path("a/b")}, folder / "zip")
    torch.save({"state_dict": weights}, folder / "plain")
    torch.save({"model": weights, "p": {1: [1, 2.5, "x"]}}, folder / "legacy", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(2, 2), folder / "module", pickle_protocol=4)
    torch.save(
        {"w": weights["w"].to_sparse(), "q": torch.quantize_per_tensor(weights["w"], 0.1, 2, torch.qint8)},
        folder / "odd",
    )
    save_file(weights, folder / "safetensors")
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def mutate(data: bytes, random_: random.Random) -> bytes:
    """Damage a file: flip bits, cut, repeat, swap or overwrite; mostly one place, sometimes many."""
    result = bytearray(data)
    kind = random_.randrange(6)
    at, length = random_.randrange(len(data)), random_.randrange(1, 64)
    if kind == 0:
        return bytes(result[:at])
    if kind == 1:
        result[at:at] = result[at : at + length]
    elif kind == 2:
        del result[at : at + length]
    elif kind == 3:
        result[at : at + length] = random_.randbytes(length)
    for _ in range(random_.choice((1, 1, 2, 8))):
        result[random_.randrange(len(result) or 1)] ^= 1 << random_.randrange(8)
    return bytes(result)


def fixed_checksum(data: bytes, random_: random.Random) -> bytes:
    """Damage the pickle inside a zip and make its checksum right again, so that the damage is read."""
    from hostile_corpus import archive

    start = data.index(b"data.pkl") + 8
    begin = data.index(b"\x80\x02", start)
    end = data.index(b"PK", begin)
    return archive(mutate(data[begin:end], random_))


def test_a_thousand_mutations(tmp_path: Path) -> None:
    files = originals(tmp_path / "originals")
    folder = tmp_path / "mutated"
    warm_up(folder)
    random_ = random.Random(0)
    for number in range(MUTATIONS):
        data = files[number % len(files)]
        inside = data[:2] == b"PK" and b"\x80\x02" in data and number % 2
        changed = fixed_checksum(data, random_) if inside else mutate(data, random_)
        (folder / f"{number:04d}.ckpt").write_bytes(changed)
    rows = run_probe(folder, 120)
    assert len(rows) == MUTATIONS
    assert all(("tensors" in row) != ("error" in row) for row in rows)
    assert max(row["seconds"] for row in rows) < 20
    assert any("tensors" in row for row in rows)
    assert any("error" in row for row in rows)


@pytest.mark.parametrize("seed", range(3))
def test_mutation_is_repeatable(seed: int) -> None:
    assert mutate(b"0123456789" * 20, random.Random(seed)) == mutate(b"0123456789" * 20, random.Random(seed))
