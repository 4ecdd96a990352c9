"""How alike two names are: words one to one, the strongest first, and which of them say nothing.

Equal words, abbreviations and inflections agree. Words that any last layer is called by, and words that only name a
neighbour (``pre_attention_norm``), are weighed apart.

``contrasts.json``, written by ``make harvest``, holds words that name modules beside each other in public models.
The lexicon of roles (``lexicon.json``, written by ``make harvest``) holds what the modules of timm, torchvision,
transformers and open_clip call the parts of an attention, of a feed-forward network, of two convolutions. It only
vouches for two units that are the only ones of their size, called by names that have nothing in common.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from lit_wsl.matching.formula import spelled
from lit_wsl.matching.tree import Item, owner_path
from lit_wsl.matching.words import is_abbreviation, path_tokens, plain_words


@cache
def _roles() -> dict[tuple[str, ...], frozenset[str]]:
    """By the words of a name the roles that it is known for."""
    found: dict[tuple[str, ...], set[str]] = {}
    for role, names in table().items():
        for name in names:
            found.setdefault(tuple(name.split()), set()).add(role)
    return {words: frozenset(roles) for words, roles in found.items()}


@cache
def table() -> dict[str, list[str]]:
    """Role -> names that were found for it, their words apart."""
    known: dict[str, list[str]] = _read("lexicon.json")
    return known


def _read(name: str) -> Any:
    return json.loads(Path(__file__).with_name(name).read_text())


@lru_cache(maxsize=100_000)
def roles_of(path: str) -> frozenset[str]:
    """What the end of a path is known for; the longest known end counts.

    >>> sorted(roles_of("layers.3.mlp.query_key_value"))
    ['attention/qkv']
    """
    words = path_tokens(path)
    k, known = next(((k, known) for k in range(len(words)) if (known := _roles().get(words[k:]))), (0, frozenset()))
    return frozenset() if k and words[k - 1] in SIDES else known  # a pre_attention_norm is no attention_norm


def same_role(a: str, b: str) -> bool:
    """Whether the names of two units are known for one role, and none of the two for another beside it."""
    ours, theirs = roles_of(a), roles_of(b)
    return bool(ours & theirs) and not any(
        r != o and r.partition("/")[0] == o.partition("/")[0] for r in ours - theirs for o in theirs
    )


def paired_by_roles(ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of paths that are known for the parts of one thing, each for another: its two norms, its gate and its up.

    Empty unless all of them are known, and for the same parts on both sides; one alone may be the part of anything.
    """
    if len(ours) < 2:
        return []
    for thing in sorted({role.partition("/")[0] for path in ours for role in roles_of(path)}):
        rows = [_parts_of(thing, side) for side in (ours, theirs)]
        if sorted(rows[0]) == sorted(rows[1]) and len(set(rows[0]) - {""}) == len(rows[0]):
            return [(i, rows[1].index(role)) for i, role in enumerate(rows[0])]
    return []


def count_by_roles(paths: Sequence[str]) -> list[int]:
    """Which place each path has among the parts of a thing that are counted, such as two norms; empty if not known."""
    for thing in sorted({role.partition("/")[0] for path in paths for role in roles_of(path)}):
        numbers = [role[-1:] for role in _parts_of(thing, paths)]
        if all(map(str.isdigit, numbers)) and len(set(numbers)) == len(numbers):
            return [sorted(numbers).index(n) for n in numbers]
    return []


def _parts_of(thing: str, paths: Sequence[str]) -> list[str]:
    """The only part of a thing that each path is known for, or an empty word."""
    found = [{r for r in roles_of(path) if r.partition("/")[0] == thing} for path in paths]
    return [min(roles) if len(roles) == 1 else "" for roles in found]


@cache
def _contrasts() -> dict[frozenset[str], str]:
    return {frozenset((a, b)): "".join(whole) for a, b, *whole in _read("contrasts.json")}


def contrast(ours: Collection[str], theirs: Collection[str], alone: Collection[str] = ()) -> bool:
    """Whether what two names don't share names things that stand beside each other elsewhere: ``self``, ``cross``.

    A word that is ``alone`` all of its name may name the whole that the other is a part of: ``fpn``, ``lateral_convs``.
    """
    known = _contrasts()
    return any((pair := frozenset((a, b))) in known and known[pair] not in alone for a in ours for b in theirs)


def of_one_role(ours: tuple[str, ...], theirs: tuple[str, ...]) -> bool:
    """Whether two names, as they stand, are known for one role."""
    return bool(_roles().get(ours, frozenset()) & _roles().get(theirs, frozenset()))


def forget() -> None:
    """Look at the table anew, for those who replace it."""
    for known in (_roles, roles_of):
        known.cache_clear()


