"""Networks whose names mislead: gates called what is gated, experts counted from the end."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.gauntlet.truth import Tensors
from benchmarks.proof.vision import WIDTH, _carry

DEPTH, EXPERTS = 4, 4


class HighwayLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transform, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def mix(self, x: Tensor, gate: nn.Linear, other: nn.Linear) -> Tensor:
        share = gate(x).sigmoid()
        return share * F.relu(other(x)) + (1 - share) * x

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, self.gate, self.transform)


class Highway(nn.Module):
    kind = HighwayLayer

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(64, WIDTH)
        self.layers = nn.ModuleList(self.kind() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inlet(x.flatten(1)))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class MisnamedLayer(HighwayLayer):
    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, self.transform, self.gate)


class Misnamed(Highway):
    """All names kept, but gates are called what they gate."""

    kind = MisnamedLayer

    @staticmethod
    def truth(state: Tensors) -> Tensors:
        names = {"transform": "gate", "gate": "transform"}
        pairs = {f"layers.{k}.{a}": f"layers.{k}.{b}" for k in range(DEPTH) for a, b in names.items()}
        return _carry(state, pairs | {"inlet": "inlet", "head": "head"})


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class ExpertBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        share, best = self.router(y).softmax(-1).max(-1)
        outs = torch.stack([expert(y) for expert in self.experts], -1)
        return x + (outs * F.one_hot(best, EXPERTS)[:, None]).sum(-1) * share[:, None]


class Experts(nn.Module):
    """Each sample goes through one of the experts of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, WIDTH)
        self.blocks = nn.ModuleList(ExpertBlock() for _ in range(2))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class HostileExpertBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(EXPERTS))
        self.r, self.n = nn.Linear(WIDTH, EXPERTS), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x)
        share, best = self.r(y).softmax(-1).max(-1)
        outs = torch.stack([e[0](F.relu(e[1](y))) for e in reversed(self.e)], -1)
        return x + (outs * F.one_hot(best, EXPERTS)[:, None]).sum(-1) * share[:, None]


class HostileExperts(nn.Module):
    """Experts are counted from the end, and so are blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.b = nn.Linear(WIDTH, 10), nn.ModuleList(HostileExpertBlock() for _ in range(2))
        self.s = nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.s(x.flatten(1))
        for block in reversed(self.b):
            x = block(x)
        return self.h(x)

    @staticmethod
    def truth(state: Tensors) -> Tensors:
        pairs = {"stem": "s", "head": "h"}
        for k in range(2):
            pairs |= {f"blocks.{k}.norm": f"b.{1 - k}.n", f"blocks.{k}.router": f"b.{1 - k}.r"}
            for e in range(EXPERTS):
                own, other = f"blocks.{k}.experts.{e}", f"b.{1 - k}.e.{EXPERTS - 1 - e}"
                pairs |= {f"{own}.down": f"{other}.0", f"{own}.up": f"{other}.1"}
        return _carry(state, pairs)
