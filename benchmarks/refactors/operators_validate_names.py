"""Operators of the part that validates: where modules stand, their names, and the order of their registration."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from benchmarks.refactors.network import Leaf, Path, Side, Step
from benchmarks.refactors.operators import LAST, UNORDERED, Apply, lists_of, operator, registered
from benchmarks.refactors.operators_fourth_names import _around
from benchmarks.refactors.operators_names import _mixed, _numbered, _reworded, _shuffled
from benchmarks.refactors.operators_places import _nested, _word
from benchmarks.refactors.operators_third_names import NORMS, _put, _translated

# Places -------------------------------------------------------------------------------------------------------------

operator("validate", "places", weight=2, name="experiment_around")(
    _around([("agent", "networks"), ("pl_module",), ("experiment", "arch"), ("solver",), ("trained", "estimator")])
)


@operator("validate", "places", weight=1.5)
def tail_in_a_module(side: Side, rng: random.Random) -> bool:
    """The last two of the modules at the top form one: what follows the trunk."""
    roles = list(dict.fromkeys(leaf.path[0].role for leaf in side.leaves))
    word = Step(rng.choice(["=tail", "=predictor_net", "=top_part", "=finish"]))
    if len(roles) < 4:
        return False
    side.leaves = [leaf.moved((word, *leaf.path)) if leaf.path[0].role in roles[-2:] else leaf for leaf in side.leaves]
    return True


@operator("validate", "places", weight=1.5)
def named_submodels(side: Side, rng: random.Random) -> bool:
    """Maps and convolutions at the top stand in one module, everything else in another."""
    words = rng.choice([("projections", "modules_dict"), ("io_layers", "inner"), ("adapters_io", "network_body")])
    single = {leaf.path[0].role for leaf in side.leaves if len(leaf.path) == 1 and leaf.path[0].index is None}
    others = {leaf.path[0].role for leaf in side.leaves} - single
    if len(single) < 2 or not others:
        return False
    side.leaves = [leaf.moved((Step(f"={words[leaf.path[0].role in others]}"), *leaf.path)) for leaf in side.leaves]
    return True


@operator("validate", "places", weight=1.5)
def container_in_the_list_name(side: Side, rng: random.Random) -> bool:
    """``encoder.layers.0`` becomes ``encoder_layers.0``."""
    done = False
    for at, leaf in enumerate(side.leaves):
        for depth, (above, below) in enumerate(pairwise(leaf.path)):
            if above.index is None and below.index is not None and _word(side, above) and _word(side, below):
                glued = f"={_word(side, above)}_{_word(side, below)}".replace(".", "_")
                side.leaves[at] = leaf.moved((*leaf.path[:depth], Step(glued, below.index), *leaf.path[depth + 2 :]))
                done = True
                break
    return done


@operator("validate", "places", weight=1.0)
def feed_forward_of_diffusers(side: Side, rng: random.Random) -> bool:
    """The two maps of a feed-forward stand in a list with what lies between: ``net.0.proj``, ``net.2``."""
    names = {"fc1": "net.0.proj", "ff1": "net.0.proj", "rise": "net.0.proj", "fc2": "net.2", "ff2": "net.2"}
    names["fall"] = "net.2"
    before = list(side.leaves)
    inside = [leaf for leaf in side.leaves if leaf.role in names and len(leaf.path) > 1]
    flat = {leaf.parent for leaf in inside if leaf.parent[-1].index is not None}
    side.leaves = [
        leaf.moved((*leaf.parent, *((Step("=ff"),) if leaf.parent in flat else ()), Step(f"={names[leaf.role]}")))
        if leaf in inside
        else leaf
        for leaf in side.leaves
    ]
    return side.leaves != before


@operator("validate", "places", LAST, weight=1.0)
def norms_in_sublayers(side: Side, rng: random.Random) -> bool:
    """The norms of each block stand in connections of their own, counted: ``sublayer_connections.0.norm``."""
    word, inner = rng.choice([("sublayer_connections", "norm"), ("residual_steps", "ln"), ("wraps", "layer_norm")])
    counts: Counter[Path] = Counter()
    done = False
    for leaf in sorted(side.leaves, key=lambda leaf: leaf.when):
        inside = len(leaf.path) > 1 and leaf.parent[-1].index is not None and leaf.path[-1].index is None
        if leaf.kind in ("norm", "group_norm") and inside:
            number = counts[leaf.parent]
            counts[leaf.parent] += 1
            spot = side.leaves.index(leaf)
            side.leaves[spot] = leaf.moved((*leaf.parent, Step(f"={word}.{number}"), Step(f"={inner}")))
            done = True
    return done


@operator("validate", "places", LAST, weight=1.0)
def groups_of_three(side: Side, rng: random.Random) -> bool:
    """A long list becomes a list of short ones: ``layers.4`` becomes ``groups.1.1``."""
    lists = [key for key, many in lists_of(side).items() if many > 3]
    if not lists:
        return False
    above, role = rng.choice(lists)
    at, word = len(above), rng.choice(["=groups_of_layers", "=chunks", "=super_blocks"])
    side.leaves = [
        leaf.moved((*above, Step(f"{word}.{leaf.path[at].index // 3}.{leaf.path[at].index % 3}"), *leaf.path[at + 1 :]))  # type: ignore[operator]
        if len(leaf.path) > at and leaf.path[:at] == above and leaf.path[at].role == role
        else leaf
        for leaf in side.leaves
    ]
    return True


@operator("validate", "places", LAST, weight=1.0)
def number_in_the_parts_name(side: Side, rng: random.Random) -> bool:
    """No level for the members of a list: ``blocks.0.attn`` becomes ``block0_attn``."""
    lists = sorted({role for (above, role), _ in lists_of(side).items() if not above})
    if not lists:
        return False
    role = rng.choice(lists)
    style = rng.choice(["{}{}_{}", "{}_{}_{}", "{}{}{}"])
    done = False
    for at, leaf in enumerate(side.leaves):
        if leaf.path[0].role == role and len(leaf.path) > 1 and leaf.path[1].index is None:
            words = _word(side, leaf.path[0]).replace(".", "_"), _word(side, leaf.path[1])
            if words[1] and not words[1][0].isdigit():
                named = style.format(words[0], leaf.path[0].index, words[1])
                side.leaves[at] = leaf.moved((Step(f"={named}"), *leaf.path[2:]))
                done = True
    return done


@operator("validate", "places", LAST, weight=0.8)
def vectors_in_a_list(side: Side, rng: random.Random) -> bool:
    """Bare parameters at the top stand in one list of parameters, in their order: ``params.0``."""
    word = rng.choice(["params", "free_parameters", "theta_list"])
    bare = [leaf for leaf in side.leaves if leaf.kind == "table" and len(leaf.path) == 1 and leaf.path[0].index is None]
    if len(bare) < 2 or any(leaf.layout not in ("", "kind:buffer") for leaf in bare):
        return False
    side.leaves = [leaf.moved((Step(f"={word}.{bare.index(leaf)}"),)) if leaf in bare else leaf for leaf in side.leaves]
    return True


operator("validate", "places", weight=1.0, name="leaves_in_adapters")(
    _nested(["weight_layer", "core_op", "wrapped_fn"])  # type: ignore[arg-type]
)


@operator("validate", "places", weight=1.0)
def outer_list_by_level(side: Side, rng: random.Random) -> bool:
    """The members of one list at the top are attributes that say their number in words of levels: ``level2``."""
    word = rng.choice(["level", "scale", "tier_", "depth_"])
    lists = sorted({role for (above, role), _ in lists_of(side).items() if not above})
    if not lists:
        return False
    role = rng.choice(lists)
    name = _word(side, Step(role)).replace(".", "_")
    side.leaves = [
        leaf.moved((Step(f"={name}_{word}{leaf.path[0].index + 1}"), *leaf.path[1:]))
        if leaf.path[0].role == role and leaf.path[0].index is not None
        else leaf
        for leaf in side.leaves
    ]
    return True


@operator("validate", "places", LAST, weight=0.8)
def pre_norm_wrappers(side: Side, rng: random.Random) -> bool:
    """A block is a list of residual parts, each with the norm before it: ``layers.0.1.norm``, ``layers.0.1.fn.fc1``."""
    inner = rng.choice(["fn", "block", "sub"])
    blocks: dict[Path, list[Leaf]] = {}
    for leaf in sorted(side.leaves, key=lambda leaf: leaf.when):
        for depth, step in enumerate(leaf.path[:-1]):
            if step.index is not None:
                blocks.setdefault(leaf.path[: depth + 1], []).append(leaf)
                break
    moved: dict[Path, Path] = {}
    for above, leaves in blocks.items():
        at = len(above)
        kinds = [leaf.kind in NORMS and len(leaf.path) == at + 1 for leaf in leaves]
        if not kinds[0] or kinds[-1] or any(one and other for one, other in pairwise(kinds)):
            continue
        part = -1
        for leaf, norm in zip(leaves, kinds):
            part += norm
            place = (*above, Step(f"={part}"))
            moved[leaf.path] = (*place, Step("=norm")) if norm else (*place, Step(f"={inner}"), *leaf.path[at:])
    side.leaves = [leaf.moved(moved.get(leaf.path, leaf.path)) for leaf in side.leaves]
    return bool(moved)


# Names --------------------------------------------------------------------------------------------------------------

PLAINER = {
    "norm": "normalizer", "ln": "normalizer", "proj": "transform", "linear": "affine", "fc": "affine", "lin": "affine",
    "attn": "attend", "att": "attend", "attention": "attending", "mlp": "perceptron", "ffn": "perceptron",
    "ff": "perceptron", "conv": "convolve", "convs": "convolutions", "embed": "vectors", "embedding": "vectors",
    "emb": "vectors", "layers": "levels", "layer": "level", "head": "readout", "heads": "readouts", "encoder": "reader",
    "decoder": "writer", "enc": "reader", "dec": "writer", "out": "exit", "output": "exit", "in": "entry",
    "input": "entry", "pos": "spot", "token": "piece", "tokens": "pieces", "query": "ask", "key": "index",
    "value": "content", "up": "rise", "down": "sink", "bn": "batchstat", "gate": "valve", "time": "moment",
    "rnn": "memory", "lstm": "memory", "gru": "memory", "hidden": "middle", "state": "memory", "node": "point",
    "edge": "line", "actor": "player", "critic": "judge", "policy": "plan", "mask": "cover", "scale": "factor",
}  # fmt: skip
CLIPPED = {
    "embedding": "embd", "attention": "atn", "projection": "prj", "encoder": "encdr", "decoder": "decdr",
    "normalization": "nrmlz", "norm": "nrm", "layer": "l", "layers": "ls", "linear": "ln_", "output": "o_",
    "predictor": "pred", "hidden": "hid", "conv": "cv", "memory": "mem", "feature": "ft", "features": "fts",
    "query": "qr", "value": "vl", "weight": "wt", "level": "lv", "token": "tk", "position": "ps", "input": "i_",
    "block": "bk", "blocks": "bks", "image": "im", "text": "tx", "user": "usr", "item": "itm", "scale": "sc",
    "class": "cl", "gate": "gt", "expert": "xp", "experts": "xps", "prompt": "pr", "classifier": "clf",
    "network": "nw",
}  # fmt: skip
SPANISH = {
    "encoder": "codificador", "decoder": "decodificador", "layers": "capas", "layer": "capa", "blocks": "bloques",
    "attn": "atencion", "attention": "atencion", "norm": "norma", "head": "cabeza", "heads": "cabezas",
    "query": "consulta", "key": "clave", "value": "valor", "output": "salida", "out": "fuera", "input": "entrada",
    "in": "dentro", "embedding": "incrustacion", "embed": "incrustar", "conv": "convolucion", "gate": "puerta",
    "mean": "media", "weight": "peso", "hidden": "oculta", "state": "estado", "cell": "celda", "node": "nodo",
    "edge": "arista", "position": "posicion", "memory": "memoria", "policy": "politica", "time": "tiempo",
    "mask": "mascara", "first": "primera", "last": "ultima", "up": "subida", "down": "bajada", "token": "ficha",
    "image": "imagen", "text": "texto", "user": "usuario", "item": "articulo", "scale": "escala", "table": "tabla",
}  # fmt: skip
ROMAN = ("0", "i", "ii", "iii", "iv", "v", "vi", "vii")
GREEK = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "omega")


def _romans(word: str) -> str:
    return ".".join(
        re.sub(r"(?<=[A-Za-z])_?([1-7])$", lambda m: f"_{ROMAN[int(m[1])]}", part) for part in word.split(".")
    )


def _four_letters(word: str) -> str:
    return ".".join(
        "_".join(re.sub(r"^([A-Za-z]{4})[A-Za-z]+", r"\1", w) for w in part.split("_")) for part in word.split(".")
    )


operator("validate", "names", weight=1.5, name="plainer_words")(_reworded(_translated(PLAINER), 0.8))
operator("validate", "names", weight=1.2, name="clipped_words")(_reworded(_translated(CLIPPED), 0.9))
operator("validate", "names", LAST, weight=0.8, name="spanish_words")(_reworded(_translated(SPANISH)))
operator("validate", "names", weight=0.8, name="four_letters")(_reworded(_four_letters, 0.8))
operator("validate", "names", weight=0.6, name="all_letters_upper")(_reworded(str.upper))
operator("validate", "names", weight=0.7, name="member_prefix")(_reworded(lambda word: f"m_{word}", 0.8))
operator("validate", "names", weight=0.7, name="say_net")(_reworded(lambda word: f"{word}_net", 0.5))
operator("validate", "names", weight=0.7, name="two_underscores")(_reworded(lambda word: word.replace("_", "__"), 0.9))
operator("validate", "names", weight=0.7, name="roman_numbers")(_reworded(_romans))


@operator("validate", "names", weight=1.0)
def parts_say_the_model(side: Side, rng: random.Random) -> bool:
    """What stands at the top says which model it belongs to: ``unet_down``, ``bert_encoder``."""
    model = rng.choice(["mixnet", "base", "v3", "tiny", "lm", "core"])
    known = {leaf.path[0].role for leaf in side.leaves if not leaf.path[0].role.startswith("=")}
    for role in known:
        word = side.words.get(role, role)
        if word:
            side.words[role] = f"{model}_{word}"
    return bool(known)


@operator("validate", "names", weight=0.8)
def sizes_in_names(side: Side, rng: random.Random) -> bool:
    """Maps say how many outputs they have, convolutions the size of their kernels: ``fc_16``, ``conv_3x3``."""
    done = False
    for at, leaf in enumerate(side.leaves):
        word = _word(side, leaf.path[-1])
        if leaf.kind in ("linear", "conv2d") and len(leaf.sizes) == 1 and word and leaf.path[-1].index is None:
            size = leaf.sizes[0][0] if leaf.kind == "linear" else f"{leaf.sizes[0][2]}x{leaf.sizes[0][2]}"
            if not word.rpartition(".")[2].isdigit():
                side.leaves[at] = leaf.moved((*leaf.parent, Step(f"={word}_{size}")))
                done = True
    return done


@operator("validate", "names", LAST, weight=0.6)
def greek_roles(side: Side, rng: random.Random) -> bool:
    """Some roles are called by letters of another alphabet, which say nothing."""
    roles = sorted(role for role in side.used() if side.words.get(role) and not role.startswith("="))
    chosen = rng.sample(roles, min(rng.randint(2, 4), len(roles)))
    letters = rng.sample(GREEK, len(chosen))
    side.words |= {role: f"{letter}_fn" for role, letter in zip(chosen, letters)}
    return bool(chosen)


@operator("validate", "names", LAST, weight=0.5)
def nodes_of_a_graph(side: Side, rng: random.Random) -> bool:
    """As converters name layers: after the operation, counted over the whole model in the order of the run."""
    kinds = {"linear": "Gemm", "conv2d": "Conv", "conv1d": "Conv", "norm": "LayerNormalization"}
    kinds |= {"batch_norm": "BatchNormalization", "embedding": "Gather", "lstm": "LSTM", "gru": "GRU"}
    if any(leaf.kind == "table" or leaf.layout.startswith(("bare", "by_head", "stacked")) for leaf in side.leaves):
        return False
    counts = 0
    moved: dict[Path, Path] = {}
    for leaf in sorted(side.leaves, key=lambda leaf: leaf.when):
        counts += rng.choice([1, 1, 2, 3])
        moved[leaf.path] = (Step(f"={kinds.get(leaf.kind, 'Op')}_{counts}"),)
    side.leaves = [leaf.moved(moved[leaf.path]) for leaf in side.leaves]
    return True


@operator("validate", "names", LAST, weight=0.7)
def parts_of_a_sequence(side: Side, rng: random.Random) -> bool:
    """Inside every member of a list the modules are counted, and what holds no weights takes places too: 0, 1, 3."""
    members: dict[Path, list[Step]] = {}
    for leaf in sorted(side.leaves, key=lambda leaf: leaf.when):
        own = len(leaf.path) > 1 and leaf.path[0].index is not None
        if own and leaf.path[1] not in members.setdefault(leaf.path[:1], []):
            members[leaf.path[:1]].append(leaf.path[1])
    bare = {
        leaf.path[:1] for leaf in side.leaves if leaf.kind == "table" or leaf.layout.startswith(("bare", "by_head"))
    }
    chosen = {
        above: steps
        for above, steps in members.items()
        if above not in bare and len(steps) > 1 and all(step.index is None for step in steps)
    }
    gap = rng.choice([0, 0, 1])
    side.leaves = [
        leaf.moved((leaf.path[0], Step(f"={(1 + gap) * steps.index(leaf.path[1])}"), *leaf.path[2:]))
        if (steps := chosen.get(leaf.path[:1])) and len(leaf.path) > 1
        else leaf
        for leaf in side.leaves
    ]
    return bool(chosen)


operator("validate", "names", weight=0.8, name="padded_from_one")(
    _numbered(lambda n, rng: replace(n, first=1, digits=2, joint=rng.choice([".", "_", "_n"])), every=True)
)
operator("validate", "names", weight=0.8, name="numbers_behind_two_underscores")(
    _numbered(lambda n, rng: replace(n, joint=rng.choice(["__", "_no"])))
)
operator("validate", "names", LAST, weight=0.7, name="count_by_four")(
    _numbered(lambda n, rng: replace(n, stride=4, first=rng.choice([0, 1])))
)
operator("validate", "names", LAST, weight=0.7, name="count_from_a_hundred")(
    _numbered(lambda n, rng: replace(n, first=100), every=True)
)
operator("validate", "names", LAST, weight=0.5, name="count_down_one_list")(
    _numbered(lambda n, rng: replace(n, down=True, joint=rng.choice([".", "_"])))
)
operator("validate", "names", LAST, weight=0.6, name="members_by_letter")(
    _numbered(lambda n, rng: replace(n, joint=rng.choice(["_", ".sub_"]), letters=True))
)


# Order --------------------------------------------------------------------------------------------------------------

operator("validate", "order", name="norms_behind_everything")(lambda side, rng: _norms_last_in_members(side))


def _norms_last_in_members(side: Side) -> bool:
    """The norms of every member of a list are registered behind its other parts, whatever they are called."""
    norms = {leaf.path for leaf in side.leaves if leaf.kind in NORMS}
    return registered(
        side,
        lambda above, steps: (
            sorted(steps, key=lambda s: (*above, s) in norms) if above and above[-1].index is not None else steps
        ),
    )


@operator("validate", "order", UNORDERED, weight=1.5)
def inherited_parts_first(side: Side, rng: random.Random) -> bool:
    """Some modules at the top come from a base class, whose constructor ran first."""
    roles = sorted({leaf.path[0].role for leaf in side.leaves})
    first = set(rng.sample(roles, max(1, len(roles) // 2)))
    return registered(side, lambda above, steps: steps if above else sorted(steps, key=lambda s: s.role not in first))


@operator("validate", "order", UNORDERED, weight=1.5)
def lazily_built_last(side: Side, rng: random.Random) -> bool:
    """One part of every member of a list is built late, and registered last."""
    roles = sorted({leaf.path[1].role for leaf in side.leaves if len(leaf.path) > 1 and leaf.path[0].index is not None})
    if not roles:
        return False
    late = rng.choice(roles)
    return registered(
        side, lambda above, steps: sorted(steps, key=lambda s: s.role == late) if len(above) == 1 else steps
    )


def _by_letters(order: str) -> Apply:
    place: Callable[[Step], int] = lambda step: order.index(step.role) if step.role in tuple(order) else len(order)  # noqa: E731
    return lambda side, rng: registered(side, lambda above, steps: sorted(steps, key=place))


operator("validate", "order", UNORDERED, weight=1.0, name="values_registered_first")(_by_letters("vkq"))
operator("validate", "order", UNORDERED, weight=1.0, name="outputs_of_attention_first")(_by_letters("oqkv"))
operator("validate", "order", UNORDERED, weight=1.5, name="tables_registered_last")(
    lambda side, rng: _kinds_last(side, ("embedding", "table"))
)
operator("validate", "order", UNORDERED, weight=1.0, name="convolutions_registered_last")(
    lambda side, rng: _kinds_last(side, ("conv1d", "conv2d", "upconv1d", "upconv2d", "weight_norm"))
)


def _kinds_last(side: Side, kinds: tuple[str, ...]) -> bool:
    """Leaves of these kinds are registered behind their siblings."""
    those = {leaf.path for leaf in side.leaves if leaf.kind in kinds}
    return registered(side, lambda above, steps: sorted(steps, key=lambda step: (*above, step) in those))


operator("validate", "order", UNORDERED, weight=1.0, name="lists_registered_first")(
    _put(lambda above, step, steps: step.index is not None, True)
)
operator("validate", "order", UNORDERED, weight=1.5, name="inner_parts_in_some_order")(
    _shuffled(lambda above: len(above) > 1, _mixed)
)
operator("validate", "order", UNORDERED, weight=1.5, name="top_and_members_in_some_order")(
    _shuffled(lambda above: len(above) < 2, _mixed)
)


@operator("validate", "order", UNORDERED, weight=1.0)
def halves_exchanged(side: Side, rng: random.Random) -> bool:
    """In every module the second half of the parts is registered first; lists stay together."""

    def arrange(above: Path, steps: list[Step]) -> list[Step]:
        roles = list(dict.fromkeys(step.role for step in steps))
        late = roles[: len(roles) // 2]
        return sorted(steps, key=lambda step: step.role in late)

    return registered(side, arrange)


@operator("validate", "order", UNORDERED, weight=1.0)
def longer_names_first(side: Side, rng: random.Random) -> bool:
    """Members are registered by the length of their names, as nobody would but as a dict of names may come."""
    return registered(side, lambda above, steps: sorted(steps, key=lambda s: (-len(_word(side, s)), s.index or 0)))
