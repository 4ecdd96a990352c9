"""Operators of the fourth part: what is there, and how it is stored."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace

from benchmarks.refactors.forms import drawn
from benchmarks.refactors.network import Leaf, Path, Side, Step
from benchmarks.refactors.operators import (
    LAST,
    Apply,
    _added,
    _copied,
    _copy,
    _exchanged_part,
    _foreign_head,
    _inserted,
    _pruned,
    _resized,
    operator,
)
from benchmarks.refactors.operators_layout import _fuse, _restore
from benchmarks.refactors.operators_places import _word
from benchmarks.refactors.operators_third import _biases, numbered

MAPS = ("linear", "conv1d", "conv2d", "conv3d")


def parts_of(side: Side) -> list[Step]:
    """The roles at the top, in the order of their registration."""
    found: dict[str, Step] = {}
    for leaf in side.leaves:
        found.setdefault(leaf.path[0].role, leaf.path[0])
    return list(found.values())


# Content: copies ----------------------------------------------------------------------------------------------------


@operator("fourth", "content", LAST, "source", 1.5)
def slow_copy_of_a_part(side: Side, rng: random.Random) -> bool:
    """A target network, an average or a key encoder beside the part that it follows, and named after it."""
    part = rng.choice(parts_of(side))
    if part.role.startswith("=") or part.index is not None:
        return False
    word = _word(side, part).replace(".", "_")
    name = rng.choice(["target_{}", "{}_target", "{}_ema", "{}_k", "momentum_{}", "{}_m"]).format(word)
    side.leaves += [
        _copy(leaf, f"{name} ", (Step(f"={name}"), *leaf.path[1:])) for leaf in side.leaves if leaf.path[0] == part
    ]
    return True


operator("fourth", "content", LAST, "source", 1.0, name="average_of_the_generator")(
    _copied([("", "model_ema"), ("net_g", "net_g_ema"), ("", "ema.ema_model"), ("unet", "ema_unet"), ("", "slow_net")])
)
operator("fourth", "content", LAST, "source", 1.0, name="teacher_in_the_module")(
    _copied(
        [("student", "teacher"), ("base_encoder", "momentum_encoder"), ("online_net", "slow_net"), ("learner", "tutor")]
    )
)


@operator("fourth", "content", LAST, "source", 0.7)
def snapshots(side: Side, rng: random.Random) -> bool:
    """Earlier states of the whole network in a list, as ensembles of snapshots keep them."""
    word = rng.choice(["snapshots", "history", "checkpoints", "past_models"])
    own = Step(rng.choice(["=model", "=current_model", "=live"]))
    copies = [_copy(leaf, f"{word} {n} ", (Step(f"={word}.{n}"), *leaf.path)) for n in range(2) for leaf in side.leaves]
    side.leaves = [leaf.moved((own, *leaf.path)) for leaf in side.leaves] + copies
    return True


@operator("fourth", "order", LAST, "source", 0.7)
def beside_each_weight(side: Side, rng: random.Random) -> bool:
    """What a regulariser or a hand-written optimiser keeps of each map in its file: importances, starts, means."""
    ending = rng.choice(["importance", "fisher", "init", "momentum"])
    for name, leaf in zip(side.names(), side.leaves):
        if leaf.kind == "linear" and leaf.plain:
            key = f"{name}.weight_{ending}"
            side.extra[key] = drawn(key, leaf.sizes[0])
    return bool(side.extra)


# Content: strangers -------------------------------------------------------------------------------------------------

operator("fourth", "content", LAST, "target", name="head_for_another_label")(
    _foreign_head(["sentiment", "age_regressor", "gender_head", "adversary", "uncertainty", "survival", "click_model"])
)
operator("fourth", "content", LAST, "target", name="part_of_another_paper")(
    _exchanged_part(["fft_mixer", "kan", "hyena_filter", "spline", "low_rank_core", "capsule"])
)
operator("fourth", "content", LAST, weight=0.7, name="residual_gains")(
    _added("table", ["ls.gamma", "res_scale", "skip_gain", "rezero"], ("o", "fc2", "down", "bn2"))
)
operator("fourth", "content", LAST, weight=0.7, name="norms_behind_maps")(
    _added("norm", ["subln", "ffn_layernorm", "post_ln", "stable_norm"], ("o", "fc2", "down"))
)


@operator("fourth", "content", LAST)
def norms_of_queries_and_keys(side: Side, rng: random.Random) -> bool:
    """One of two code bases norms queries and keys by head."""
    one, other = rng.choice([("q_norm", "k_norm"), ("query_norm", "key_norm"), ("norm_q", "norm_k"), ("ln_q", "ln_k")])
    out: list[Leaf] = []
    for leaf in side.leaves:
        out.append(leaf)
        if leaf.role in ("q", "k") and leaf.kind == "linear":
            name = one if leaf.role == "q" else other
            fresh = replace(leaf, kind="norm", layout="", sizes=((4,),), path=(*leaf.parent, Step(f"={name}")))
            out.append(replace(fresh, pieces=(f"new {name} {leaf.pieces[0]}",)))
    done = len(out) > len(side.leaves)
    side.leaves = out
    return done


@operator("fourth", "content", LAST)
def segment_table(side: Side, rng: random.Random) -> bool:
    """A small table beside that of the tokens: kinds of segments, of cameras, of languages."""
    for at, leaf in enumerate(side.leaves):
        if leaf.kind == "embedding":
            word = rng.choice(["lang_embed", "speaker_embed", "camera_table", "domain_emb", "dialect"])
            fresh = replace(leaf, path=(*leaf.parent, Step(f"={word}")), sizes=((3, leaf.sizes[0][1]),), layout="")
            side.leaves.insert(at + 1, replace(fresh, pieces=(f"new {word}",)))
            return True
    return False


@operator("fourth", "content", LAST)
def statistics_of_the_input(side: Side, rng: random.Random) -> bool:
    """A normaliser in front of everything that holds buffers: mean, variance, count."""
    name = rng.choice(["obs_rms", "normalizer", "scaler", "input_stats", "data_normalizer"])
    words = rng.choice([("mean", "var"), ("running_mean", "running_std"), ("center", "spread"), ("mu", "sigma")])
    width = side.leaves[0].sizes[0][-1]
    side.leaves[:0] = [
        Leaf((Step(f"={name}"), Step(f"={word}")), "table", (f"{name} {word}",), ((width,),), layout="kind:buffer")
        for word in words
    ]
    return True


@operator("fourth", "content", LAST, "source")
def schedule_of_noise(side: Side, rng: random.Random) -> bool:
    """What diffusion modules and schedulers register at the top of a module."""
    names = rng.sample(["betas", "alphas_cumprod", "sqrt_recip_alphas", "posterior_variance", "sigmas", "p2_weight"], 3)
    side.extra |= {name: drawn(name, (8,)) for name in names}
    return True


@operator("fourth", "content", LAST, "source")
def critic_of_the_loss(side: Side, rng: random.Random) -> bool:
    """A discriminator, or a network that the loss compares with, of layers of the model's own sizes."""
    maps = [leaf for leaf in side.leaves if leaf.kind in MAPS and leaf.plain]
    word = rng.choice(["discriminator", "loss_fn.vgg", "criterion.net", "perceptual_loss", "aux_net"])
    chosen = rng.sample(maps, min(3, len(maps)))
    side.leaves += [
        _copy(leaf, f"{word} {n} ", (Step(f"={word}"), Step(f"=layers.{2 * n}"))) for n, leaf in enumerate(chosen)
    ]
    return bool(chosen)


