"""The report as a file: as JSON for programs, whose schema is ``assets/schema.json``, and as one HTML page.

The page needs no network: both trees, lines between them, search, and every score. Names come from checkpoints, so they
are data, never markup: they travel as JSON whose ``<`` is escaped, and the page shows them as text only. Its content
security policy forbids any connection.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from lit_wsl.errors import printable
from lit_wsl.files import atomic_write_text, package_version
from lit_wsl.matching.scoring import ScoreBreakdown
from lit_wsl.plan.coverage import Count, Coverage, excluded_names
from lit_wsl.plan.entries import Decided, Measured, PlanEntry, Side, measured_dict
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.report.rows import gaps, operation_counts, remedy
from lit_wsl.report.scores import Material, breakdown, pairs, runner_up
from lit_wsl.report.terminal import excluded_lines
from lit_wsl.structure.description import ModelDescription, ParameterInfo, shape_text

VERSION = 1
MOST_PAIRS = 2_000  # steps of a report that explains each pair's score unless asked not to: a few megabytes
ASSETS = Path(__file__).parent / "assets"
SCHEMA = ASSETS / "schema.json"


def report_dict(result: Any, *, breakdowns: bool | None = None, **details: Any) -> dict[str, Any]:
    """The report as plain data.

    Args:
        result: A :class:`~lit_wsl.TransferReport`, a :class:`~lit_wsl.MappingResult` or a plan.
        breakdowns: Also give the parts of each score and the runner-up; by default where there are no more than
            2,000 steps.
        **details: What ``result`` does not hold, or not so: as for :meth:`~lit_wsl.report.scores.Material.gather`.

    Returns:
        Data that fits ``lit_wsl/report/assets/schema.json``; the same input gives the same data.
    """
    material = Material.gather(result, **details)
    plan = material.plan
    unmatched = {"source": _unmatched(material, "source"), "target": _unmatched(material, "target")}
    explained = len(plan.entries) <= MOST_PAIRS if breakdowns is None else breakdowns
    return {
        "format": "lit_wsl.report",
        "version": VERSION,
        "lit_wsl": package_version(),
        "models": {"source": asdict(plan.source), "target": asdict(plan.target)},
        "applied": bool(getattr(result, "applied", False)),
        "options": dict(plan.options),
        "proof": plan.proof,
        "proof_by": plan.proof_by,
        "measured": None if plan.measured is None else measured_dict(plan.measured),
        "counts": _counts(plan, unmatched),
        "coverage": coverage_dict(material.coverage),
        "mappings": [_mapping(material, number, entry, explained) for number, entry in enumerate(plan.entries)],
        "ambiguous": [
            {
                "targets": list(case.targets),
                "shape": list(case.shape),
                "reason": case.reason,
                "candidates": [{"sources": list(c.sources), "score": _round(c.score)} for c in case.candidates],
            }
            for case in plan.ambiguous
        ],
        "unmatched": unmatched,
        "warnings": list(material.warnings),
        "notes": list(material.notes),
    }


def save_json(result: Any, path: str | os.PathLike[str], **details: Any) -> Path:
    """Write :func:`report_dict` to a file, atomically."""
    path = Path(path)
    atomic_write_text(path, report_text(result, **details))
    return path


def report_text(result: Any, **details: Any) -> str:
    """:func:`report_dict` as JSON text, with the same keyword arguments."""
    return json.dumps(report_dict(result, **details), indent=2, ensure_ascii=False) + "\n"


def coverage_dict(coverage: Coverage) -> dict[str, Any]:
    """Coverage as plain data, shares included."""

    def count(moved: Count) -> dict[str, Any]:
        return {**asdict(moved), "tensor_share": _round(moved.tensor_share), "share": _round(moved.share)}

    return {
        "source": count(coverage.source),
        "target": count(coverage.target),
        "source_buffers": count(coverage.source_buffers),
        "target_buffers": count(coverage.target_buffers),
        "floor_share": _round(coverage.floor_share),
        "modules": [{**asdict(row), "loaded": count(row.loaded)} for row in coverage.modules],
    }


def _counts(plan: TransferPlan, unmatched: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return {
        "mappings": len(plan.entries),
        "sources_used": len(plan.by_source),
        "targets_filled": len(plan.by_target),
        "operations": operation_counts(plan),
        "ambiguous_targets": sum(len(case.targets) for case in plan.ambiguous),
        "unmatched_source": len(unmatched["source"]),
        "unmatched_target": len(unmatched["target"]),
    }


def _mapping(material: Material, number: int, entry: PlanEntry, explained: bool) -> dict[str, Any]:
    data: dict[str, Any] = {
        "sources": list(entry.sources),
        "targets": list(entry.targets),
        "source_shapes": [list(shape) for shape in entry.source_shapes],
        "target_shapes": [list(shape) for shape in entry.target_shapes],
        "kind": entry.kind,
        "operation": entry.badge,
        "operations": [operation.to_dict() for operation in entry.operations],
        "lossless": entry.lossless,
        "score": _round(entry.score),
        "margin": _round(entry.margin),
        "reason": entry.reason,
    }
    if explained:
        named = number in material.questioned
        data["pairs"] = [_pair(material, entry, source, target, named) for source, target in pairs(entry)]
    return data


def _pair(material: Material, entry: PlanEntry, source: str, target: str, named: bool) -> dict[str, Any]:
    data = _score_parts(breakdown(material, entry, source, target))
    if named:
        other = runner_up(material, entry, source, target)
        data["runner_up"] = None if other is None else _score_parts(other)
    return data


def _score_parts(parts: ScoreBreakdown) -> dict[str, Any]:
    several = ("name_parts", "hierarchy_parts", "weights")
    return {
        "source": parts.source,
        "target": parts.target,
        **{key: _round(getattr(parts, key)) for key in ("shape", "name", "hierarchy")},
        **{key: {part: _round(value) for part, value in getattr(parts, key).items()} for key in several},
        "parents": None if parts.parents is None else _round(parts.parents),
        "score": _round(parts.total),
    }


def _unmatched(material: Material, side: Side) -> list[dict[str, Any]]:
    """What was asked for and found no partner, with the nearest tensor of the other side."""
    described = material.source if side == "source" else material.target
    rows = [
        {
            "name": item.name,
            "shape": list(item.shape),
            "kind": item.kind,
            "reason": item.reason,
            "nearest": None if gap.nearest is None else {"name": gap.nearest.name, "shape": list(gap.nearest.shape)},
            "advice": gap.advice,
        }
        for gap in gaps(material.plan, side, material.source, material.target)
        for item in gap.members
    ]
    return sorted(rows, key=lambda row: described[row["name"]].index)


def _round(value: float) -> float:
    """Six digits: enough for any reader, and free of the last bit's noise."""
    return round(float(value), 6)


