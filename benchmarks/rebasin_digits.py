"""Two seeds of a network on real digits: the barrier between them, as they are, after matching, after REPAIR.

python -m benchmarks.rebasin_digits [--nets mlp,conv,narrow] [--seeds 0,1]
"""

from __future__ import annotations

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lit_wsl.rebasin import apply_permutation, infer_permutation_spec, weight_matching
from lit_wsl.rebasin.activation import activation_matching
from lit_wsl.rebasin.barrier import interpolation_curve

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


def measure(name: str, seeds: tuple[int, int], epochs: int) -> dict[str, float]:
    training, test = digits()
    began = time.perf_counter()
    models = [train(name, seed, training, epochs) for seed in seeds]
    a, b = (m.state_dict() for m in models)
    trained = time.perf_counter() - began
    batches = list(zip(training[0].split(200), training[1].split(200)))
    spec = infer_permutation_spec(models[0], (training[0][:2],))
    rows = {"unaligned": (b, False), "unaligned, REPAIR": (b, True)}
    began = time.perf_counter()
    by_weights = weight_matching(spec, a, b, progress=False)
    weights_s = time.perf_counter() - began
    by_activations = activation_matching(spec, models[0], a, b, batches, progress=False)
    rows["weights"] = (apply_permutation(spec, by_weights, b), False)
    rows["weights, REPAIR"] = (rows["weights"][0], True)
    rows["activations"] = (apply_permutation(spec, by_activations, b), False)
    rows["activations, REPAIR"] = (rows["activations"][0], True)
    accuracy = [float((m(test[0]).argmax(1) == test[1]).float().mean()) for m in models]
    print(
        f"\n{name}: seeds {seeds}, trained in {trained:.0f} s, test accuracy {accuracy[0]:.3f} {accuracy[1]:.3f}; "
        f"weight matching {weights_s:.1f} s, {by_weights.sweeps} sweeps from {by_weights.start}, "
        f"objective {by_weights.objective_before:.1f} -> {by_weights.objective:.1f}, "
        f"identity {by_weights.identity_share:.3f}"
    )
    results = {}
    for label, (other, repair) in rows.items():
        curve = interpolation_curve(models[0], a, other, batches, repair=repair, spec=spec)
        results[label] = curve.loss_barrier
        print(f"  {label:22} loss barrier {curve.loss_barrier:8.4f}   accuracy barrier {curve.accuracy_barrier:7.4f}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", default="mlp,conv,narrow")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    first, second = (int(s) for s in options.seeds.split(","))
    for name in options.nets.split(","):
        results = measure(name, (first, second), options.epochs)
        way = "activations, REPAIR" if name == "narrow" else "weights, REPAIR"
        reached = results[way] <= TARGETS[name]
        print(f"  target {TARGETS[name]} for {way}: {'reached' if reached else 'MISSED'} ({results[way]:.4f})")


if __name__ == "__main__":
    main()
