"""Who else could have stood in a place: the next best candidates for one side of a matched pair."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from lit_wsl.mapper.scoring import ScoreBreakdown
from lit_wsl.report.material import Material
from lit_wsl.structure.info import ParameterInfo, Shape
from lit_wsl.transfer.plan import PlanEntry, Side

QUICK = 4  # rivals scored per step of a report
THOROUGH = 64  # rivals scored where one tensor is asked for


def candidates(
    material: Material,
    fixed: ParameterInfo,
    side: Side,
    shape: Shape,
    *,
    like: str = "",
    without: Sequence[str] = (),
    operation: bool = False,
    shortlist: int = THOROUGH,
) -> list[ScoreBreakdown]:
    """Score the tensors that could stand beside ``fixed``, the best first.

    Args:
        material: What the report is made from.
        fixed: The tensor that looks for a partner.
        side: Where the partner would come from.
        shape: The partner's shape; its axes may stand in any order.
        like: Name of the partner that it has, if any: rivals of a renamed tensor are named like its partner.
        without: Names that are no candidates.
        operation: Whether the partner goes through an operation, as its rivals would then.
        shortlist: How many to score at most, beside those of the partner's own module: the ones whose names are most
            alike to ``like`` or, half as many, to ``fixed``.

    Returns:
        Breakdowns with their totals falling; ties in order of names.
    """
    rivals = [i for i in material.alike[side].get((fixed.kind, tuple(sorted(shape))), ()) if i.name not in without]
    if len(rivals) > shortlist:
        rivals = _shortlist(material, rivals, fixed, like, side, shortlist)
    found = []
    for rival in rivals:
        source, target = (rival, fixed) if side == "source" else (fixed, rival)
        found.append(material.score(source, target, operation=operation or source.shape != target.shape))
    return sorted(found, key=lambda parts: (-parts.total, parts.source, parts.target))


def _shortlist(
    material: Material, rivals: list[ParameterInfo], fixed: ParameterInfo, like: str, side: Side, size: int
) -> list[ParameterInfo]:
    names = [rival.name for rival in rivals]
    near: set[int] = set()
    for name, count in ((like, size), (fixed.name, size // 2)):
        if name:
            best = process.extract(name, names, scorer=Levenshtein.normalized_similarity, limit=count)
            near.update(index for _, _, index in best)
    together = material.partner_modules[side].get(fixed.module_path, frozenset())
    return [rival for i, rival in enumerate(rivals) if i in near or rival.module_path in together]


def runner_up(material: Material, entry: PlanEntry, source: str, target: str) -> ScoreBreakdown | None:
    """The next best source for the target of one pair of a step; None where no other source has a shape that fits."""
    if target not in material.target or source not in material.source:
        return None
    found = candidates(
        material,
        material.target[target],
        "source",
        material.source[source].shape,
        like=source,
        without=entry.sources,
        operation=entry.badge not in ("exact", "cast"),
        shortlist=QUICK,
    )
    return found[0] if found else None
