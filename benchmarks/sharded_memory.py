"""Peak memory of a transfer, per process, against the size of the model and against plain ``load_state_dict``.

``python -m benchmarks.sharded_memory`` measures, for models of 1, 2 and 4 GB in float32 on the CPU:

- ``plain``: ``model.load_state_dict(torch.load(path))`` of a checkpoint whose names fit, the usual way;
- ``transfer``: ``transfer_weights(model, path)`` of a refactored model in one process: renamed, a fused layer split,
  three layers joined;
- ``sharded``: the same into a model that FSDP2 has sharded over two processes;
- ``resume``: the states of AdamW, two values per weight, carried into the optimizer of that sharded model.

Then ``plan``: plans for checkpoints much larger than memory (their files are sparse: only the headers are written).

Each case runs in processes of its own. ``private`` is the peak of anonymous memory (``RssAnon``) that a process holds,
the model (or this rank's part of it) included; pages of the memory-mapped checkpoint are shared, clean and given back
when memory is short, so they are listed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MB = 1 << 20
WIDTH = 2048  # of each layer; a weight is 16 MB
BLOCK = 6 * WIDTH * WIDTH * 4  # bytes of a block
PLANS = ("dense 80 layers (70B)", "experts, 61 layers x 256")


class OldBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.w12 = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, WIDTH, bias=False)


class NewBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))


def old_network(blocks: int) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(OldBlock() for _ in range(blocks))})


def new_network(blocks: int) -> nn.Module:
    return nn.ModuleDict({"decoder": nn.ModuleList(NewBlock() for _ in range(blocks))})


def make_plan(blocks: int) -> Any:
    from lit_wsl.structure import describe
    from lit_wsl.transfer import Concat, PlanEntry, SideSummary, Split, TransferPlan

    w = WIDTH
    entries: list[PlanEntry] = []
    for i in range(blocks):
        old, new = f"layers.{i}.", f"decoder.{i}."
        q = tuple(f"{old}w{x}.weight" for x in "qkv")
        one = (w, w)
        entries += [
            PlanEntry(q, (f"{new}qkv.weight",), (Concat(0, (w, w, w)),), (one, one, one), ((3 * w, w),)),
            PlanEntry(
                (f"{old}w12.weight",),
                (f"{new}gate.weight", f"{new}up.weight"),
                (Split(0, (w, w)),),
                ((2 * w, w),),
                (one, one),
            ),
            PlanEntry((f"{old}w3.weight",), (f"{new}down.weight",), (), (one,), (one,)),
        ]
    with torch.device("meta"):
        sides = describe(old_network(blocks)), describe(new_network(blocks))
    return TransferPlan(tuple(entries), SideSummary.of(sides[0]), SideSummary.of(sides[1]))


# ---- measuring ----------------------------------------


def resident() -> tuple[int, int]:
    """Private and file-backed resident bytes of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    anonymous, file = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return anonymous, file


class Peak:
    """The highest resident memory while it runs, sampled every 2 ms."""

    def __enter__(self) -> Peak:
        self.start = self.private, self.mapped = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            private, mapped = resident()
            self.private, self.mapped = max(self.private, private), max(self.mapped, mapped)

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


@dataclass(frozen=True)
class Measured:
    """What one process saw, in MB.

    Attributes:
        case: What was done.
        gigabytes: Size of the model.
        rank: Which process.
        held: Bytes of the model that this process holds, and of what was to be made.
        private: Peak of private memory, the model included.
        extra: How much of it came on top of what was there before, and of what was to be made.
        mapped: Peak of resident pages of files.
        seconds: Wall time.
    """

    case: str
    gigabytes: float
    rank: int
    held: float
    private: float
    extra: float
    mapped: float
    seconds: float


def measure(
    case: str, gigabytes: float, work: Callable[[], object], held: int, rank: int = 0, made: int = 0
) -> Measured:
    start = time.perf_counter()
    with Peak() as peak:
        work()
    seconds = time.perf_counter() - start
    extra = peak.private - peak.start[0] - made
    return Measured(case, gigabytes, rank, (held + made) / MB, peak.private / MB, extra / MB, peak.mapped / MB, seconds)


def held_bytes(model: nn.Module) -> int:
    from lit_wsl.transfer.ranks import held_part

    return sum(held_part(p).nbytes for p in model.parameters())


# ---- the cases, each in processes of its own ----------------------------------------


def blocks_of(gigabytes: float) -> int:
    return max(1, round(gigabytes * 1e9 / BLOCK))


def materialised(model: nn.Module, value: float = 0.0) -> nn.Module:
    """Give a model from the meta device its memory, every page of it touched."""
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            from lit_wsl.transfer.ranks import held_part

            held_part(p).fill_(value)
    return model


