"""Time, memory and correctness of planning at scale, on the meta device: no weights are ever allocated.

``python -m benchmarks.scale`` runs every case in a process of its own, so that its peak memory is its own. The source
is a state dict under one public naming scheme, the target a module under another.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Truth = dict[str, tuple[str, ...]]  # target name -> source names, in order
Row = tuple[str, str, tuple[int, ...]]  # source name, target name, shape


@dataclass(frozen=True)
class Case:
    """One decoder under two naming schemes.

    Attributes:
        name: What is mapped.
        rows: Source name, target name and shape of every tensor, each side's registration order being its own.
        stacked: The target holds each layer's experts in two 3-D tensors.
        seconds: Bound on the time of planning, if one is set.
        gigabytes: Bound on the peak memory of the whole process, if one is set.
    """

    name: str
    rows: Callable[[], Iterator[Row]]
    stacked: bool = False
    seconds: float | None = None
    gigabytes: float | None = None


def dense(layers: int, hidden: int, ffn: int, kv: int, vocab: int = 32000) -> Iterator[Row]:
    """A dense decoder: the original release's names against those of the hub."""
    yield "tok_embeddings.weight", "model.embed_tokens.weight", (vocab, hidden)
    for i in range(layers):
        s, t = f"layers.{i}.", f"model.layers.{i}."
        for a, b, rows, columns in (
            ("attention.wq", "self_attn.q_proj", hidden, hidden),
            ("attention.wk", "self_attn.k_proj", kv, hidden),
            ("attention.wv", "self_attn.v_proj", kv, hidden),
            ("attention.wo", "self_attn.o_proj", hidden, hidden),
            ("feed_forward.w1", "mlp.gate_proj", ffn, hidden),
            ("feed_forward.w3", "mlp.up_proj", ffn, hidden),
            ("feed_forward.w2", "mlp.down_proj", hidden, ffn),
        ):
            yield f"{s}{a}.weight", f"{t}{b}.weight", (rows, columns)
        yield f"{s}attention_norm.weight", f"{t}input_layernorm.weight", (hidden,)
        yield f"{s}ffn_norm.weight", f"{t}post_attention_layernorm.weight", (hidden,)
    yield "norm.weight", "model.norm.weight", (hidden,)
    yield "output.weight", "lm_head.weight", (vocab, hidden)


def mixture(layers: int, experts: int, first_dense: int = 3, hidden: int = 7168) -> Iterator[Row]:
    """A mixture of experts with compressed attention, sizes of DeepSeek-V3; inference names against the hub's."""
    ffn, expert, q_rank, kv_rank, heads, vocab = 18432, 2048, 1536, 512, 128, 129280

    def gated(s: str, t: str, width: int) -> Iterator[Row]:
        yield f"{s}w1.weight", f"{t}gate_proj.weight", (width, hidden)
        yield f"{s}w3.weight", f"{t}up_proj.weight", (width, hidden)
        yield f"{s}w2.weight", f"{t}down_proj.weight", (hidden, width)

    yield "embed.weight", "model.embed_tokens.weight", (vocab, hidden)
    for i in range(layers):
        s, t = f"layers.{i}.", f"model.layers.{i}."
        for a, b, shape in (
            ("wq_a", "q_a_proj", (q_rank, hidden)),
            ("q_norm", "q_a_layernorm", (q_rank,)),
            ("wq_b", "q_b_proj", (heads * 192, q_rank)),
            ("wkv_a", "kv_a_proj_with_mqa", (kv_rank + 64, hidden)),
            ("kv_norm", "kv_a_layernorm", (kv_rank,)),
            ("wkv_b", "kv_b_proj", (heads * 256, kv_rank)),
            ("wo", "o_proj", (hidden, heads * 128)),
        ):
            yield f"{s}attn.{a}.weight", f"{t}self_attn.{b}.weight", shape
        if i < first_dense:
            yield from gated(f"{s}ffn.", f"{t}mlp.", ffn)
        else:
            for j in range(experts):
                yield from gated(f"{s}ffn.experts.{j}.", f"{t}mlp.experts.{j}.", expert)
            yield f"{s}ffn.gate.weight", f"{t}mlp.gate.weight", (experts, hidden)
            yield f"{s}ffn.gate.bias", f"{t}mlp.gate.e_score_correction_bias", (experts,)
            yield from gated(f"{s}ffn.shared_experts.", f"{t}mlp.shared_experts.", expert)
        yield f"{s}attn_norm.weight", f"{t}input_layernorm.weight", (hidden,)
        yield f"{s}ffn_norm.weight", f"{t}post_attention_layernorm.weight", (hidden,)
    yield "norm.weight", "model.norm.weight", (hidden,)
    yield "head.weight", "lm_head.weight", (vocab, hidden)


