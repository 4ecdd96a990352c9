"""The undo log puts everything back, whatever of it went to memory or to the file."""

import io
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_wsl.errors import TransferError
from lit_wsl.transfer import undo as module
from lit_wsl.transfer.undo import UndoLog, room_on_disk

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)


def make(sizes):
    return [torch.randn(size, 3).mul(9).to(DTYPES[i % 4]) for i, size in enumerate(sizes)]


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    memory=st.integers(0, 200),
    musts=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_everything_comes_back(sizes, memory, musts):
    tensors = make(sizes)
    before = [tensor.clone() for tensor in tensors]
    with UndoLog(memory, spill=True) as log:
        for tensor, must in zip(tensors, musts):
            log.remember(tensor, must=must)
            tensor.zero_()
        log.restore()
    assert log.lost == 0
    assert all(map(torch.equal, tensors, before))


def test_views_come_back_in_place():
    whole = torch.arange(12.0).view(3, 4)
    column = whole[:, 1]
    with UndoLog(0, spill=True) as log:
        log.remember(column, must=False)
        column.fill_(-1)
        log.restore()
    assert torch.equal(whole, torch.arange(12.0).view(3, 4))


def test_what_is_not_remembered_is_counted():
    tensors = make([2, 2])
    with UndoLog(24) as log:
        for tensor in tensors:
            log.remember(tensor, must=False)
    assert log.lost == tensors[1].nbytes


class Full(io.BytesIO):
    def write(self, data):
        raise OSError(28, "No space left on device")


@pytest.fixture
def full_disk(monkeypatch):
    full = SimpleNamespace(TemporaryFile=Full, gettempdir=lambda: "/full")
    monkeypatch.setattr(module, "tempfile", full)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_stops_copies_that_may_fail_and_no_others():
    a, b = make([2, 4])
    with UndoLog(0, spill=True) as log:
        log.remember(a, must=False)
        assert log.lost == a.nbytes
        with pytest.raises(TransferError, match=r"/full has no room .*No space left.*TMPDIR"):
            log.remember(b, must=True)


def test_room_is_asked_of_the_disk(monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    assert room_on_disk(50)
    assert not room_on_disk(51)

    def gone(folder):
        raise OSError("gone")

    monkeypatch.setattr(module.shutil, "disk_usage", gone)
    assert not room_on_disk(0)
