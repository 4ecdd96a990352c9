"""What names tell: similarity of tokens, abbreviations, and a dictionary learned from the pair of models itself.

Nothing here knows any library's names. Abbreviations are recognised by their make (``attn`` is a subsequence of
``attention``, ``ln`` the initials of ``layer norm``), and everything else a pair of models renames consistently is
learned from the tensors whose partner is already certain (:class:`Dictionary`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from rapidfuzz.distance import Levenshtein

from lit_wsl.structure.description import tokenize

WEAK = 0.05  # weight of a word that says next to nothing
ABBREVIATION = 0.85


# English words that say a place in a sequence, as the number they mean.
_ORDINALS = {
    **dict.fromkeys(("first", "one"), "1"),
    **dict.fromkeys(("second", "two"), "2"),
    **dict.fromkeys(("third", "three"), "3"),
    **dict.fromkeys(("fourth", "four"), "4"),
}


@lru_cache(maxsize=200_000)
def path_tokens(path: str) -> tuple[str, ...]:
    """Tokens of a dotted path, numbers included, ordinals as numbers; cached.

    >>> path_tokens("blocks.0.norm_before")
    ('blocks', '0', 'norm', 'before')
    """
    return tuple(_ORDINALS.get(token, token) for token in tokenize(path))


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


def best_pairs_similarity(a: Sequence[str], b: Sequence[str], dictionary: Dictionary | None = None) -> float:
    """Soft Jaccard similarity of two word lists: greedy one-to-one pairing by word similarity.

    Returns:
        Similarity, 0 to 1; 0.5 (no evidence) if both lists are empty.

    >>> round(best_pairs_similarity(["q", "proj"], ["query"]), 3)
    0.395
    """
    if not a and not b:
        return 0.5
    shared, unshared = _paired(a, b, dictionary)
    return shared / (shared + unshared)


def shared_evidence(
    a: Sequence[str],
    b: Sequence[str],
    dictionary: Dictionary | None = None,
    weak_a: Collection[str] = (),
    weak_b: Collection[str] = (),
) -> float:
    """How strongly two lists of telling words speak for each other, 0 (nothing in common) to 1.

    ``shared / (shared + 0.5 + 0.15 * unshared)``: words without a counterpart count little, since the other side may
    simply not name what this side names.

    Args:
        a: Words of the source.
        b: Words of the target.
        dictionary: Learned translations, used beside the words' own similarity.
        weak_a: Words of the source that say next to nothing.
        weak_b: Words of the target that say next to nothing.
    """
    shared, unshared = _paired(a, b, dictionary, weak_a, weak_b)
    return shared / (shared + 0.5 + 0.15 * unshared)


def _paired(
    a: Sequence[str],
    b: Sequence[str],
    dictionary: Dictionary | None = None,
    weak_a: Collection[str] = (),
    weak_b: Collection[str] = (),
) -> tuple[float, float]:
    """Weight of the words that find a counterpart, and of those that don't, both sides together."""
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
    return shared, sum(weights_a) + sum(weights_b) - 2 * shared


def weighted_similarity(a: Mapping[str, float], b: Mapping[str, float], dictionary: Dictionary | None = None) -> float:
    """Soft Jaccard similarity of two sets of weighted words.

    >>> weighted_similarity({"word": 1.0, "weight": 0.0}, {"word": 1.0, "table": 0.5})
    0.666667
    """
    scored = []
    for x in sorted(a):
        for y in sorted(b):
            s = token_similarity(x, y)
            if dictionary is not None:
                s = max(s, dictionary.strength(x, y))
            if s > 0:
                scored.append((-s * (a[x] + b[y]), x, y, s))
    shared, used_a, used_b = 0.0, set(), set()
    for _, x, y, s in sorted(scored):
        if x not in used_a and y not in used_b:
            used_a.add(x)
            used_b.add(y)
            shared += s * (a[x] + b[y]) / 2
    union = sum(a.values()) + sum(b.values()) - shared
    return round(shared / union, 6) if union > 0 else 0.0
