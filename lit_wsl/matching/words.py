"""What names tell: similarity of tokens, abbreviations, and a dictionary learned from the pair of models itself.

Nothing here knows any library's names. Abbreviations are recognised by their form (``attn`` is a subsequence of
``attention``, ``ln`` the initials of ``layer norm``), and everything else a pair of models renames consistently is
learned from the tensors whose partner is already certain (:class:`Dictionary`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product

from rapidfuzz.distance import Levenshtein

from lit_wsl.structure.description import tokenize

ABBREVIATION = 0.85


# English words that say a place in a sequence, as the number they mean.
_ORDINALS = {
    **dict.fromkeys(("first", "one"), "1"),
    **dict.fromkeys(("second", "two"), "2"),
    **dict.fromkeys(("third", "three"), "3"),
    **dict.fromkeys(("fourth", "four"), "4"),
}


_VERSION = re.compile(r"(?<=\w)_v(\d+)(?=\.|$)")
_FROM_TO = re.compile(r"(?<![a-zA-Z])([a-zA-Z])2([a-zA-Z])(?![a-zA-Z])")  # A2B counts nothing


@lru_cache(maxsize=200_000)
def path_tokens(path: str) -> tuple[str, ...]:
    """Tokens of a dotted path, numbers included, ordinals and versions as numbers; cached.

    >>> path_tokens("blocks.0.norm_before"), path_tokens("to_out_v2"), path_tokens("G_A2B")
    (('blocks', '0', 'norm', 'before'), ('to', 'out', '2'), ('g', 'ab'))
    """
    around, dot, part = path.rpartition(".")
    if dot:  # modules are cut once, and not again for each tensor in them
        return path_tokens(around) + path_tokens(part)
    return tuple(_ORDINALS.get(token, token) for token in tokenize(_FROM_TO.sub(r"\1\2", _VERSION.sub(r"_\1", part))))


@lru_cache(maxsize=200_000)
def plain_words(path: str) -> tuple[str, ...]:
    """Tokens of a dotted path without the numbers.

    >>> plain_words("blocks.0.norm_before"), plain_words("to_q_v2")
    (('blocks', 'norm', 'before'), ('to', 'q'))
    """
    return tuple(token for token in path_tokens(path) if not token.isdigit())


@lru_cache(maxsize=200_000)
def split_numbers(path: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Cut a path into its pattern (numbers replaced by ``#``) and its numbers.

    >>> split_numbers("layer1.0.conv2")
    (('layer', '#', '#', 'conv', '#'), (1, 0, 2))
    """
    around, dot, part = path.rpartition(".")
    if dot:
        (words, numbers), (more, last) = split_numbers(around), split_numbers(part)
        return words + more, numbers + last
    tokens = path_tokens(part)
    return tuple("#" if t.isdigit() else t for t in tokens), tuple(int(t) for t in tokens if t.isdigit())


@lru_cache(maxsize=200_000)
def counted(path: str) -> tuple[tuple[str, str], ...]:
    """The places along a path where something is counted, and the number there.

    >>> counted("layer1.0.conv")
    (('layer#', '1'), ('layer1.#', '0'))
    """
    around, dot, part = path.rpartition(".")
    last = _number_in(part)
    return (counted(around) if dot else ()) + (((around + dot + last[0], last[1]),) if last else ())


@lru_cache(maxsize=4096)
def _number_in(part: str) -> tuple[str, str] | None:
    """Where one part of a path counts, and the number."""
    digits = "".join(c for c in _FROM_TO.sub("", part) if c.isdigit())
    return (re.sub(r"\d+", "#", part), str(int(digits))) if digits else None  # 9 and 10 in one place; 00 is 0


Lists = Mapping[str, Mapping[str, int]]


def lists_along(sizes: Iterable[tuple[str, int]]) -> Lists:
    """By each place where paths count, how much stands at each number there.

    >>> lists_along([("layers.0.up", 6), ("layers.0.down", 6), ("layers.1.up", 4)])
    {'layers.#': {'0': 12, '1': 4}}
    """
    found: dict[str, dict[str, int]] = {}
    below: dict[str, int] = {}
    for path, size in sizes:
        below[path] = below.get(path, 0) + size
    while below:  # what stands in a module is added up before it is added to what stands around it
        outer: dict[str, int] = {}
        for path, size in below.items():
            around, dot, part = path.rpartition(".")
            last = _number_in(part)
            if last is not None:
                members = found.setdefault(around + dot + last[0], {})
                members[last[1]] = members.get(last[1], 0) + size
            if dot:
                outer[around] = outer.get(around, 0) + size
        below = outer
    return found


