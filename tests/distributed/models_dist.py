"""A network before and after a refactoring that needs every lossless operation, and the plan between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from lit_wsl.structure import describe
from lit_wsl.transfer import Concat, PlanEntry, SideSummary, Split, Stack, TransferPlan, Transpose

D, F, E, C = 12, 20, 4, 5  # width, hidden width, experts, classes (odd: parts of different size)


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(6, D)
        self.bn = nn.BatchNorm1d(D)
        self.qkv = nn.Linear(D, 3 * D)
        self.gate = nn.Linear(D, F, bias=False)
        self.up = nn.Linear(D, F, bias=False)
        self.down = nn.Parameter(torch.randn(F, D) / F**0.5)  # input first, as in Conv1D
        self.experts = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(E))
        self.fc = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.inp(x))
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + q * k.tanh() + v
        x = x + (silu(self.gate(x)) * self.up(x)) @ self.down
        return self.fc(torch.stack([e(x) for e in self.experts]).mean(0))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.gate_up = nn.Linear(D, 2 * F, bias=False)
        self.down = nn.Linear(F, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.query(x) * self.key(x).tanh() + self.value(x)
        gate, up = self.gate_up(x).chunk(2, -1)
        return x + self.down(silu(gate) * up)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(E, D, D))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->ebo", x, self.weight).mean(0)


class New(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, D), nn.BatchNorm1d(D))
        self.body = Body()
        self.experts = Experts()
        self.head = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.experts(self.body(self.stem(x))))


def old_model(seed: int = 0) -> Old:
    torch.manual_seed(seed)
    old = Old()
    old.train()(torch.randn(64, 6) * 3 + 1)  # running statistics of its own
    return old.eval()


def make_plan(prefix: str = "") -> TransferPlan:
    """The plan from ``Old`` to ``New``; ``prefix`` stands before the target's names."""
    old, new = describe(Old(), label="old"), describe(New(), label="new")

    def entry(sources: str, targets: str, *operations) -> PlanEntry:
        s, t = sources.split(), targets.split()
        shapes = tuple(new[name].shape for name in t)
        return PlanEntry(
            tuple(s),
            tuple(prefix + name for name in t),
            operations,
            tuple(old[name].shape for name in s),
            shapes,
            new[t[0]].kind,
        )

    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    entries = (
        entry("inp.weight", "stem.0.weight"),
        entry("inp.bias", "stem.0.bias"),
        *(entry(f"bn.{name}", f"stem.1.{name}") for name in statistics),
        entry("qkv.weight", "body.query.weight body.key.weight body.value.weight", Split(0, (D, D, D))),
        entry("qkv.bias", "body.query.bias body.key.bias body.value.bias", Split(0, (D, D, D))),
        entry("gate.weight up.weight", "body.gate_up.weight", Concat(0, (F, F))),
        entry("down", "body.down.weight", Transpose()),
        entry(" ".join(f"experts.{i}.weight" for i in range(E)), "experts.weight", Stack(0, E)),
        entry("fc.weight", "head.weight"),
        entry("fc.bias", "head.bias"),
    )
    return TransferPlan(entries, SideSummary.of(old), SideSummary.of(new))


def expected_state(old: Old) -> dict[str, Tensor]:
    """What the new network must hold, written out by hand."""
    s = {name: tensor.detach() for name, tensor in old.state_dict().items()}
    out = {f"stem.0.{n}": s[f"inp.{n}"] for n in ("weight", "bias")}
    for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        out[f"stem.1.{n}"] = s[f"bn.{n}"]
    for n in ("weight", "bias"):
        for i, name in enumerate(("query", "key", "value")):
            out[f"body.{name}.{n}"] = s[f"qkv.{n}"][i * D : (i + 1) * D]
    out["body.gate_up.weight"] = torch.cat([s["gate.weight"], s["up.weight"]])
    out["body.down.weight"] = s["down"].T
    out["experts.weight"] = torch.stack([s[f"experts.{i}.weight"] for i in range(E)])
    return out | {f"head.{n}": s[f"fc.{n}"] for n in ("weight", "bias")}
