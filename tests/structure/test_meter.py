"""Measuring losses: every pass sees the same model, whatever the passes before have done to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lit_wsl.structure.losses import LossMeter


class Counting(nn.Module):
    """Its loss depends on what earlier calls have left behind."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls, self.seen = kind, 0, []
        self.linear = nn.Linear(3, 2)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        own = {"attribute": self.calls, "list": len(self.seen), "buffer": float(self.steps), "weight": 0}[self.kind]
        if self.kind == "attribute":
            self.calls += 1
        elif self.kind == "list":
            self.seen.append(1)
        elif self.kind == "buffer":
            self.steps += 1
        else:
            with torch.no_grad():
                self.linear.weight.mul_(2.0)
        return self.linear(x) + own


@pytest.mark.parametrize("kind", ["attribute", "list", "buffer", "weight"])
@pytest.mark.parametrize("in_session", [True, False])
def test_a_model_that_changes_itself_is_measured_alike_every_time(kind, in_session):
    torch.manual_seed(0)
    net = Counting(kind).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batch = torch.randn(8, 3), torch.randn(8, 2)
    meter = LossMeter(net, lambda net, batch: F.mse_loss(net(batch[0]), batch[1]), [batch])
    assert meter.has(0)
    lent = {"linear.weight": torch.randn(2, 3)}
    kept = lent["linear.weight"].clone()

    def measured():
        found = [meter.losses({}, 0), meter.losses(lent, 0), meter.losses({}, 0), meter.losses(lent, 0)]
        return [*found, *(losses for losses, _ in meter.gradients(lent, 0, 1))]

    if in_session:
        with meter.session():
            first, other, *rest = measured()
    else:
        first, other, *rest = measured()
    assert first != other
    assert rest == [first, other, pytest.approx(other)]
    assert torch.equal(lent["linear.weight"], kept)
    assert net.training and net.calls == 0 and net.seen == []
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