@operator("fourth", "content", LAST)
def probes_on_blocks(side: Side, rng: random.Random) -> bool:
    """A classifier behind every member of a list, in a list of its own, of the head's size."""
    lists = [leaf.path[0] for leaf in side.leaves if leaf.path[0].index is not None and len(leaf.path) > 1]
    head = side.leaves[-1]
    if not lists or head.kind != "linear" or numbered(head):
        return False
    word = rng.choice(["probes", "intermediate_classifiers", "aux_heads_list", "layer_outputs"])
    many = max(step.index or 0 for step in lists if step.role == lists[0].role) + 1
    side.leaves += [_copy(replace(head, layout=""), f"{word} {n} ", (Step(f"={word}", n),)) for n in range(many)]
    return True


@operator("fourth", "content", LAST, weight=0.7)
def backbone_alone(side: Side, rng: random.Random) -> bool:
    """The last layer is not there: a pretrained body, or a model that needs no head."""
    if numbered(side.leaves[-1]) or len(side.leaves) < 4:
        return False
    side.leaves = side.leaves[:-1]
    return True


@operator("fourth", "content", LAST, weight=0.7)
def norms_without_parameters(side: Side, rng: random.Random) -> bool:
    """Some norms have no scale and no shift (``elementwise_affine=False``), so nothing of them is stored."""
    roles = sorted({leaf.role for leaf in side.leaves if leaf.kind == "norm" and leaf.plain})
    if not roles:
        return False
    role = rng.choice(roles)
    side.leaves = [leaf for leaf in side.leaves if not (leaf.kind == "norm" and leaf.role == role)]
    return True


