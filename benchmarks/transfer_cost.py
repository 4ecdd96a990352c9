"""Time and peak memory of a transfer against ``torch.load(mmap=True)`` and ``load_state_dict``.

    python -m benchmarks.transfer_cost --gigabytes 2

Each run is a process of its own, on one file, with its peak resident memory as the kernel counts it. The model's
names differ from the file's (prefix), so the transfer does match; the baseline strips the prefix by hand.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn


def build(gigabytes: float, width: int = 2048) -> nn.Module:
    """A stack of linear layers of about that size in float32, uninitialised."""
    layers = max(1, round(gigabytes * 2**30 / (4 * width * (width + 1))))
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def run(mode: str, path: str, gigabytes: float) -> dict[str, float]:
    model = build(gigabytes)
    if mode == "transfer":  # imports are not the cost in question
        from lit_wsl import transfer_weights

        transfer_weights(nn.Linear(2, 2), nn.Linear(2, 2).state_dict())
    start = time.perf_counter()
    if mode == "transfer":
        transfer_weights(model, path)
    else:
        state = torch.load(path, mmap=True, weights_only=True)
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    seconds = time.perf_counter() - start
    assert float(model[0].weight[0, 0]) == 1.0
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("MODE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(*args.one, args.gigabytes)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        model = build(args.gigabytes)
        torch.save({f"model.{n}": torch.ones_like(t) for n, t in model.state_dict().items()}, path)
        del model
        best: dict[str, dict[str, float]] = {}
        for _ in range(args.repeats):
            for mode in ("baseline", "transfer"):
                command = [sys.executable, "-m", "benchmarks.transfer_cost", "--gigabytes", str(args.gigabytes)]
                done = subprocess.run([*command, "--one", mode, str(path)], capture_output=True, text=True, check=True)
                result = json.loads(done.stdout.splitlines()[-1])
                known = best.setdefault(mode, result)
                best[mode] = {key: min(known[key], result[key]) for key in result}
        for mode, result in best.items():
            print(f"{mode:9} {result['seconds']:7.2f} s   peak {result['peak'] / 2**30:6.2f} GiB")
        ratio = {key: best["transfer"][key] / best["baseline"][key] for key in ("seconds", "peak")}
        print(f"ratio     {ratio['seconds']:7.2f}     peak {ratio['peak']:6.2f}")


if __name__ == "__main__":
    main()
