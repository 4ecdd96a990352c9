"""Which of the queries, keys, values and output of an attention a unit is, as far as names say it.

Queries, keys and values are called by a letter or by a word. The output (Vaswani et al., Attention Is All You Need,
2017) may be called anything, but it is called in their manner: ``wo`` beside ``wq``, ``out_lin`` beside ``q_lin``, or
simply ``proj`` where nothing else stands beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from lit_wsl.matching.tree import Item, relative, stem_of
from lit_wsl.matching.words import path_tokens, plain_words

LETTERS = {"q": ("q", "query", "queries", "wq"), "k": ("k", "key", "keys", "wk"), "v": ("v", "value", "values", "wv")}
OUTPUTS = (("o", "wo"), ("out",), ("proj", "output", "dense", "projection"))  # the more telling ones first
PERHAPS = "?"  # one of several that may be the output
_WORDS = {word: letter for letter, words in LETTERS.items() for word in words}
Letters = Mapping[str, frozenset[str]]


@lru_cache(maxsize=10_000)
def spelled(words: tuple[str, ...]) -> frozenset[str]:
    """The letters that the words of a name stand for, whatever stands beside it.

    >>> sorted(spelled(("qkv",))), sorted(spelled(("key", "value"))), sorted(spelled(("gate",)))
    (['k', 'q', 'v'], ['k', 'v'], [])
    """
    return frozenset(letter for w in words for letter in _letters_in(w))


def is_query_or_key(path: str) -> bool:
    """Whether the last part of a path is called after queries or keys, and not by letters that spell a whole.

    >>> is_query_or_key("attn.to_q"), is_query_or_key("attn.query_key_value"), is_query_or_key("attn.qkv")
    (True, True, False)
    """
    return any(_WORDS.get(word) in ("q", "k") for word in plain_words(path.rpartition(".")[2]))


def _letters_in(word: str) -> str:
    if word in _WORDS:
        return _WORDS[word]
    return word if len(word) > 1 and "k" in word and set(word) <= set("qkv") else ""


def letters_below(root: Item) -> Letters:
    """By the path of each unit's largest tensor what the unit is in an attention; others are left out.

    A value is one only where queries or keys stand beside it; beside a gate it is something else.
    """
    root = root.like if root.like and root.level == 2 else root  # modules of one structure have the same names inside
    if root.letters is None:  # a module stands in the regions of all modules around it
        found: dict[str, frozenset[str]] = {}
        for child in (c for c in root.children if c.level == 2):
            place = relative(child, root)
            found |= {f"{place}.{name}": letters for name, letters in letters_below(child).items()}
        units = [Named.below(root, child) for child in root.children if child.level < 2]
        named = [(u, letters) for u in units if (letters := u.letters)]
        wholes = frozenset[str]().union(*(letters for _, letters in named if len(letters) > 1))
        named = [(u, letters) for u, letters in named if len(letters) > 1 or not letters <= wholes]  # v1 beside kv
        named = [own for own in named if not _is_of_another_manner(*own, named)]  # v1 beside value
        if len({x for _, letters in named for x in letters}) > 1:
            found |= {u.name: letters for u, letters in named}
            outputs = _outputs([u for u in units if u.unit.rank >= 2 and not u.letters], [u for u, _ in named])
            called = [(letters, u.manner) for u, letters in named]
            twice = len(set(called)) < len(called)  # values of an attention, value of a gate
            found |= {u.name: frozenset("o" if len(outputs) == 1 and not twice else PERHAPS) for u in outputs}
        root.letters = found
    return root.letters


@dataclass(frozen=True)
class Named:
    """A unit with the path of its largest tensor, and the words by which its module calls it."""

    name: str
    words: tuple[str, ...]
    unit: Item

    @classmethod
    def below(cls, module: Item, unit: Item) -> Named:
        """A unit of a module; what it is wrapped in is its name, as in ``query.base_layer``."""
        path = relative(unit.main, module)
        return cls(path, plain_words(stem_of(path.partition(".")[0])), unit)

    @property
    def letters(self) -> frozenset[str]:
        """The letters that it stands for; what goes in is all three where it is three times as high as wide."""
        shape = self.unit.main.shape
        whole = self.words == ("in", "proj") and len(shape) == 2 and shape[0] == 3 * shape[1]
        return frozenset("qkv") if whole else spelled(self.words)

    @property
    def manner(self) -> tuple[str, ...]:
        """The words and numbers that say no letter."""
        return tuple(w for w in path_tokens(self.name.partition(".")[0]) if not _letters_in(w))


def _is_of_another_manner(unit: Named, letters: frozenset[str], named: Sequence[tuple[Named, frozenset[str]]]) -> bool:
    """Whether another unit stands for the same letter, and only that is called in the manner of the other letters."""
    manners = {u.manner for u, others in named if others.isdisjoint(letters)}
    return unit.manner not in manners and any(u.manner in manners for u, others in named if others == letters)


def _outputs(units: Sequence[Named], named: Sequence[Named]) -> list[Named]:
    """The unit that is called in the manner of queries, keys and values, but is none of them; all that may be it."""
    manners = {tuple(w for w in u.words if not _letters_in(w)) for u in named}
    short = any(u.words in (("wq",), ("wk",), ("wv",)) for u in named)
    rows = [[u for u in units if any(w in outputs for w in u.words)] for outputs in OUTPUTS]
    fits = [[u for u in row if not manners.isdisjoint(_without(u.words, own))] for row, own in zip(rows, OUTPUTS)]
    alike = [[u for u in row if (u.words == ("wo",)) == short] for row in fits]
    every: list[Named] = []
    for k, (told, fitting) in enumerate(zip(rows, fits)):
        others = [u for row in alike[k + 1 :] for u in row if u not in told]  # proj beside query is no less than wo
        for found in (alike[k], fitting, told if k < len(OUTPUTS) - 1 else []):
            if len(found) == 1:
                return found if found == alike[k] or not others else [*found, *others]
        every += [u for u in told if u not in every]
        if fitting:
            break
    return every if len(every) > 1 else []


def _without(words: tuple[str, ...], some: Sequence[str]) -> set[tuple[str, ...]]:
    """A name without all of some words, or without one of them."""
    one = {(*words[:k], *words[k + 1 :]) for k, word in enumerate(words) if word in some}
    return {tuple(w for w in words if w not in some), *one}


def in_both(a: Letters, b: Letters) -> frozenset[str]:
    """The letters that as many units stand for on both sides, so that each must find its like."""
    counts = [Counter(letter for letters in side.values() for letter in letters) for side in (a, b)]
    return frozenset(x for x, count in counts[0].items() if count == counts[1][x] and x != PERHAPS)
