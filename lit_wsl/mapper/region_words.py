"""What the words of a path are worth inside a region: rare ones tell where an item is, common ones hardly.

A word that all tensors of a region share says nothing about one of them; a word that only few have names it. And a word
of an item's own name that also stands elsewhere in the region may say only what the item stands next to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lit_wsl.mapper.families import Family
from lit_wsl.mapper.names import ABBREVIATION, Dictionary, path_tokens, token_similarity, weighted_similarity
from lit_wsl.mapper.pairing import Region
from lit_wsl.mapper.tree import Item, place_in, relative


class RegionWords:
    """Counts words below the roots of regions, each root once.

    Args:
        dictionary: Words of the source for words of the target.
    """

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self._known: dict[int, tuple[Item, Counter[str]]] = {}

    def support(self, s: Item, t: Item, region: Region) -> float:
        """How far names alone support a pair: similarity of their words, rare words of the region counting most."""
        paths = relative(s, region.source), relative(t, region.target)
        if paths[0] == paths[1]:
            return 1.0
        words = [[w for w in path_tokens(p) if not w.isdigit()] for p in paths]
        rare = [
            {w: 1.0 / max(1, self._counts(root)[w] / len(item.tensors)) for w in ws}
            for ws, root, item in zip(words, (region.source, region.target), (s, t))
        ]
        return weighted_similarity(rare[0], rare[1], self.dictionary)

    def weak(self, families: Sequence[Family], root: Item) -> set[str]:
        """Words of own names that also stand elsewhere in the region: ``attention_norm`` is near the attention.

        Words of the modules around an item are no such hints: they say where the item is.
        """
        if len(families) < 2:
            return set()
        everywhere = self._counts(root)
        here = _word_counts([t for f in families for m in f.members for t in m.tensors], root)
        outside = sorted(w for w, count in everywhere.items() if count > here[w])
        places = [place_in(m, root).rpartition(".") for f in families for m in f.members]
        own = {w for _, _, name in places for w in path_tokens(name)}
        around = {w for above, _, _ in places for w in path_tokens(above)}
        return {w for w in own - around if any(token_similarity(w, o) >= ABBREVIATION for o in outside)}

    def _counts(self, root: Item) -> Counter[str]:
        """How many tensors below a root have each word in their path."""
        if id(root) not in self._known:
            self._known[id(root)] = (root, _word_counts(root.tensors, root))
        return self._known[id(root)][1]


def _word_counts(tensors: Sequence[Item], root: Item) -> Counter[str]:
    return Counter(w for t in tensors for w in set(path_tokens(relative(t, root))) if not w.isdigit())
