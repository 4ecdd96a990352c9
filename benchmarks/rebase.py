"""How much of a fine-tuning arrives on another release of its base: digits and a character model, labels unused.

    python -m benchmarks.rebase --nets mlp conv --seeds 2 3 4 --out benchmarks/results/rebase.json
    python -m benchmarks.rebase --nets transformer --seeds 5 6 7 --out benchmarks/results/rebase.json

Three networks: an MLP and a convolutional one with batch norms on digits (fine-tuned on digits turned by a quarter),
and a small causal transformer on the characters of Python's help texts (fine-tuned on Python code). The old base was
trained on half of the data. The new base is another seed on all data, or the old one trained further on all data, at a
full learning rate. The share is ``(loss(new base) - loss(result)) / (loss(new base) - loss(new base fine-tuned))`` on
test data of the fine-tuning's task; alpha is 1. ``rebase`` gets eight unlabelled batches of that task. "by the gap" is
the simpler rule that ``auto`` is better than: permuted up to a midpoint gap of 0.1, turned above it. Further columns
train the result and the new base for a tenth of the fine-tuning's steps. No choice was made on the seeds above.
"""

from __future__ import annotations

import argparse
import ast
import copy
import inspect
import json
import pydoc_data.topics
import random
import statistics
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.rebasin_digits import digits
from lit_wsl.rebasin import infer_permutation_spec, rebase, reestimate_batchnorm, task_vector

GOALS = {
    ("mlp", "continued"): 0.88,
    ("conv", "continued"): 0.90,
    ("transformer", "continued"): 0.63,
    ("mlp", "other seed"): 0.85,
    ("conv", "other seed"): 0.60,
    ("transformer", "other seed"): 0.35,
}
#: Steps and learning rate of the old base, of further training, and of the fine-tuning.
RECIPES = {
    "mlp": ((400, 0.05), (400, 0.05), (150, 0.01)),
    "conv": ((300, 0.05), (300, 0.05), (150, 0.01)),
    "transformer": ((1200, 3e-3), (1200, 3e-3), (250, 5e-4)),
}
METHODS = ("add", "permute", "turn", "fit", "auto")
CONTEXT = 32
CHARACTERS = ["\n", *map(chr, range(32, 127))]


