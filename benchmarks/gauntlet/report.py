"""The gauntlet's table, in Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gauntlet.pair import Pair
from benchmarks.gauntlet.score import Score


def totals(scores: Sequence[Score], pairs: Sequence[Pair]) -> dict[str, dict[str, Any]]:
    """Sums over all pairs for each method."""
    permuted = {pair.name for pair in pairs if pair.permute}
    out: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(score.method for score in scores):
        ours = [score for score in scores if score.method == method]
        plain = [score for score in ours if score.pair not in permuted]
        out[method] = {
            "pairs": len(ours),
            "right": sum(score.right for score in ours),
            "wrong": sum(score.wrong for score in ours),
            "wrong without permute": sum(score.wrong for score in plain),
            "missing": sum(score.missing for score in ours),
            "buffers": [sum(score.buffers[i] for score in ours) for i in range(3)],
            "pairs with a wrong tensor": sum(bool(score.wrong_names) for score in ours),
            "kept": sum(score.kept for score in ours),
            "kept without permute": sum(score.kept for score in plain),
            "pairs without permute": len(plain),
            "unlisted": sum(len(score.unlisted) for score in ours),
            "seconds": round(sum(score.seconds for score in ours), 2),
        }
    return out


def worse_with_sample(scores: Sequence[Score]) -> list[str]:
    """Pairs where a sample or the source's module turned something right into something else."""
    found: list[str] = []
    right = {(score.pair, score.method): set(score.right_names) for score in scores}
    for pair, method in right:
        base = right.get((pair, "lit_wsl state_dict"))
        if method.startswith("lit_wsl") and base is not None:
            lost = sorted(base - right[pair, method])
            if lost:
                found.append(f"{pair} ({method}): {len(lost)} lost, {lost[0]} first")
    return found


def differing_plans(scores: Sequence[Score], earlier: Path) -> list[str]:
    """Pairs whose plan is not the one of an earlier run: under another PYTHONHASHSEED there must be none."""
    known = {(row["pair"], row["method"]): row.get("digest") for row in json.loads(earlier.read_text())["scores"]}
    return [
        f"{score.pair} ({score.method})"
        for score in scores
        if score.digest and known.get((score.pair, score.method), score.digest) != score.digest
    ]


def markdown(scores: Sequence[Score], pairs: Sequence[Pair], command: str) -> str:
    """All scores as tables."""
    sums = totals(scores, pairs)
    lines = [
        "# Gauntlet",
        "",
        f"`{command}`",
        "",
        "Cells: parameters right / wrong / missing, then ✓ if the target computes what the source computes.",
        "Without permute: without the pairs whose truth permutes axes, which names and shapes do not show.",
        "",
    ]
    lines += [
        "| method | right | wrong | without permute | missing | buffers | wrong pairs | kept | without permute | s |",
        "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for method, row in sums.items():
        buffers = " / ".join(str(count) for count in row["buffers"])
        lines.append(
            f"| {method} | {row['right']} | {row['wrong']} | {row['wrong without permute']} | {row['missing']} |"
            f" {buffers} |"
            f" {row['pairs with a wrong tensor']} | {row['kept']}/{row['pairs']} |"
            f" {row['kept without permute']}/{row['pairs without permute']} | {row['seconds']} |"
        )
    methods = list(sums)
    first = next((method for method in methods if method.startswith("lit_wsl")), None)
    lines += ["", "| pair | " + " | ".join(methods) + (" | s |" if first else " |")]
    lines.append("|---|" + "---|" * (len(methods) + bool(first)))
    cells = {(score.pair, score.method): score for score in scores}
    for pair in pairs:
        row = [cells[pair.name, method] for method in methods if (pair.name, method) in cells]
        if row:
            text = " | ".join(f"{s.right}/{s.wrong}/{s.missing}{' ✓' if s.kept else ''}" for s in row)
            seconds = f" | {cells[pair.name, first].seconds:.2f}" if first else ""
            lines.append(f"| {pair.name}{' (permute)' if pair.permute else ''} | {text}{seconds} |")
    return "\n".join(lines) + "\n"


def write(path: Path, scores: Sequence[Score], pairs: Sequence[Pair], command: str) -> None:
    """Write the JSON to ``path`` and the tables beside it as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "command": command,
        "totals": totals(scores, pairs),
        "worse with a sample": worse_with_sample(scores),
        "scores": [score.to_dict() for score in scores],
    }
    rows = ",\n".join(json.dumps(row) for row in data.pop("scores"))
    head = json.dumps(data, indent=1)
    path.write_text(f'{head[:-2]},\n "scores": [\n{rows}\n]}}\n')
    path.with_suffix(".md").write_text(markdown(scores, pairs, command))
