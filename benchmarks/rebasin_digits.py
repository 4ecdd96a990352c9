"""Two seeds of a network on real digits: the barrier between them, as they are, after matching, after REPAIR.

    python -m benchmarks.rebasin_digits --seeds 0,1 2,3 4,5 6,7 --out benchmarks/results/rebasin_digits.json

The barrier is the loss barrier on the training data. The narrow net is matched on activations, with weights as the
other candidate (``best``); nothing was tuned to a pair of seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lit_wsl.rebasin import (
    activation_matching,
    apply_permutation,
    best_matching,
    infer_permutation_spec,
    interpolation_curve,
    weight_matching,
)

TARGETS = {"mlp": 0.005, "conv": 0.010, "narrow": 0.25}


def digits() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Training and test images (N, 1, 8, 8), standardised, with labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return (images[train], labels[train]), (images[test], labels[test])


def mlp(width: int = 512) -> nn.Module:
    first, second = nn.Linear(64, width), nn.Linear(width, width)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), nn.Linear(width, 10))


def conv(width: int) -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = block(1, width) + block(width, width) + [nn.MaxPool2d(2)] + block(width, width) + block(width, width)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


NETS = {"mlp": lambda: mlp(512), "conv": lambda: conv(64), "narrow": lambda: conv(16)}


def train(name: str, seed: int, data: tuple[torch.Tensor, torch.Tensor], epochs: int = 30) -> nn.Module:
    torch.manual_seed(seed)
    model = NETS[name]()
    images, labels = data
    steps = epochs * (len(images) // 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for i in range(0, len(images) - 63, 64):
            pick = order[i : i + 64]
            optimizer.zero_grad()
            F.cross_entropy(model(images[pick]), labels[pick]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def measure(name: str, seeds: tuple[int, int], epochs: int) -> dict[str, Any]:
    """Barriers between two seeds by each way of matching, on the training data."""
    training, test = digits()
    began = time.perf_counter()
    models = [train(name, seed, training, epochs) for seed in seeds]
    a, b = (m.state_dict() for m in models)
    trained = time.perf_counter() - began
    batches = list(zip(training[0].split(200), training[1].split(200)))
    spec = infer_permutation_spec(models[0], (training[0][:2],))
    weights = weight_matching(spec, a, b, progress=False)
    activations = activation_matching(spec, models[0], a, b, batches, progress=False)
    best = best_matching(spec, models[0], a, b, batches, progress=False)
    others = {"unaligned": b}
    for way, found in (("weights", weights), ("activations", activations), ("best", best)):
        others[way] = apply_permutation(spec, found, b)
    accuracy = [float((m(test[0]).argmax(1) == test[1]).float().mean()) for m in models]
    print(
        f"\n{name}: seeds {seeds}, trained in {trained:.0f} s, test accuracy {accuracy[0]:.3f} {accuracy[1]:.3f}; "
        f"weight matching {weights.sweeps} sweeps from {weights.start}, objective {weights.objective_before:.1f} -> "
        f"{weights.objective:.1f}, identity {weights.identity_share:.3f}; best: {best.start}"
    )
    row: dict[str, Any] = {"net": name, "seeds": list(seeds), "best": best.start}
    for way, other in others.items():
        for repair in (False, True):
            curve = interpolation_curve(models[0], a, other, batches, repair=repair, spec=spec)
            label = f"{way}, REPAIR" if repair else way
            row[label] = curve.loss_barrier
            print(
                f"  {label:22} loss barrier {curve.loss_barrier:8.4f}   accuracy barrier {curve.accuracy_barrier:7.4f}"
            )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", default="mlp,conv,narrow")
    parser.add_argument("--seeds", nargs="*", default=["0,1"], help="pairs: 0,1 2,3")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON file for the barriers")
    options = parser.parse_args()
    pairs = [tuple(int(s) for s in pair.split(",")) for pair in options.seeds]
    rows = [measure(net, pair, options.epochs) for net in options.nets.split(",") for pair in pairs]
    for net in options.nets.split(","):
        mine = [row for row in rows if row["net"] == net]
        print(f"\n{net}, bound {TARGETS[net]}:")
        for way in ("unaligned", "weights, REPAIR", "activations, REPAIR", "best, REPAIR"):
            values = [row[way] for row in mine]
            within = sum(value <= TARGETS[net] for value in values)
            shown = " ".join(f"{value:.4f}" for value in values)
            print(f"  {way:22} {shown}   within the bound: {within} of {len(values)}")
    if options.out:
        data = {"torch": torch.__version__, "epochs": options.epochs, "bounds": TARGETS, "rows": rows}
        options.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
