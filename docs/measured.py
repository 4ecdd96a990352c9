"""Put the measured numbers of ``benchmarks/results`` into README and ``docs/comparison.md``: ``python docs/measured.py``.

What has not been measured is left out. Every table names the command that wrote its numbers. Besides the JSON files that
have a table here, every ``NAME.txt`` is shown as it was printed: ``python -m benchmarks.NAME > benchmarks/results/NAME.txt``
(its first line may be ``$ the command``, where there were options).
"""

# ruff: noqa: E501  rows of tables are easier to read as they stand

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "comparison.md"
README = ROOT / "README.md"
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
    own = data["totals"]["lit_wsl state_dict"]
    yield f"\nWrong tensors of `lit_wsl` outside of pairs that permute axes: {own['wrong without permute']}.\n"
    yield f"\n`{data['command']}`\n\n"


def scale() -> Iterator[str]:
    """Time and memory of planning."""
    data = load("scale.json")
    if not data:
        return
    yield "### Planning very large models, on the meta device\n\n"
    yield "Making the plan alone, in one process: the first call, the best of three, and the memory that it takes.\n\n"
    waits = any("waiting" in row for row in data)
    if waits:
        yield (
            "*Waiting*: right, but loaded only with a proof by function, since these schemes are known to order rows differently, "
            "which neither names nor shapes show.\n\n"
        )
    yield f"| case | tensors | wrong | missing |{' waiting |' if waits else ''} first, s | best, s | memory, GB |\n"
    yield f"|---|---:|---:|---:|{'---:|' if waits else ''}---:|---:|---:|\n"
    for row in data:
        waiting = f" {row.get('waiting', 0):,} |" if waits else ""
        yield (
            f"| {row['case']} | {row['tensors']:,} | {row['wrong']:,} | {row['missing']:,} |{waiting} {row['first_s']:.2f} | "
            f"{row['best_s']:.2f} | {row['plan_gb']:.2f} |\n"
        )
    yield "\n`python -m benchmarks.scale --json benchmarks/results/scale.json`\n\n"


