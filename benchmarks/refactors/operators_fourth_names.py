"""Operators of the fourth part: where modules stand, their names, and the order of their registration."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from benchmarks.refactors.network import Path, Side, Step
from benchmarks.refactors.operators import LAST, UNORDERED, Apply, lists_of, operator, registered
from benchmarks.refactors.operators_names import _mixed, _numbered, _reworded, _shuffled
from benchmarks.refactors.operators_places import _nested, _word
from benchmarks.refactors.operators_third_names import NORMS, _put, _translated, numbered

# Places -------------------------------------------------------------------------------------------------------------


def _around(words: list[tuple[str, ...]]) -> Apply:
    def apply(side: Side, rng: random.Random) -> bool:
        above = tuple(Step(f"={word}") for word in rng.choice(words))
        side.leaves = [leaf.moved((*above, *leaf.path)) for leaf in side.leaves]
        return True

    return apply


operator("fourth", "places", weight=2, name="lightning_module_around")(
    _around(
        [("learner",), ("lightning_module", "net"), ("system", "backbone_net"), ("task", "architecture"), ("_net",)]
    )
)


@operator("fourth", "places", weight=1.5)
def parts_wrapped(side: Side, rng: random.Random) -> bool:
    """Each part at the top was compiled or wrapped alone: ``encoder._orig_mod.layers``, ``encoder.module.layers``."""
    word = Step(rng.choice(["=_orig_mod", "=module", "=_fsdp_wrapped_module", "=wrapped"]))
    before = list(side.leaves)
    side.leaves = [
        leaf.moved((leaf.path[0], word, *leaf.path[1:])) if len(leaf.path) > 1 and leaf.path[0].index is None else leaf
        for leaf in side.leaves
    ]
    return side.leaves != before


@operator("fourth", "places", weight=1.5)
def cut_in_two(side: Side, rng: random.Random) -> bool:
    """What stands at the top belongs to one of two modules now: the first ones here, the last ones there."""
    roles = list(dict.fromkeys(leaf.path[0].role for leaf in side.leaves))
    if len(roles) < 3:
        return False
    at = rng.randrange(1, len(roles))
    words = rng.choice(
        [("backbone", "head_net"), ("representation", "task"), ("body_net", "top"), ("first_half", "second_half")]
    )
    side.leaves = [
        leaf.moved((Step(f"={words[roles.index(leaf.path[0].role) >= at]}"), *leaf.path)) for leaf in side.leaves
    ]
    return True


@operator("fourth", "places", weight=1.0)
def tables_in_a_module(side: Side, rng: random.Random) -> bool:
    """All tables and bare parameters at the top form a module: ``embeddings.tokens``."""
    word = Step(rng.choice(["=embeddings", "=embedder", "=input_layer", "=prep", "=embed"]))
    before = list(side.leaves)
    side.leaves = [
        leaf.moved((word, *leaf.path))
        if leaf.kind in ("embedding", "table") and len(leaf.path) == 1 and leaf.path[0].index is None
        else leaf
        for leaf in side.leaves
    ]
    return side.leaves != before


@operator("fourth", "places", weight=1.0)
def last_layer_joins(side: Side, rng: random.Random) -> bool:
    """The last layer moves into the container that stands before it."""
    *rest, last = side.leaves
    before = next((leaf for leaf in reversed(rest) if len(leaf.path) > 1 and leaf.path[0].index is None), None)
    if before is None or len(last.path) > 1 or numbered(last):
        return False
    side.leaves = [*rest, last.moved((before.path[0], *last.path))]
    return True


@operator("fourth", "places", weight=1.0)
def level_says_itself_twice(side: Side, rng: random.Random) -> bool:
    """``encoder.encoder.layers``: a wrapper that is called after what it wraps."""
    roles = sorted({leaf.path[0].role for leaf in side.leaves if len(leaf.path) > 1 and leaf.path[0].index is None})
    if not roles:
        return False
    role = rng.choice(roles)
    word = _word(side, Step(role)).partition(".")[0]
    side.leaves = [
        leaf.moved((Step(f"={word}"), *leaf.path)) if leaf.path[0].role == role and len(leaf.path) > 1 else leaf
        for leaf in side.leaves
    ]
    return bool(word)


@operator("fourth", "places", weight=1.5)
def convolutions_with_their_norms(side: Side, rng: random.Random) -> bool:
    """A convolution and the norm behind it are one module: ``conv1.conv``, ``conv1.bn``."""
    first, second = rng.choice([("conv", "bn"), ("conv", "norm"), ("0", "1"), ("layer", "normalizer"), ("c", "n")])
    leaves = list(side.leaves)
    done = False
    for at, (one, two) in enumerate(pairwise(leaves)):
        beside = one.parent == two.parent and one.path[-1].index is None and two.path[-1].index is None
        if one.kind in ("conv1d", "conv2d", "conv3d", "depthwise") and two.kind.endswith("norm") and beside:
            side.leaves[at] = one.moved((*one.path, Step(f"={first}")))
            side.leaves[at + 1] = two.moved((*one.path, Step(f"={second}")))
            done = True
    return done


operator("fourth", "places", name="maps_in_modules")(_nested(["proj", "lin", "dense", "conv_layer"]))  # type: ignore[arg-type]


@operator("fourth", "places", weight=1.5)
def keyed_members(side: Side, rng: random.Random) -> bool:
    """A list becomes a dict of modules with spelled keys: ``layers.block_0``."""
    roles = sorted({role for _, role in lists_of(side)})
    if not roles:
        return False
    role, key = rng.choice(roles), rng.choice(["block_", "item", "n_", "part_", "l"])
    side.leaves = [leaf.moved(tuple(s for step in leaf.path for s in _keyed(step, role, key))) for leaf in side.leaves]
    return True


def _keyed(step: Step, role: str, key: str) -> tuple[Step, ...]:
    return (Step(role), Step(f"={key}{step.index}")) if step.role == role and step.index is not None else (step,)


@operator("fourth", "places", LAST, weight=1.0)
def levels_by_word(side: Side, rng: random.Random) -> bool:
    """The members of a short list have names instead of numbers: ``shallow``, ``middle``, ``deep``."""
    words = rng.choice([("shallow", "middle", "deep"), ("early", "mid", "late")])
    lists = sorted({role for (_, role), many in lists_of(side).items() if 1 < many <= 3})
    lists = [role for role in lists if all(many <= 3 for (_, other), many in lists_of(side).items() if other == role)]
    if not lists:
        return False
    role = rng.choice(lists)
    side.leaves = [
        leaf.moved(
            tuple(
                Step(f"={_word(side, step)}_{words[step.index]}".replace(".", "_"))
                if step.role == role and step.index is not None
                else step
                for step in leaf.path
            )
        )
        for leaf in side.leaves
    ]
    return True


def _levels_by_size(side: Side, rng: random.Random, down: bool) -> bool:
    word = rng.choice(["b", "res", "scale_", "r"])
    lists = sorted({role for _, role in lists_of(side)})
    if not lists:
        return False
    role = rng.choice(lists)
    many = max(length for (_, other), length in lists_of(side).items() if other == role)
    size = lambda index: 2 ** (2 + (many - 1 - index if down else index))  # noqa: E731
    side.leaves = [
        leaf.moved(
            tuple(
                Step(f"={_word(side, step)}.{word}{size(step.index)}")
                if step.role == role and step.index is not None
                else step
                for step in leaf.path
            )
        )
        for leaf in side.leaves
    ]
    return True


@operator("fourth", "places", LAST, weight=0.7)
def levels_by_size(side: Side, rng: random.Random) -> bool:
    """The members of a list are called after their resolution: ``b4``, ``b8``, ``b16``."""
    return _levels_by_size(side, rng, False)


@operator("fourth", "places", LAST, weight=0.5)
def count_down_by_size(side: Side, rng: random.Random) -> bool:
    """The same, the finest first: ``res64``, ``res32``, ``res16``."""
    return _levels_by_size(side, rng, True)


@operator("fourth", "places", LAST, weight=1.0)
def levels_exchanged(side: Side, rng: random.Random) -> bool:
    """A list of lists is turned inside out: ``stages.1.branches.0`` becomes ``branches.0.stages.1``."""
    before = list(side.leaves)
    side.leaves = [leaf.moved(_exchanged(leaf.path)) for leaf in side.leaves]
    return side.leaves != before


def _exchanged(path: Path) -> Path:
    for at, (outer, inner) in enumerate(pairwise(path)):
        if outer.index is not None and inner.index is not None:
            return (*path[:at], inner, outer, *path[at + 2 :])
    return path


@operator("fourth", "places", LAST, weight=1.0)
def norms_beside_blocks(side: Side, rng: random.Random) -> bool:
    """All norms of a list of blocks stand in one list beside it, two (or three) for each block, in their order."""
    lists = [key for key, many in lists_of(side).items() if many > 1]
    if not lists:
        return False
    above, role = rng.choice(lists)
    at, word = len(above), rng.choice(["layer_norms", "norms_list", "all_norms", "lns"])
    inside = lambda leaf: leaf.path[:at] == above and leaf.path[at].role == role and len(leaf.path) == at + 2  # noqa: E731
    norms = [leaf for leaf in side.leaves if leaf.kind in NORMS and leaf.path[-1].index is None and inside(leaf)]
    each = Counter(leaf.path[at].index for leaf in norms)
    if len(set(each.values())) != 1:
        return False
    moved = [leaf.moved((*above, Step(f"={word}", n))) for n, leaf in enumerate(norms)]
    rest = [leaf for leaf in side.leaves if leaf not in norms]
    last = max((n for n, leaf in enumerate(rest) if leaf.path[:at] == above), default=-1)
    side.leaves = [*rest[: last + 1], *moved, *rest[last + 1 :]]
    return True


@operator("fourth", "places", LAST, weight=0.7)
def no_levels(side: Side, rng: random.Random) -> bool:
    """Everything is an attribute of the model: ``encoder_layers_0_attn_q``."""
    joint = rng.choice(["_", "__"])
    side.leaves = [leaf.moved((Step("=" + name.replace(".", joint)),)) for leaf, name in zip(side.leaves, side.names())]
    return True


# Names --------------------------------------------------------------------------------------------------------------

OTHERWISE = {
    "norm": "ln", "ln": "layernorm", "proj": "linear", "linear": "dense", "fc": "lin", "attn": "mha", "mha": "attn",
    "attention": "att", "mlp": "ffn", "ffn": "mlp", "ff": "feedforward", "conv": "cnn", "embed": "embedding",
    "embedding": "emb", "emb": "embed", "layers": "modules_list", "blocks": "layers", "layer": "block", "head": "pred",
    "encoder": "enc", "decoder": "dec", "out": "output", "output": "out", "in": "inp", "input": "inp", "pos": "place",
    "token": "tok", "tokens": "toks", "query": "q", "key": "k", "value": "v", "q": "query", "k": "key", "v": "value",
    "up": "upsampling", "down": "downsampling", "bn": "batchnorm", "gate": "gating", "time": "step", "map": "proj",
    "rnn": "recurrent", "lstm": "rnn", "hidden": "inner", "state": "status", "node": "vertex", "edge": "link",
}  # fmt: skip
SHORT = {
    "attention": "attn", "projection": "proj", "embedding": "emb", "embeddings": "embs", "encoder": "enc",
    "layer": "lyr", "decoder": "dec", "convolution": "conv", "feature": "feat", "features": "feats", "position": "pos",
    "query": "qry", "value": "val", "output": "out", "input": "in", "linear": "lin", "temporal": "temp",
    "spatial": "spat", "representation": "repr", "residual": "res", "network": "net", "critic": "crit", "policy": "pi",
    "action": "act", "density": "dens", "direction": "dir", "relation": "rel", "sequence": "seq", "message": "msg",
    "update": "upd", "bidirectional": "bi", "transition": "trans", "context": "ctx", "memory": "mem",
    "target": "tgt", "source": "src",
}  # fmt: skip
GERMAN = {
    "encoder": "kodierer", "decoder": "dekodierer", "layers": "schichten", "layer": "schicht", "blocks": "bloecke",
    "attn": "aufmerksamkeit", "attention": "aufmerksamkeit", "norm": "normierung", "head": "kopf", "heads": "koepfe",
    "query": "frage", "key": "schluessel", "value": "wert", "output": "ausgabe", "out": "aus", "input": "eingabe",
    "in": "ein", "embedding": "einbettung", "embed": "einbettung", "conv": "faltung", "gate": "tor", "mean": "mittel",
    "weight": "gewicht", "bias": "versatz", "hidden": "verdeckt", "state": "zustand", "cell": "zelle", "node": "knoten",
    "edge": "kante", "position": "stelle", "memory": "speicher", "actor": "handelnder", "critic": "kritiker",
    "policy": "strategie", "reward": "lohn", "time": "zeit", "mask": "maske", "proj": "projektion", "first": "erste",
    "last": "letzte", "up": "auf", "down": "ab", "token": "zeichen", "tokens": "zeichen_alle", "stem": "stamm",
}  # fmt: skip


def _letters_upper(word: str) -> str:
    return ".".join(part.upper() if len(part) <= 2 else part for part in word.split("."))


operator("fourth", "names", weight=1.5, name="said_otherwise")(_reworded(_translated(OTHERWISE), 0.8))
operator("fourth", "names", weight=1.5, name="said_shorter")(_reworded(_translated(SHORT), 0.9))
operator("fourth", "names", LAST, weight=0.8, name="another_language")(_reworded(_translated(GERMAN)))
operator("fourth", "names", weight=0.7, name="letters_upper")(_reworded(_letters_upper))
operator("fourth", "names", weight=0.7, name="trailing_underscores")(_reworded(lambda word: f"{word}_", 0.7))
operator("fourth", "names", weight=0.7, name="say_module")(_reworded(lambda word: f"{word}_module", 0.5))
operator("fourth", "names", weight=0.7, name="own_prefix")(_reworded(lambda word: f"lit_{word}", 0.6))
operator("fourth", "names", weight=0.7, name="digits_spelled")(
    _reworded(
        lambda word: re.sub(
            r"(?<=[a-z])([0-4])(?=\.|$)", lambda m: "_" + ("zero", "one", "two", "three", "four")[int(m[0])], word
        )
    )
)


@operator("fourth", "names", weight=1.0)
def kinds_in_names(side: Side, rng: random.Random) -> bool:
    """Every name says what kind of layer it is: ``q_linear``, ``norm1_ln``."""
    kinds = {
        "linear": "linear",
        "norm": "ln",
        "batch_norm": "bn",
        "conv2d": "conv",
        "conv1d": "conv",
        "embedding": "emb",
    }
    kinds |= {"conv3d": "conv", "group_norm": "gn", "instance_norm": "inorm", "lstm": "lstm", "gru": "gru"}
    first = rng.random() < 0.4
    done = False
    for at, leaf in enumerate(side.leaves):
        word, kind = _word(side, leaf.path[-1]), kinds.get(leaf.kind, "")
        if kind and word and leaf.path[-1].index is None and not word.rpartition(".")[2].isdigit():
            above, _, last = word.rpartition(".")
            named = f"{kind}_{last}" if first else f"{last}_{kind}"
            side.leaves[at] = leaf.moved((*leaf.parent, Step(f"={above}.{named}" if above else f"={named}")))
            done = True
    return done


@operator("fourth", "names", LAST, weight=0.5)
def kinds_counted_in_blocks(side: Side, rng: random.Random) -> bool:
    """Inside each block the layers are called after their kind and counted: ``linear_1``, ``linear_2``, ``norm_1``."""
    kinds = {
        "linear": "linear",
        "norm": "norm",
        "batch_norm": "bn",
        "conv2d": "conv",
        "conv1d": "conv",
        "conv3d": "conv",
    }
    counts: Counter[tuple[Path, str]] = Counter()
    done = False
    for leaf in sorted(side.leaves, key=lambda leaf: leaf.when):
        place = leaf.path[-1]
        if leaf.kind in kinds and place.index is None and numbered(leaf) and not leaf.layout.startswith("bare"):
            key = (leaf.parent, kinds[leaf.kind])
            counts[key] += 1
            spot = side.leaves.index(leaf)
            side.leaves[spot] = leaf.moved((*leaf.parent, Step(f"={key[1]}_{counts[key]}")))
            done = True
    return done


@operator("fourth", "names", weight=1.0)
def head_in_a_sequence(side: Side, rng: random.Random) -> bool:
    """The last map stands behind a dropout or an activation: ``head.1``, ``classifier.3``."""
    last = side.leaves[-1]
    if last.kind not in ("linear", "conv2d", "conv1d", "conv3d") or numbered(last):
        return False
    side.leaves[-1] = last.moved((*last.path, Step(rng.choice(["=1", "=2", "=3", "=0"]))))
    return True


operator("fourth", "names", weight=0.8, name="padded_to_three")(
    _numbered(lambda n, rng: replace(n, digits=3, joint=rng.choice([".", "_"])), every=True)
)
operator("fourth", "names", weight=0.8, name="one_list_from_one")(
    _numbered(lambda n, rng: replace(n, first=1, joint=rng.choice(["", "_", "."])))
)
operator("fourth", "names", LAST, weight=0.7, name="count_by_three")(
    _numbered(lambda n, rng: replace(n, stride=3, first=rng.choice([0, 1])))
)
operator("fourth", "names", LAST, weight=0.5, name="count_down_everywhere")(
    _numbered(lambda n, rng: replace(n, down=True), every=True)
)
operator("fourth", "names", LAST, weight=0.7, name="lettered_members")(
    _numbered(lambda n, rng: replace(n, joint="", letters=True))
)


# Order --------------------------------------------------------------------------------------------------------------


@operator("fourth", "order", UNORDERED, weight=1.5)
def one_member_elsewhere(side: Side, rng: random.Random) -> bool:
    """One of the modules at the top, or one in every block, is registered at another place."""
    roles = sorted({step.role for leaf in side.leaves for step in leaf.path})
    role, place = rng.choice(roles), rng.randrange(4)

    def arrange(above: Path, steps: list[Step]) -> list[Step]:
        moved = [step for step in steps if step.role == role]
        rest = [step for step in steps if step.role != role]
        at = min(place, len(rest))
        return [*rest[:at], *moved, *rest[at:]] if len(rest) else steps

    return registered(side, arrange)


@operator("fourth", "order", UNORDERED, weight=1.5)
def norms_behind_their_parts(side: Side, rng: random.Random) -> bool:
    """Each norm in a block is registered after the module that it stands before, as in BART."""
    norms = {leaf.path for leaf in side.leaves if leaf.kind in NORMS}

    def arrange(above: Path, steps: list[Step]) -> list[Step]:
        out = list(steps)
        for step in steps:
            at = out.index(step)
            if (*above, step) in norms and above and at + 1 < len(out) and (*above, out[at + 1]) not in norms:
                out[at : at + 2] = [out[at + 1], step]
        return out

    return registered(side, arrange)


def _keys_first(above: Path, steps: list[Step]) -> list[Step]:
    order = ["k", "v", "q"]
    return sorted(steps, key=lambda step: order.index(step.role) if step.role in order else 3)


operator("fourth", "order", UNORDERED, weight=1.0, name="keys_registered_first")(
    lambda side, rng: registered(side, _keys_first)
)


def _by_weight(side: Side, rng: random.Random) -> bool:
    """The modules at the top in the order of how much they hold, lists kept together."""
    many = Counter(leaf.path[0].role for leaf in side.leaves)
    up = rng.random() < 0.5
    return registered(
        side,
        lambda above, steps: steps if above else sorted(steps, key=lambda s: many[s.role] if up else -many[s.role]),
    )


operator("fourth", "order", UNORDERED, weight=1.0, name="largest_parts_first_or_last")(_by_weight)
operator("fourth", "order", UNORDERED, weight=1.0, name="maps_before_convolutions")(
    lambda side, rng: _by_kind(side, ["linear", "embedding", "table"])
)


def _by_kind(side: Side, first: list[str]) -> bool:
    kinds: dict[Path, str] = {leaf.path: leaf.kind for leaf in side.leaves}
    return registered(
        side, lambda above, steps: sorted(steps, key=lambda step: kinds.get((*above, step), "") not in first)
    )


operator("fourth", "order", UNORDERED, weight=1.0, name="lists_registered_last")(
    _put(lambda above, step, steps: step.index is not None, False)
)
operator("fourth", "order", UNORDERED, weight=1.0, name="parts_in_some_order")(
    _shuffled(lambda above: len(above) == 1, _mixed)
)


def _ends(chosen: Callable[[list[Step]], Step]) -> Apply:
    """One end of the model is registered at the other."""
    return lambda side, rng: registered(
        side,
        lambda above, steps: (
            steps
            if above
            else sorted(steps, key=lambda step: (step.role == chosen(steps).role) == (chosen(steps) == steps[0]))
        ),
    )


operator("fourth", "order", UNORDERED, weight=1.0, name="entry_registered_last")(_ends(lambda steps: steps[0]))
operator("fourth", "order", UNORDERED, weight=1.0, name="exit_registered_first")(_ends(lambda steps: steps[-1]))