_NAME_PARTS = ("token", "edit", "substring", "type")
_HIERARCHY_PARTS = ("depth", "path", "parents", "order")
_MOST_BREAKDOWNS = 20_000  # beyond it they would be most of the page and of the time
_Numbers = defaultdict[Any, int]


def save_html(result: Any, path: str | os.PathLike[str], **details: Any) -> Path:
    """Write the interactive report.

    Args:
        result: A :class:`~lit_wsl.TransferReport`, a :class:`~lit_wsl.MappingResult` or a plan.
        path: The file to write, atomically.
        **details: What ``result`` does not hold, or not so: as for :meth:`~lit_wsl.report.scores.Material.gather`.

    Returns:
        The path.

    Raises:
        CheckpointError: If the file cannot be written.
    """
    path = Path(path)
    atomic_write_text(path, render_html(Material.gather(result, **details)))
    return path


def render_html(material: Material) -> str:
    """The page as text."""
    plan = material.plan
    pieces = {
        "title": html.escape(f"{plan.source.label} → {plan.target.label}"),
        "css": (ASSETS / "report.css").read_text(encoding="utf-8"),
        "data": _embed(page_data(material)),
        "chart": _chart(material),
        "js": (ASSETS / "report.js").read_text(encoding="utf-8"),
    }
    page = (ASSETS / "report.html").read_text(encoding="utf-8")
    before, *rest = page.split("{{")
    text = [before]
    for piece in rest:  # one pass, so that braces inside a piece are never taken for a place
        name, _, after = piece.partition("}}")
        text += [pieces[name], after]
    return "".join(text)


def _chart(material: Material) -> str:
    """The decisions of a proof on data, drawn."""
    measured = material.plan.measured
    chart = "" if measured is None else decision_chart(measured)
    if measured is None or not chart:
        return ""
    losses = f"loss {measured.fresh:.4g} fresh, {measured.transferred:.4g} transferred"
    title = f"Proof on data: {losses}, {len(measured.decisions)} decision{'s'[: len(measured.decisions) != 1]}"
    return f'<details class="remark" id="decisions"><summary>{html.escape(title)}</summary>{chart}</details>'


