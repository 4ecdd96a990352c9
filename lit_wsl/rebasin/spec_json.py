"""JSON form of a permutation spec, short enough for a person to read and edit.

The coordinates of an axis are written as a list of segments, ``{"shape": [12, 64], "groups": ["heads", "inner"]}``: the
positions run through a box in row-major order, each side of the box is one group (null: a side that stays fixed).
``"start": [0, 32]`` says that a side begins at another unit than 0. What does not fit a segment is cut into more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.spec_axis import AxisSpec, PermutationGroup

if TYPE_CHECKING:
    from lit_wsl.rebasin.spec import PermutationSpec

FORMAT = "lit_wsl.permutation_spec"
VERSION = 1


def segment_coords(
    shape: Sequence[int], groups: Sequence[str | None], start: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Coordinates of the positions of one segment: group -> LongTensor ``(prod(shape),)``.

    >>> segment_coords([2, 3], ["heads", None])["heads"].tolist()
    [0, 0, 0, 1, 1, 1]
    """
    grid = torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape))
    offset = start or [0] * len(shape)
    return {group: grid[:, k] + offset[k] for k, group in enumerate(groups) if group is not None}


def _box(coords: Tensor, begin: int) -> tuple[int, list[int], list[int]]:
    """Largest row-major box of coordinates from ``begin`` on: its end, the side of each row, the repeat."""
    first = coords[:, begin]
    rows, total = coords.shape
    same = (coords[:, begin:] == first[:, None]).all(dim=0)
    repeat = int(same.long().cumprod(0).sum())
    sides = [1] * rows
    best_end = begin + repeat
    # Rows run at different speeds; a row that moves first is the innermost side. Rows that are -1 or constant have 1.
    block = repeat
    order: list[int] = []
    while begin + 2 * block <= total:
        moving = [row for row in range(rows) if int(coords[row, begin + block]) != int(first[row])]
        if len(moving) != 1 or moving[0] in order:
            break
        row = moving[0]
        here = coords[:, begin : begin + block]
        count = 1
        while begin + (count + 1) * block <= total:
            expected = here.clone()
            expected[row] += count
            if not torch.equal(coords[:, begin + count * block : begin + (count + 1) * block], expected):
                break
            count += 1
        if count == 1:
            break
        sides[row] = count
        order.append(row)
        block *= count
        best_end = begin + block
    return best_end, sides, [*reversed(order)]


def axis_to_segments(axis_spec: AxisSpec) -> list[dict[str, Any]]:
    """Segments of one axis; see the module."""
    segments: list[dict[str, Any]] = []
    begin = 0
    while begin < axis_spec.length:
        end, sides, order = _box(axis_spec.coords, begin)
        first = axis_spec.coords[:, begin].tolist()
        inert = [row for row, unit in enumerate(first) if unit >= 0 and row not in order]
        rows = sorted([*inert, *order], key=lambda row: order.index(row) if row in order else -1)
        shape = [sides[row] for row in rows]
        groups: list[str | None] = [axis_spec.groups[row] for row in rows]
        start = [first[row] for row in rows]
        volume = 1
        for side in shape:
            volume *= side
        if (repeat := (end - begin) // volume) > 1 or not rows:
            shape, groups, start = [*shape, repeat], [*groups, None], [*start, 0]
        entry: dict[str, Any] = {"shape": shape, "groups": groups}
        if any(start):
            entry["start"] = start
        segments.append(entry)
        begin = end
    return segments


def axis_from_segments(segments: Sequence[Mapping[str, Any]], order: Sequence[str], outer_axis: int | None) -> AxisSpec:
    """Inverse of :func:`axis_to_segments`; ``order`` ranks the groups, parents before children."""
    parts = [
        (segment_coords(s["shape"], s["groups"], s.get("start")), torch.Size(s["shape"]).numel()) for s in segments
    ]
    used = {group for part, _ in parts for group in part}
    if unknown := sorted(used.difference(order)):
        raise RebasinError(f"A segment names the groups {unknown}, which the spec does not list.")
    groups = tuple(group for group in order if group in used)
    rows = [torch.cat([part.get(g, torch.full((n,), -1)) for part, n in parts]) for g in groups]
    length = sum(n for _, n in parts)
    return AxisSpec(groups, torch.stack(rows) if rows else torch.empty(0, length, dtype=torch.long), outer_axis)


def spec_to_dict(spec: PermutationSpec) -> dict[str, Any]:
    """The spec as JSON-able data."""
    axes: dict[str, Any] = {}
    for tensor, by_axis in spec.axes.items():
        axes[tensor] = {}
        for axis, axis_spec in by_axis.items():
            entry: dict[str, Any] = {"segments": axis_to_segments(axis_spec)}
            if axis_spec.outer_axis is not None:
                entry["outer_axis"] = axis_spec.outer_axis
            axes[tensor][str(axis)] = entry
    return {
        "format": FORMAT,
        "version": VERSION,
        "groups": {
            name: {"size": g.size, **({"parent": g.parent} if g.parent else {})} for name, g in spec.groups.items()
        },
        "axes": axes,
        "shapes": {name: list(shape) for name, shape in spec.shapes.items()},
        "parameters": list(spec.parameters),
        "frozen": {name: {str(axis): why for axis, why in by.items()} for name, by in spec.frozen.items()},
        "dropped": dict(spec.dropped),
    }


def spec_from_dict(data: Mapping[str, Any]) -> PermutationSpec:
    """Inverse of :func:`spec_to_dict`.

    Raises:
        RebasinError: The data is not a permutation spec, or of a newer version.
    """
    from lit_wsl.rebasin.spec import PermutationSpec

    if data.get("format") != FORMAT or int(data.get("version", 0)) > VERSION:
        raise RebasinError(
            f"Not a permutation spec this version reads: format {data.get('format')!r}, "
            f"version {data.get('version')!r}; expected {FORMAT!r}, at most {VERSION}."
        )
    try:
        groups = {n: PermutationGroup(n, int(g["size"]), g.get("parent")) for n, g in data["groups"].items()}
        axes = {
            tensor: {
                int(axis): axis_from_segments(entry["segments"], list(groups), entry.get("outer_axis"))
                for axis, entry in by_axis.items()
            }
            for tensor, by_axis in data["axes"].items()
        }
        return PermutationSpec(
            groups,
            axes,
            shapes={name: tuple(shape) for name, shape in data.get("shapes", {}).items()},
            parameters=tuple(data.get("parameters", ())),
            frozen={n: {int(a): why for a, why in by.items()} for n, by in data.get("frozen", {}).items()},
            dropped=dict(data.get("dropped", {})),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RebasinError(f"The permutation spec is damaged: {type(error).__name__}: {error}") from error
