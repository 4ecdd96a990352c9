"""What a conversion costs: a Lightning checkpoint with Adam's states, split and renamed, against a plain copy by torch.

Each way runs in a process of its own; its peak of resident memory (VmHWM of Linux, mapped pages of the file included)
is counted from before the work. Also: writing and reading a plan of 120,000 entries.

    python -m benchmarks.convert --gb 1
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

WIDTH = 1024


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """A decoder of as many layers as it takes; two thirds of the file are Adam's moments."""
    from lit_wsl.structure import describe
    from lit_wsl.transfer import PlanEntry, SideSummary, Split, TransferPlan

    layers = max(1, round(gigabytes * 2**30 / (4 * 3 * 8 * WIDTH**2)))
    state, moments, entries, new = {}, {}, [], {}
    for i in range(layers):
        shapes = {"attn": (3 * WIDTH, WIDTH), "proj": (WIDTH, WIDTH), "mlp": (4 * WIDTH, WIDTH)}
        for module, shape in shapes.items():
            moments[len(state)] = {
                "step": torch.tensor(5.0),
                "exp_avg": torch.randn(shape),
                "exp_avg_sq": torch.rand(shape),
            }
            state[f"h.{i}.{module}.weight"] = torch.randn(shape)
        square = (WIDTH, WIDTH)
        targets = tuple(f"blocks.{i}.{x}.weight" for x in "qkv")
        split = (Split(0, (WIDTH,) * 3),)
        entries += [
            PlanEntry((f"h.{i}.mlp.weight",), (f"blocks.{i}.up.weight",), (), (shapes["mlp"],), (shapes["mlp"],)),
            PlanEntry((f"h.{i}.attn.weight",), targets, split, (shapes["attn"],), (square,) * 3),
            PlanEntry((f"h.{i}.proj.weight",), (f"blocks.{i}.out.weight",), (), (square,), (square,)),
        ]
        new[f"blocks.{i}.up.weight"] = torch.empty(shapes["mlp"], device="meta")
        new.update({name: torch.empty(square, device="meta") for name in (*targets, f"blocks.{i}.out.weight")})
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(range(len(state)))}]}
    content = {"state_dict": state, "optimizer_states": [optimizer], "lr_schedulers": [], "epoch": 1}
    torch.save({**content, "pytorch-lightning_version": "2.6.6"}, folder / "old.ckpt")
    TransferPlan(tuple(entries), SideSummary.of(describe(state)), SideSummary.of(describe(new))).save(
        folder / "plan.json"
    )


def copy(folder: Path) -> None:
    """The floor: torch reads the file and writes it again."""
    torch.save(torch.load(folder / "old.ckpt", mmap=True, weights_only=True), folder / "copy.ckpt")


def convert(folder: Path) -> None:
    """The conversion, optimizer states included."""
    from lit_wsl import TransferPlan

    TransferPlan.load(folder / "plan.json").convert_checkpoint(folder / "old.ckpt", folder / "new.ckpt")


def measure(way: str, folder: Path) -> None:
    """Run one way in this process and print seconds and the peak of resident memory in GiB."""
    import lit_wsl.checkpoint.convert  # noqa: F401  imports are not what is measured

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: a process inherits its parent's
    before = memory("VmRSS")
    start = time.perf_counter()
    {"copy": copy, "convert": convert}[way](folder)
    seconds = time.perf_counter() - start
    print(f"{seconds:.2f} {memory('VmHWM') - before:.2f}")


def memory(field: str) -> float:
    """A field of this process's status, in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 2**20


def plan_of_many_entries() -> None:
    """Write and read a plan for a mixture of experts."""
    from lit_wsl.plan.file import plan_to_text
    from lit_wsl.transfer import PlanEntry, SideSummary, TransferPlan

    side = SideSummary("x", 0, 0, 0, 0, "")
    plan = TransferPlan(
        tuple(
            PlanEntry(
                (f"m.{i}.experts.{e}.{a}",), (f"model.{i}.ffn.{e}.{b}",), (), ((8, 8),), ((8, 8),), score=0.9 + i / 1e3
            )
            for i in range(60)
            for e in range(667)
            for a, b in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
        ),
        side,
        side,
    )
    start = time.perf_counter()
    text = plan_to_text(plan)
    middle = time.perf_counter()
    same = TransferPlan.from_text(text) == plan
    print(
        f"plan of {len(plan):,} entries: written in {middle - start:.1f} s as {len(text):,} characters, "
        f"read in {time.perf_counter() - middle:.1f} s, {'equal' if same else 'NOT EQUAL'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the checkpoint in GiB")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each way; the fastest counts")
    parser.add_argument("--way", choices=["copy", "convert"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        measure(options.way, options.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder, options.gb)
        print(
            f"checkpoint of {(folder / 'old.ckpt').stat().st_size / 2**30:.2f} GiB, {torch.get_num_threads()} threads"
        )
        for way in ("copy", "convert"):
            command = [sys.executable, "-m", "benchmarks.convert", "--way", way, "--folder", name]
            runs = [
                tuple(map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))
                for _ in range(options.repeat)
            ]
            print(f"{way:>8}: {min(r[0] for r in runs):6.2f} s, peak of memory + {max(r[1] for r in runs):.2f} GiB")
    plan_of_many_entries()


if __name__ == "__main__":
    main()