operator("fourth", "content", LAST, weight=1.0, name="prune_to_thirds")(
    _pruned(lambda n: sorted({0, n // 2, n - 1}) if n > 2 else [])
)
operator("fourth", "content", LAST, weight=1.0, name="prune_first_half")(_pruned(lambda n: list(range(n // 2, n))))
operator("fourth", "content", LAST, weight=1.0, name="insert_both_ends")(_inserted(lambda n: [0, n + 1]))
operator("fourth", "content", LAST, weight=1.0, name="insert_before_last")(_inserted(lambda n: [max(0, n - 1)]))


# Content: sizes -----------------------------------------------------------------------------------------------------


@operator("fourth", "content", LAST)
def one_more_class(side: Side, rng: random.Random) -> bool:
    """The last map has more rows; what it had can't be taken without changing it."""
    last = side.leaves[-1]
    return last.kind in MAPS and last.plain and _resized(lambda leaf: leaf == last, 0)(side, rng)


def _wider_inside(chosen: Callable[[Leaf], bool]) -> Apply:
    """Another number of columns; what is then left of a layer, its bias, goes, as it would fit and mean little."""

    def apply(side: Side, rng: random.Random) -> bool:
        before = list(side.leaves)
        side.leaves = [replace(leaf, bias=False) if chosen(leaf) else leaf for leaf in side.leaves]
        return _resized(chosen, 1)(side, rng) and side.leaves != before

    return apply


@operator("fourth", "content", LAST)
def more_channels_in(side: Side, rng: random.Random) -> bool:
    """Pictures with more bands: the first convolution reads more of them."""
    first = next((leaf for leaf in side.leaves if leaf.kind in MAPS and len(leaf.sizes[0]) == 3), None)
    return first is not None and first.plain and _wider_inside(lambda leaf: leaf.path == first.path)(side, rng)


@operator("fourth", "content", LAST, weight=0.7)
def wider_feed_forward(side: Side, rng: random.Random) -> bool:
    """Every feed-forward is wider inside: nothing of its maps fits any more."""
    seed = rng.random()
    wide = _resized(lambda leaf: leaf.role in ("fc1", "gate", "up") and leaf.plain, 0)(side, random.Random(seed))
    back = _wider_inside(lambda leaf: leaf.role in ("fc2", "down") and leaf.plain)(side, random.Random(seed))
    return wide or back


@operator("fourth", "content", LAST, weight=0.7)
def longer_tables(side: Side, rng: random.Random) -> bool:
    """More positions, more words: every table has more rows, and so has a last map that shares its parameter."""
    return _resized(lambda leaf: leaf.kind == "embedding" or leaf.layout == "tied", 0)(side, rng)


# Layout: fused and split --------------------------------------------------------------------------------------------


def _fused_as(roles: Iterable[str], names: Iterable[str]) -> Apply:
    chosen, options = tuple(roles), [f"={name}" for name in names]
    return lambda side, rng: _fuse(side, chosen, rng.choice(options))


operator("fourth", "layout", weight=1.5, name="fuse_queries_keys_values")(lambda side, rng: _fuse(side, "qkv", "qkv"))
operator("fourth", "layout", weight=1.0, name="fuse_keys_values")(lambda side, rng: _fuse(side, "kv", "kv"))
operator("fourth", "layout", weight=1.0, name="fuse_by_letters")(_fused_as("qkv", ["Wqkv", "qkv_dense", "q_k_v"]))
operator("fourth", "layout", weight=1.5, name="fuse_gated_units")(lambda s, rng: _fuse(s, ("gate", "up"), "gate_up"))
operator("fourth", "layout", LAST, weight=0.7, name="values_first")(
    lambda side, rng: _fuse(side, "qkv", rng.choice(["=vkq", "=v_k_q", "=value_key_query"]), (2, 1, 0))
)
PAIRS = [("carry", "transform"), ("from_map", "to_map"), ("centre", "log_width"), ("act_mean", "act_log_std")]
PAIRS += [("ask", "offer"), ("arc_head", "arc_dependent"), ("label_head", "label_dependent"), ("density", "features")]


@operator("fourth", "layout", weight=1.5)
def fuse_maps_of_one_input(side: Side, rng: random.Random) -> bool:
    """Two maps of the same input as one, that is called after both: ``mean_and_log_std``."""
    joint = rng.choice(["_and_", "_", "_then_"])
    done = False
    for pair in PAIRS:
        one, other = (side.words.get(role, role).replace(".", "_") for role in pair)
        done |= one != other and _fuse(side, pair, f"={one}{joint}{other}")
    return done


@operator("fourth", "layout", LAST, weight=1.5)
def attention_of_the_framework(side: Side, rng: random.Random) -> bool:
    """``nn.MultiheadAttention``: ``in_proj_weight``, ``in_proj_bias`` and ``out_proj``."""
    fused = _fuse(side, "qkv", "=in_proj")
    parents = {leaf.parent for leaf in side.leaves if leaf.role == "=in_proj"}
    side.leaves = [
        replace(leaf, layout="bare")
        if leaf.role == "=in_proj"
        else leaf.moved((*leaf.parent, Step("=out_proj")))
        if leaf.role == "o" and leaf.parent in parents
        else leaf
        for leaf in side.leaves
    ]
    return fused


@operator("fourth", "layout", weight=1.5)
def directions_apart(side: Side, rng: random.Random) -> bool:
    """A recurrent layer that reads both ways becomes two, one for each way."""
    ways = rng.choice([("forward_rnn", "backward_rnn"), ("fwd", "bwd"), ("left_to_right", "right_to_left")])
    out: list[Leaf] = []
    for leaf in side.leaves:
        if leaf.kind != "bilstm":
            out.append(leaf)
            continue
        out += [
            replace(leaf, kind="lstm", path=(*leaf.path, Step(f"={way}")), pieces=(piece,), sizes=(size,))
            for way, piece, size in zip(ways, leaf.pieces, leaf.sizes)
        ]
    done = len(out) > len(side.leaves)
    side.leaves = out
    return done


@operator("fourth", "layout", weight=1.0)
def members_in_one_parameter(side: Side, rng: random.Random) -> bool:
    """Members of a list that are run at once are one parameter: (members, out, in). Their own order is kept."""
    families: dict[tuple[Path, str, Path], list[Leaf]] = {}
    for leaf in side.leaves:
        for depth, step in enumerate(leaf.path[:-1]):
            if step.role in ("judges", "slow_judges", "routed") and step.index is not None and leaf.plain:
                families.setdefault((leaf.path[:depth], step.role, leaf.path[depth + 1 :]), []).append(leaf)
    families = {key: members for key, members in families.items() if len(members) > 1}
    for (above, role, below), members in families.items():
        whole = replace(
            members[0],
            path=(*above, Step(role), *below),
            pieces=tuple(m.pieces[0] for m in members),
            sizes=tuple(m.sizes[0] for m in members),
            layout="parts_apart",
        )
        side.leaves[side.leaves.index(members[0])] = whole
        side.leaves = [leaf for leaf in side.leaves if leaf not in members]
    return bool(families)


# Layout: the same tensors in other shapes, kinds and modules --------------------------------------------------------


def _plain_in(*roles: str) -> Callable[[Leaf], bool]:
    return lambda leaf: leaf.role in roles


operator("fourth", "layout", weight=0.8, name="tables_as_parameters")(_restore("bare", "embedding", lambda leaf: True))
operator("fourth", "layout", weight=0.8, name="positions_in_a_table")(
    _restore("embedding", "table", lambda leaf: len(leaf.sizes[0]) == 3 and leaf.sizes[0][1] > 2)
)
operator("fourth", "layout", weight=0.8, name="norms_over_channels")(
    _restore("over_channels", "norm", lambda leaf: True)
)
operator("fourth", "layout", LAST, weight=0.8, name="norms_as_parameters")(
    _restore("bare", "norm", lambda leaf: leaf.path[-1].index is None)
)
operator("fourth", "layout", weight=0.8, name="synchronised_norms")(
    _restore("synchronised", "batch_norm", lambda leaf: True)
)
operator("fourth", "layout", weight=1.0, name="tracked_instances")(
    _restore("tracked", "instance_norm", lambda leaf: True)
)
operator("fourth", "layout", weight=1.0, name="parametrised_weight_norms")(
    _restore("style:parametrized", "weight_norm", lambda leaf: True)
)
operator("fourth", "layout", weight=0.8, name="steps_as_maps")(
    _restore("flat", "conv1d", lambda leaf: leaf.sizes[0][2] == 1 and leaf.sizes[0][1] > 1)
)
operator("fourth", "layout", weight=0.8, name="places_as_maps")(
    _restore("flat", "conv3d", lambda leaf: leaf.sizes[0][2] == 1)
)
operator("fourth", "layout", weight=0.5, name="attention_by_convolutions")(
    _restore("pointwise_1d", "linear", _plain_in("q", "k", "v", "o"))
)
operator("fourth", "layout", LAST, weight=0.6, name="weights_and_biases")(
    _restore("named:weights,biases", "linear", lambda leaf: True)
)
operator("fourth", "layout", weight=0.8, name="norms_of_the_annotated")(
    _restore("named:a_2,b_2", "norm", lambda leaf: True)
)
operator("fourth", "layout", weight=0.8, name="norms_with_offsets")(
    _restore("named:scale,offset", "norm", lambda leaf: True)
)
operator("fourth", "layout", weight=1.0, name="bilinear_as_parameter")(_restore("bare", "bilinear", lambda leaf: True))


@operator("fourth", "layout", weight=1.0)
def scales_in_modules(side: Side, rng: random.Random) -> bool:
    """A bare parameter becomes the only one of a small module: ``layer_scale.gamma``."""
    name = rng.choice(["gamma", "value", "weight", "param"])
    return _restore(f"inside:{name}", "table", lambda leaf: not numbered(leaf) or len(leaf.sizes[0]) == 1)(side, rng)


@operator("fourth", "layout", weight=1.0)
def learned_and_fixed(side: Side, rng: random.Random) -> bool:
    """What was fixed, and a buffer, is learned now."""
    before = list(side.leaves)
    side.leaves = [replace(leaf, layout="") if leaf.layout == "kind:buffer" else leaf for leaf in side.leaves]
    return side.leaves != before


operator("fourth", "layout", weight=0.8, name="parameters_frozen_to_buffers")(
    _restore("kind:buffer", "table", lambda leaf: not numbered(leaf))
)


@operator("fourth", "layout", LAST, weight=1.0)
def port_from_keras(side: Side, rng: random.Random) -> bool:
    """Another framework's names and layouts throughout: ``kernel``, ``gamma``, ``moving_mean``, ``embeddings``."""
    layouts = {
        "linear": "transposed:kernel",
        "conv2d": "channels_last",
        "conv1d": "channels_last",
        "norm": "named:gamma,beta",
        "group_norm": "named:gamma,beta",
        "batch_norm": "moving",
        "embedding": "named:embeddings",
    }
    before = list(side.leaves)
    side.leaves = [
        replace(leaf, layout=layouts[leaf.kind]) if leaf.kind in layouts and leaf.plain else leaf
        for leaf in side.leaves
    ]
    return side.leaves != before


operator("fourth", "layout", weight=0.7, name="biases_of_values_alone")(_biases(_plain_in("k", "q"), False))
operator("fourth", "layout", weight=0.7, name="no_biases_in_feed_forward")(_biases(_plain_in("fc1", "fc2"), False))
operator("fourth", "layout", weight=0.7, name="no_biases_outside_lists")(
    _biases(lambda leaf: not numbered(leaf), False)
)


@operator("fourth", "layout", weight=2)
def shared_no_more(side: Side, rng: random.Random) -> bool:
    """What was one parameter under two names is two, that start from the same values."""
    before = list(side.leaves)
    side.leaves = [replace(leaf, layout="") if leaf.layout in ("tied", "shared") else leaf for leaf in side.leaves]
    return side.leaves != before


@operator("fourth", "layout", where="source", weight=2)
def shared_and_stored_once(side: Side, rng: random.Random) -> bool:
    """The file holds what is shared under its first name alone."""
    before = list(side.leaves)
    side.leaves = [leaf for leaf in side.leaves if leaf.layout not in ("tied", "shared")]
    return side.leaves != before
