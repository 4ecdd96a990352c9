"""Put the measured numbers of ``benchmarks/results`` into ``docs/comparison.md``: ``python docs/measured.py``.

What has not been measured is left out. Every table names the command that wrote its numbers.
"""

# ruff: noqa: E501  rows of tables are easier to read as they stand

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "comparison.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->"


def load(name: str) -> Any:
    """A result file, or None."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def gauntlet() -> Iterator[str]:
    """Pairs of public implementations with known truth."""
    data = load("gauntlet.json")
    if not data:
        return
    yield "### Pairs with known truth\n\n"
    pairs = max(row["pairs"] for row in data["totals"].values())
    yield (
        f"{pairs} pairs of models from timm, torchvision, transformers, open_clip and generated refactorings, random weights. "
        "The truth of each pair is proven by equal outputs. *Kept*: after the transfer the target computes what the source "
        "computes. Pairs whose truth permutes axes, which neither names nor shapes show, are counted apart.\n\n"
    )
    yield "| method | right | wrong | missing | pairs with a wrong tensor | kept | kept, without permuted pairs |\n"
    yield "|---|---:|---:|---:|---:|---:|---:|\n"
    for method, row in data["totals"].items():
        yield (
            f"| {method} | {row['right']:,} | {row['wrong']:,} | {row['missing']:,} | {row['pairs with a wrong tensor']} | "
            f"{row['kept']} of {row['pairs']} | {row['kept without permute']} of {row['pairs without permute']} |\n"
        )
    yield f"\n`{data['command']}`\n\n"


def scale() -> Iterator[str]:
    """Time and memory of planning."""
    data = load("scale.json")
    if not data:
        return
    yield "### Planning very large models, on the meta device\n\n"
    yield from _generic(data, ("case", "tensors", "seconds", "gigabytes", "wrong", "missing"))
    yield "\n`python -m benchmarks.scale --json benchmarks/results/scale.json`\n\n"


def _generic(rows: list[dict[str, Any]], wanted: tuple[str, ...]) -> Iterator[str]:
    keys = [key for key in wanted if key in rows[0]]
    yield "| " + " | ".join(keys) + " |\n|" + "---|" * len(keys) + "\n"
    for row in rows:
        cells = [
            f"{row[k]:,.2f}" if isinstance(row[k], float) else f"{row[k]:,}" if isinstance(row[k], int) else row[k]
            for k in keys
        ]
        yield "| " + " | ".join(map(str, cells)) + " |\n"


def memory() -> Iterator[str]:
    """Memory of a transfer against plain loading."""
    data, plans = load("sharded_memory.json"), load("plan_memory.json")
    if data and data["transfers"]:
        yield "### Memory of a transfer\n\n"
        yield (
            "Peak of private memory per process, in MB, the model itself included; pages of the mapped file, which the system "
            "takes back when memory is short, are not. *Plain* is `model.load_state_dict(torch.load(path))` with names that fit; "
            "*transfer* fills a renamed model with split and joined layers; *sharded* the same into FSDP2 over two processes. "
            "Seconds from a shared two-core machine.\n\n"
        )
        yield "| model | way | model's share | peak | above the model | s |\n|---|---|---:|---:|---:|---:|\n"
        for row in data["transfers"]:
            if row["rank"] == 0:
                yield (
                    f"| {row['gigabytes']:g} GB | {row['case']} | {row['held']:,.0f} | {row['private']:,.0f} | "
                    f"{row['extra']:,.0f} | {row['seconds']:.1f} |\n"
                )
        yield "\n`python -m benchmarks.sharded_memory`\n\n"
    rows = (plans or data or {}).get("plans") or []
    if rows:
        yield "Plans of checkpoints larger than memory (sparse files, headers only):\n\n"
        yield "| checkpoint | size, GB | tensors | right | memory, MB | s |\n|---|---:|---:|---:|---:|---:|\n"
        for row in rows:
            yield (
                f"| {row['case']} | {row['gigabytes']:,.0f} | {row['tensors']:,} | {row['right']:,} | {row['extra']:,.0f} | "
                f"{row['seconds']:.1f} |\n"
            )
        yield "\n"


def reading() -> Iterator[str]:
    """Reading a large file."""
    data = load("io.json")
    if not data:
        return
    names = {
        "torch": "`torch.load(mmap=True)` + `load_state_dict`",
        "read": "`open_checkpoint` + `load_state_dict`",
        "foreign": "the same, from a file with foreign classes in it",
        "transfer": "`transfer_weights` into renamed modules, all checks",
    }
    yield f"### Reading {data['bytes'] / 1e9:.1f} GB\n\n"
    yield "Median of the repeats, on a shared two-core machine, the file in the page cache.\n\n"
    yield "| way | s | fastest, s | private memory, MB |\n|---|---:|---:|---:|\n"
    for key, row in data["ways"].items():
        yield f"| {names.get(key, key)} | {row['seconds']:.1f} | {row['fastest']:.1f} | {row['private'] / 1e6:.1f} |\n"
    yield "\n`python benchmarks/io.py --json benchmarks/results/io.json`\n\n"


def render() -> str:
    """All tables that there are numbers for."""
    return "".join(piece for part in (gauntlet, scale, memory, reading) for piece in part())


def main() -> None:
    """Rewrite the section of the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END, 1)[1]
    PAGE.write_text(f"{before}{BEGIN}{render()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
