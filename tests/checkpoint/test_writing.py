"""Writing is all or nothing: full disks, read-only folders and killed processes leave the old file whole."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lit_wsl.checkpoint import (
    atomic,
    atomic_save,
    atomic_write_bytes,
    atomic_write_text,
    open_checkpoint,
    save_safetensors,
)
from lit_wsl.errors import CheckpointError


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_text_and_bytes(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.json", "\u00e4\n")
    atomic_write_bytes(tmp_path / "b", b"\0")
    assert (tmp_path / "a.json").read_bytes() == "\u00e4\n".encode()
    assert (tmp_path / "b").read_bytes() == b"\0"
    assert leftovers(tmp_path) == []


def test_an_error_in_the_block_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_permissions_and_links_stay(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    atomic_write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640
    atomic_write_text(tmp_path / "fresh", "x")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "fresh").stat().st_mode & 0o777 == 0o666 & ~umask


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; create it"):
        atomic_write_text(tmp_path / "no" / "a", "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="part of the path is a file"):
        atomic_write_text(tmp_path / "file" / "a", "x")
    with pytest.raises(CheckpointError, match="is a folder"):
        atomic_write_text(tmp_path, "x")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
def test_system_errors_keep_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"w": torch.ones(2)}, path)
    old = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"a\.ckpt.*unchanged"):
        atomic_save({"w": torch.zeros(2)}, path)
    assert path.read_bytes() == old
    assert leftovers(tmp_path) == []


LIMITED = """
    import resource, signal, sys, torch
    from lit_wsl.checkpoint import atomic_save
    from lit_wsl.errors import CheckpointError
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        atomic_save({"w": torch.zeros(1_000_000)}, sys.argv[1])
    except CheckpointError as error:
        print(error)
        raise SystemExit(7)
"""


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_a_write_that_runs_out_of_room(tmp_path: Path, name: str) -> None:
    """A limit on the file size stands in for a full disk: the write stops in the middle with a system error."""
    path = tmp_path / name
    atomic_save({"w": torch.ones(3)}, path)
    old = path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED), str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 7, done.stderr[-2000:]
    assert "unchanged" in done.stdout
    assert path.read_bytes() == old
    assert leftovers(tmp_path) == []


KILLED = """
    import sys, torch
    from lit_wsl.checkpoint import atomic_save
    old = {"w": torch.zeros(500_000), "mark": torch.tensor(0)}
    print("ready", flush=True)
    number = 0
    while True:
        number += 1
        atomic_save({"w": torch.full((500_000,), float(number)), "mark": torch.tensor(number)}, sys.argv[1])
"""


@pytest.mark.parametrize("delay", [0.01, 0.05, 0.12])
def test_kill_9_leaves_a_whole_file(tmp_path: Path, delay: float) -> None:
    path = tmp_path / "a.ckpt"
    atomic_save({"w": torch.zeros(500_000), "mark": torch.tensor(0)}, path)
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline().strip() == "ready"
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait(20)
    checkpoint = open_checkpoint(path)
    assert bool((checkpoint["w"] == checkpoint["mark"]).all())
    atomic_save({"w": torch.ones(1)}, path)
    assert leftovers(tmp_path) == []


STOPPED = """
    import os, signal, sys
    from lit_wsl.checkpoint import atomic
    with atomic(sys.argv[1]) as temporary:
        temporary.write_text("half of it")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next_of_the_same_target(tmp_path: Path) -> None:
    path, other = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    for target in (path, path, other):
        subprocess.run([sys.executable, "-c", textwrap.dedent(STOPPED), str(target)], check=False)
    strange = [tmp_path / ".a.ckpt.notes.tmp", tmp_path / ".a.ckpt.swp", tmp_path / "a.ckpt.tmp"]
    for file in strange:
        file.write_text("not ours")
    assert len(leftovers(tmp_path)) >= 3
    atomic_write_text(path, "new")
    left = [file for file in leftovers(tmp_path) if tmp_path / file not in strange]
    assert len(left) == 1
    assert str(left[0]).rpartition("/")[2].startswith(".b.ckpt.")
    assert all(file.exists() for file in strange)


@pytest.mark.parametrize("name", ["a.txt", "a.safetensors"])
def test_a_writer_at_work_is_left_alone(tmp_path: Path, name: str) -> None:
    """Two write the same target at once: both come to their end, and the last one's file stays."""
    path = tmp_path / name
    with atomic(path) as slow:
        slow.write_text("slow")
        if name == "a.txt":
            atomic_write_text(path, "quick")
        else:
            save_safetensors({"w": torch.ones(2)}, path)
        assert slow.read_text() == "slow"
    assert path.read_text() == "slow"
    assert leftovers(tmp_path) == []


def test_writers_side_by_side_do_not_take_each_others_files(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    texts = [f"{number}" * 1000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for done in pool.map(lambda text: [atomic_write_text(tmp_path / "a", text) for _ in range(20)], texts):
            assert len(done) == 20
            assert (tmp_path / "a").read_text() in texts
    assert leftovers(tmp_path) == []


def test_safetensors_with_shared_and_turned_tensors(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    tensors = {"a": weight, "tied": weight, "turned": weight.t(), "part": weight[1:], "p": torch.nn.Parameter(weight)}
    save_safetensors(tensors, tmp_path / "a.safetensors", {"who": "me"})
    found = open_checkpoint(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(str(tmp_path / "a.safetensors"), "pt") as opened:
        assert opened.metadata() == {"who": "me"}


def test_what_safetensors_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'epoch'"):
        atomic_save({"w": torch.ones(2), "epoch": 3}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"'s'"):
        atomic_save({"s": torch.ones(2).to_sparse()}, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