WORDS, HALF_WORDS = "words", "half words"
LETTERS, NEAR_WORDS = "letters", "neighbour's words"
INITIALS = f"{LETTERS}, initials"
SHORT_WORDS = "short words"
MEANING = "meaning"  # words that mean the same
LAYER_ONLY = "layers"  # both names say a kind of layer and no more
ALL_OR_NONE = {LAYER_ONLY: WORDS, MEANING: SHORT_WORDS}  # what tells nothing beside a rival that nothing tells
WEAK = (SHORT_WORDS, HALF_WORDS, "open ")  # what order may overrule
FORMULA = ("q", "k", "v")  # the letters of Attention(Q, K, V); any other letter may stand for anything
ENDS = frozenset((  # what the last layer is called in any model, so that it says nothing about what it is for
    "head", "heads", "fc", "classifier", "classify", "linear", "last", "final", "logits", "output", "out", "proj",
    "projection", "dense", "layer", "lm", "predictions", "prediction", "pred", "logit", "readout", "decoder", "cls",
    "model", "net", "module", "backbone", "to", "lin", "score",
))  # fmt: skip
KINDS = frozenset(("bn", "ln", "gn", "conv", "convolution", "embed", "embedding", "embeddings", "table", "weight"))
WHOLES = frozenset(("backbone", "model", "net", "module"))  # what a model is called, or most of it
CONTAINERS = WHOLES | {"decoder"}
LAYERS = frozenset((
    "bn", "ln", "gn", "conv", "convolution", "weight", "fc", "linear", "lin", "proj", "projection", "dense", "layer",
    "to", "module", "net", "model",
))  # fmt: skip
LISTS = frozenset(("block", "blocks", "layers", "unit", "units", "stage", "stages", "modules"))
BLOCKS = LAYERS | LISTS | {  # and modules that all have the same structure, so that they do not say which of them
    "attn", "attention", "att", "mha", "mlp", "ffn", "ff", "feed", "forward",
}  # fmt: skip
LAYER_NAMES = (ENDS | KINDS | LAYERS) - {"decoder"}  # say a kind of layer, or a place that any model has
INFLECTION = 5  # letters at the end of a word that only change its form: combine, combination
LITTLE = 0.1  # what a word for any layer says, beside words that say which
GENERAL = (ENDS | KINDS | {"and"}) - {"decoder"}  # words that name a kind of layer, or a place that any model has
ATTENTIONS = frozenset(("attention", "attn", "att", "sa", "mha", "msa", "selfattention", "mixer"))
FEEDS = frozenset(("ffn", "ff", "mlp", "feed", "feedforward"))
CROSS = frozenset(("cross", "ca", "crossattention", "crossattn", "xattn", "encoder", "encdec", "memory", "context"))
TASKS = frozenset(("cls", "classifier", "classify", "lm"))  # what some last layers are for
NOTHING = (ENDS - TASKS) | KINDS | LAYERS | LISTS  # words that say nothing of what a module is for
FRONT = frozenset(("emb", "embed", "embedding", "embeddings", "patch", "stem", "input", "first"))
BACK = frozenset(("head", "final", "last", "out", "output", "logits", "classifier"))
CALLED = (  # what one thing is called: tables of words and of positions, the two halves of a block
    frozenset(("word", "words", "token", "tokens", "tok", "wte", "vocab", "emb", "table")),
    frozenset(("pos", "position", "positions", "positional", "place", "places", "wpe", "emb", "table")),
    frozenset(("segment", "segments", "seg", "token", "type", "emb", "table")),
    FRONT | {"word", "words", "token", "tokens", "tok", "wte", "vocab"},
    ATTENTIONS | {"self"},
    FEEDS | {"forward"},
)
SYNONYMS = tuple(map(frozenset, (  # words that name one thing in different code, and hardly two things in one model
    ("actor", "policy", "pi"), ("critic", "vf", "baseline"),
    ("begin", "start", "onset"), ("end", "finish", "stop"),
    ("mean", "mu", "loc"), ("var", "variance"), ("std", "sigma", "stddev"), ("logvar", "lnvar"), ("logstd", "logsigma"),
    ("image", "img", "visual", "vision", "picture"), ("text", "textual", "txt", "language"),
    ("audio", "sound", "acoustic"), ("document", "passage"), ("query", "question"), ("user", "customer"),
    ("up", "expand", "widen"), ("down", "contract", "reduce", "shrink"),
    ("fuse", "merge", "combine"), ("time", "temporal"), ("space", "spatial"), ("box", "bbox", "boxes"),
    ("shared", "common"), ("backward", "reverse"),
)))  # fmt: skip
SPREADS = frozenset(("var", "variance", "std", "sigma", "scale"))
PREFIXES = frozenset((  # turn a word into another
    "un", "non", "not", "no", "in", "im", "dis", "de", "anti", "con", "a", "fe", "sub", "super", "hyper", "inter",
    "intra",
))  # fmt: skip
SIDES = frozenset(("pre", "post", "before", "after"))  # says that the other words name a neighbour


