"""Batches of streams: read by a copy of the process, so that the run finds everything where it was."""

from __future__ import annotations

import os
import time
from multiprocessing import Pipe

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lit_wsl.callbacks.sample import NoSampleError, first_of_stream, stream


class Counting(IterableDataset):
    """Numbers that are counted on from pass to pass, with noise, from a generator that can't be wound back."""

    def __init__(self, count: int = 12) -> None:
        self.rows = (torch.tensor([float(k)]) for k in range(count))
        self.noise = torch.Generator().manual_seed(0)
        self.reads = 0

    def __iter__(self):
        for row in self.rows:
            self.reads += 1
            yield row + torch.rand(1, generator=self.noise)


def test_the_batches_are_those_that_the_run_will_see():
    data = Counting()
    loader = DataLoader(data, 4, num_workers=0)
    state = torch.get_rng_state()
    seen = list(stream(loader))
    assert data.reads == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(batch) for batch in seen] == [4, 4, 4]
    assert all(torch.equal(a, b) for a, b in zip(seen, loader, strict=True))


def test_what_both_processes_share_is_as_it_was(tmp_path):
    path = tmp_path / "lines"
    path.write_text("".join(f"{k}\n" for k in range(20_000)))
    ours, theirs = Pipe(duplex=False)
    theirs.send("for the run")
    with path.open("rb", buffering=0) as file:
        file.readline()
        where = file.tell()

        def lines():
            yield file.read(1000)
            yield ours.recv()

        assert list(stream(lines())) == [path.read_bytes()[where : where + 1000]]
        assert file.tell() == where
    assert ours.recv() == "for the run"


def test_an_endless_stream_is_read_as_far_as_asked_and_the_copy_ends(tmp_path):
    def numbers():
        (tmp_path / "process").write_text(str(os.getpid()))
        k = 0
        while True:
            yield torch.full((1000,), k)
            k += 1

    batches = stream(numbers())
    assert [int(next(batches)[0]) for _ in range(3)] == [0, 1, 2]
    child = int((tmp_path / "process").read_text())
    assert child != os.getpid()
    batches.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_stream_without_a_batch_says_why():
    def broken():
        raise ValueError("no such shard")
        yield

    def slow():
        time.sleep(60)
        yield

    with pytest.raises(NoSampleError, match="ValueError: no such shard"):
        first_of_stream(broken())
    with pytest.raises(NoSampleError, match="at its end"):
        first_of_stream([])
    with pytest.raises(NoSampleError, match="within 0 seconds"):
        next(stream(slow(), seconds=0.2))
