"""A lexicon of roles: which names stand for the same place in public code.

``lexicon.json`` holds what the modules of timm, torchvision, transformers and open_clip call the parts of an attention,
of a feed-forward network, of two convolutions, told by their classes and use (``make harvest`` writes it). It only
vouches: two units that are the only ones of their size, called by names that have nothing in common, may be partners
if both names are known for one role. No pair is found by it.
"""

from __future__ import annotations

import json
from functools import cache, lru_cache
from importlib import resources

from lit_wsl.matching.words import path_tokens


@cache
def _roles() -> dict[tuple[str, ...], frozenset[str]]:
    """By the words of a name the roles that it is known for."""
    found: dict[tuple[str, ...], set[str]] = {}
    for role, names in table().items():
        for name in names:
            found.setdefault(path_tokens(name), set()).add(role)
    return {words: frozenset(roles) for words, roles in found.items()}


@cache
def table() -> dict[str, list[str]]:
    """Role -> names that were found for it."""
    known: dict[str, list[str]] = json.loads(resources.files(__package__).joinpath("lexicon.json").read_text())
    return known


@lru_cache(maxsize=100_000)
def roles_of(path: str) -> frozenset[str]:
    """What the end of a path is known for; the longest known end counts.

    >>> sorted(roles_of("layers.3.mlp.query_key_value"))
    ['attention/qkv']
    """
    words = path_tokens(path)
    return next((known for k in range(len(words)) if (known := _roles().get(words[k:]))), frozenset())


def same_role(a: str, b: str) -> bool:
    """Whether the names of two units are known for one role."""
    return bool(roles_of(a) & roles_of(b))


def forget() -> None:
    """Look at the table anew, for those who replace it."""
    for known in (_roles, roles_of):
        known.cache_clear()
