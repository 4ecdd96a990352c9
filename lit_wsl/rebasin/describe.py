"""What a person wants to know of a permutation spec, as text."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_wsl.rebasin.spec import PermutationSpec


def describe(spec: PermutationSpec, max_lines: int = 20) -> str:
    """Groups found, share of the parameters covered, and what stays fixed and why."""
    nested = sum(group.parent is not None for group in spec.groups.values())
    lines = [
        f"{len(spec.groups)} permutation groups ({nested} nested) move {len(spec.axes)} of {len(spec.shapes)} tensors: "
        f"{spec.coverage:.1%} of the parameters."
    ]
    for name, group in list(spec.groups.items())[:max_lines]:
        inside = f" inside {group.parent}" if group.parent else ""
        lines.append(f"  {name}: {group.size} units{inside}, {len(spec.uses(name))} axes")
    if len(spec.groups) > max_lines:
        lines.append(f"  ... and {len(spec.groups) - max_lines} more")
    reasons = Counter(reason for by_axis in spec.frozen.values() for reason in by_axis.values())
    if reasons:
        lines.append(f"Fixed: {sum(reasons.values())} axes.")
        lines += [f"  {count} x {reason}" for reason, count in sorted(reasons.items(), key=lambda i: (-i[1], i[0]))]
    if spec.dropped:
        lines.append(f"Dropped: {len(spec.dropped)} groups.")
        lines += [f"  {name}: {reason}" for name, reason in spec.dropped.items()]
    return "\n".join(lines)
