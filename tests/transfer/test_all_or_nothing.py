"""Whatever raises at whatever write: the state before, or a TransferError that names what is not as it was."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lit_wsl import transfer_weights
from lit_wsl.errors import TransferError
from lit_wsl.plan.entries import PlanEntry, SideSummary
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure import describe
from lit_wsl.transfer import apply, undo
from lit_wsl.transfer.apply import apply_plan

ERRORS = [
    OSError("the disk is gone"),
    SystemExit(3),
    TimeoutError("too long"),
    MemoryError(),
    KeyError("x"),
    GeneratorExit(),
]


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 6))


def bits(model):
    plain = torch._C.DisableTorchFunctionSubclass
    with plain():
        return {name: t.detach().clone() for name, t in model.state_dict(keep_vars=True).items()}


def changed(model, before):
    return {name for name, value in bits(model).items() if not torch.equal(value, before[name])}


def holds_or_names(model, before, error):
    """The promise."""
    off = changed(model, before)
    return not off or (
        isinstance(error, TransferError) and off <= set(error.not_restored) and all(n in str(error) for n in off)
    )


TENSORS = len(net().state_dict())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("memory", [0, 64, 1 << 20])
def test_any_error_at_any_write(error, written, memory, monkeypatch):
    """Beyond the log's memory nothing of a copy within memory is kept: then the names are told."""
    monkeypatch.setattr(apply, "_UNDO_MEMORY", memory)
    real = apply.copy_into
    for at in range(TENSORS):
        left = iter(range(at, -1, -1))

        def failing(target, value, left=left):
            last = next(left, -1) == 0
            if not last or written:
                real(target, value)
            if last:
                raise error

        model = net()
        before = bits(model)
        with monkeypatch.context() as patch:
            patch.setattr(apply, "copy_into", failing)
            with pytest.raises(BaseException) as caught:
                transfer_weights(model, net().state_dict())
        assert holds_or_names(model, before, caught.value), (at, caught.value)
        if memory == 1 << 20:
            assert not changed(model, before)
        if not isinstance(error, Exception) and not changed(model, before) and memory == 1 << 20:
            assert caught.value is error


class Refusing(nn.Parameter):
    """Its own class lets no ``copy_`` through; from the n-th on, if ``after`` is given."""

    after = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_ and type(args[0]) is cls:
            cls.after -= 1
            if cls.after < 0:
                raise NotImplementedError("packed weights cannot be written")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_tensor_whose_class_refuses_to_be_written_stops_nothing_from_going_back(place, after, monkeypatch):
    monkeypatch.setattr(Refusing, "after", after)
    model = net()
    model[place].weight = Refusing(model[place].weight.detach().clone())
    model[place].bias = Refusing(model[place].bias.detach().clone())
    before = bits(model)
    with pytest.raises(TransferError, match=rf"{place}\.(weight|bias)"):
        transfer_weights(model, net().state_dict())
    assert not changed(model, before)


class SecondRead(dict):
    """Like a file that opens, and is gone when it is read."""

    def __init__(self, tensors, at):
        super().__init__(tensors)
        self.reads, self.at = {}, at

    def __getitem__(self, name):
        self.reads[name] = self.reads.get(name, 0) + 1
        if name == self.at and self.reads[name] == 2:
            raise OSError("stale file handle")
        return super().__getitem__(name)


@pytest.mark.parametrize("memory", [0, 1 << 20])
@pytest.mark.parametrize("at", list(net().state_dict()))
def test_a_second_read_that_fails_leaves_everything_as_it_was_whatever_the_memory(at, memory, monkeypatch):
    monkeypatch.setattr(apply, "_UNDO_MEMORY", memory)
    model = net()
    before = bits(model)
    with pytest.raises(TransferError, match=r"stale file handle.*unchanged"):
        transfer_weights(model, SecondRead(net().state_dict(), at))
    assert not changed(model, before)


@pytest.mark.parametrize("memory", [0, 40, 1 << 20])
@pytest.mark.parametrize("at", range(0, TENSORS, 3))
def test_what_a_signal_raises_in_the_middle_of_the_copying(at, memory, monkeypatch):
    def handler(number, frame):
        raise TimeoutError("too long")

    monkeypatch.setattr(apply, "_UNDO_MEMORY", memory)
    real, left = apply.copy_into, iter(range(at, -100, -1))

    def interrupted(target, value):
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        real(target, value)

    monkeypatch.setattr(apply, "copy_into", interrupted)
    monkeypatch.setattr(apply, "is_plain", lambda target, value: False)
    model = net()
    before, installed = bits(model), signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises((TimeoutError, TransferError)) as caught:
            transfer_weights(model, net().state_dict())
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, installed)
    assert holds_or_names(model, before, caught.value)
    assert "too long" in str(caught.value)
    if memory == 1 << 20:
        assert isinstance(caught.value, TimeoutError)


def test_handlers_that_raise_nothing_are_run_and_stop_nothing(monkeypatch):
    seen = []
    real = apply.copy_into

    def interrupted(target, value):
        os.kill(os.getpid(), signal.SIGUSR1)
        real(target, value)

    monkeypatch.setattr(apply, "copy_into", interrupted)
    installed = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        old, model = net(), net()
        transfer_weights(model, old.state_dict())
    finally:
        signal.signal(signal.SIGUSR1, installed)
    assert not changed(model, bits(old))
    assert seen


