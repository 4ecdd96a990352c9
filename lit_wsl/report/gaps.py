"""What a plan leaves without a partner, told once for every view: names, shapes, reasons, nearest partner, remedy."""

from __future__ import annotations

from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from lit_wsl.plan.coverage import excluded_names
from lit_wsl.plan.entries import Side, Unmatched
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.report.rows import shape_text
from lit_wsl.structure.description import ModelDescription, ParameterInfo
from lit_wsl.structure.families import fold

MOST_LOOKED_UP = 200  # families of a side whose nearest partner is looked for; a screen shows far fewer


@dataclass(frozen=True)
class Gap:
    """Tensors of one side without a partner, alike but for the numbers in their names.

    Attributes:
        pattern: Their name, numbers folded.
        members: The tensors.
        reason: Why they have no partner.
        nearest: The most alike tensor of the other side, for the first of them.
        advice: What would fill them, where that is known.
    """

    pattern: str
    members: tuple[Unmatched, ...]
    reason: str
    nearest: ParameterInfo | None = None
    advice: str = ""

    @property
    def text(self) -> str:
        """Name and shape: ``blocks.{0..11}.norm.bias 64``."""
        kind = " (buffer)" if self.members[0].kind == "buffer" else ""
        return f"{self.pattern} {shape_text(self.members[0].shape)}{kind}"


def left_over(plan: TransferPlan, side: Side, described: ModelDescription) -> tuple[Unmatched, ...]:
    """The tensors of a side that were asked for and have no partner; ambiguous targets are not among them.

    What a plan does not mention (it was edited, or made for a smaller model) is left over too.

    Args:
        plan: The plan.
        side: Which side.
        described: That side.
    """
    own = [entry.sources if side == "source" else entry.targets for entry in plan.entries]
    settled = {described.tied.get(name, name) for names in own for name in names}
    if side == "target":
        settled |= {described.tied.get(name, name) for case in plan.ambiguous for name in case.targets}
    settled |= excluded_names(plan, side, described)
    known = {item.name: item for item in (plan.unmatched_source if side == "source" else plan.unmatched_target)}
    return tuple(
        known.get(info.name) or Unmatched(info.name, info.shape, info.kind, "not in the plan")
        for info in described.parameters
        if info.name not in settled
    )


def gaps(plan: TransferPlan, side: Side, source: ModelDescription, target: ModelDescription) -> list[Gap]:
    """What is left over of a side, folded, each with its nearest partner on the other.

    Args:
        plan: The plan.
        side: Which side.
        source: The source's side.
        target: The target's side.
    """
    own, other = (source, target) if side == "source" else (target, source)
    left = left_over(plan, side, own)
    across: Side = "target" if side == "source" else "source"
    free = frozenset(item.name for item in left_over(plan, across, other))
    rivals = _Rivals(other, free)
    found: list[Gap] = []
    for family in fold([(item.name,) for item in left], [(item.shape, item.kind, item.reason) for item in left]):
        members = tuple(left[m] for m in family.members)
        first = members[0]
        nearest = rivals.nearest(first) if len(found) < MOST_LOOKED_UP else None
        advice = ""
        if nearest is not None and nearest.name in free and len(members) == 1:
            new, old = (first, nearest) if side == "target" else (nearest, first)
            advice = _advice(old, new, source, target, plan)
        found.append(Gap(family.patterns[0], members, first.reason, nearest, advice))
    return found


class _Rivals:
    """The tensors of a side by kind and rank, the free ones alone where there are any.

    Args:
        side: The side.
        free: Names of its tensors without a partner.
    """

    def __init__(self, side: ModelDescription, free: frozenset[str]) -> None:
        self._free: dict[tuple[str, int], list[ParameterInfo]] = {}
        self._all: dict[tuple[str, int], list[ParameterInfo]] = {}
        for info in side.parameters:
            for pool in (self._all, self._free) if info.name in free else (self._all,):
                pool.setdefault((info.kind, len(info.shape)), []).append(info)

    def nearest(self, item: Unmatched) -> ParameterInfo | None:
        """The tensor that most likely stands for this one: free, of nearly its shape, of its role, named like it."""
        key, leaf = (item.kind, len(item.shape)), item.name.rpartition(".")[2]
        rivals = self._free.get(key) or self._all.get(key)
        if not rivals:
            return None
        points = [sum(a == b for a, b in zip(rival.shape, item.shape)) + (rival.leaf == leaf) for rival in rivals]
        best = [rival for rival, found in zip(rivals, points) if found == max(points)]
        return max(best, key=lambda rival: Levenshtein.normalized_similarity(rival.name, item.name))


def _advice(
    old: Unmatched | ParameterInfo,
    new: Unmatched | ParameterInfo,
    source: ModelDescription,
    target: ModelDescription,
    plan: TransferPlan,
) -> str:
    """The value-changing operation that takes the one into the other, if the user may want it."""
    differing = [axis for axis, (a, b) in enumerate(zip(old.shape, new.shape)) if a != b]
    roles = {name.rpartition(".")[2] for name in (old.name, new.name)}
    if len(differing) != 1 or len(roles) != 1:
        return ""
    places = [(_module(side), _module_of(item)) for side, item in ((source, old), (target, new))]
    axis, rank = differing[0], len(new.shape)
    if axis == 0 and rank <= 2 and all(own == order[-1] for order, own in places):
        wanted, what = "partial_head", "copies the rows that both have"
    elif axis == 1 and rank == 4 and all(own == order[0] for order, own in places):
        wanted, what = "new_input_channels", "adapts the first convolution to the other number of channels"
    else:
        return ""
    return "" if wanted in plan.options.get("adapt", ()) else f'adapt=["{wanted}"] {what}'


def _module(side: ModelDescription) -> list[str]:
    """Paths of the modules that hold parameters, in order."""
    return list(dict.fromkeys(info.module_path for info in side.parameters if info.kind == "parameter"))


def _module_of(item: Unmatched | ParameterInfo) -> str:
    return item.name.rpartition(".")[0]


def remedy(plan: TransferPlan) -> str:
    """What a user can do about ambiguous targets; empty where there are none."""
    if not plan.ambiguous:
        return ""
    return (
        "to decide: give the old code (source_module=) and a sample, or your loss and data; or move the right "
        "candidate to the entries of a plan file"
    )
