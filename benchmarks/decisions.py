"""What decided three choices inside the package, each measured again by one command.

    python -m benchmarks.decisions copying
    python -m benchmarks.decisions assignment     (beside lap, where it is installed: pip install lapx)
    python -m benchmarks.decisions matching

``copying``: large tensors are copied and looked at for NaN and infinity piece by piece, by several threads, instead of
``Tensor.copy_`` and then a pass of torch over the result. ``assignment``: large problems are solved on a small core
instead of by a dense solver. ``matching``: ``best_matching`` tries weights and responses in one objective beside either
alone; read from ``benchmarks/results/rebasin_digits.json``. Ways that are compared take turns; medians are shown.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lit_wsl.rebasin.matching.assignment import assign_large
from lit_wsl.transfer.apply import all_finite, copy_in_pieces, copy_into

RESULTS = Path(__file__).parent / "results"


def in_turns(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: median(found) for name, found in times.items()}


def copying(repeats: int) -> None:
    """Gigabytes per second of a copy that also tells whether all that was copied is finite."""
    most = torch.get_num_threads()
    print(f"GB/s of copying and looking, {most} threads at most, medians of {repeats}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for megabytes in (1, 16, 256):
            source = torch.randn(megabytes * 2**20 // dtype.itemsize, dtype=torch.float32).to(dtype)
            target = torch.zeros_like(source)

            def plainly(threads: int, target: Tensor = target, source: Tensor = source) -> bool:
                torch.set_num_threads(threads)
                copy_into(target, source)
                return all_finite(target)

            def in_pieces(threads: int, target: Tensor = target, source: Tensor = source) -> bool:
                torch.set_num_threads(threads)
                return copy_in_pieces(target, source)

            ways: dict[str, Callable[[], object]] = {}
            for threads in sorted({1, most}):
                ways[f"copy_ and isfinite, {threads}"] = lambda n=threads, f=plainly: f(n)
                ways[f"in pieces, {threads}"] = lambda n=threads, f=in_pieces: f(n)
            in_turns(ways, 1)
            found = in_turns(ways, repeats * (1 if megabytes > 100 else 5))
            speeds = ", ".join(f"{name}: {source.nbytes / seconds / 1e9:.1f}" for name, seconds in found.items())
            print(f"{str(dtype)[6:]:9} {megabytes:4} MB  {speeds}", flush=True)
    from_file(most, repeats)
    torch.set_num_threads(most)


def from_file(most: int, repeats: int, megabytes: int = 512) -> None:
    """The same out of a file that is mapped anew each time, as a checkpoint is, into memory that nobody touched yet.

    Here most of the time goes into pages that the system has to bring in, which several threads ask for at once.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, count = Path(folder) / "weights", megabytes * 2**20 // 4
        torch.randn(count).numpy().tofile(path)

        def plainly(threads: int) -> bool:
            torch.set_num_threads(threads)
            target = torch.empty(count)
            copy_into(target, torch.from_file(str(path), size=count))
            return all_finite(target)

        def in_pieces(threads: int) -> bool:
            torch.set_num_threads(threads)
            return copy_in_pieces(torch.empty(count), torch.from_file(str(path), size=count))

        ways: dict[str, Callable[[], object]] = {}
        for threads in sorted({1, most}):
            ways[f"copy_ and isfinite, {threads}"] = partial(plainly, threads)
            ways[f"in pieces, {threads}"] = partial(in_pieces, threads)
        in_turns(ways, 1)
        found = in_turns(ways, repeats)
    speeds = ", ".join(f"{name}: {count * 4 / seconds / 1e9:.1f}" for name, seconds in found.items())
    print(f"float32    {megabytes} MB of a mapped file  {speeds}", flush=True)


def similarities(size: int, noise: float, seed: int) -> Tensor:
    """Inner products of units with those of a permuted, noisy copy; of unrelated ones where the noise is infinite."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, 256, generator=generator)
    other = torch.randn(size, 256, generator=generator)
    if np.isfinite(noise):
        other = rows[torch.randperm(size, generator=generator)] + noise * other
    return rows @ other.T


def assignment(repeats: int) -> None:
    """Seconds, and how far the sums lie apart."""
    ways: dict[str, Callable[[Tensor], np.ndarray]] = {
        "core": lambda s: assign_large(s).numpy(),
        "scipy": lambda s: linear_sum_assignment((s - s.amax(dim=0)).numpy(), maximize=True)[1],
    }
    try:
        from lap import lapjv
    except ImportError:
        print("lap is not installed: only scipy is beside the core (pip install lapx)")
    else:
        ways["lap"] = lambda s: lapjv((s.amax() - s).double().numpy(), return_cost=False)[0]
    print(f"seconds, medians of {repeats}; gap: largest relative difference of the sums")
    for size in (768, 1536, 3072, 4608):
        for noise in (4.0, 8.0, float("inf")):
            matrix = similarities(size, noise, size)
            found = in_turns({name: partial(way, matrix) for name, way in ways.items()}, repeats)
            sums = [float(matrix.double().numpy()[np.arange(size), way(matrix)].sum()) for way in ways.values()]
            gap = (max(sums) - min(sums)) / abs(max(sums))
            told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in found.items())
            print(f"{size:5} noise {noise:3}: {told}; gap {gap:.1e}", flush=True)


def matching() -> None:
    """Barriers after REPAIR: what trying both together finds beside the better of the two alone."""
    rows = json.loads((RESULTS / "rebasin_digits.json").read_text())["rows"]
    for net in dict.fromkeys(row["net"] for row in rows):
        mine = [row for row in rows if row["net"] == net]
        alone = [min(row["weights, REPAIR"], row["activations, REPAIR"]) for row in mine]
        best = [row["best, REPAIR"] for row in mine]
        better = sum(b < a for a, b in zip(alone, best))
        print(
            f"{net:7} better of weights and activations {median(alone):.4f} (largest {max(alone):.4f}), best_matching "
            f"{median(best):.4f} (largest {max(best):.4f}), lower in {better} of {len(mine)} pairs"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("copying", "assignment", "matching"))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.what == "matching":
        matching()
    else:
        {"copying": copying, "assignment": assignment}[options.what](options.repeats)


if __name__ == "__main__":
    main()
