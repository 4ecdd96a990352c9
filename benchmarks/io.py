"""Reading and transferring a large checkpoint, beside ``torch.load(mmap=True)`` and ``load_state_dict``.

    python benchmarks/io.py                      # 2 GB in a temporary folder; about a minute
    python benchmarks/io.py --gigabytes 0.5 --repeats 5 --json benchmarks/results/io.json

Every measurement is a process of its own, the ways take turns, and the file is in the page cache for all of them. Time
and memory are counted from the moment the model stands until its weights are filled: ``peak`` is the growth of the
resident set over the model alone at its highest point, mapped pages of the file included; ``private`` is the growth of
memory that is not a mapped file, so cannot be given back by the system when it is short. Memory is watched in a first
round, time taken in the others: the watching thread needs the interpreter every two milliseconds, so it slows a way
that copies in many calls more than one that copies in few. ``cpu`` is the processor time of the process, which says
more than the seconds on a machine that does other work too. One thread unless ``--threads`` says otherwise, for all
ways alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

WIDTH = 4096
WAYS = {
    "torch": "torch.load(mmap=True) + load_state_dict",
    "read": "open_checkpoint + load_state_dict, same names",
    "machine": "the same by the own pickle machine alone, as for foreign hyper-parameters",
    "transfer": "transfer_weights to renamed modules, all checks",
}


class Block(nn.Module):
    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)


class Model(nn.Module):
    """A stack of blocks of two square linear layers and a norm, 134 MB each; its names can differ."""

    def __init__(self, blocks: int, stack: str = "layers", names: tuple[str, str] = ("up", "down")) -> None:
        super().__init__()
        self.add_module(stack, nn.ModuleList(Block(names) for _ in range(blocks)))


class PeakPrivate(threading.Thread):
    """Samples the process's private resident memory every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak = memory("RssAnon")
        self.going = True
        self.start()

    def run(self) -> None:
        while self.going:
            self.peak = max(self.peak, memory("RssAnon"))
            time.sleep(0.002)


def memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def fill(way: str, path: Path, blocks: int, threads: int, watched: bool) -> None:
    """Fill a model in one of the ways, and print time and, where it is watched, memory as JSON."""
    from lit_wsl import transfer_weights
    from lit_wsl.checkpoint import open_checkpoint
    from lit_wsl.checkpoint.one_file import MappedFile, read_zip

    torch.set_num_threads(threads)
    renamed = way == "transfer"
    with torch.device("meta"):
        model = Model(blocks, "encoder", ("up_proj", "down_proj")) if renamed else Model(blocks)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()  # touch every page of the model
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark counts from here
    before, watch, started = memory("VmRSS"), PeakPrivate() if watched else None, time.perf_counter()
    processor = time.process_time()
    if way == "torch":
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"])
    elif way == "transfer":
        transfer_weights(model, path)
    elif way == "machine":
        model.load_state_dict(read_zip(MappedFile(path)).value["state_dict"])
    else:
        model.load_state_dict(dict(open_checkpoint(path)))
    seconds, cpu = time.perf_counter() - started, time.process_time() - processor
    found = {"seconds": seconds, "cpu": cpu}
    if watch is not None:
        watch.going = False
        private = max(watch.peak, memory("RssAnon")) - watch.start_bytes
        found = {"peak": memory("VmHWM") - before, "total_peak": memory("VmHWM"), "private": private}
    found["sum"] = sum(float(parameter.sum()) for parameter in model.parameters())
    print(json.dumps(found))


def measure(way: str, path: Path, blocks: int, threads: int, watched: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--fill", way, "--file", str(path), "--blocks", str(blocks)]
    command += ["--threads", str(threads), *(["--watched"] if watched else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def make_file(folder: Path, blocks: int) -> Path:
    torch.manual_seed(0)
    path = folder / "old.ckpt"
    torch.save({"state_dict": Model(blocks).state_dict(), "epoch": 1}, path)
    return path


def run(gigabytes: float, repeats: int, threads: int, folder: Path) -> dict[str, Any]:
    blocks = max(1, round(gigabytes * 1e9 / (2 * WIDTH * WIDTH * 4)))
    path = make_file(folder, blocks)
    rows: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for turn in range(repeats + 1):
        for way in WAYS:
            rows[way].append(measure(way, path, blocks, threads, watched=turn == 0))
    size = path.stat().st_size
    summary = {}
    for way, found in rows.items():
        watched, *timed = found  # the first round warms the page cache, too
        summary[way] = {
            "seconds": statistics.median(row["seconds"] for row in timed),
            "fastest": min(row["seconds"] for row in timed),
            "cpu": statistics.median(row["cpu"] for row in timed),
            **{key: watched[key] for key in ("peak", "total_peak", "private")},
        }
    if len({round(row["sum"], 3) for found in rows.values() for row in found}) != 1:
        raise SystemExit("the ways did not give the same weights")
    return {"bytes": size, "repeats": repeats, "threads": threads, "torch": torch.__version__, "ways": summary}


def show(result: dict[str, Any]) -> None:
    base, size = result["ways"]["torch"], result["bytes"]
    print(f"{size / 1e9:.2f} GB, median of {result['repeats']} runs; memory in units of the file's size")
    print(
        f"{'way':74} {'seconds':>8} {'x torch':>8} {'cpu':>6} {'x torch':>8} "
        f"{'peak':>6} {'private':>8} {'process x torch':>16}"
    )
    for way, row in result["ways"].items():
        print(
            f"{WAYS[way]:74} {row['seconds']:8.2f} {row['seconds'] / base['seconds']:8.2f} "
            f"{row['cpu']:6.2f} {row['cpu'] / base['cpu']:8.2f} {row['peak'] / size:6.2f} "
            f"{row['private'] / size:8.3f} {row['total_peak'] / base['total_peak']:16.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--fill", choices=sorted(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--watched", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fill:
        fill(options.fill, options.file, options.blocks, options.threads, options.watched)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = run(options.gigabytes, options.repeats, options.threads, Path(folder))
    show(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
