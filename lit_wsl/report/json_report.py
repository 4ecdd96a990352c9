"""The report as JSON, for programs: one layout for mappings and transfers, whose schema is ``assets/schema.json``."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_wsl.files import atomic_write_text
from lit_wsl.matching.scoring import ScoreBreakdown
from lit_wsl.plan.coverage import Count, Coverage
from lit_wsl.plan.entries import PlanEntry, Side, measured_dict
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.report.rows import gaps, operation_counts
from lit_wsl.report.scores import Material, breakdown, pairs, runner_up

VERSION = 1
MOST_PAIRS = 2_000  # steps of a report that explains each pair's score unless asked not to: a few megabytes
SCHEMA = Path(__file__).parent / "assets" / "schema.json"


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
    from lit_wsl.files import package_version

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
    data = _parts(breakdown(material, entry, source, target))
    if named:
        other = runner_up(material, entry, source, target)
        data["runner_up"] = None if other is None else _parts(other)
    return data


def _parts(parts: ScoreBreakdown) -> dict[str, Any]:
    return {
        "source": parts.source,
        "target": parts.target,
        "shape": _round(parts.shape),
        "name": _round(parts.name),
        "hierarchy": _round(parts.hierarchy),
        "name_parts": {key: _round(value) for key, value in parts.name_parts.items()},
        "hierarchy_parts": {key: _round(value) for key, value in parts.hierarchy_parts.items()},
        "weights": {key: _round(value) for key, value in parts.weights.items()},
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
