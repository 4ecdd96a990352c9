"""``make proof-bench``: names alone and with data, on pairs whose sources are trained here.

A tensor is right if it holds the truth, missing if it holds what the new model held, wrong otherwise. The function is
kept if the filled model's loss on a batch is the source's.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from benchmarks.proof.pairs import PAIRS, Directed, directed, loader, loss
from lit_wsl import LitWslError, transfer_weights

RESULTS = Path(__file__).parents[1] / "results" / "proof.txt"


@dataclass(frozen=True)
class Row:
    """How one direction of a pair went."""

    pair: str
    mode: str
    right: int
    wrong: int
    missing: int
    kept: bool
    proof: str = ""
    passes: float = 0.0
    seconds: float = 0.0
    error: str = ""


def measure(pair: Directed, mode: str) -> Row:
    """Transfer and compare with the truth."""
    torch.manual_seed(3)
    model = pair.target().eval()
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(11)
    batches = list(islice(loader(pair.task), 8))
    data = {"loss": lambda net, batch: loss(pair.task, net, batch), "batches": batches} if mode == "data" else {}
    started, error, plan = time.monotonic(), "", None
    try:
        plan = transfer_weights(model, pair.source, min_coverage=0.0, **data).plan
    except LitWslError as failure:
        error = str(failure)[:200]
    seconds = time.monotonic() - started
    counts = {"right": 0, "wrong": 0, "missing": 0}
    for name, value in model.state_dict().items():
        same = torch.equal(value, pair.truth[name])
        counts["right" if same else "missing" if torch.equal(value, fresh[name]) else "wrong"] += 1
    both = []
    for net in (model, pair.source_model):
        torch.manual_seed(5)
        with torch.no_grad():
            both.append(float(loss(pair.task, net.eval(), batches[0])))
    kept = abs(both[0] - both[1]) < 1e-4 * abs(both[1])
    passes = plan.measured.passes if plan is not None and plan.measured is not None else 0.0
    proof = plan.proof if plan is not None else ""
    return Row(pair.name, mode, **counts, kept=kept, proof=proof, passes=passes, seconds=round(seconds, 2), error=error)


def main() -> None:
    """Run all pairs, print a line for each, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="*", help="names of pairs; all by default")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows, lines = [], []
    for pair in PAIRS:
        if options.pairs and pair.name not in options.pairs:
            continue
        for direction in directed(pair):
            for mode in ("names", "data"):
                row = measure(direction, mode)
                rows.append(row)
                lines.append(
                    f"{row.pair:17} {row.mode:6} right {row.right:3} wrong {row.wrong:3} missing {row.missing:3} "
                    f"{'kept' if row.kept else '-':5} {row.proof:10} {row.passes:6.1f} passes {row.seconds:6.1f} s "
                    f"{row.error}".rstrip()
                )
                print(lines[-1], flush=True)
    sums = []
    for mode in ("names", "data"):
        own = [row for row in rows if row.mode == mode]
        counts = {key: sum(getattr(row, key) for row in own) for key in ("right", "wrong", "missing", "kept")}
        text = ", ".join(f"{key} {count}" for key, count in counts.items())
        sums.append(f"{'Names alone' if mode == 'names' else 'With data'}: {text} of {len(own)} directed pairs.")
    print("\n".join(sums))
    if not options.pairs:
        busy = f"make proof-bench, at a load of {os.getloadavg()[1]:.0f} on {os.cpu_count()} cores."
        RESULTS.write_text("\n".join([busy, *sums, "", *lines]) + "\n")


if __name__ == "__main__":
    main()
