"""Applying a plan: in place, all or nothing, with little memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_wsl.errors import PlanError, TransferError
from lit_wsl.plan.entries import PlanEntry, SideSummary
from lit_wsl.plan.operations import Concat, Operation, Permute, Reshape, Split, Stack, Tie, Transpose
from lit_wsl.plan.plan import TransferPlan, check_plan, loses_values
from lit_wsl.structure import describe
from lit_wsl.transfer.apply import apply_plan, copy_into


def plan_of(entries, source, model):
    return TransferPlan(tuple(entries), SideSummary.of(describe(source)), SideSummary.of(describe(model)))


def snapshot(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return all(torch.equal(before[n], after[n]) for n in before)


class Target(nn.Module):
    """One tensor for each kind of operation."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.flipped = nn.Linear(5, 3)
        self.conv = nn.Conv2d(6, 7, 1)
        self.experts = nn.Parameter(torch.randn(3, 2, 4))
        self.gate, self.up = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
        self.tied = self.gate
        self.register_buffer("steps", torch.tensor(0))


def source():
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(*shape, generator=g)

    return {
        "q": rand(4, 4), "k": rand(4, 4), "v": rand(4, 4),
        "q_bias": rand(4), "k_bias": rand(4), "v_bias": rand(4),
        "flipped": rand(5, 3), "linear": rand(7, 6), "bias": rand(7),
        "e0": rand(2, 4), "e1": rand(2, 4), "e2": rand(2, 4),
        "gate_up": rand(3, 4), "steps": torch.tensor(41),
    }  # fmt: skip


ENTRIES = [
    PlanEntry(("q", "k", "v"), ("qkv.weight",), (Concat(0, (4, 4, 4)),)),
    PlanEntry(("q_bias", "k_bias", "v_bias"), ("qkv.bias",), (Concat(0, (4, 4, 4)),)),
    PlanEntry(("flipped",), ("flipped.weight",), (Transpose(),)),
    PlanEntry(("linear",), ("conv.weight",), (Reshape((7, 6), (7, 6, 1, 1)),)),
    PlanEntry(("bias",), ("conv.bias",)),
    PlanEntry(("e0", "e1", "e2"), ("experts",), (Stack(0, 3),)),
    PlanEntry(("gate_up",), ("gate.weight", "up.weight"), (Permute((1, 0)), Split(0, (2, 2)))),
    PlanEntry(("steps",), ("steps",), kind="buffer"),
]


def test_every_operation_lands_where_it_should():
    model, s = Target(), source()
    objects = {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}
    kept = model.flipped.bias.clone()
    plan = plan_of(ENTRIES, s, model)
    check_plan(plan, describe(s), describe(model))
    applied = apply_plan(plan, s, model)
    assert torch.equal(model.qkv.weight, torch.cat([s["q"], s["k"], s["v"]]))
    x = torch.randn(2, 4)
    assert torch.allclose(model.qkv(x).chunk(3, -1)[1], x @ s["k"].T + s["k_bias"], atol=1e-6)
    assert torch.equal(model.flipped.weight, s["flipped"].T)
    assert torch.equal(model.conv.weight[..., 0, 0], s["linear"])
    assert torch.equal(model.conv.bias, s["bias"])
    assert torch.equal(model.experts[1], s["e1"])
    assert torch.equal(torch.cat([model.tied.weight, model.up.weight]).T, s["gate_up"])
    assert model.steps == 41
    assert torch.equal(model.flipped.bias, kept)
    assert {n: id(t) for n, t in model.state_dict(keep_vars=True).items()} == objects
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in model.parameters())
    assert (applied.warnings, applied.notes) == ((), ())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_values_are_cast_to_the_targets_dtype_and_it_is_noted(dtype):
    model = nn.Linear(3, 2).to(dtype)
    s = {"weight": torch.rand(2, 3), "bias": torch.rand(2)}
    entries = [PlanEntry((n,), (n,)) for n in s]
    applied = apply_plan(plan_of(entries, s, model), s, model)
    assert model.weight.dtype == dtype
    assert torch.equal(model.weight, s["weight"].to(dtype))
    (note,) = applied.notes
    assert note.startswith(f"cast 2 tensors from float32 to {str(dtype).removeprefix('torch.')}")
    assert ("which rounds them" in note) == (dtype.is_floating_point and dtype.itemsize < 4)


def test_values_out_of_the_new_range_are_warned_about():
    model = nn.Linear(2, 2).half()
    s = {"weight": torch.tensor([[1e6, 1.0], [2.0, -1e9]])}
    applied = apply_plan(plan_of([PlanEntry(("weight",), ("weight",))], s, model), s, model)
    assert len(applied.warnings) == 1
    assert "weight (2, 2): 2 values are out of the range of float16" in applied.warnings[0]


