"""Several convolutional networks with batch norms on digits, each from its own seed, merged into one.

    python -m benchmarks.rebasin_many --seeds 0 1 2 --out benchmarks/results/rebasin_many.json

Accuracy on test images of each network, and of their mean: as they are, aligned to the first pair by pair, and aligned
all at once by ``match_many`` on weights and on training images without labels. Statistics of batch norms are always
estimated anew on training images.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.rebasin_digits import NETS, conv, digits, train
from lit_wsl.rebasin import (
    apply_permutation,
    average,
    infer_permutation_spec,
    match_many,
    reestimate_batchnorm,
    weight_matching,
)

GOAL = 0.95


def accuracy(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> float:
    with torch.no_grad():
        return float((model.eval()(data[0]).argmax(1) == data[1]).float().mean())


def measure(seeds: list[int], width: int, epochs: int) -> dict[str, Any]:
    training, test = digits()
    NETS["many"] = lambda: conv(width)
    models = [train("many", seed, training, epochs) for seed in seeds]
    states = [model.state_dict() for model in models]
    batches = list(training[0].split(200))
    spec = infer_permutation_spec(models[0], (training[0][:2],))

    def merged(matchings: list[Any]) -> float:
        aligned = [apply_permutation(spec, found, state) for found, state in zip(matchings, states, strict=True)]
        model = copy.deepcopy(models[0])
        model.load_state_dict(average(aligned))
        reestimate_batchnorm(model, batches)
        return accuracy(model, test)

    def pairwise() -> list[Any]:
        return [{}, *(weight_matching(spec, states[0], state, progress=False) for state in states[1:])]

    row: dict[str, Any] = {"seeds": seeds, "width": width, "single": [accuracy(model, test) for model in models]}
    ways = {
        "as they are": lambda: [{} for _ in states],
        "pair by pair, weights": pairwise,
        "match_many, weights": lambda: match_many(spec, states, progress=False),
        "match_many, data": lambda: match_many(spec, states, model=models[0], batches=batches, progress=False),
    }
    for way, match in ways.items():
        began = time.perf_counter()
        row[way] = merged(match())
        print(f"{way:24} {row[way]:.3f}   {time.perf_counter() - began:.0f} s", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON file for the accuracies")
    options = parser.parse_args()
    row = measure(options.seeds, options.width, options.epochs)
    best = max(row["match_many, weights"], row["match_many, data"])
    print(f"single {row['single']}, best merged {best:.3f}, goal {GOAL}: {'reached' if best >= GOAL else 'missed'}")
    if options.out:
        options.out.write_text(json.dumps({"torch": torch.__version__, "goal": GOAL, **row}, indent=1) + "\n")


if __name__ == "__main__":
    main()
