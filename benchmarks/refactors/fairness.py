"""Whether a pair deceives: whether a name says one thing on one side and a sibling of it on the other.

``network.names_lie`` looks at layers. Here every level counts: what all names below a module have and its siblings'
names have not is what it is called. If that is what a sibling of the same make was called on the other side, and not
what it was called there itself, then a careful human would be deceived as well, and the pair is no test.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple

from benchmarks.refactors.network import Net, Placed

Make = frozenset[tuple[str, tuple[int, ...]]]


class Deception(NamedTuple):
    """What a module is called now, and which sibling was called so before."""

    module: str
    sibling: str
    words: frozenset[str]


def deceptions(old: Net, new: Net) -> list[Deception]:
    """Every module whose new name was the old name of a sibling."""
    before, after = _called(old), _called(new)
    counted = _counters(before), _counters(after)
    found = []
    for parent in sorted(before.keys() & after.keys()):
        for module, (make, words) in sorted(after[parent].items()):
            own = before[parent].get(module)
            for sibling, (other_make, other_words) in sorted(before[parent].items()):
                said = (words & other_words) - (own[1] if own else frozenset())
                said = frozenset(word for word in said if _same_count(word, parent, counted))
                if own and sibling != module and make == other_make and said:
                    found.append(Deception(f"{parent}/{module}".strip("/"), sibling, said))
    return found


def _called(net: Net) -> dict[str, dict[str, tuple[Make, frozenset[str]]]]:
    """For every module that holds others: its members by their roles, their make, and what they are called."""
    below: dict[str, dict[str, list[Placed]]] = defaultdict(lambda: defaultdict(list))
    for placed in net.placed:
        if len(placed.leaf.pieces) == 1 and " " not in placed.leaf.pieces[0]:
            steps = [re.sub(r"#\d+", "", step) for step in placed.leaf.pieces[0].split("/")]
            for depth, step in enumerate(steps):
                below["/".join(steps[:depth])][step].append(placed)
    found: dict[str, dict[str, tuple[Make, frozenset[str]]]] = {}
    for parent, members in below.items():
        words = {name: [_words(placed) for placed in leaves] for name, leaves in members.items()}
        for name, leaves in members.items():
            others = {word for other in words if other != name for said in words[other] for word in said}
            make = frozenset((placed.leaf.kind, placed.leaf.sizes[0]) for placed in leaves)
            own = frozenset.intersection(*words[name]) - others
            found.setdefault(parent, {})[name] = (make, own)
    return found


def _words(placed: Placed) -> frozenset[str]:
    return frozenset(
        plain for part in placed.name.split(".") if (plain := part.replace("_", "").lower()) and not plain.isdigit()
    )


def _stem(word: str) -> str:
    return re.sub(r"\d+$", "", word)


Counters = dict[tuple[str, str], set[str]]


def _counters(called: dict[str, dict[str, tuple[Make, frozenset[str]]]]) -> Counters:
    """For words that end in a number: all numbers that stand behind the same word in the same module."""
    found: Counters = defaultdict(set)
    for parent, members in called.items():
        for _, words in members.values():
            for word in words:
                if _stem(word) != word:
                    found[parent, _stem(word)].add(word)
    return found


def _same_count(word: str, parent: str, counted: tuple[Counters, Counters]) -> bool:
    """Whether a word is no number, or counts the same on both sides: from zero here and from one there shows."""
    key = (parent, _stem(word))
    return _stem(word) == word or counted[0].get(key) == counted[1].get(key)
