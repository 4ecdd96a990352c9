"""What a proof costs where nothing is open: two batches, beside the time of the transfer and of two steps of training.

The same network under other names, trained for a moment. Medians of interleaved rounds; run it on a quiet machine:
``python -m benchmarks.proof.cost``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.proof.data import digits, text
from lit_wsl import transfer_weights

BATCH, STEPS, ROUNDS, MOST = 32, 120, 201, 20.0  # rounds at most, and seconds


class Net(nn.Module):
    """Layers by role, held under other names."""

    def __init__(self, renamed: bool, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.names = {role: f"{role}_new" if renamed else role for role in layers}
        for role, layer in layers.items():
            self.add_module(self.names[role], layer)

    def of(self, role: str) -> Any:
        """The layer of a role."""
        return getattr(self, self.names[role])


class Mlp(Net):
    def __init__(self, renamed: bool, width: int = 64) -> None:
        sizes = {"inlet": (64, width), "first": (width, width), "second": (width, width), "outlet": (width, 10)}
        super().__init__(renamed, {role: nn.Linear(*size) for role, size in sizes.items()})

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for role in ("inlet", "first", "second"):
            x = F.relu(self.of(role)(x))
        return self.of("outlet")(x)


class Conv(Net):
    def __init__(self, renamed: bool) -> None:
        layers: dict[str, nn.Module] = {"stem": nn.Conv2d(1, 16, 3, padding=1), "norm": nn.BatchNorm2d(16)}
        layers |= {"deep": nn.Conv2d(16, 24, 3, padding=1), "deep_norm": nn.BatchNorm2d(24)}
        super().__init__(renamed, layers | {"head": nn.Linear(24, 10)})

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.of("norm")(self.of("stem")(x))), 2)
        x = F.relu(self.of("deep_norm")(self.of("deep")(x)))
        return self.of("head")(x.mean((2, 3)))


class Gpt(Net):
    def __init__(self, renamed: bool, blocks: int = 12, width: int = 128) -> None:
        def block() -> nn.Module:
            return nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)

        layers: dict[str, nn.Module] = {"tokens": nn.Embedding(72, width), "places": nn.Embedding(48, width)}
        layers |= {"blocks": nn.ModuleList(block() for _ in range(blocks)), "norm": nn.LayerNorm(width)}
        super().__init__(renamed, layers | {"head": nn.Linear(width, 72, bias=False)})

    def forward(self, ids: Tensor) -> Tensor:
        count = ids.shape[1]
        x = self.of("tokens")(ids) + self.of("places").weight[:count]
        mask = nn.Transformer.generate_square_subsequent_mask(count)
        for block in self.of("blocks"):
            x = block(x, mask, is_causal=True)
        return self.of("head")(self.of("norm")(x))


def loss(net: nn.Module, batch: list[Tensor]) -> Tensor:
    """Cross entropy of classes, or of the next characters."""
    if len(batch) == 1:
        ids = batch[0]
        return F.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    return F.cross_entropy(net(batch[0]), batch[1])


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    """Add how long something took."""
    started = time.perf_counter()
    yield
    into.append(time.perf_counter() - started)


def measure(name: str, build: Callable[[bool], nn.Module], batches: list[list[Tensor]]) -> str:
    """One line about a network."""
    torch.manual_seed(0)
    old = build(False)
    optimizer = torch.optim.AdamW(old.parameters(), 1e-3)
    for number in range(STEPS):
        optimizer.zero_grad()
        loss(old, batches[number % len(batches)]).backward()
        optimizer.step()
    state = {key: value.detach().clone() for key, value in old.state_dict().items()}
    transfer: list[float] = []
    proof: list[float] = []
    steps: list[float] = []
    ratios, passes, said = [], 0.0, ""
    started = time.perf_counter()
    while len(ratios) < ROUNDS and time.perf_counter() - started < MOST:
        plain, proven = build(True), build(True)
        with timed(transfer):
            transfer_weights(plain, state)
        with timed(proof):
            plan = transfer_weights(proven, state, loss=loss, batches=batches[:8]).plan
        optimizer = torch.optim.AdamW(plain.parameters(), 1e-5)
        with timed(steps):
            for batch in batches[:2]:
                optimizer.zero_grad()
                loss(plain, batch).backward()
                optimizer.step()
        ratios.append(proof[-1] / (transfer[-1] + steps[-1]))
        passes, said = plan.measured.passes if plan.measured else 0.0, plan.proof
    shown = [f"{1e3 * statistics.median(values):8.1f}" for values in (transfer, steps, proof)]
    parameters = sum(p.numel() for p in old.parameters())
    return (
        f"{name:16} {parameters:10,} parameters, transfer {shown[0]} ms, two steps {shown[1]} ms, transfer with proof "
        f"{shown[2]} ms: {statistics.median(ratios):.2f} of both; {passes:g} passes, {said}"
    )


def main() -> None:
    """All networks."""
    torch.set_num_threads(1)
    images, labels = digits()
    pictures = [list(pair) for pair in zip(images.split(BATCH), labels.split(BATCH))]
    letters = [[part] for part in text().split(BATCH)]
    print(measure("MLP of 64", Mlp, pictures), flush=True)
    print(measure("MLP of 512", lambda renamed: Mlp(renamed, 512), pictures), flush=True)
    print(measure("conv net", Conv, pictures), flush=True)
    print(measure("GPT, 12 blocks", Gpt, letters), flush=True)


if __name__ == "__main__":
    main()