def _embed(data: Any) -> str:
    """JSON that cannot end the script element that holds it."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_data(material: Material) -> dict[str, Any]:
    """What the page draws, as compact plain data: names once, everything else by number."""
    plan = material.plan
    # values by number of first appearance, so that repeated texts and shapes are written once
    shapes, texts, badges = (_Numbers(count().__next__) for _ in range(3))
    sides = {
        "source": _side(material, "source", shapes, texts),
        "target": _side(material, "target", shapes, texts),
    }
    where = {"source": _finder(material.source), "target": _finder(material.target)}
    entries = [_entry(material, i, entry, where, texts, badges) for i, entry in enumerate(plan.entries)]
    weights = material.options.score_weights
    notes = list(material.notes)
    if len(plan.entries) > _MOST_BREAKDOWNS:
        notes.append(f"score breakdowns are left out of pages with more than {_MOST_BREAKDOWNS:,} mappings")
    elif len(material.questioned) < len(plan.entries):
        notes.append(f"runners-up are named for the {len(material.questioned):,} mappings with the smallest margins")
    return {
        "version": package_version(),
        "labels": {"source": plan.source.label, "target": plan.target.label},
        "options": dict(plan.options),
        "proof": plan.proof,
        "proof_by": plan.proof_by,
        "measured": None if plan.measured is None else measured_dict(plan.measured),
        "remedy": remedy(plan),
        "counts": {
            "operations": operation_counts(plan),
            "ambiguous_targets": sum(len(case.targets) for case in plan.ambiguous),
        },
        "coverage": coverage_dict(material.coverage),
        "weights": [round(weights[key], 3) for key in ("shape", "name", "hierarchy")],
        "nameParts": _NAME_PARTS,
        "hierarchyParts": _HIERARCHY_PARTS,
        **sides,
        "entries": entries,
        "ambiguous": [
            {
                "t": where["target"](case.targets),
                "c": [[where["source"](c.sources), round(c.score, 3)] for c in case.candidates],
                "reason": case.reason,
            }
            for case in plan.ambiguous
        ],
        "shapes": list(shapes),
        "texts": list(texts),
        "badges": list(badges),
        "warnings": [*_excluded(plan, material.target), *material.warnings],
        "notes": notes,
    }


def _excluded(plan: TransferPlan, target: ModelDescription) -> list[str]:
    lines = excluded_lines(plan, target)
    return [f"buffers: {'; '.join([lines[0], *([' '.join(lines[1:])] if lines[1:] else [])])}"] if lines else []


_Finder = Callable[[tuple[str, ...]], list[int]]


def _finder(side: ModelDescription) -> _Finder:
    """Gives the numbers of tensors by their names, those that are known, or by other names of the same tensors."""
    numbers = {info.name: number for number, info in enumerate(side.parameters)}
    known = numbers | {alias: numbers[name] for alias, name in side.tied.items() if name in numbers}
    return lambda names: [known[name] for name in names if name in known]


def _side(material: Material, which: Side, shapes: _Numbers, texts: _Numbers) -> dict[str, Any]:
    """One side; what has no partner with its reason, its nearest tensor on the other side, and what would fill it."""
    side, other = (material.source, material.target)[:: 1 if which == "source" else -1]
    infos: tuple[ParameterInfo, ...] = side.parameters
    numbers = {info.name: i for i, info in enumerate(infos)}
    places = {info.name: i for i, info in enumerate(other.parameters)}
    left = [
        [
            numbers[item.name],
            texts[gap.reason],
            None if gap.nearest is None else places[gap.nearest.name],
            texts[gap.advice] if gap.advice else None,
        ]
        for gap in gaps(material.plan, which, material.source, material.target)
        for item in gap.members
    ]
    return {
        "names": [info.name for info in infos],
        "shapes": [shapes[shape_text(info.shape), info.numel] for info in infos],
        "buffers": [i for i, info in enumerate(infos) if info.kind == "buffer"],
        "types": [info.module_type for info in infos] if side.is_module else None,
        "unmatched": sorted(left),
        "excluded": sorted(numbers[name] for name in excluded_names(material.plan, which, side)),
    }


def _entry(
    material: Material, number: int, entry: PlanEntry, where: dict[str, _Finder], texts: _Numbers, badges: _Numbers
) -> list[Any]:
    found = []
    explained = len(material.plan.entries) <= _MOST_BREAKDOWNS
    for source, target in pairs(entry) if explained else ():
        s, t = where["source"]((source,)), where["target"]((target,))
        if s and t:
            pair = [s[0], t[0], *_parts(breakdown(material, entry, source, target))]
            if number in material.questioned:
                other = runner_up(material, entry, source, target)
                pair.append(None if other is None else [*where["source"]((other.source,)), *_parts(other)])
            found.append(pair)
    return [
        where["source"](entry.sources),
        where["target"](entry.targets),
        badges[entry.badge],
        round(entry.score, 3),
        round(entry.margin, 3),
        texts[entry.reason],
        found,
        int(entry.changes_values),
    ]


def _parts(parts: ScoreBreakdown) -> list[Any]:
    """Shape, name, hierarchy, what these two are made of, the score, and the parents' match."""
    details = [parts.name_parts.get(key) for key in _NAME_PARTS]
    details += [parts.hierarchy_parts.get(key) for key in _HIERARCHY_PARTS]
    return [
        round(parts.shape, 3),
        round(parts.name, 3),
        round(parts.hierarchy, 3),
        [None if value is None else round(value, 3) for value in details],
        round(parts.total, 3),
        parts.parents,
    ]