def test_two_threads_on_one_model_are_refused_and_one_after_the_other_is_not(monkeypatch):
    model, old = net(), net()
    real, inside, go_on = apply.copy_into, threading.Event(), threading.Event()

    def slow(target, value):
        inside.set()
        go_on.wait(10)
        real(target, value)

    monkeypatch.setattr(apply, "copy_into", slow)
    first = threading.Thread(target=transfer_weights, args=(model, old.state_dict()))
    first.start()
    inside.wait(10)
    wrapped = nn.ModuleDict({"net": model})
    for other in (model, wrapped, model[0]):
        with pytest.raises(TransferError, match="another thread"):
            transfer_weights(other, other.state_dict())
    go_on.set()
    first.join()
    assert not changed(model, bits(old))
    transfer_weights(model, net().state_dict())


def fill_by_name(model, tensors):
    side = SideSummary.of(describe(model))
    apply_plan(TransferPlan(tuple(PlanEntry((n,), (n,)) for n in tensors), side, side), tensors, model)


class Overlapping(nn.Module):
    """Two tensors of which the second lies in the first, wholly or in part."""

    def __init__(self, cut):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 4))
        self.register_buffer("view", self.table.detach()[cut])


@pytest.mark.parametrize("cut", [slice(0, 3), (slice(None), slice(0, 2)), slice(None)])
def test_overlapping_tensors_are_filled_where_they_agree_and_refused_where_they_do_not(cut):
    table = torch.randn(6, 4)
    model = Overlapping(cut)
    fill_by_name(model, {"table": table, "view": table[cut].clone()})
    assert torch.equal(model.table, table)
    model = Overlapping(cut)
    before = bits(model)
    with pytest.raises(TransferError, match=r"(?s)table.*view.*share memory|view.*table.*share memory"):
        fill_by_name(model, {"table": table, "view": table[cut] + 1})
    assert not changed(model, before)


def test_neighbours_in_one_memory_do_not_overlap():
    class Columns(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.randn(6, 4)
            self.left, self.right = nn.Parameter(whole[:, :1]), nn.Parameter(whole[:, 1:])

    model, old = Columns(), {"left": torch.randn(6, 1), "right": torch.randn(6, 3)}
    transfer_weights(model, old)
    assert not changed(model, old)


@given(st.lists(st.sampled_from(["tensor", "refusing", "other", "failing"]), max_size=6))
def test_each_way_back_is_tried_and_those_that_fail_are_named(kinds):
    done, expected, tensors = [], [], []

    def fail():
        raise RuntimeError("no")

    with undo.UndoLog() as log:
        for place, kind in enumerate(kinds):
            if kind == "failing":
                log.later(f"step {place}", fail)
                expected.append(f"step {place}")
            elif kind == "other":
                log.later(f"step {place}", lambda place=place: done.append(place))
            else:
                Refusing.after = 0
                tensor = torch.zeros(3) if kind == "tensor" else Refusing(torch.zeros(3))
                log.remember(tensor, must=True, name=f"step {place}")
                with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
                    tensor.fill_(1)
                tensors.append(tensor)
        error = ValueError("first")
        raised = log.take_back(error)
    assert all(not bits_of(t).any() for t in tensors)
    assert done == [p for p, k in reversed(list(enumerate(kinds))) if k == "other"]
    if expected:
        assert isinstance(raised, TransferError)
        assert raised.not_restored == tuple(reversed(expected))
        assert raised.__cause__ is error
    else:
        assert raised is error


def bits_of(tensor):
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().clone()


def test_a_failed_transfer_leaves_lazy_modules_lazy(monkeypatch):
    from lit_wsl.transfer import apply

    class Net(nn.Module):
        def __init__(self, lazy):
            super().__init__()
            self.a = nn.LazyLinear(4) if lazy else nn.Linear(5, 4)
            self.b = nn.LazyBatchNorm1d() if lazy else nn.BatchNorm1d(4)
            self.c = nn.LazyLinear(3) if lazy else nn.Linear(4, 3)

        def forward(self, x):
            return self.c(self.b(self.a(x)).relu())

    def hooks(model):
        return [(type(m), len(m._forward_pre_hooks), len(m._load_state_dict_pre_hooks)) for m in model.modules()]

    def failing(target, value, real=apply.copy_into, calls=[]):  # noqa: B006
        calls.append(target)
        if len(calls) == 4:
            raise OSError("gone")
        real(target, value)

    model, old, x = Net(True), Net(False), torch.randn(6, 5)
    before, parameters = hooks(model), list(model.parameters())
    monkeypatch.setattr(apply, "copy_into", failing)
    with pytest.raises(TransferError, match="gone"):
        transfer_weights(model, old.state_dict(), example_args=(x,))
    assert hooks(model) == before
    assert all(nn.parameter.is_lazy(p) for p in model.parameters())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    transfer_weights(model, old.state_dict(), example_args=(x,))
    assert torch.equal(model(x), old(x))