CASES = (
    Case("dense 32 layers (7B)", lambda: dense(32, 4096, 11008, 4096), seconds=0.3),
    Case("dense 32 layers (8B, grouped queries)", lambda: dense(32, 4096, 14336, 1024, 128256), seconds=0.3),
    Case("dense 80 layers (70B)", lambda: dense(80, 8192, 28672, 1024)),
    Case("experts, 12,000 tensors", lambda: mixture(40, 100)),
    Case("experts, 61 layers x 256", lambda: mixture(61, 256)),
    Case("experts, 61 layers x 256, stacked target", lambda: mixture(61, 256), stacked=True),
    Case("experts, 120,000 tensors", lambda: mixture(80, 512), seconds=20.0, gigabytes=2.0),
)


def source_of(rows: list[Row]) -> dict[str, Tensor]:
    """The state dict: w1, w2, w3 in the order of their names, as the original releases register them."""
    ordered: list[Row] = []
    waiting: Row | None = None
    for row in rows:
        if row[0].endswith("w3.weight"):
            waiting = row
            continue
        ordered.append(row)
        if waiting is not None:
            ordered.append(waiting)
            waiting = None
    return {name: torch.empty(shape, device="meta") for name, _, shape in ordered}


def module_of(tensors: list[tuple[str, tuple[int, ...]]]) -> nn.Module:
    """A tree of modules with these parameters; layers carry the classes that their shapes imply."""
    root = nn.Module()
    for name, shape in tensors:
        *path, leaf = name.split(".")
        module = root
        for depth, part in enumerate(path):
            child = module._modules.get(part)
            if child is None:
                child = _leaf(path, shape) if depth == len(path) - 1 and leaf == "weight" else nn.Module()
                module.add_module(part, child)
            module = child
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
    return root


def _leaf(path: list[str], shape: tuple[int, ...]) -> nn.Module:
    if len(shape) == 1:
        return nn.RMSNorm(1, device="meta")
    if "embed" in path[-1]:
        return nn.Embedding(1, 1, device="meta")
    return nn.Linear(1, 1, bias=False, device="meta")


def target_of(rows: list[Row], stacked: bool) -> tuple[list[tuple[str, tuple[int, ...]]], Truth]:
    """The target's tensors in its registration order, and where each comes from."""
    tensors: list[tuple[str, tuple[int, ...]]] = []
    truth: Truth = {}
    if not stacked:
        for source, target, shape in rows:
            tensors.append((target, shape))
            truth[target] = (source,)
        return tensors, truth
    experts: dict[str, dict[int, dict[str, tuple[str, tuple[int, ...]]]]] = {}
    for source, target, shape in rows:
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight", target)
        if match is None:
            tensors.append((target, shape))
            truth[target] = (source,)
            continue
        layer = experts.setdefault(match[1], {})
        if not layer:  # the stacked tensors take the place of the first expert
            tensors += [(f"{match[1]}.gate_up_proj", ()), (f"{match[1]}.down_proj", ())]
        layer.setdefault(int(match[2]), {})[match[3]] = (source, shape)
    sizes: dict[str, tuple[int, ...]] = {}
    for path, layer in experts.items():
        count = len(layer)
        rows_, columns = layer[0]["gate"][1]
        sizes[f"{path}.gate_up_proj"] = (count, 2 * rows_, columns)
        sizes[f"{path}.down_proj"] = (count, *layer[0]["down"][1])
        truth[f"{path}.gate_up_proj"] = tuple(layer[j][part][0] for j in range(count) for part in ("gate", "up"))
        truth[f"{path}.down_proj"] = tuple(layer[j]["down"][0] for j in range(count))
    return [(name, sizes.get(name, shape)) for name, shape in tensors], truth


@dataclass(frozen=True)
class Result:
    """What one case took.

    Attributes:
        case: Its name.
        tensors: Tensors of the source.
        right: Target tensors with the true sources.
        wrong: Target tensors with other sources.
        missing: Target tensors with none.
        describe_s: Seconds to describe both sides.
        waiting: Steps that depend on a layout which nothing shows, so that a transfer asks for a proof first.
        first_s: Seconds of the first ``build_plan`` of the process.
        best_s: Seconds of the best of the repeats.
        cpu_s: Processor seconds of the first, which a busy machine does not stretch.
        peak_gb: Peak resident memory of the process, torch and both models included.
        plan_gb: How much of it planning added.
        passed: Whether the bounds of the case hold and nothing is wrong or missing.
    """

    case: str
    tensors: int
    right: int
    wrong: int
    missing: int
    waiting: int
    describe_s: float
    first_s: float
    best_s: float
    cpu_s: float
    peak_gb: float
    plan_gb: float
    passed: bool


