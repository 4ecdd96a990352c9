"""The two sides of a transfer: each is opened once and described once."""

from __future__ import annotations

import sys

import pytest
import torch
from conversion_models import NewTransformer, OldTransformer, fit, tokens, transformer_plan
from torch import nn

from lit_wsl import WeightTransferCallback, transfer_weights
from lit_wsl.structure.description import describe
from lit_wsl.transfer.sides import Source, Target


class Net(nn.Module):
    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.order = (first, second)
        self.add_module(second, nn.Linear(6, 3))
        self.add_module(first, nn.Linear(4, 6))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        for name in self.order:
            x = torch.tanh(self.get_submodule(name)(x)) * self.scale
        return x


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_transfer_with_the_old_code_describes_each_side_once(described, wrapped):
    """The old code itself is not described, unless the proof has to search."""
    old, new = Net("a", "b"), Net("lower", "upper")
    state = {f"model.{n}" if wrapped else n: t for n, t in old.state_dict().items()}
    x = torch.randn(5, 4)
    report = transfer_weights(new, state, source_module=old, example_args=(x,))
    assert report.plan.proof == "proven"
    torch.testing.assert_close(new(x), old(x))
    assert sorted(side.__name__ for side in described) == ["Net", "dict"]


@pytest.fixture
def described(monkeypatch):
    """What is described, by whichever module of the package."""
    seen = []
    note = lambda side, **how: seen.append(type(side)) or describe(side, **how)  # noqa: E731
    for name, module in list(sys.modules.items()):
        if name.startswith("lit_wsl.") and getattr(module, "describe", None) is describe:
            monkeypatch.setattr(module, "describe", note)
    return seen


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    old = OldTransformer()
    fit(old, tokens(), folder, 2).save_checkpoint(folder / "old.ckpt")
    return old, folder / "old.ckpt"


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("resume", ["weights", "optimizer", "all"])
def test_a_run_that_resumes_describes_each_side_once(described, old_run, tmp_path, resume, planned):
    """With a sample, the proof on its loss where no plan is given, its optimizers, and what callbacks keep."""
    old, file = old_run
    new = NewTransformer()
    plan = transformer_plan(old, new) if planned else None
    described.clear()
    callback = WeightTransferCallback(file, plan=plan, resume=resume, verbose=False)
    fit(new, tokens(), tmp_path, 3, callbacks=[callback])
    assert callback.report.applied
    assert sorted(side.__name__ for side in described) == ["Checkpoint", "NewTransformer"]


def test_a_conversion_describes_each_side_once(described, old_run, tmp_path):
    old, file = old_run
    plan = transformer_plan(old, NewTransformer())
    described.clear()
    plan.convert_checkpoint(file, tmp_path / "new.ckpt", target=NewTransformer())
    assert sorted(side.__name__ for side in described) == ["Checkpoint", "NewTransformer"]


def test_a_source_knows_what_its_module_knows():
    old = Net("a", "b")
    given = Source.open(old.state_dict(), old=old, samples=[((torch.randn(2, 4),), {})]).description
    assert given["a.weight"].module_type == "Linear"
    assert given["a.weight"].execution_order < given["b.weight"].execution_order
    assert given["scale"].kind == "buffer"  # its values alone would not tell
    assert Source.open(old.state_dict()).description["scale"].kind == "parameter"


def test_a_target_that_no_sample_runs_says_so():
    target = Target.of(Net("a", "b"), [((torch.randn(2, 9),), {})])
    assert target.shaped is None
    assert "the sample call failed" in target.remark
    assert not target.description.has_execution_order