def memory() -> Iterator[str]:
    """Memory of a transfer against plain loading."""
    data, plans = load("sharded_memory.json"), load("plan_memory.json")
    if data and data["transfers"]:
        yield "### Memory of a transfer\n\n"
        yield (
            "Peak of private memory per process, in MB, the model itself included; pages of the mapped file, which the system "
            "takes back when memory is short, are not. *Plain* is `model.load_state_dict(torch.load(path))` with names that fit; "
            "*transfer* fills a renamed model with split and joined layers; *sharded* the same into FSDP2 over two processes, *resume* with the optimizer's states besides. "
            "*resume* carries AdamW's two moments of every weight into the optimizer of that model; they count to its share. "
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
    runs = [data for data in (load("io.json"), load("io_two_threads.json")) if data]
    if not runs:
        return
    names = {
        "torch": "`torch.load(mmap=True)` + `load_state_dict`",
        "read": "`open_checkpoint` + `load_state_dict`",
        "machine": "the same by our own pickle machine, which reads files with foreign classes",
        "transfer": "`transfer_weights` into renamed modules, all checks",
    }
    yield f"### Reading {runs[0]['bytes'] / 1e9:.1f} GB\n\n"
    yield "Median of the repeats, on a shared two-core machine, the file in the page cache; in brackets in units of the first way.\n\n"
    yield "| threads | way | s | processor, s | peak memory, GB | private memory, MB |\n|---:|---|---:|---:|---:|---:|\n"
    for data in runs:
        base = data["ways"]["torch"]
        for key, row in data["ways"].items():
            times = " | ".join(f"{row[k]:.2f} ({row[k] / base[k]:.2f})" for k in ("seconds", "cpu"))
            yield f"| {data['threads']} | {names.get(key, key)} | {times} | {row['peak'] / 1e9:.2f} | {row['private'] / 1e6:.1f} |\n"
    yield "\n`python benchmarks/io.py --repeats 9 --json benchmarks/results/io.json`\n"
    yield "`python benchmarks/io.py --repeats 9 --threads 2 --json benchmarks/results/io_two_threads.json`\n\n"


def architectures() -> Iterator[str]:
    """Permutation specs inferred for public architectures."""
    data = load("rebasin_architectures.json")
    if not data or not data["rows"]:
        return
    rows = data["rows"]
    kept = sum(row["kept"] for row in rows)
    yield "### Permutation symmetries of public architectures\n\n"
    yield (
        f"{len(rows)} architectures, random weights. *Kept*: after a random permutation of every group that was found the network "
        f"computes the same, in double precision, and no group had to be dropped for it ({kept} of {len(rows)}). *Coverage*: share "
        "of the elements of the parameters in use that some group permutes. Processor seconds of the inference, without its proof.\n\n"
    )
    yield "| library | architectures | kept | refused | median coverage | minimum coverage | median s | most s |\n"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|\n"
    for library in sorted({row["library"] for row in rows}):
        part = [row for row in rows if row["library"] == library]
        good = [row for row in part if not row["error"]]
        shares = [row["coverage"] for row in good] or [0.0]
        seconds = [row.get("infer_cpu_seconds", row["infer_seconds"]) for row in good] or [0.0]
        yield (
            f"| {library} | {len(part)} | {sum(r['kept'] for r in part)} | {len(part) - len(good)} | {median(shares):.1%} | "
            f"{min(shares):.1%} | {median(seconds):.2f} | {max(seconds):.2f} |\n"
        )
    yield "\n"
    left = [row for row in rows if not row["kept"]]
    if left:
        why = [
            f"{r['name']} ({r['error'] or 'groups dropped: ' + ', '.join(map(str, r['dropped'][:3]))})" for r in left
        ]
        yield f"Not kept in full: {'; '.join(why)}.\n\n"
    low = sorted((row for row in rows if not row["error"] and row["coverage"] < 0.9), key=lambda r: r["coverage"])
    if low:
        names = [f"{row['name']} ({row['coverage']:.1%})" for row in low]
        yield f"Below 90 % coverage: {', '.join(names)}.\n\n"
    default = (
        "python -m benchmarks.rebasin_architectures --threads 1 --out benchmarks/results/rebasin_architectures.json"
    )
    yield f"`{data.get('command', default)}`\n\n"


def registered() -> Iterator[str]:
    """Hand-written specs of the registry."""
    data = load("rebasin_registered.json")
    if not data:
        return
    rows = data["rows"]
    same = sum(row["groups"] == row["inferred"] for row in rows)
    yield "### Hand-written specs on the models they are named after\n\n"
    yield (
        f"{len(rows)} models of torchvision, timm and OpenCLIP: {sum(row['kept'] for row in rows)} keep their function under a random "
        f"permutation of all groups of the registered spec; in {same} inference finds as many groups. Minimum coverage by hand "
        f"{min(row['coverage'] for row in rows):.2%}, inferred {min(row['inferred_coverage'] for row in rows):.2%}.\n\n"
        "`python -m benchmarks.rebasin_registered --out benchmarks/results/rebasin_registered.json`\n\n"
    )


def digits() -> Iterator[str]:
    """Barriers between two seeds."""
    data = load("rebasin_digits.json")
    if not data:
        return
    pairs = list(dict.fromkeys(tuple(row["seeds"]) for row in data["rows"]))
    yield "### Two seeds on real digits: the barrier between them\n\n"
    yield (
        f"Barrier of the training loss on the line between two networks that were trained alike from different seeds, {len(pairs)} pairs; "
        "median, and the largest in brackets. All but *as they are* after REPAIR. *Best* is `best_matching`.\n\n"
    )
    ways = {
        "unaligned": "as they are",
        "weights, REPAIR": "weights",
        "activations, REPAIR": "activations",
        "best, REPAIR": "best",
    }
    yield f"| network | bound | {' | '.join(ways.values())} | best within the bound |\n|---|---:|---:|---:|---:|---:|---:|\n"
    for net, bound in data["bounds"].items():
        rows = [row for row in data["rows"] if row["net"] == net]
        cells = [f"{median(row[way] for row in rows):.4f} ({max(row[way] for row in rows):.4f})" for way in ways]
        within = sum(row["best, REPAIR"] <= bound for row in rows)
        yield f"| {net} | {bound:g} | {' | '.join(cells)} | {within} of {len(rows)} |\n"
    seeds = " ".join(f"{a},{b}" for a, b in pairs)
    yield f"\n`python -m benchmarks.rebasin_digits --seeds {seeds} --out benchmarks/results/rebasin_digits.json`\n\n"


def timing() -> Iterator[str]:
    """Time of weight matching."""
    data = load("rebasin_timing.json")
    if not data:
        return
    yield "### Time of the matching, beside the rebasin package\n\n"
    yield (
        "Processor seconds, wall clock in brackets. *Pure* are the matrix products and assignments of a sweep alone; *to the end* is "
        "the whole matching of a fine-tuned pair. The last columns: one sweep of the `rebasin` package (which knows no residual "
        "streams, the costliest groups), how many times our whole sweep that is, and how many times ours over as many groups of the "
        "same sizes as it has.\n\n"
    )
    yield "| threads | model | groups | inference | one sweep | pure | to the end | rebasin, one sweep | x our sweep | x ours, same sizes |\n"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|\n"
    for threads, models in sorted(data.items()):
        for model, row in models.items():
            peer = row.get("rebasin") or {}
            theirs, times, same = (
                _seconds(peer[key]) if key in peer else ""
                for key in ("sweep", "times_our_sweep", "times_our_sweep_over_these")
            )
            cells = (_seconds(row[key]) for key in ("spec", "sweep", "pure", "fine_tuned_pair"))
            yield (
                f"| {threads.split()[0]} | {model} | {row['trees']} | {' | '.join(cells)} | {peer.get('error', theirs)} | {times} | {same} |\n"
            )
    yield "\n`python -m benchmarks.rebasin_timing`\n\n"


def _seconds(value: dict[str, float]) -> str:
    return f"{value['cpu']:.2f} ({value['wall']:.2f})"


TITLES = {
    "written": "Renamings written by hand to break the matching",
    "rebasin_planted": "Planted permutations, recovered",
    "rebasin_llama": "Matching the shapes of a Llama",
    "convert": "Converting a checkpoint",
    "transfer_cost": "A transfer beside plain loading",
    "decisions_copying": "Copying and looking, piece by piece or by torch",
    "decisions_assignment": "Large assignments: the core beside scipy and lap",
    "decisions_matching": "Weights and activations in one objective beside either alone",
}


def ablation() -> Iterator[str]:
    """What each rule of the matching is worth."""
    measured = [d for d in map(load, ("ablation.json", "ablation_gauntlet.json", "ablation_more.json")) if d]
    if not measured:
        return
    yield "### The rules of the matching, switched off\n\n"
    names = ("random refactors", "plans of the gauntlet", "more refactors for rules that changed nothing")
    what = ", ".join(f"{data['pairs']} {name}" for data, name in zip(measured, names))
    yield (
        f"{what}: each rule switched off in turn; how many plans change, and how many more tensors are right or wrong "
        "then. A *kind* of evidence finds matches, a *guard* holds doubtful ones back, a *means* takes part in how matches "
        "are found. Several guards stand for one another. *-*: not measured there. Three rules guard what none of these "
        "pairs has, each with a test that fails without it: factors of a weight (of 16 matrices between `weight_norm`, "
        "`spectral_norm` and plain layers all 16 are filled wrongly), letters of an attention (the value of a gate), and "
        "queries, keys, values in another order (`qkv` for `kqv`). The minimum score is the user's `threshold`.\n\n"
    )
    yield from _switched_off(measured)
    files = ("ablation_guards_third.json", "ablation_guards_fourth.json", "ablation_guards_gauntlet.json")
    measured = [d for d in map(load, (*files, "ablation_written.json")) if d]
    if not measured:
        return
    yield (
        f"The guards one by one, over {listed_counts(measured)}. A rule that said nothing of a pair is not switched off "
        "there. *said*: the pairs of which it said something. *Open own name*, *levels of lists exchanged* and *inside out* "
        "measured nothing and are gone; of lists within lists that exchanged their levels they held back right ones only. "
        "Each guard that is left and measures nothing here holds back something that nothing else does, in a case of its "
        "own that fails without it: most of those are in `test_replaced.py` and `test_dissent.py`. *Words of a neighbour* is "
        "held by `test_a_word_of_a_neighbour_is_no_word_where_only_one_side_says_before` and by the norms of "
        "`test_replaced.py`; *runs in another order* keeps what the model's own execution contradicts from going by order, "
        "at the price of some right ones (`test_order_decides_nothing_where_the_model_runs_otherwise`).\n\n"
    )
    yield from _switched_off(measured, said=True)


def listed_counts(measured: list[dict[str, Any]]) -> str:
    """How many pairs of which kind."""
    names = ("random refactors of a third split", "of a fourth", "plans of the gauntlet", "renamings written by hand")
    return ", ".join(f"{d['pairs']:,} {name}" for d, name in zip(measured, names))


def _switched_off(measured: list[dict[str, Any]], *, said: bool = False) -> Iterator[str]:
    keys = ("heard",) * said + ("pairs", "right", "wrong")
    yield "| rule off | sort |" + (" said |" * said + " plans that change | right | wrong |") * len(measured) + "\n"
    yield "|---|---|" + "---:|" * len(keys) * len(measured) + "\n"
    rows = {name: row["sort"] for data in measured for name, row in data["rules"].items()}
    for name, sort in rows.items():
        cells = [f"{name} | {sort}"]
        for data in measured:
            row = data["rules"].get(name)
            signed = ("right", "wrong")
            cells += (
                ["-"] * len(keys) if row is None else [f"{row.get(k, 0):{'+,' if k in signed else ','}}" for k in keys]
            )
        yield f"| {' | '.join(cells)} |\n"
    yield "\n" + "\n".join(f"`{data['command']}`" for data in measured) + "\n\n"


def printed() -> Iterator[str]:
    """What other benchmarks printed, as it stands; those without a title here last, by name."""
    order = list(TITLES)
    tables = {file.stem for file in RESULTS.glob("*.json")}
    files = sorted(
        RESULTS.glob("*.txt"), key=lambda f: (order.index(f.stem) if f.stem in order else len(order), f.stem)
    )
    for file in files:
        if file.stem in tables:
            continue
        text = file.read_text(encoding="utf-8").strip("\n")
        first, _, rest = text.partition("\n")
        command, body = (
            (first[2:], rest.strip("\n")) if first.startswith("$ ") else (f"python -m benchmarks.{file.stem}", text)
        )
        if body:
            yield f"### {TITLES.get(file.stem, file.stem)}\n\n```text\n{body.replace('```', chr(39) * 3)}\n```\n\n`{command}`\n\n"


def render() -> str:
    """All tables that there are numbers for."""
    parts = (gauntlet, ablation, scale, memory, reading, architectures, registered, timing, digits, printed)
    return "".join(piece for part in parts for piece in part())


def summary() -> str:
    """The README's sentences about the gauntlet."""
    data = load("gauntlet.json")
    if not data:
        return ""
    own, order, plain = (data["totals"][key] for key in ("lit_wsl state_dict", "zip by order", "strict=False"))
    elsewhere = own["wrong without permute"]
    where = f"{elsewhere:,} of them" if elsewhere else "all of these in pairs that permute axes inside a tensor"
    where += " in pairs without permuted axes" if elsewhere else ", which neither names nor shapes show"
    wrong = f"{own['wrong']:,} wrong, {where}" if own["wrong"] else "none wrong"
    text = (
        f"On [{own['pairs']} pairs of public implementations and refactorings](docs/comparison.md) with proven truth "
        f"(`make gauntlet`): {own['right']:,} tensors right, {own['missing']:,} missing, {wrong}. Loading in order of "
        f"registration gets {order['wrong']:,} wrong, `strict=False` leaves {plain['missing']:,} out."
    )
    return "\n".join(textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)) + "\n"


def filled(page: str, text: str) -> str:
    """The page with the text between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}{text}{END}{rest.split(END, 1)[1]}"


def main() -> None:
    """Rewrite the marked parts of both pages."""
    for path, text in ((PAGE, render()), (README, summary())):
        path.write_text(filled(path.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main()
