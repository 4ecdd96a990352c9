"""Running averages (EMA, SWA) among the tensors that they are the averages of, told by names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

AVERAGE_WORDS = frozenset({"ema", "average", "averaged", "averaging", "avg", "swa", "shadow", "polyak"})
PROBES = 8  # names that are looked for, so that not all of them need to stand on both sides


def words_of(text: str) -> set[str]:
    """Cut a key into lower-case words: ``state_dict_ema``, ``EMACallback``, ``modelEma``."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", text)
    return {part.lower() for part in parts}


@dataclass(frozen=True)
class Average:
    """Weights that stand a second time among others: ``prefix`` of their names, and model's name -> averaged name."""

    prefix: str
    pairs: dict[str, str]


def find_average(shapes: Mapping[str, tuple[int, ...]]) -> Average | None:
    """Find a running average among the tensors that it is the average of.

    An average is a copy under a prefix. That it is the copy is told by a word of the prefix (``ema``), or by names
    that lost their dots (``shadow.net_layer_weight``, LDM's LitEma without any separator) beside names that have them.

    Args:
        shapes: Name -> shape of all tensors.
    """
    under: dict[str, list[str]] = {}
    for name in shapes:
        for prefix in _prefixes(name):
            under.setdefault(prefix, []).append(name)
    dotted = any("." in name for name in shapes)
    for prefix, mine in sorted(under.items()):
        told = bool(words_of(prefix) & AVERAGE_WORDS)
        flat = all("." not in name[len(prefix) :].removeprefix("module.") for name in mine)
        if len(mine) < 2 or not (told or (flat and dotted)):
            continue
        keys = {_squeezed(name[len(prefix) :].removeprefix("module.")): name for name in mine}
        rest = {name: _squeezed(name) for name in shapes if not name.startswith(prefix)}
        starts: set[str] = set()
        for probe in sorted(keys, key=lambda key: (-len(key), key))[:PROBES]:
            starts |= {squeezed.removesuffix(probe) for squeezed in rest.values() if squeezed.endswith(probe)}
        pairs: dict[str, str] = {}
        for start in sorted(starts, key=lambda text: (len(text), text)):
            alike = {
                name: keys[squeezed[len(start) :]]
                for name, squeezed in rest.items()
                if squeezed.startswith(start) and squeezed[len(start) :] in keys
            }
            alike = {a: b for a, b in alike.items() if shapes[a] == shapes[b]}
            pairs = max(pairs, alike, key=len)
        counted = [name for name in mine if shapes[name]]  # decay and number of updates are scalars
        lost_dots = flat and any(
            "." in _tail(name, len(_squeezed(mine_name)) - len(_squeezed(prefix))) for name, mine_name in pairs.items()
        )
        if len(pairs) * 2 > len(mine) and (told or (lost_dots and len(pairs) >= len(counted) > 1)):
            return Average(prefix, pairs)
    return None


def _prefixes(name: str) -> list[str]:
    """What may stand before the name of the original: the first modules, or the first words of a name without dots."""
    parts = re.split("(?<=[.])", name) if "." in name else re.split("(?<=_)", name)
    return ["".join(parts[:k]) for k in (1, 2) if k < len(parts)]


def _squeezed(name: str) -> str:
    return name.replace(".", "").replace("_", "")


def _tail(name: str, letters: int) -> str:
    """The end of a name that has so many letters, separators aside."""
    at = len(name)
    while letters > 0 and at > 0:
        at -= 1
        letters -= name[at] not in "._"
    return name[at:]