@lru_cache(maxsize=200_000)
def strength(a: str, b: str) -> tuple[float, int]:
    """How strongly two words stand for each other, and how: 3 equal, 2 cut or inflected, 1 a letter, 0 by meaning."""
    if a == b:
        return 1.0, 3
    if a.isdigit() or b.isdigit():
        return 0.0, 0
    if any(a in words and b in words for words in SYNONYMS):
        return 0.8, 0
    a, b = (w[1:] if len(w) == 2 and w[0] == "w" else w for w in (a, b))  # wq: the weight of the queries
    if a == b:
        return 0.9, 1 + (a.isdigit() or a in FORMULA)
    short, long = sorted((a, b), key=lambda w: (len(w), w))
    if len(short) == 2 and not long.startswith("inp"):
        return 0.0, 0  # two letters begin many words, or are the initials of two: ca, cs, ln
    if is_abbreviation(short, long) and (long.startswith(short) or not set(short[1:]) & set("aeiou")):
        return (0.8, 2) if len(short) > 1 else (0.7, 1) if short in FORMULA else (0.0, 0)
    if short in SPREADS and long == f"log{short}":  # maps to logarithms are called after the values, too
        return 0.6, 2
    if len(short) >= 4 and long.endswith(short):  # an end is no part of attend
        return (0.0, 0) if long.removesuffix(short) in PREFIXES else (0.6, 2)
    stem = next((k for k, (x, y) in enumerate(zip(short, long)) if x != y), len(short))
    if stem >= 3 and stem >= 0.75 * len(short) and len(long) - stem <= INFLECTION:
        return 0.6, 2
    return 0.0, 0


@dataclass(frozen=True)
class Likeness:
    """How two lists of words agree: weight shared, the best kind of a shared word, and what is left over."""

    shared: float
    best: int
    left_s: tuple[str, ...]
    left_t: tuple[str, ...]
    only_near: bool = False
    only_layers: bool = False
    only_sides: bool = False
    meant: bool = False  # whether some words only mean the same

    @property
    def kind(self) -> str:
        """The cell of a pair that leads by it; none if each says something that the other does not."""
        left = {*self.left_s, *self.left_t}
        if (self.only_near and left) or left & SIDES or (self.only_sides and not all(map(_is_general, left))):
            return NEAR_WORDS
        if self.only_layers and left:
            return ""
        if self.best == 1:
            return LETTERS
        if self.meant:
            return "" if all(any(not _is_general(w) for w in ws) for ws in (self.left_s, self.left_t)) else MEANING
        if self.left_s and self.left_t:
            if not all(map(_is_general, left)):
                return ""
            left = set()  # word_table, word_embeddings
        return HALF_WORDS if left else WORDS if self.best == 3 else SHORT_WORDS


def liken(
    a: Sequence[str],
    b: Sequence[str],
    near_a: frozenset[str] = frozenset(),
    near_b: frozenset[str] = frozenset(),
    general: frozenset[str] = LAYERS,
) -> Likeness:
    """Pair the words of two lists one to one, the strongest first.

    A word and its abbreviation share as much as a word and itself, so that ``enrich`` is no more like
    ``enrich_context`` than like ``enrichment``; names of which nothing is left over share a little more.
    """
    return _liken(tuple(a), tuple(b), near_a, near_b, general)


@lru_cache(maxsize=20_000)  # blocks of a list have the same names
def _liken(
    a: tuple[str, ...], b: tuple[str, ...], near_a: frozenset[str], near_b: frozenset[str], general: frozenset[str]
) -> Likeness:
    scored = sorted(
        (-value * (LITTLE if _names_layer(x, y, general) else 1.0), -kind, i, j)
        for i, x in enumerate(a)
        for j, y in enumerate(b)
        for value, kind in [strength(x, y)]
        if value
    )
    used_a: set[int] = set()
    used_b: set[int] = set()
    shared, best, near, layers, exact, sides, meant = 0.0, 0, True, True, True, True, False
    for value, kind, i, j in scored:
        if i not in used_a and j not in used_b:
            used_a.add(i)
            used_b.add(j)
            known = _names_layer(a[i], b[j], general)
            shared += LITTLE if known else -value if kind == -1 else 1.0
            best = max(best, -kind)
            meant = meant or kind == 0
            exact = exact and kind == -3
            near = near and (a[i] in near_a or b[j] in near_b)
            layers = layers and known
            sides = sides and (known or a[i] in SIDES)  # pre_norm is no pre_feedforward_norm
    left_a, left_b = (
        tuple(w for i, w in enumerate(a) if i not in used_a),
        tuple(w for j, w in enumerate(b) if j not in used_b),
    )
    if used_a and not (left_a or left_b):
        shared += LITTLE * (1 + exact) * (LITTLE if layers else 1.0)
    some = bool(used_a)
    return Likeness(shared, best, left_a, left_b, some and near, some and layers, some and sides and not layers, meant)


