"""Copies that stand in one list on one side and in several on the other, such as those of an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lit_wsl.matching.layers import Region, Unit, common_path


def gathered(theirs: Sequence[Region], ours: Sequence[Region]) -> tuple[list[Region], list[Region]]:
    """Regions of both sides, put together where the other side has as many copies in one of its own.

    Args:
        theirs: What is outside of all regions, and the regions.
        ours: The same of the other side.
    """
    made = _as_many(ours, theirs)
    return _as_many(theirs, made), made


def _as_many(own: Sequence[Region], others: Sequence[Region]) -> list[Region]:
    """The regions of one side, some put together to as many copies as one of the other side has."""
    own = list(own)
    for other in others[1:]:
        if any(_is_like(other, region) for region in own[1:]):
            continue
        free = [region for region in own[1:] if not any(_is_like(region, one) for one in others[1:])]
        for used, units, whole in _put_together(own[0], free):
            if _is_like(other, whole):
                outside = replace(own[0], units=tuple(u for u in own[0].units if u not in units))
                own = [outside, *(region for region in own[1:] if region not in used), whole]
                break
    return own


def _is_like(one: Region, other: Region) -> bool:
    return len(one.copies) == len(other.copies) and one.elements == other.elements


def _put_together(outside: Region, free: Sequence[Region]) -> Iterator[tuple[list[Region], list[Unit], Region]]:
    """Regions with the same layers as one, also with what is alike outside; those and that beside it."""
    alike: dict[object, list[Region]] = {}
    for region in free:
        alike.setdefault(_layers(flattened(region)), []).append(region)
    for regions in alike.values():
        flat = [flattened(region) for region in regions]
        yield regions, [], _joined(flat)
        single = list(_singles(outside, flat[0]))
        yield regions, [unit for own in single for unit in own[1]], _joined([*flat, *(own[0] for own in single)])


def _layers(region: Region) -> frozenset[tuple[object, ...]]:
    return frozenset((unit.path, unit.times, unit.shapes) for unit in region.units)


def flattened(region: Region) -> Region:
    """Copies that each hold as many copies of all their layers as so many more copies."""
    times = {unit.times for unit in region.units}
    if len(times) != 1 or times == {1}:
        return region
    copies = []
    for copy in range(len(region.copies)):
        for k in range(*times):
            copies.append(common_path(own[copy][k] for unit in region.units for own in unit.names))
    inside = len(copies[0]) - len(region.copies[0])
    units = tuple(
        Unit(unit.path[inside:], tuple(tuple((n,) for copy in own for n in copy) for own in unit.names), unit.shapes)
        for unit in region.units
    )
    return Region(tuple(copies), units)


def _joined(regions: Sequence[Region]) -> Region:
    """Regions with the same layers as one."""
    places = [{unit.path: unit for unit in region.units} for region in regions]
    units = []
    for unit in regions[0].units:
        names = [own[unit.path].names for own in places]
        units.append(
            replace(unit, names=tuple(tuple(copy for own in tensor for copy in own) for tensor in zip(*names)))
        )
    return Region(tuple(prefix for region in regions for prefix in region.copies), tuple(units))


def _singles(outside: Region, like: Region) -> Iterator[tuple[Region, list[Unit]]]:
    """What stands outside of all regions and has the layers of a region, as one copy of it; and these layers."""
    known = {unit.path: unit for unit in outside.units}
    first = like.units[0].path
    for path in known:
        prefix = path.removesuffix(first)
        if path.endswith(f".{first}") and all(
            (own := known.get(f"{prefix}{unit.path}")) is not None and own.shapes == unit.shapes for unit in like.units
        ):
            found = [known[f"{prefix}{unit.path}"] for unit in like.units]
            yield Region((prefix,), tuple(replace(own, path=unit.path) for own, unit in zip(found, like.units))), found
