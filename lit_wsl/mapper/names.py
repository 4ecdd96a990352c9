"""What names tell: similarity of tokens, abbreviations, and a dictionary learned from the pair of models itself.

Nothing here knows any library's names. Abbreviations are recognised by their make (``attn`` is a subsequence of
``attention``, ``ln`` the initials of ``layer norm``), and everything else a pair of models renames consistently is
learned from the tensors whose partner is already certain (:class:`Dictionary`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from rapidfuzz.distance import Levenshtein

from lit_wsl.structure.info import tokenize

WEAK = 0.3


@lru_cache(maxsize=200_000)
def path_tokens(path: str) -> tuple[str, ...]:
    """Tokens of a dotted path, numbers included; cached."""
    return tokenize(path)


@lru_cache(maxsize=200_000)
def split_numbers(path: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Cut a path into its pattern (numbers replaced by ``#``) and its numbers.

    >>> split_numbers("layer1.0.conv2")
    (('layer', '#', '#', 'conv', '#'), (1, 0, 2))
    """
    tokens = path_tokens(path)
    numbers = tuple(int(t) for t in tokens if t.isdigit())
    return tuple("#" if t.isdigit() else t for t in tokens), numbers


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
    """Similarity of two words, 0 to 1: equal 1.0, abbreviation 0.85, contained 0.6, else from the edit distance."""
    if a == b:
        return 1.0
    if a.isdigit() or b.isdigit():
        return 0.0
    short, long = sorted((a, b), key=lambda t: (len(t), t))
    if is_abbreviation(short, long):
        return 0.85
    if short in long and (len(short) >= 3 or len(long) <= 2):
        return 0.6
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

    def learn(self, source_words: Iterable[str], target_words: Iterable[str], weight: int = 1) -> None:
        """Count one matched pair."""
        left, right = sorted(set(source_words)), sorted(set(target_words))
        for a in left:
            self.source[a] += weight
        for b in right:
            self.target[b] += weight
        for a in left:
            for b in right:
                self.together[a, b] += weight

    def strength(self, a: str, b: str) -> float:
        """Strength of the translation, 0 to 1."""
        n = self.together.get((a, b), 0)
        return 2 * n / (self.source[a] + self.target[b]) if n else 0.0

    def knows(self, a: str, b: str) -> bool:
        """Whether either word has been seen at all."""
        return a in self.source or b in self.target

    def copy(self) -> Dictionary:
        """An independent copy."""
        return Dictionary(Counter(self.together), Counter(self.source), Counter(self.target))


def best_pairs_similarity(
    a: Sequence[str],
    b: Sequence[str],
    dictionary: Dictionary | None = None,
    weak_a: Collection[str] = (),
    weak_b: Collection[str] = (),
    prior: float = 0.0,
) -> float:
    """Soft Jaccard similarity of two word lists: greedy one-to-one pairing by word similarity.

    Args:
        a: Words of the source.
        b: Words of the target.
        dictionary: Learned translations, used beside the words' own similarity.
        weak_a: Words of the source that say little; they weigh 0.3.
        weak_b: Words of the target that say little.
        prior: Weight of having seen nothing, which pulls the similarity towards 0.5.

    Returns:
        Similarity, 0 to 1; 0.5 (no evidence) if both lists are empty.
    """
    if not a and not b:
        return 0.5
    weights_a = [WEAK if w in weak_a else 1.0 for w in a]
    weights_b = [WEAK if w in weak_b else 1.0 for w in b]
    scored = []
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            s = token_similarity(x, y)
            if dictionary is not None and s < 1.0:
                s = max(s, dictionary.strength(x, y))
            if s > 0:
                scored.append((-s, i, j))
    scored.sort()
    used_a: set[int] = set()
    used_b: set[int] = set()
    shared = 0.0
    for negative, i, j in scored:
        if i not in used_a and j not in used_b:
            used_a.add(i)
            used_b.add(j)
            shared += -negative * (weights_a[i] + weights_b[j]) / 2
    union = sum(weights_a) + sum(weights_b) - shared
    return (shared + prior / 2) / (union + prior) if union + prior > 0 else 1.0