def on_meta(make: Callable[[int], nn.Module], gigabytes: float) -> nn.Module:
    with torch.device("meta"):
        return make(blocks_of(gigabytes))


def write(path: Path, gigabytes: float) -> None:
    """The old checkpoint, every weight filled with its own number."""
    old = materialised(on_meta(old_network, gigabytes))
    with torch.no_grad():
        for number, p in enumerate(old.parameters()):
            p.fill_(number + 1)
    torch.save({"state_dict": old.state_dict()}, path)
    write_training(path, old)


def write_training(path: Path, old: nn.Module) -> None:
    """The same checkpoint with optimizer states, both moments of every weight filled with its weight's number."""
    weights = dict(old.named_parameters())
    group = {k: v for k, v in torch.optim.AdamW([torch.zeros(1)]).param_groups[0].items() if k != "params"}
    states = {
        number: {"step": torch.tensor(7.0), "exp_avg": p.detach(), "exp_avg_sq": p.detach().clone()}
        for number, p in enumerate(weights.values())
    }
    optimizer = {"state": states, "param_groups": [{**group, "params": list(range(len(weights)))}]}
    content = {"state_dict": old.state_dict(), "optimizer_states": [optimizer], "lr_schedulers": []}
    torch.save(content, path.with_suffix(".training"))


def plain(path: Path, gigabytes: float) -> Measured:
    model = materialised(on_meta(old_network, gigabytes))

    def work() -> None:
        model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])

    return measure("plain", gigabytes, work, held_bytes(model))


def transfer(path: Path, gigabytes: float) -> Measured:
    from lit_wsl.transfer.api import transfer_weights

    model, plan = materialised(on_meta(new_network, gigabytes)), make_plan(blocks_of(gigabytes))
    result = measure("transfer", gigabytes, lambda: transfer_weights(model, path, plan=plan), held_bytes(model))
    check(model)
    return result


def in_shards(gigabytes: float) -> tuple[nn.Module, Any]:
    """The new network, sharded by FSDP2, and the plan."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, plan = on_meta(new_network, gigabytes), make_plan(blocks_of(gigabytes))
    for block in model["decoder"]:
        fully_shard(block, mesh=mesh)
    materialised(model)
    dist.barrier()
    return model, plan


def resume(path: Path, gigabytes: float) -> Measured:
    from types import SimpleNamespace

    import torch.distributed as dist

    from lit_wsl.checkpoint import open_checkpoint
    from lit_wsl.convert.engines import Sharded
    from lit_wsl.convert.optimizers import convert_optimizers
    from lit_wsl.convert.weights import Translation

    model, plan = in_shards(gigabytes)
    optimizer = torch.optim.AdamW(model.parameters())
    run: Any = SimpleNamespace(optimizers=[optimizer])
    checkpoint = open_checkpoint(path.with_suffix(".training"))

    def work() -> None:
        sides = Translation.of(checkpoint, plan, model)
        engine, old = Sharded(run, model, sides.order), sides.old_parameters
        order = replace(engine.order, groups=engine.groups)
        states = checkpoint.unread["optimizer_states"]
        engine.load(convert_optimizers(states, plan, old, order, keep=engine.keep).states)

    held = held_bytes(model)
    result = measure("resume", gigabytes, work, held, dist.get_rank(), made=2 * held)
    with torch.no_grad():  # the moments of a weight hold its number
        for p in model.parameters():
            p.copy_(optimizer.state[p]["exp_avg"])
    check(model)
    dist.destroy_process_group()
    return result


def sharded(path: Path, gigabytes: float) -> Measured:
    import torch.distributed as dist

    from lit_wsl.transfer.api import transfer_weights

    model, plan = in_shards(gigabytes)
    work = lambda: transfer_weights(model, path, plan=plan)  # noqa: E731
    result = measure("sharded", gigabytes, work, held_bytes(model), dist.get_rank())
    check(model)
    dist.destroy_process_group()
    return result


def check(model: nn.Module) -> None:
    """Every weight holds its own number, from the first row of this process's part to the last."""
    from lit_wsl.structure.running import is_sharded

    for i, block in enumerate(model["decoder"]):
        q, k, v, w12, w3 = (5 * i + n + 1 for n in range(5))
        for layer, numbers in ((block.qkv, (q, k, v)), (block.gate, (w12,)), (block.up, (w12,)), (block.down, (w3,))):
            expected = torch.tensor(numbers, dtype=torch.float32).repeat_interleave(WIDTH)
            weight: Tensor = layer.weight.detach()
            if is_sharded(weight):
                expected = expected.chunk(weight.device_mesh.size())[weight.device_mesh.get_local_rank()]
                weight = weight.to_local()
            assert torch.equal(weight[:, 0], expected), (i, numbers)
            assert torch.equal(weight[:, -1], expected), (i, numbers)