def unlike_lists(a: Lists, b: Lists, *, within: bool = False) -> frozenset[str]:
    """The places where two sides count otherwise, or (``within``) where neither's numbers are among the other's."""
    return frozenset(
        place
        for place in a.keys() | b.keys()
        for ours, theirs in [(a.get(place, {}).keys(), b.get(place, {}).keys())]
        if not (ours == theirs or (within and (ours <= theirs or theirs <= ours)))
    )


def lists_of_one_size(ours: Lists, theirs: Lists, step: int) -> Iterator[tuple[str, str]]:
    """Places of two lists whose members have the same sizes, those of the second read backwards if ``step`` is -1.

    Lists that are the same backwards are left out.
    """
    rows: list[dict[tuple[int, ...], list[str]]] = [{}, {}]
    for row, lists in zip(rows, (ours, theirs)):
        for place, members in lists.items():
            sizes = tuple(members[n] for n in sorted(members, key=int)) if len({*members.values()}) > 1 else ()
            if sizes != sizes[::-1]:
                row.setdefault(sizes, []).append(place)
    for sizes, places in rows[0].items():
        yield from product(places, rows[1].get(sizes[::step], ()))


def is_abbreviation(short: str, long: str) -> bool:
    """Whether one word can abbreviate the other: same first letter, the rest a subsequence.

    >>> is_abbreviation("attn", "attention"), is_abbreviation("q", "query"), is_abbreviation("v", "query")
    (True, True, False)
    """
    if len(short) > len(long) or not short or short[0] != long[0]:
        return False
    letters = iter(long)
    return all(letter in letters for letter in short)


@lru_cache(maxsize=200_000)
def token_similarity(a: str, b: str) -> float:
    """Similarity of two words: equal 1.0, abbreviation 0.85, contained or inflected 0.6, else by edit distance."""
    if a == b:
        return 1.0
    if a.isdigit() or b.isdigit():
        return 0.0
    short, long = sorted((a, b), key=lambda t: (len(t), t))
    if is_abbreviation(short, long):
        return ABBREVIATION
    if short in long and (len(short) >= 3 or len(long) <= 2):
        return 0.6
    stem = next((k for k, (x, y) in enumerate(zip(short, long)) if x != y), len(short))
    if stem >= 3 and stem >= 0.75 * len(short):
        return 0.6  # one word, inflected: gate, gating
    ratio = Levenshtein.normalized_similarity(a, b)
    return 0.7 * ratio if ratio >= 0.6 and len(short) >= 3 else 0.0


@dataclass
class Dictionary:
    """Which words of one model stand for which words of the other, learned from matched pairs.

    The strength of ``a -> b`` is the Dice coefficient ``2 n(a, b) / (n(a) + n(b))`` over the matched pairs: a word
    that occurs exactly where the other occurs has strength 1.
    """

    together: Counter[tuple[str, str]] = field(default_factory=Counter)
    source: Counter[str] = field(default_factory=Counter)
    target: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]]) -> Dictionary:
        """Learn from the names of matched tensors; each pair of families counts once, however many members it has."""
        dictionary = cls()
        for patterns in dict.fromkeys((split_numbers(s)[0], split_numbers(t)[0]) for s, t in pairs):
            left, right = (sorted({word for word in pattern if word != "#"}) for pattern in patterns)
            dictionary.source.update(left)
            dictionary.target.update(right)
            dictionary.together.update((a, b) for a in left for b in right)
        return dictionary

    def strength(self, a: str, b: str) -> float:
        """Strength of the translation, 0 to 1."""
        n = self.together.get((a, b), 0)
        return 2 * n / (self.source[a] + self.target[b]) if n else 0.0


def best_pairs_similarity(a: Sequence[str], b: Sequence[str], dictionary: Dictionary | None = None) -> float:
    """Soft Jaccard similarity of two word lists: greedy one-to-one pairing by word similarity.

    Returns:
        Similarity, 0 to 1; 0.5 (no evidence) if both lists are empty.

    >>> round(best_pairs_similarity(["q", "proj"], ["query"]), 3)
    0.395
    """
    if not a and not b:
        return 0.5
    scored = []
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            s = token_similarity(x, y)
            if dictionary is not None and s < 1.0:
                s = max(s, dictionary.strength(x, y))
            if s > 0:
                scored.append((-s, i, j))
    used_a: set[int] = set()
    used_b: set[int] = set()
    shared = 0.0
    for negative, i, j in sorted(scored):
        if i not in used_a and j not in used_b:
            used_a.add(i)
            used_b.add(j)
            shared -= negative
    return shared / (len(a) + len(b) - shared)
