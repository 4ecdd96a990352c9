"""Draw what a proof on data measured for two spellings of a small network: ``python docs/figures/proof.py``."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lit_wsl import transfer_weights
from lit_wsl.report.saving import decision_chart

WIDTH = 24


class Usual(nn.Module):
    """Two gated branches, each behind a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        y = self.norm1(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.outlet(x + torch.tanh(self.mix(self.norm2(x))))


class Other(nn.Module):
    """The same function: gate and up in one matrix, a square matrix turned, names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.b = nn.ModuleList([nn.Linear(40, WIDTH), nn.Linear(WIDTH, 80)])
        self.c = nn.ModuleList([nn.Linear(WIDTH, 3), nn.Linear(4, WIDTH)])
        self.d, self.e = nn.Parameter(torch.randn(WIDTH, WIDTH) / 5), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.c[1](x)
        up, gate = self.b[1](self.a[1](x)).chunk(2, -1)
        x = x + self.b[0](F.silu(gate) * up)
        return self.c[0](x + torch.tanh(self.a[0](x) @ self.d + self.e))


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss on one batch of points ``(N, 4)`` and classes ``(N,)``."""
    return F.cross_entropy(net(batch[0]), batch[1])


def draw(path: Path) -> None:
    """Train the usual spelling, take it to the other, write the figure."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(512, 4)
        y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] + x[:, 3] ** 2 > 1).long()
        old = Usual()
        optimizer = torch.optim.AdamW(old.parameters(), 0.01)
        for _ in range(300):
            optimizer.zero_grad()
            loss(old, (x, y)).backward()
            optimizer.step()
        batches = list(zip(x.split(64), y.split(64)))
        report = transfer_weights(Other(), old.state_dict(), min_coverage=0.0, loss=loss, batches=batches)
    assert report.plan.measured is not None
    head, rest = decision_chart(report.plan.measured).split(">", 1)
    path.write_text(f'<?xml version="1.0"?>\n{head}><rect width="100%" height="100%" fill="white"/>{rest}\n', "utf-8")


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".svg"))
