"""Weights that are stored as factors: a length and a direction (weight norm), or any parametrization of several parts.

A factor has the shape of a weight without being one. Copied into a plain weight it gives another function, without an
error, so factors match factors of the same role only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lit_wsl.structure.info import ParameterInfo, Shape

_PARAMETRIZED = re.compile(
    r"(?:.*\.)?parametrizations\.[^.]+\.original(\d+)"
)  # as torch.nn.utils.parametrize stores them
_LENGTH, _DIRECTION = "_g", "_v"  # as torch.nn.utils.weight_norm and many ports of it store them


def factor_roles(infos: Iterable[ParameterInfo]) -> dict[str, int]:
    """The tensors that are factors of a weight, and which one.

    Args:
        infos: One side's tensors.

    Returns:
        Name -> place among the factors; of weight norm 0 is the length, 1 the direction.

    >>> factor_roles([ParameterInfo("fc.weight_g", (7, 1)), ParameterInfo("fc.weight_v", (7, 6))])
    {'fc.weight_g': 0, 'fc.weight_v': 1}
    """
    by_name = {info.name: info for info in infos}
    roles: dict[str, int] = {}
    for name, info in by_name.items():
        found = _PARAMETRIZED.fullmatch(name)
        if found:
            roles[name] = int(found[1])
        elif name.endswith(_LENGTH):
            direction = by_name.get(name.removesuffix(_LENGTH) + _DIRECTION)
            if direction is not None and _is_length(info.shape, direction.shape):
                roles[name], roles[direction.name] = 0, 1
    return roles


def _is_length(length: Shape, direction: Shape) -> bool:
    """Whether a shape is that of norms of a tensor along some of its axes."""
    if length == ():
        return len(direction) > 0
    return len(length) == len(direction) > 1 and all(a in (1, b) for a, b in zip(length, direction))


def same_roles(
    sources: Sequence[ParameterInfo],
    targets: Sequence[ParameterInfo],
    of_source: dict[str, int],
    of_target: dict[str, int],
) -> bool:
    """Whether tensors may become others: none of them a factor, or all of them the same one."""
    return len({of_source.get(s.name) for s in sources} | {of_target.get(t.name) for t in targets}) == 1
