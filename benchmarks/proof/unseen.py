"""``python -m benchmarks.proof.unseen``: pairs that the code was judged by at first sight, through a Trainer.

Each set was written before the code had seen any of its pairs; what was measured then stands in the closing notes of
the session. Now they are a benchmark like any other.
"""

from __future__ import annotations

import argparse
import importlib
import io
import time
import warnings
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.proof.__main__ import Row
from benchmarks.proof.pairs import Directed, Pair, directed, loader, loss
from benchmarks.proof.spelled import Spelled, spelled
from lit_wsl import LitWslError, WeightTransferCallback

SETS = ("k", "l", "m", "n", "o", "p", "q")


class Task(pl.LightningModule):
    """A network with its loss and its data."""

    def __init__(self, net: torch.nn.Module, task: str) -> None:
        super().__init__()
        self.net, self.task = net, task

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return loss(self.task, self.net, batch)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("val_loss", loss(self.task, self.net, batch))

    def train_dataloader(self) -> DataLoader:
        return loader(self.task)

    def val_dataloader(self) -> DataLoader:
        return loader(self.task, shuffle=False)


def pairs(name: str) -> list[Pair]:
    """The pairs of a set."""
    module = importlib.import_module(f"benchmarks.proof.unseen_{name}")
    return [_pair(net, f"unseen_{name}") for net in module.NETS]


def _pair(net: type[Spelled], code: str) -> Pair:
    usual = {role: role for role in net().spelling}
    truth = partial(spelled, usual=usual, other=net.other, head=net.head)
    hostile = partial(net, net.other)
    return Pair(net.__name__, net.task, net, hostile, truth, getattr(net, "steps", 300), code=("data", "spelled", code))


def measure(pair: Directed, path: Path, verbose: bool) -> Row:
    """Validate the new model with the old checkpoint, and compare what it holds with the truth."""
    torch.manual_seed(3)
    task = Task(pair.target(), pair.task)
    fresh = {name: value.clone() for name, value in task.net.state_dict().items()}
    torch.save({"state_dict": {f"net.{name}": value for name, value in pair.source.items()}}, path)
    transfer = WeightTransferCallback(path)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False}
    trainer = pl.Trainer(
        callbacks=[transfer], accelerator="cpu", limit_val_batches=1, enable_model_summary=False, **quiet
    )
    started, error = time.monotonic(), ""
    out = io.StringIO()
    try:
        with redirect_stdout(out):
            trainer.validate(task, verbose=False)
    except LitWslError as failure:
        error = str(failure).splitlines()[0][:120]
    seconds = time.monotonic() - started
    if verbose:
        print(out.getvalue())
    counts = {"right": 0, "wrong": 0, "missing": 0}
    wrong = []
    for name, value in task.net.state_dict().items():
        kind = (
            "right"
            if torch.equal(value, pair.truth[name])
            else "missing"
            if torch.equal(value, fresh[name])
            else "wrong"
        )
        counts[kind] += 1
        wrong += [name] if kind == "wrong" else []
    both = []
    batch = next(iter(loader(pair.task, shuffle=False)))
    for net in (task.net, pair.source_model):
        torch.manual_seed(5)
        with torch.no_grad():
            both.append(float(loss(pair.task, net.eval(), batch)))
    plan = transfer.report.plan if transfer.report is not None else None
    passes = plan.measured.passes if plan is not None and plan.measured is not None else 0.0
    if verbose and plan is not None:
        print("\n".join(plan.notes), "\nwrong:", wrong)
    kept = abs(both[0] - both[1]) < 1e-4 * abs(both[1])
    proof = plan.proof if plan is not None else ""
    return Row(
        pair.name, "data", **counts, kept=kept, proof=proof, passes=passes, seconds=round(seconds, 2), error=error
    )


def main() -> None:
    """Run a set and print a line for each pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="*", help="names of pairs, with the arrow of a direction or without")
    parser.add_argument("--set", default=",".join(SETS), help="which sets, separated by commas")
    parser.add_argument("--verbose", action="store_true", help="what the callback prints, too")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    path = Path(__file__).parents[2] / "build" / "proof" / "unseen.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.set.split(","):
        for pair in pairs(name):
            if options.pairs and not any(wanted.split()[0] == pair.name for wanted in options.pairs):
                continue
            for direction in directed(pair):
                if options.pairs and not {direction.name, pair.name} & set(options.pairs):
                    continue
                row = measure(direction, path, options.verbose)
                rows.append(row)
                print(
                    f"{name} {row.pair:17} right {row.right:3} wrong {row.wrong:3} missing {row.missing:3} "
                    f"{'kept' if row.kept else '-':5} {row.proof:10} {row.passes:6.1f} passes {row.seconds:6.1f} s "
                    f"{row.error}".rstrip(),
                    flush=True,
                )
    sums = {key: sum(getattr(row, key) for row in rows) for key in ("kept", "right", "wrong", "missing")}
    print(", ".join(f"{key} {count}" for key, count in sums.items()), f"of {len(rows)} directed pairs")


if __name__ == "__main__":
    main()