def _peak() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def measure(case: Case, repeats: int = 3) -> Result:
    """Plan one case in this process."""
    from lit_wsl.mapper import build_plan
    from lit_wsl.matching.layouts import hidden_layouts
    from lit_wsl.structure import describe

    rows = list(case.rows())
    source = source_of(rows)
    tensors, truth = target_of(rows, case.stacked)
    target = module_of(tensors)
    start = time.perf_counter()
    theirs, ours = describe(source), describe(target)
    describe_s = time.perf_counter() - start
    before = _peak()
    times: list[float] = []
    cpu: list[float] = []
    while not times or (len(times) < repeats and sum(times) < 10):
        start, busy = time.perf_counter(), time.process_time()
        plan = build_plan(theirs, ours, assume_layouts=True)
        waiting = hidden_layouts(plan, theirs, ours)
        times.append(time.perf_counter() - start)
        cpu.append(time.process_time() - busy)
    found = {name: tuple(entry.sources) for entry in plan.entries for name in entry.targets}
    right = sum(_same(found.get(name), sources) for name, sources in truth.items())
    missing = sum(name not in found for name in truth)
    wrong = len(truth) - missing - right
    peak = _peak()
    fits = (case.seconds is None or times[0] <= case.seconds) and (case.gigabytes is None or peak <= case.gigabytes)
    return Result(
        case=case.name,
        tensors=len(rows),
        right=right,
        wrong=wrong,
        missing=missing,
        waiting=len(waiting),
        describe_s=round(describe_s, 4),
        first_s=round(times[0], 4),
        best_s=round(min(times), 4),
        cpu_s=round(cpu[0], 4),
        peak_gb=round(peak, 3),
        plan_gb=round(peak - before, 3),
        passed=fits and not wrong and not missing,
    )


def _same(found: tuple[str, ...] | None, wanted: tuple[str, ...]) -> bool:
    """Equal, or, for gate and up of all experts, in one of the two nestings of stack and concat."""
    return found is not None and (found == wanted or found == (*wanted[0::2], *wanted[1::2]))


def markdown(results: list[Result], command: str) -> str:
    lines = [
        "# Scale",
        "",
        f"`{command}`",
        "",
        "Planning on the meta device; seconds of `build_plan` alone, first call of a fresh process and best of three.",
        "Of the right ones, `waiting` are loaded only with a proof by function: releases under these two schemes order",
        "the rows of q and k differently, which nothing but the function shows.",
        "",
        "| case | tensors | right | wrong | missing | waiting | describe s | first s | best s | CPU s |"
        " peak GB | planning GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        lines.append(
            f"| {r.case} | {r.tensors} | {r.right} | {r.wrong} | {r.missing} | {r.waiting} |"
            f" {r.describe_s:.2f} | {r.first_s:.2f} | {r.best_s:.2f} | {r.cpu_s:.2f} |"
            f" {r.peak_gb:.2f} | {r.plan_gb:.2f} |"
        )
    return "\n".join([*lines, "", *remarks(results), ""])


def remarks(results: list[Result]) -> list[str]:
    by_name = {r.case: r for r in results}
    small, large = by_name.get("experts, 12,000 tensors"), by_name.get("experts, 120,000 tensors")
    if small is None or large is None:
        return []
    ratio = (large.cpu_s / large.tensors) / (small.cpu_s / small.tensors)
    return [f"CPU time per tensor at {large.tensors:,} tensors over that at {small.tensors:,}: {ratio:.2f} (bound: 2)."]


def main(argv: list[str] | None = None) -> int:
    """Run the cases; 1 if something is wrong or missing or a bound is missed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--cases", default="", metavar="REGEX", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write results here, and the table beside it as .md")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.here:
        case = next(case for case in CASES if case.name == options.here)
        print(json.dumps(asdict(measure(case))))
        return 0
    results: list[Result] = []
    failed = False
    for case in CASES:
        if not re.search(options.cases, case.name):
            continue
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.scale", "--here", case.name], capture_output=True, text=True
        )
        if run.returncode:
            print(f"{case.name}: failed\n{run.stderr[-2000:]}", flush=True)
            failed = True
            continue
        data: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
        results.append(Result(**data))
        print(" ".join(f"{key}={value}" for key, value in data.items()), flush=True)
    print("\n".join(remarks(results)))
    if options.json:
        arguments = " ".join(sys.argv[1:] if argv is None else argv)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
        text = markdown(results, f"python -m benchmarks.scale {arguments}".strip())
        options.json.with_suffix(".md").write_text(text)
    return 1 if failed or not all(r.passed for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