@given(st.integers(0, 3), st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.sampled_from([4, 2]))
@settings(max_examples=20, deadline=None)
def test_exactly_the_values_that_are_not_finite_are_counted(count, value, size):
    model = nn.Linear(10, 10, bias=False)
    dtype = torch.float32 if size == 4 else torch.bfloat16
    weight = torch.full((10, 10), 3e38, dtype=dtype)  # the sum overflows, the values do not
    weight.view(-1)[:count] = value
    s = {"weight": weight}
    applied = apply_plan(plan_of([PlanEntry(("weight",), ("weight",))], s, model), s, model)
    assert [w.split(": ")[1].split(" of")[0] for w in applied.warnings] == ([str(count)] if count else [])


class Failing(dict):
    """A source that fails at the n-th read."""

    def __init__(self, tensors, at):
        super().__init__(tensors)
        self.reads, self.at = 0, at

    def __getitem__(self, name):
        self.reads += 1
        if self.reads == self.at:
            raise OSError("the disk is gone")
        return super().__getitem__(name)


def reads_of_a_whole_transfer():
    s = Failing(source(), at=-1)
    apply_plan(plan_of(ENTRIES, source(), Target()), s, Target())
    return s.reads


@pytest.mark.parametrize("at", range(1, reads_of_a_whole_transfer() + 1))
def test_a_read_that_fails_at_any_moment_leaves_the_model_as_it_was(at):
    model = Target()
    before = snapshot(model)
    plan = plan_of(ENTRIES, source(), model)
    with pytest.raises(TransferError, match=r"the disk is gone.*unchanged"):
        apply_plan(plan, Failing(source(), at), model)
    assert unchanged(model, before)


@pytest.mark.parametrize("budget", [0, 60, 1 << 20])
@pytest.mark.parametrize("at", range(8))
def test_a_copy_that_fails_is_taken_back_within_any_memory(at, budget, monkeypatch):
    """With allocating copies only, so that what exceeds the budget goes through the file."""
    model, s = Target(), source()
    before = snapshot(model)
    calls = iter(range(100))

    def failing(target, value):
        if next(calls) == at:
            copy_into(target, value)  # written, then failed
            raise MemoryError("no memory")
        copy_into(target, value)

    monkeypatch.setattr("lit_wsl.transfer.apply._UNDO_MEMORY", budget)
    monkeypatch.setattr("lit_wsl.transfer.apply._VIEWS", frozenset())
    monkeypatch.setattr("lit_wsl.transfer.apply._allocates", lambda entry: True)
    # once the failure has come, taking back works
    monkeypatch.setattr("lit_wsl.transfer.apply.copy_into", failing)
    with pytest.raises(TransferError, match="no memory"):
        apply_plan(plan_of(ENTRIES, s, model), s, model)
    assert unchanged(model, before)


def test_an_operation_that_depends_on_values_is_tried_before_anything_is_written():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    s = {"a": torch.ones(2, 2), "b": torch.ones(2, 2), "c": torch.zeros(2, 2)}
    entries = [PlanEntry(("a",), ("0.weight",)), PlanEntry(("b", "c"), ("1.weight",), (Tie(2),))]
    before = snapshot(model)
    with pytest.raises(TransferError, match=r"tie.*differ"):
        apply_plan(plan_of(entries, s, model), s, model)
    assert unchanged(model, before)


def test_ctrl_c_is_answered_when_the_model_is_whole(monkeypatch):
    model, s = Target(), source()
    calls = iter(range(100))

    def interrupted(target, value):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        copy_into(target, value)

    monkeypatch.setattr("lit_wsl.transfer.apply.copy_into", interrupted)
    handler = signal.default_int_handler
    before = signal.signal(signal.SIGINT, handler)  # a job in the background starts with the signal ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            apply_plan(plan_of(ENTRIES, s, model), s, model)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert torch.equal(model.conv.bias, s["bias"])
    assert model.steps == 41


def test_a_model_can_be_filled_from_itself():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    first, second = model[0].weight.detach().clone(), model[1].weight.detach().clone()
    entries = [
        PlanEntry(("0.weight",), ("1.weight",), (Transpose(),)),
        PlanEntry(("1.weight",), ("0.weight",)),
    ]
    s = dict(model.state_dict())
    apply_plan(plan_of(entries, s, model), s, model)
    assert torch.equal(model[1].weight, first.T)
    assert torch.equal(model[0].weight, second)


def test_views_that_state_dict_makes_up_are_refused():
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 3))
            self.register_state_dict_post_hook(lambda m, sd, prefix, meta: sd.update(flat=sd.pop("weight").view(-1)))

    model, s = Hooked(), {"flat": torch.ones(6)}
    with pytest.raises(TransferError, match="flat is made up"):
        apply_plan(plan_of([PlanEntry(("flat",), ("flat",))], s, model), s, model)
    assert not model.weight.any()


def test_tensors_that_cannot_be_written_are_refused_before_any_is():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2, 2)
            self.register_buffer("wide", torch.arange(3.0).expand(2, 3))

    s = {"lin.weight": torch.ones(2, 2), "wide": torch.ones(2, 3)}
    entries = [PlanEntry((n,), (n,)) for n in s]
    with torch.inference_mode():
        frozen = nn.ModuleDict({"lin": nn.Linear(2, 2)})
    for model, used, words in ((Net(), entries, "wide of shape.*clone"), (frozen, entries[:1], "inference_mode")):
        before = snapshot(model)
        with pytest.raises(TransferError, match=words):
            apply_plan(plan_of(used, s, model), s, model)
        assert unchanged(model, before)