WIDTH, ROW, TOP = 900, 46, 58
LEFT, RIGHT = 20, 660  # of the axis
BEYOND = 1.5  # where the axis ends, in falls of the loss from the fresh model
MOST = 40  # decisions that are drawn
GOOD, BAD, GREY = "var(--high, #15803d)", "var(--low, #c0262d)", "var(--muted, #667085)"


def decision_chart(measured: Measured) -> str:
    """An SVG with one row for each decision, on one axis of the loss; empty if nothing was decided."""
    drawn = [d for d in measured.decisions if math.isfinite(d.loss)][:MOST]
    losses = [measured.fresh, measured.transferred, *(d.loss for d in drawn), *(d.rival_loss for d in drawn)]
    known = [loss for loss in losses if math.isfinite(loss)]
    if not drawn:
        return ""
    low, high = min(known), max(known)
    if measured.fresh > low:  # a rival that is far worse than the fresh model stands at the end
        high = min(high, low + BEYOND * (measured.fresh - low))
    span = (high - low) or 1.0

    def x(loss: float) -> float:
        return LEFT + (RIGHT - LEFT) * (min(loss, high) - low) / span

    height = TOP + ROW * len(drawn) + 26
    left_out = len(measured.decisions) - len(drawn)
    title = "loss: each answer (full) and its best rival (hollow), and the fresh model (dashed)"
    below = "risk: that the answer is no better than its rivals; where it is above 1 %, nothing is taken"
    parts = [
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Loss of each decision and of its best rival" font-family="sans-serif" font-size="12" '
        'fill="currentColor">',
        _text(LEFT, 16, title, weight=600),
        _text(LEFT, 34, below, GREY),
    ]
    if math.isfinite(measured.fresh):
        at = x(measured.fresh)
        anchor = "middle" if 60 < at < 600 else "start" if at < 300 else "end"
        parts.append(_line(at, TOP - 12, at, height - 22, GREY, ' stroke-dasharray="4 4"'))
        parts.append(_text(at, height - 8, f"fresh {measured.fresh:.4g}", GREY, anchor=anchor))
    for row, decided in enumerate(drawn):
        parts += _row(decided, TOP + ROW * row, x)
    if left_out:
        parts.append(_text(LEFT, height - 8, f"and {left_out} more", GREY))
    return "".join([*parts, "</svg>"])


def _row(decided: Decided, y: int, x: Callable[[float], float]) -> list[str]:
    parts = [_text(LEFT, y + 8, f"{_short(decided.question, 46)}: {_short(decided.answer, 70)}")]
    parts.append(_line(LEFT, y + 24, RIGHT, y + 24, "var(--line, #dfe3ea)"))
    here = x(decided.loss)
    if math.isfinite(decided.rival_loss):
        there = x(decided.rival_loss)
        parts.append(_line(here, y + 24, there, y + 24, BAD, ' stroke-width="2"'))
        parts.append(
            f'<circle cx="{there:.1f}" cy="{y + 24}" r="5" fill="none" stroke="{BAD}" stroke-width="2">'
            f"<title>{_safe(f'{decided.rival}: {decided.rival_loss:.5g}')}</title></circle>"
        )
    parts.append(
        f'<circle cx="{here:.1f}" cy="{y + 24}" r="5" fill="{GOOD if decided.taken else GREY}">'
        f"<title>{_safe(f'{decided.answer}: {decided.loss:.5g}')}</title></circle>"
    )
    verdict = f"{decided.loss:.4g} against {decided.rival_loss:.4g}, "
    verdict += f"risk {decided.risk:.0e}" if decided.taken else "open"
    parts.append(_text(RIGHT + 16, y + 28, verdict, GOOD if decided.taken else GREY))
    return parts


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _safe(text: str) -> str:
    return html.escape(printable(text))


def _text(x: float, y: float, text: str, fill: str = "", *, weight: int = 400, anchor: str = "start") -> str:
    colour = f' fill="{fill}"' if fill else ""
    return f'<text x="{x:.1f}" y="{y}" font-weight="{weight}" text-anchor="{anchor}"{colour}>{_safe(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}"{more}/>'
