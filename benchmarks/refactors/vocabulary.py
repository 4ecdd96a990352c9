"""Words for roles. A word group is what one code base calls the parts of one thing: its q, k, v and o, its two norms.

``harvested.json`` holds what ``harvest.py`` found in public libraries, with counts; ``words.json`` what people write by
hand for roles that are too rare there. A group belongs to the ``first`` part of the corpus or to the ``second``; groups
that share the word of their first role go together, so that neither part has seen the other's words. The third part,
the fourth and the one that validates have two such files each of their own, from other packages.
"""

from __future__ import annotations

import json
import math
import random
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import lit_wsl.matching.likeness
from benchmarks.refactors.structures import Split
from lit_wsl.matching.numbers import place_by
from lit_wsl.matching.words import path_tokens

HERE = Path(__file__).parent
HARVESTED = HERE / "harvested.json"
HARVESTED_THIRD = HERE / "harvested_third.json"
HARVESTED_FOURTH = HERE / "harvested_fourth.json"
HARVESTED_VALIDATE = HERE / "harvested_validate.json"
LEXICON = Path(lit_wsl.matching.likeness.__file__).with_name("lexicon.json")
CONTRASTS = LEXICON.with_name("contrasts.json")
BY_HAND = HERE / "words.json"
BY_HAND_THIRD = HERE / "words_third.json"
BY_HAND_FOURTH = HERE / "words_fourth.json"
BY_HAND_VALIDATE = HERE / "words_validate.json"
ENOUGH = 8  # groups of words that a role has at least, before those that another part knows are left out

Words = dict[str, str]


def _read(by_hand: Path, harvested: Path) -> dict[str, dict[str, tuple[Words, float]]]:
    """Every group of words with its weight: how often code says it, dampened."""
    found: dict[str, dict[str, tuple[Words, float]]] = {}
    for name, entries in json.loads(by_hand.read_text()).items():
        for words in entries:
            found.setdefault(name, {})[json.dumps(words, sort_keys=True)] = (words, 1.0)
    if harvested.exists():
        for name, entries in json.loads(harvested.read_text())["groups"].items():
            for entry in entries:
                weight = 1 + math.log(sum(entry["counts"].values()))
                found.setdefault(name, {})[json.dumps(entry["words"], sort_keys=True)] = (entry["words"], weight)
    return found


@cache
def _groups() -> Mapping[str, list[tuple[Words, float]]]:
    """The groups of the parts to look at."""
    return {name: _agreed(list(entries.values())) for name, entries in _read(BY_HAND, HARVESTED).items()}


OWN: dict[Split, tuple[Path, Path]] = {  # parts with words of their own, in the order in which they came
    "third": (BY_HAND_THIRD, HARVESTED_THIRD),
    "fourth": (BY_HAND_FOURTH, HARVESTED_FOURTH),
    "validate": (BY_HAND_VALIDATE, HARVESTED_VALIDATE),
}


@cache
def _own_groups(split: Split) -> Mapping[str, list[tuple[Words, float]]]:
    """The groups of a part with words of its own, without those that are word for word in the parts before it."""
    parts = list(OWN)
    known = [_read(BY_HAND, HARVESTED), *(_read(*OWN[part]) for part in parts[: parts.index(split)])]
    chosen = {}
    for name, entries in _read(*OWN[split]).items():
        fresh = [entry for key, entry in entries.items() if not any(key in others.get(name, {}) for others in known)]
        chosen[name] = _agreed(fresh if len(fresh) >= ENOUGH else list(entries.values()))
    return chosen


def _agreed(entries: list[tuple[Words, float]]) -> list[tuple[Words, float]]:
    """Without groups in which a word stands for what other code mostly calls a sibling: their names would lie."""
    meant: dict[str, Counter[str]] = defaultdict(Counter)
    for words, weight in entries:
        for role, word in words.items():
            meant[word][role] += weight  # type: ignore[assignment]
    return [e for e in entries if all(meant[word][role] >= max(meant[word].values()) for role, word in e[0].items())]


@cache
def groups_of(name: str, split: Split) -> tuple[tuple[Words, float], ...]:
    """The word groups of one part of the corpus."""
    if split in OWN:
        return tuple(sorted(_own_groups(split)[name], key=lambda e: json.dumps(e[0], sort_keys=True)))
    entries = _groups()[name]
    firsts = sorted({_first(words) for words, _ in entries}, key=lambda word: zlib.crc32(f"{name}/{word}".encode()))
    mine = {word for at, word in enumerate(firsts) if (at % 2 == 0) == (split == "first")}
    chosen = sorted((e for e in entries if _first(e[0]) in mine), key=lambda e: json.dumps(e[0], sort_keys=True))
    return tuple(chosen or entries)


def _first(words: Words) -> str:
    return next(iter(words.values()))


UNITS = (  # groups that name linear maps, convolutions, norms and tables; the others name modules, or any last layer
    *("attention", "block", "convs", "cross", "gated", "gated_fused", "mlp", "neck", "patches", "stem", "tokens"),
)
MODULES = frozenset(("attn", "mlp", "self", "cross", "ff"))  # their parts have roles of their own


def other(split: Split) -> Split | None:
    """The part whose words judge a part; ``None``, which is all of them, for the part that has words of its own."""
    others: dict[Split, Split] = {"first": "second", "second": "first"}
    return others.get(split)


def lexicon(split: Split | None = None) -> dict[str, list[str]]:
    """What public libraries call each role, from one part of the corpus or from both; the words of a name apart."""
    found: dict[str, set[str]] = defaultdict(set)
    harvested = json.loads(HARVESTED.read_text())["groups"]
    for name in UNITS:
        theirs = [entry["words"] for entry in harvested[name]]
        entries = _groups()[name] if split is None else groups_of(name, split)
        for words in (words for words, _ in entries if words in theirs):
            for role, word in words.items():
                if word and role not in MODULES and not all(part.isdigit() for part in word.split(".")):
                    known = path_tokens(word)
                    # one model begins with its feed-forward, but pre_mlp_norm is elsewhere the second norm of a block
                    if role not in ("norm1", "norm2") or place_by({*known}) in (-1, int(role[-1]) - 1):
                        found[f"{name}/{role}"].add(" ".join(known))
    return {role: sorted(names) for role, names in sorted(found.items())}


def use_lexicon_of(split: Split | None) -> None:
    """Let the matching know the words of one part only, so that the other is judged with words that it never saw."""
    known = lexicon(split)
    lit_wsl.matching.likeness.table = lambda: known  # type: ignore[assignment]
    lit_wsl.matching.likeness.forget()


def draw_words(name: str, split: Split, rng: random.Random) -> Words:
    entries = groups_of(name, split)
    return dict(rng.choices([words for words, _ in entries], [weight for _, weight in entries])[0])