def _names_layer(a: str, b: str, general: frozenset[str]) -> bool:
    """Whether what two words have in common names a kind of layer: ``attention`` and ``selfattention``."""
    return any(w in general or w == "backbone" for w in (a, b)) or ("norm" in a and "norm" in b)


Shared = list[list[float]]  # how alike each of one side is to each of the other


def leads(shared: Shared) -> list[tuple[int, int]]:
    """Pairs that lead over every rival of their row and of their column."""
    found = []
    for i, row in enumerate(shared):
        least = max(row) - 1e-9
        if least > 0 and sum(x >= least for x in row) == 1:
            j = row.index(max(row))
            if sum(other[j] >= least for other in shared) == 1:
                found.append((i, j))
    return found


def paired_by_initials(ours: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
    """Pairs of names of which one side's are the initials of the other's, each of one; letters may also count.

    >>> paired_by_initials([("l", "out"), ("r", "out")], [("right",), ("left",)])
    [(0, 1), (1, 0)]
    >>> paired_by_initials([("a",), ("b",)], [("before",), ("after",)])
    []
    """
    sides = [[[w for w in words if w not in GENERAL] for words in side] for side in (ours, theirs)]
    if len(ours) != len(theirs) or len(ours) < 2 or any(len(words) != 1 for side in sides for words in side):
        return []
    names = [[words[0] for words in side] for side in sides]
    letters = [sorted(name[0] for name in side) for side in names]
    short = [{len(name) == 1 for name in side} for side in names]
    if (
        letters[0] != letters[1]
        or len(set(letters[0])) < len(ours)
        or short not in ([{True}, {False}], [{False}, {True}])
    ):
        return []
    if "".join(letters[0]) == "abcdefgh"[: len(ours)]:
        return []
    others = [name for side in names for name in side if len(name) > 1]
    if any(name[0] in FORMULA and spelled((name,)) != {name[0]} for name in others):
        return []  # the q of encoder_q stands for queries, not for a queue
    initials = [name[0] for name in names[1]]
    return [(i, initials.index(name[0])) for i, name in enumerate(names[0])]


def own_name(item: Item, parts: int = 1) -> tuple[str, ...]:
    """The words of the last parts of a path that have any, without numbers."""
    return _last_words(item.called, parts)


@lru_cache(maxsize=10_000)
def _last_words(path: str, parts: int) -> tuple[str, ...]:
    found: tuple[str, ...] = ()
    for part in reversed(path.split(".")):
        words = plain_words(part)
        found = (*words, *found)
        parts -= bool(words)
        if not parts:
            break
    return found


@lru_cache(maxsize=20_000)
def foreign(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Whether two names share no word. Names that say no more than a kind, of a norm or a last layer, agree."""
    names = [[w for w in words if len(w) > 1 or w in FORMULA] for words in (a, b)]  # a letter may stand for anything
    if all(_is_general(w) for words in names for w in words):
        return False
    telling = [[w for w in words if not _is_general(w) or w in CONTAINERS] for words in names]
    names = telling if all(telling) else names
    return all(names) and liken(names[0], names[1]).shared == 0.0


def related(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Whether two names share a word that says more than a kind of layer."""
    ours, theirs = ([w for w in words if not _is_general(w)] for words in (a, b))
    return liken(ours, theirs).shared > 0.0


def _is_general(word: str) -> bool:
    """Whether a word names a kind of layer, a list of these, or what the last layer of any model is called."""
    return word in ENDS or word in KINDS or word in LISTS or "norm" in word


def called_otherwise(s: Item, t: Item) -> bool:
    """Whether both have names of their own that don't agree: where the others kept theirs, it is another thing."""
    own = [plain_words(i.called.rpartition(".")[2]) for i in (s, t)]
    likeness = liken(own[0], own[1])
    left = likeness.left_s, likeness.left_t
    return all(any(len(w) > 2 for w in ws) for ws in left) or (likeness.shared > 0 and all(left))  # branch_a, branch_c


def own_words(item: Item) -> frozenset[str]:
    """The words of the last two parts of a path."""
    parts = owner_path(item.main.path).split(".")[-2:]
    return frozenset(w for part in parts for w in plain_words(part))
