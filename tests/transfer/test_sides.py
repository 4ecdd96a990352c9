"""The two sides of a transfer: each is opened once and described once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_wsl import transfer_weights
from lit_wsl.transfer import sides
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
def test_a_transfer_with_the_old_code_describes_each_side_once(monkeypatch, wrapped):
    seen = []
    original = sides.describe
    monkeypatch.setattr(sides, "describe", lambda side, **kw: seen.append(side) or original(side, **kw))
    old, new = Net("a", "b"), Net("lower", "upper")
    state = {f"model.{n}" if wrapped else n: t for n, t in old.state_dict().items()}
    x = torch.randn(5, 4)
    report = transfer_weights(new, state, source_module=old, example_args=(x,))
    assert report.plan.proof == "proven"
    torch.testing.assert_close(new(x), old(x))
    assert [s is new for s in seen].count(True) == 1
    assert len(seen) == 2


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