# ---- plans for what fits no memory ----------------------------------------


def write_sparse(folder: Path, tensors: dict[str, Tensor], shards: int) -> Path:
    """A sharded safetensors checkpoint in bfloat16 whose data is a hole in the file."""
    names = list(tensors)
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        header: dict[str, Any] = {}
        offset = 0
        for name in names[shard * len(names) // shards : (shard + 1) * len(names) // shards]:
            size = 2 * tensors[name].numel()
            header[name] = {
                "dtype": "BF16",
                "shape": list(tensors[name].shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
            index[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + offset)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": index}))
    return path


def write_plan_case(path: Path, name: str) -> None:
    from benchmarks.scale import CASES, source_of

    case = next(c for c in CASES if c.name == name)
    write_sparse(path, source_of(list(case.rows())), shards=30)


def plan(path: Path, name: str) -> dict[str, Any]:
    from benchmarks.scale import CASES, module_of, target_of
    from lit_wsl.matching.options import MatchingOptions
    from lit_wsl.transfer.api import prepare_transfer
    from lit_wsl.transfer.sides import Source, Target

    case = next(c for c in CASES if c.name == name)
    tensors, truth = target_of(list(case.rows()), case.stacked)
    model = module_of(tensors)
    found: list[Any] = []

    def work() -> None:
        index = path / "model.safetensors.index.json"
        found.append(prepare_transfer(Source.open(index), Target.of(model), MatchingOptions()))

    size = sum(2 * info.numel() for info in model.parameters())
    measured = measure("plan", size / 1e9, work, 0)
    entries = {t: e.sources for e in found[0].plan.entries for t in e.targets}
    right = sum(entries.get(name) == sources for name, sources in truth.items())
    return {**asdict(measured), "case": name, "tensors": len(truth), "right": right}


# ---- running ----------------------------------------


def run(job: str, path: Path, argument: str, ranks: int = 1) -> list[dict[str, Any]]:
    """Run a job in ``ranks`` new processes and collect what they print."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
        command = [sys.executable, "-m", "benchmarks.sharded_memory", "--job", job, str(path), argument]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{job} failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs if output.strip()]


def show(rows: list[dict[str, Any]], plans: list[dict[str, Any]]) -> None:
    baseline = {row["gigabytes"]: row for row in rows if row["case"] == "plain"}
    columns = ("model GB", "rank", "held", "private", "extra", "mapped", "seconds", "ratio")
    print(f"{'case':10}" + "".join(f"{column:>9}" for column in columns))
    for row in rows:
        ratio = row["private"] / baseline[row["gigabytes"]]["private"]
        numbers = (f"{row['gigabytes']:g}", row["rank"], *(f"{row[c]:.0f}" for c in columns[2:6]))
        print(f"{row['case']:10}" + "".join(f"{n:>9}" for n in (*numbers, f"{row['seconds']:.1f}", f"{ratio:.2f}")))
    print("MB per process; ratio: private memory against plain load_state_dict. Largest tensor: 50 MB.")
    for row in plans:
        print(
            f"plan: {row['case']}, {row['gigabytes']:.0f} GB: {row['right']} of {row['tensors']} tensors right, "
            f"{row['seconds']:.1f} s, {row['private']:.0f} MB private, {row['private'] + row['mapped']:.0f} MB in all"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="*", default=[1, 2, 4], help="sizes of the model, GB")
    parser.add_argument("--ranks", type=int, default=2, help="processes of the sharded case")
    parser.add_argument("--no-plans", action="store_true", help="leave the plans out")
    parser.add_argument("--output", type=Path, help="also write the numbers as JSON")
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job, path, argument = args.job
        if job in ("write", "plain", "transfer", "sharded", "resume"):
            result = globals()[job](Path(path), float(argument))
            print(json.dumps(asdict(result) if result else {}))
        else:
            print(json.dumps(globals()[job](Path(path), argument) or {}))
        return
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "old.ckpt"
            run("write", path, str(size))
            rows += run("plain", path, str(size))
            rows += run("transfer", path, str(size))
            rows += run("sharded", path, str(size), args.ranks)
            rows += run("resume", path, str(size), args.ranks)
    plans: list[dict[str, Any]] = []
    for name in () if args.no_plans else PLANS:
        with tempfile.TemporaryDirectory() as folder:
            run("write_plan_case", Path(folder), name)
            plans += run("plan", Path(folder), name)
    show(rows, plans)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"transfers": rows, "plans": plans}, indent=1) + "\n")


if __name__ == "__main__":
    main()