class Block(nn.Module):
    """Causal attention and an MLP on a residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharacterModel(nn.Module):
    """A small causal transformer."""

    def __init__(self, width: int = 64, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(len(CHARACTERS), width)
        self.place = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(CHARACTERS))
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def mlp() -> nn.Module:
    hidden = [nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(512, 10))


def conv(width: int = 32) -> nn.Module:
    def block(inputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]

    layers = [*block(1), *block(width), nn.MaxPool2d(2), *block(width), *block(width)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


NETS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "conv": conv, "transformer": CharacterModel}


class Digits:
    """Training batches and test data; for the fine-tuning turned by a quarter."""

    def __init__(self, tuning: bool = False, half: bool = False) -> None:
        self.training, self.test = (
            (images.rot90(1, (2, 3)) if tuning else images, labels) for images, labels in digits()
        )
        if half:
            self.training = (self.training[0][::2], self.training[1][::2])

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pick = torch.randint(0, len(self.training[0]), (64,), generator=generator)
        return self.training[0][pick], self.training[1][pick]


class Characters:
    """Training batches and test data: help texts, for the fine-tuning Python code."""

    def __init__(self, tuning: bool = False, half: bool = False) -> None:
        modules = (statistics, inspect, textwrap, argparse, ast, random)
        code = "\n\n".join(inspect.getsource(module) for module in modules)
        text = code if tuning else "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
        ids = {character: number for number, character in enumerate(CHARACTERS)}
        tokens = torch.tensor([ids[c] for c in text if c in ids])
        cut = len(tokens) * 9 // 10
        self.training = tokens[: cut // 2 if half else cut]
        test = tokens[cut:]
        count = min(400, (len(test) - 1) // CONTEXT)
        self.test = tuple(test[i : i + count * CONTEXT].view(count, CONTEXT) for i in (0, 1))

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        at = torch.randint(0, len(self.training) - CONTEXT - 1, (16,), generator=generator)
        windows = torch.stack([self.training[i : i + CONTEXT + 1] for i in at])
        return windows[:, :-1], windows[:, 1:]


def train(net: str, model: nn.Module, data: Any, recipe: tuple[int, float], seed: int) -> nn.Module:
    """A copy of the model after so many steps; warm-up, then a linear decay to zero."""
    steps, rate = recipe
    model = copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(seed)
    if net == "transformer":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 20) * (1 - s / steps))
    for _ in range(steps):
        inputs, targets = data.draw(generator)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def loss(model: nn.Module, data: Any) -> float:
    inputs, targets = data.test
    return float(F.cross_entropy(model.eval()(inputs).flatten(0, -2), targets.flatten()))


def new_model(net: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return NETS[net]()


def measure(net: str, seed: int) -> list[dict[str, Any]]:
    """The shares of one net and seed, on both kinds of new base."""
    kind = Characters if net == "transformer" else Digits
    whole, half, tuning = kind(), kind(half=True), kind(tuning=True)
    first, further, tune = RECIPES[net]
    old = train(net, new_model(net, seed), half, first, seed)
    tuned = train(net, old, tuning, tune, seed + 300)
    bases = {
        "continued": train(net, old, whole, further, seed + 200),
        "other seed": train(net, new_model(net, seed + 100), whole, first, seed + 100),
    }
    generator = torch.Generator().manual_seed(77)
    batches = [tuning.draw(generator)[0] for _ in range(8)]
    spec = infer_permutation_spec(old, (batches[0][:2],))
    vector = task_vector(tuned.state_dict(), old.state_dict(), strict=False)
    tenth = (tune[0] // 10, tune[1])
    rows = []
    for to, base in bases.items():
        start, end = loss(base, tuning), loss(train(net, base, tuning, tune, seed + 300), tuning)

        def share(model: nn.Module, start: float = start, end: float = end) -> float:
            return (start - loss(model, tuning)) / (start - end)

        refreshed = copy.deepcopy(base)
        reestimate_batchnorm(refreshed, batches)
        row: dict[str, Any] = {"net": net, "seed": seed, "to": to, "base loss": start, "tuned loss": end}
        row["base"], row["base + 10 %"] = share(refreshed), share(train(net, base, tuning, tenth, seed + 301))
        row["finetuned itself"] = share(tuned)
        for method in METHODS:
            began = time.perf_counter()
            found = rebase(
                spec, vector, old.state_dict(), base.state_dict(), model=old, batches=batches, method=method,
                progress=False,
            )  # fmt: skip
            model = copy.deepcopy(base)
            model.load_state_dict(found.state_dict)
            row[method] = share(model)
            if method == "auto":
                row["auto + 10 %"] = share(train(net, model, tuning, tenth, seed + 301))
                row |= {"method": found.method, "gap": found.gap, "missed": found.missed}
                row["seconds"] = time.perf_counter() - began
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    rows = [{**row, "by the gap": row["permute" if row["gap"] <= 0.1 else "turn"]} for row in rows]
    columns = ("base", *METHODS, "by the gap", "auto + 10 %", "base + 10 %", "finetuned itself")
    print("\nmean share over the seeds\n" + " ".join(f"{c:>16}" for c in ("net", "new base", *columns, "goal")))
    for (net, to), goal in GOALS.items():
        mine = [row for row in rows if (row["net"], row["to"]) == (net, to)]
        if mine:
            means = {column: statistics.fmean(row[column] for row in mine) for column in columns}
            reached = "reached" if means["auto"] >= goal else "missed"
            numbers = " ".join(f"{means[column]:16.2f}" for column in columns)
            print(f"{net:>16} {to:>16} {numbers} {goal:>8.2f} {reached}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--out", type=Path, help="JSON file, written after every seed; rows of other runs are kept")
    parser.add_argument("--show", action="store_true", help="only print the table of --out")
    options = parser.parse_args()
    kept = json.loads(options.out.read_text())["rows"] if options.out and options.out.exists() else []
    if options.show:
        return show(kept)
    for net in options.nets:
        for seed in options.seeds:
            rows = measure(net, seed)
            if options.out:
                kept = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
            kept = [row for row in kept if (row["net"], row["seed"]) != (net, seed)] + rows
            if options.out:
                data = {"torch": torch.__version__, "recipes": RECIPES, "rows": kept}
                options.out.write_text(json.dumps(data, indent=1) + "\n")
    return show(kept)


if __name__ == "__main__":
    main()
