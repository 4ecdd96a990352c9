"""Two networks trained from different seeds, on the same line: the barrier between them before and after matching.

1. Train a convolutional network on scikit-learn's handwritten digits twice, from two seeds.
2. Infer its permutation symmetries, bring the second network into the first one's order, and check that it still
   answers exactly as before.
3. Walk along the straight line between both: as they are; matched; matched with batch norm statistics estimated anew.

Run it with ``python examples/rebasin_digits.py``; it takes about a minute on two cores. ``--plot line.png`` draws the
three curves (with matplotlib). It checks what it shows, and ends with exit code 1 if anything of it is not so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lit_wsl.rebasin import InterpolationCurve, apply_permutation, infer_permutation_spec, weight_matching
from lit_wsl.rebasin.merging.merge import interpolation_curve


def network(width: int = 32) -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(1, width), *block(width, width), nn.MaxPool2d(2), *block(width, width), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, 10))


def train(seed: int, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    model = network()
    batch = 64
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for start in range(0, len(images) - batch + 1, batch):
            pick = order[start : start + batch]
            optimizer.zero_grad()
            cross_entropy(model(images[pick]), labels[pick]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def plot(path: Path, curves: dict[str, InterpolationCurve]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for label, curve in curves.items():
        axes.plot(curve.alphas, curve.losses, marker="o", markersize=3, label=label)
    axes.set(xlabel="position between the two networks", ylabel="training loss")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--plot", type=Path, help="file for the plot (.png, .svg)")
    options = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    train_images, train_labels, held_out = images[:1437], labels[:1437], images[1437:]
    first, second = (train(seed, train_images, train_labels, options.epochs) for seed in (0, 1))
    for number, model in enumerate((first, second), start=1):
        right = float((model(held_out).argmax(1) == labels[1437:]).float().mean())
        print(f"network {number}: {right:.1%} of {len(held_out)} held-out images")

    spec = infer_permutation_spec(first, (train_images[:2],))
    print(f"\n{len(spec.groups)} groups of units may be permuted, {spec.coverage:.1%} of the parameters move")
    found = weight_matching(spec, first.state_dict(), second.state_dict(), seed=0)
    aligned = apply_permutation(spec, found, second.state_dict())
    print(f"matched in {found.sweeps} sweeps; {found.identity_share:.1%} of the units stayed where they were")
    with torch.no_grad():
        before = second(held_out)
        moved = network().eval()
        moved.load_state_dict(aligned)
        same = torch.allclose(moved(held_out), before, atol=1e-3)

    batches = list(zip(train_images.split(200), train_labels.split(200)))
    ways = {
        "as they are": (second.state_dict(), False),
        "matched": (aligned, False),
        "matched, statistics estimated anew": (aligned, True),
    }
    curves = {}
    print()
    for label, (other, repair) in ways.items():
        curves[label] = interpolation_curve(first, first.state_dict(), other, batches, repair=repair)
        barrier, lost = curves[label].loss_barrier, curves[label].accuracy_barrier
        print(f"{label:36} loss barrier {barrier:6.3f}   accuracy barrier {lost:6.1%}")
    if options.plot:
        plot(options.plot, curves)
        print(f"\nplot: {options.plot}")

    heights = [curve.loss_barrier for curve in curves.values()]
    claims = {
        "the permuted network answers as before": same,
        "matching lowers the barrier": heights[1] < heights[0],
        "new statistics lower it further": heights[2] < heights[1],
        "what is left is below a quarter of the barrier": heights[2] < 0.25 * heights[0],
    }
    print()
    for claim, holds in claims.items():
        print("yes" if holds else "NO ", claim)
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
