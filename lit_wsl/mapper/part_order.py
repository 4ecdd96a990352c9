"""In which order parts stand in the whole they make up: what the whole's name, a formula or numbers tell.

The whole's name may spell its parts (``qkv``, ``gate_up_proj``, ``w12``), the parts may be called as in the formula
``Attention(Q, K, V)``, or they may be numbered. Names that do none of this tell no order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from lit_wsl.mapper.names import ABBREVIATION, path_tokens, token_similarity
from lit_wsl.mapper.tree import owner_path

SPELLED, FORMULA, NUMBERED, UNKNOWN = 1.0, 0.9, 0.7, 0.0


@dataclass(frozen=True)
class PartOrder:
    """An order of parts, and what it rests on.

    Attributes:
        order: Indices of the parts, in the order in which they stand in the whole.
        strength: How strong the evidence is: ``SPELLED``, ``FORMULA``, ``NUMBERED`` or ``UNKNOWN``.
        reason: The evidence in words.
    """

    order: tuple[int, ...]
    strength: float
    reason: str

    @property
    def known(self) -> bool:
        """Whether anything tells the order."""
        return self.strength != UNKNOWN


def order_of_parts(whole: str, parts: Sequence[str]) -> PartOrder:
    """The order of parts by the strongest evidence there is.

    Args:
        whole: Path of the tensor or unit that the parts make up.
        parts: Paths of the parts, in any order.

    >>> order_of_parts("attn.qkv.weight", ["attn.v.weight", "attn.q.weight", "attn.k.weight"]).order
    (1, 2, 0)
    >>> order_of_parts("mlp.in_proj.weight", ["mlp.left.weight", "mlp.right.weight"]).known
    False
    """
    labels = _labels(parts)
    unknown = PartOrder(tuple(range(len(parts))), UNKNOWN, "nothing tells in which order the parts stand")
    return _spelled(whole, labels) or _by_formula(labels) or _by_number(labels) or unknown


def _labels(parts: Sequence[str]) -> list[str]:
    """What tells the parts apart: their paths without common beginning and end, e.g. ``q``, ``k``, ``v``."""
    paths = [owner_path(part) for part in parts]
    head, tail = _shared_letters(paths), _shared_letters([p[::-1] for p in paths])
    labels = [p[head : len(p) - tail] for p in paths]
    if any(not label for label in labels):  # one label begins like another: keep what they share
        cut = max((p[:head].rfind(c) for p in paths for c in "._"), default=-1) + 1
        labels = [p[cut : len(p) - tail] or p[cut:] for p in paths]
    return [label.strip("._").lower() for label in labels]


def _shared_letters(words: Sequence[str]) -> int:
    """Length of the common beginning."""
    return next((k for k, letters in enumerate(zip(*words)) if len(set(letters)) > 1), min(map(len, words)))


def _spelled(name: str, labels: Sequence[str]) -> PartOrder | None:
    """The order in which a name spells its parts: by initials in one word, by numbers, or by words."""
    *_, above, own = ("", "", *owner_path(name).split("."))
    tokens = (*(t for t in path_tokens(above) if not t.isdigit()), *path_tokens(own))
    reason = "the name spells the order of the parts"
    initials = [label[0] for label in labels]
    for order in permutations(range(len(labels))):
        if len(set(initials)) == len(initials) and any(
            tok.endswith("".join(initials[i] for i in order)) and len(tok) <= len(labels) + 1 for tok in tokens
        ):
            return PartOrder(order, SPELLED, reason)
        if all(label.isdigit() for label in labels) and "".join(labels[i] for i in order) in path_tokens(own):
            return PartOrder(order, SPELLED, reason)
    if any(label.isdigit() for label in labels):
        return None  # a number on both sides says nothing
    places = []
    for label in labels:
        words = path_tokens(label)
        hits = [k for k, tok in enumerate(tokens) if any(token_similarity(w, tok) >= ABBREVIATION for w in words)]
        places.append(hits[-1] if hits else -1)
    if min(places) < 0 or len(set(places)) < len(places):
        return None
    return PartOrder(_sorted_by(places), SPELLED, reason)


def _by_formula(labels: Sequence[str]) -> PartOrder | None:
    """Attention(Q, K, V): queries before keys before values."""
    initials = [label[:1] for label in labels]
    if sorted(initials) not in (["k", "q", "v"], ["k", "v"], ["k", "q"]):
        return None
    reason = "queries, keys, values stand in the order of the formula"
    return PartOrder(_sorted_by(["qkv".index(initial) for initial in initials]), FORMULA, reason)


def _by_number(labels: Sequence[str]) -> PartOrder | None:
    """Parts that are called alike but for a number, where the number is part of a word (``w1``, ``wi_0``)."""
    if not all(label.isdigit() for label in labels) or len(set(labels)) < len(labels):
        return None
    return PartOrder(_sorted_by([int(label) for label in labels]), NUMBERED, "the parts are numbered")


def _sorted_by(places: Sequence[int]) -> tuple[int, ...]:
    """Indices in the order of their places."""
    return tuple(sorted(range(len(places)), key=lambda i: places[i]))