def test_the_models_own_kind_of_number_is_kept_from_losing_values():
    assert loses_values(torch.complex64, torch.float64)
    assert loses_values(torch.float16, torch.int64)
    assert loses_values(torch.int32, torch.bool)
    assert not loses_values(torch.int64, torch.int32)
    assert not loses_values(torch.bool, torch.float16)
    model = nn.Module()
    model.register_buffer("steps", torch.tensor([3]))
    s = {"steps": torch.tensor([2.5])}
    with pytest.raises(PlanError, match=r"steps is torch\.float32.*torch\.int64"):
        check_plan(plan_of([PlanEntry(("steps",), ("steps",))], s, model), describe(s), describe(model))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (PlanEntry(("nope",), ("conv.bias",)), ["'nope'"]),
        (PlanEntry(("bias",), ("conv.bia",)), ["'conv.bia'", "did you mean 'conv.bias'"]),
        (PlanEntry(("bias",), ("qkv.bias",)), ["(7,)", "(12,)", "qkv.bias"]),
        (PlanEntry(("bias",), ("conv.bias",), (), ((8,),)), ["bias has shape (7,)", "(8,)"]),
        (PlanEntry(("q", "k"), ("qkv.weight",), (Concat(0, (4, 4, 4)),)), ["concat"]),
        (PlanEntry(("gate_up",), ("gate.weight",), (Split(1, (2, 2)),)), ["2 tensors for 1 target"]),
        (PlanEntry((), ("conv.bias",)), ["no source"]),
        (PlanEntry(("bias",), ()), ["no target"]),
    ],
)
def test_a_plan_that_does_not_fit_names_the_entry_and_the_shapes(entry, words):
    model, s = Target(), source()
    with pytest.raises(PlanError) as caught:
        check_plan(plan_of([entry], s, model), describe(s), describe(model))
    for word in [*words, "Nothing was changed"]:
        assert word in str(caught.value), str(caught.value)


def test_two_entries_for_one_target_are_refused_also_through_a_tied_name():
    model, s = Target(), source()
    for second in ("gate.weight", "tied.weight"):
        entries = [
            PlanEntry(("gate_up",), ("gate.weight", "up.weight"), (Permute((1, 0)), Split(0, (2, 2)))),
            PlanEntry(("gate_up",), (second, "up.weight"), (Permute((1, 0)), Split(0, (2, 2)))),
        ]
        with pytest.raises(PlanError, match=r"gate\.weight is filled 2 times"):
            check_plan(plan_of(entries, s, model), describe(s), describe(model))


def test_a_value_changing_operation_sees_the_targets_present_values():
    class Half(Operation):
        name, lossless, needs_target = "half", False, True

        def shapes(self, inputs):
            return list(inputs)

        def apply(self, inputs, targets=()):
            return [(a + b) / 2 for a, b in zip(inputs, targets)]

        def reverse(self):
            raise PlanError("no way back")

    model, s = nn.Linear(2, 2), {"weight": torch.ones(2, 2)}
    before = model.weight.detach().clone()
    apply_plan(plan_of([PlanEntry(("weight",), ("weight",), (Half(),))], s, model), s, model)
    assert torch.equal(model.weight, (before + 1) / 2)


def test_progress_covers_every_byte_twice():
    model, s = Target(), source()
    seen = {"verify": 0, "copy": 0}

    def progress(stage, size):
        seen[stage] += size

    apply_plan(plan_of(ENTRIES, s, model), s, model, progress=progress)
    total = sum(t.nbytes for t in s.values())
    assert seen == {"verify": total, "copy": total}


def test_a_big_transfer_takes_little_memory_beside_the_model():
    """Peak memory beyond the model's own, reading included, stays below a fifth of the checkpoint's size."""
    code = textwrap.dedent(
        """
        import resource, torch
        from torch import nn
        from lit_wsl.structure import describe
        from lit_wsl.transfer.apply import apply_plan
        from lit_wsl.transfer.plan import PlanEntry, SideSummary, TransferPlan

        class Reading(dict):  # like a file: nothing stays in memory between reads
            def meta_items(self):
                return iter(())

            def __getitem__(self, name):
                return torch.ones(self.size, self.size)

        def transfer(count, size):
            model = nn.ModuleList([nn.Linear(size, size, bias=False) for _ in range(count)])
            source = Reading.fromkeys(model.state_dict())
            source.size = size
            side = SideSummary.of(describe(model))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            apply_plan(TransferPlan(tuple(PlanEntry((n,), (n,)) for n in source), side, side), source, model)
            assert all(bool((p == 1).all()) for p in model.parameters())
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return (after - before) / sum(p.nbytes for p in model.parameters())

        torch.set_num_threads(1)
        transfer(2, 8)  # loads what is loaded once
        print(transfer(96, 1024))
        """
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.2
