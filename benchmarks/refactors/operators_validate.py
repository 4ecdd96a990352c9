"""Operators of the part that validates: what is there, and how it is stored."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.refactors.forms import drawn, form_of
from benchmarks.refactors.network import Leaf, Path, Side, Step
from benchmarks.refactors.operators import (
    LAST,
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
from benchmarks.refactors.operators_fourth import MAPS, _fused_as, _plain_in, _wider_inside, parts_of
from benchmarks.refactors.operators_layout import _fuse, _restore
from benchmarks.refactors.operators_places import _word
from benchmarks.refactors.operators_third import _biases, numbered

BLOCK_ENDS = (
    "o",
    "fc2",
    "ff2",
    "down",
    "fall",
    "think2",
    "conv2",
    "twice2",
    "unit_conv2",
    "points2",
    "step2",
    "sum_out",
)


# Content: copies ----------------------------------------------------------------------------------------------------

operator("validate", "content", LAST, "source", 1.5, name="moving_average_of_the_net")(
    _copied([("", "ema.module"), ("net", "net_avg"), ("denoise_fn", "denoise_fn_ema"), ("", "averaged_model.module")])
)
operator("validate", "content", LAST, "source", 1.0, name="bootstrapped_twin")(
    _copied([("online_network", "target_network"), ("query_model", "key_model"), ("f", "f_bar"), ("live", "lagging")])
)


@operator("validate", "order", LAST, "source", 0.8)
def averages_without_dots(side: Side, rng: random.Random) -> bool:
    """Averages as buffers of one flat module, their names written without the dots."""
    above = rng.choice(["model_ema", "ema_weights", "polyak"])
    for name, leaf in zip(side.names(), side.leaves):
        for slot in form_of(leaf).slots:
            if slot.dtype.is_floating_point:
                flat = f"{above}.{(name + slot.suffix).replace('.', '')}"
                side.extra[flat] = drawn(flat, tuple(slot.value().shape))
    return True


@operator("validate", "order", LAST, "source", 0.8)
def state_of_the_optimiser(side: Side, rng: random.Random) -> bool:
    """First and second moments of every parameter, numbered, in the file of the weights."""
    above = rng.choice(["optimizer.state", "opt.state", "adam"])
    shapes = [tuple(slot.value().shape) for leaf in side.leaves for slot in form_of(leaf).slots if slot.suffix]
    for number, shape in enumerate(shapes):
        for moment in ("exp_avg", "exp_avg_sq"):
            key = f"{above}.{number}.{moment}"
            side.extra[key] = drawn(key, shape)
    return bool(shapes)


@operator("validate", "order", LAST, "source", 0.7)
def observers_of_quantisation(side: Side, rng: random.Random) -> bool:
    """What training for low precision keeps beside every map: scales, zero points, ranges."""
    for name, leaf in zip(side.names(), side.leaves):
        if leaf.kind in ("linear", "conv2d") and leaf.plain:
            above = f"{name}.activation_post_process"
            side.extra |= {f"{above}.scale": drawn(f"{above} scale", (1,)), f"{above}.zero_point": torch.tensor([3])}
            side.extra |= {
                f"{above}.{end}": drawn(f"{above} {end}", (leaf.sizes[0][0],)) for end in ("min_val", "max_val")
            }
    return bool(side.extra)


@operator("validate", "content", LAST, "source", 0.7)
def reference_of_the_policy(side: Side, rng: random.Random) -> bool:
    """The largest part again, frozen, as the reference that a loss compares with."""
    sizes = {step: sum(leaf.path[0].role == step.role for leaf in side.leaves) for step in parts_of(side)}
    part = max(sizes, key=lambda step: (sizes[step], step.role))
    if part.role.startswith("="):
        return False
    word = _word(side, part).replace(".", "_")
    name = rng.choice(["ref_{}", "{}_ref", "frozen_{}", "{}_init_copy"]).format(word)
    side.leaves += [
        _copy(leaf, f"{name} ", (Step(f"={name}", leaf.path[0].index), *leaf.path[1:]))
        for leaf in side.leaves
        if leaf.path[0].role == part.role
    ]
    return True


# Content: strangers -------------------------------------------------------------------------------------------------

operator("validate", "content", LAST, "target", name="head_of_another_dataset")(
    _foreign_head(["watermark_detector", "dialect_id", "popularity", "geo_cells", "camera_tilt", "toxic_span"])
)
operator("validate", "content", LAST, "target", name="part_of_another_year")(
    _exchanged_part(["hopfield_store", "dct_filter", "tucker_core", "sinkhorn_sorter", "lattice_code", "liquid_unit"])
)
operator("validate", "content", LAST, weight=0.7, name="gains_behind_parts")(
    _added("table", ["drop_gain", "branch_alpha", "res_lambda", "learned_skip"], BLOCK_ENDS)
)
operator("validate", "content", LAST, weight=0.7, name="norms_behind_parts")(
    _added("norm", ["peri_norm", "tail_rms", "branch_ln", "extra_normalizer"], BLOCK_ENDS)
)


@operator("validate", "content", LAST)
def mean_and_deviation_of_pictures(side: Side, rng: random.Random) -> bool:
    """Constants that some wrappers hold as buffers before everything else."""
    names = rng.choice([("pixel_mean", "pixel_std"), ("image_mean", "image_std"), ("imagenet_mu", "imagenet_sd")])
    side.leaves[:0] = [
        Leaf((Step(f"={name}"),), "table", (f"constant {name}",), ((3, 1, 1),), layout="kind:buffer") for name in names
    ]
    return True


@operator("validate", "content", LAST)
def waves_of_positions(side: Side, rng: random.Random) -> bool:
    """Fixed positions as a buffer of a small module, which the other code base computes anew."""
    width = next((leaf.sizes[0][-1] for leaf in side.leaves if leaf.kind in ("embedding", "norm")), 0)
    name = rng.choice(["sinusoids.pe", "fixed_encoding.table", "rotary.freqs", "time_signal.waves"])
    if width:
        leaf = Leaf((Step(f"={name}"),), "table", ("fixed waves",), ((1, 31, width),), layout="kind:buffer")
        side.leaves.insert(rng.choice([0, len(side.leaves)]), leaf)
    return width > 0


@operator("validate", "content", LAST, "source")
def parameters_of_the_loss(side: Side, rng: random.Random) -> bool:
    """Centres of classes, margins, a queue: what a loss module holds, of the sizes of the last map."""
    last = side.leaves[-1]
    if last.kind != "linear" or not last.plain:
        return False
    word = rng.choice(["criterion.centers", "margin_loss.kernel_matrix", "arcface.weight", "supcon.queue"])
    out, inner = last.sizes[0]
    side.extra |= {word: drawn(word, (out, inner)), f"{word}_count": torch.tensor(77)}
    return True


@operator("validate", "content", LAST, "source")
def records_of_the_run(side: Side, rng: random.Random) -> bool:
    """States of metrics, the best score, the step: single numbers and small matrices."""
    width = side.leaves[0].sizes[0][-1] if side.leaves[0].sizes[0] else 4
    side.extra |= {
        "val_iou.confusion": drawn("confusion", (width, width)),
        "test_auroc.thresholds": drawn("thresholds", (width,)),
        "best_score": drawn("best score", ()),
        "global_iterations": torch.tensor(4_211),
    }
    return True


@operator("validate", "content", LAST, weight=1.5)
def deep_prompts(side: Side, rng: random.Random) -> bool:
    """Learned vectors at the entry of every member of a list, which only one of the two code bases has."""
    width = next((leaf.sizes[0][0] for leaf in side.leaves if leaf.kind == "norm"), 0)
    word = rng.choice(["ctx_vectors", "visual_prompt", "memory_slots", "sink_tokens"])
    seen: set[Path] = set()
    out: list[Leaf] = []
    for leaf in side.leaves:
        if width and len(leaf.path) > 1 and leaf.path[0].index is not None and leaf.path[:1] not in seen:
            seen.add(leaf.path[:1])
            path = (leaf.path[0], Step(f"={word}"))
            out.append(Leaf(path, "table", (f"{word} {leaf.path[0]}",), ((3, width),), when=leaf.when))
        out.append(leaf)
    side.leaves = out
    return bool(seen)


@operator("validate", "content", LAST)
def second_output_map(side: Side, rng: random.Random) -> bool:
    """Another map of the last one's size behind it or before it: of a second data set, a second language."""
    last = side.leaves[-1]
    if last.kind not in MAPS or not last.plain or numbered(last):
        return False
    word = rng.choice(["secondary_task", "alt_language_out", "pretrain_classes", "coarse_labels"])
    side.leaves.insert(len(side.leaves) - rng.choice([0, 1]), _copy(last, f"{word} ", (Step(f"={word}"),)))
    return True


@operator("validate", "content", LAST, "target", weight=0.7)
def entry_replaced(side: Side, rng: random.Random) -> bool:
    """The first layer gives way to one of the same size that reads something else."""
    first = side.leaves[0]
    if first.kind not in (*MAPS, "embedding") or not first.plain or numbered(first):
        return False
    word = rng.choice(["depth_entry", "lidar_input", "spectrum_reader", "byte_input"])
    side.leaves[0] = _copy(first, f"{word} ", (Step(f"={word}"),))
    return True


@operator("validate", "content", LAST, weight=0.7)
def front_alone(side: Side, rng: random.Random) -> bool:
    """The second half of what stands at the top is not there: an encoder without its decoder."""
    parts = parts_of(side)
    if len(parts) < 4:
        return False
    kept = {part.role for part in parts[: (len(parts) + 1) // 2]}
    side.leaves = [leaf for leaf in side.leaves if leaf.path[0].role in kept]
    return True


operator("validate", "content", LAST, weight=1.0, name="prune_second")(
    _pruned(lambda n: [i for i in range(n) if i != 1] if n > 2 else [])
)
operator("validate", "content", LAST, weight=1.0, name="prune_last_half")(_pruned(lambda n: list(range((n + 1) // 2))))
operator("validate", "content", LAST, weight=1.0, name="prune_even")(_pruned(lambda n: list(range(1, n, 2))))
operator("validate", "content", LAST, weight=1.0, name="insert_two_in_front")(_inserted(lambda n: [0, 1]))
operator("validate", "content", LAST, weight=1.0, name="insert_at_a_third")(_inserted(lambda n: [(n + 2) // 3]))
operator("validate", "content", LAST, weight=1.0, name="insert_behind_the_first_and_last")(
    _inserted(lambda n: [1, n + 1] if n > 1 else [1])
)


# Content: sizes -----------------------------------------------------------------------------------------------------


@operator("validate", "content", LAST)
def outputs_of_another_data_set(side: Side, rng: random.Random) -> bool:
    """Every map outside of lists whose outputs are few has another number of them."""
    few = lambda leaf: leaf.kind in MAPS and leaf.plain and not numbered(leaf) and leaf.sizes[0][0] < 7  # noqa: E731
    return _resized(few, 0)(side, rng)


@operator("validate", "content", LAST)
def entry_of_another_instrument(side: Side, rng: random.Random) -> bool:
    """More channels, more features: what runs first among the maps reads more."""
    first = next((leaf for leaf in side.leaves if leaf.kind in MAPS), None)
    return first is not None and first.plain and _wider_inside(lambda leaf: leaf.path == first.path)(side, rng)


@operator("validate", "content", LAST, weight=0.7)
def more_rows_in_one_table(side: Side, rng: random.Random) -> bool:
    """One of the tables is longer, and a map that shares its parameter with it."""
    tables = [leaf for leaf in side.leaves if leaf.kind == "embedding" and leaf.plain]
    if not tables:
        return False
    chosen = rng.choice(tables).pieces
    return _resized(lambda leaf: leaf.pieces == chosen, 0)(side, rng)


# Layout: fused and split --------------------------------------------------------------------------------------------

operator("validate", "layout", weight=1.5, name="fuse_three")(lambda side, rng: _fuse(side, "qkv", "qkv"))
operator("validate", "layout", weight=1.0, name="fuse_two_of_three")(lambda side, rng: _fuse(side, "kv", "kv"))
operator("validate", "layout", weight=1.0, name="fuse_three_by_name")(
    _fused_as("qkv", ["q_and_k_and_v", "qkv_matrix", "make_qkv_at_once", "QKV"])
)
operator("validate", "layout", weight=1.5, name="fuse_gate_and_content")(
    lambda s, rng: _fuse(s, ("gate", "up"), "gate_up")
)
operator("validate", "layout", LAST, weight=0.7, name="keys_first_in_the_name")(
    lambda side, rng: _fuse(side, "qkv", rng.choice(["=k_v_q", "=kvq_proj", "=key_value_query"]), (1, 2, 0))
)
TWINS = [("code_centre", "code_spread"), ("stream_u", "stream_v"), ("start_h", "start_c"), ("act_out", "judge_out")]
TWINS += [("what_out", "where_out"), ("glasses", "smile"), ("write_kernel", "write_shift")]


@operator("validate", "layout", weight=1.5)
def fuse_neighbours(side: Side, rng: random.Random) -> bool:
    """Two maps of one input as one, whose name says both in their order."""
    joint = rng.choice(["_", "_and_", "_plus_"])
    done = False
    for pair in TWINS:
        one, other = (side.words.get(role, role).replace(".", "_") for role in pair)
        done |= one != other and _fuse(side, pair, f"={one}{joint}{other}")
    return done


@operator("validate", "layout", weight=1.5)
def experts_in_one_parameter(side: Side, rng: random.Random) -> bool:
    """All experts as one parameter, (experts, out, in); their number says which is which."""
    return _one_parameter(side, ("chosen", "specialists"), "")


@operator("validate", "layout", LAST, weight=0.8)
def experts_in_one_turned(side: Side, rng: random.Random) -> bool:
    """The same as (experts, in, out), to be multiplied from the right."""
    return _one_parameter(side, ("chosen", "specialists"), "t")


def _one_parameter(side: Side, roles: tuple[str, ...], turned: str) -> bool:
    families: dict[tuple[Path, str, Path], list[Leaf]] = {}
    for leaf in side.leaves:
        for depth, step in enumerate(leaf.path[:-1]):
            if step.role in roles and step.index is not None and leaf.plain and leaf.kind == "linear" and not leaf.bias:
                families.setdefault((leaf.path[:depth], step.role, leaf.path[depth + 1 :]), []).append(leaf)
    families = {key: members for key, members in families.items() if len(members) > 1}
    for (above, role, below), members in families.items():
        whole = replace(
            members[0],
            path=(*above, Step(role), *below),
            pieces=tuple(m.pieces[0] for m in members),
            sizes=tuple(m.sizes[0] for m in members),
            layout=f"stacked:1{turned}",
        )
        side.leaves[side.leaves.index(members[0])] = whole
        side.leaves = [leaf for leaf in side.leaves if leaf not in members]
    return bool(families)


@operator("validate", "layout", LAST, weight=1.0)
def one_map_for_each_gate(side: Side, rng: random.Random) -> bool:
    """Cells written by hand, with a map for each gate."""
    out: list[Leaf] = []
    for leaf in side.leaves:
        if leaf.kind not in ("lstm", "gru") or leaf.layout not in ("", "cell"):
            out.append(leaf)
        elif len(leaf.pieces) == 1:
            out.append(replace(leaf, layout="gates_apart"))
        else:
            out += [
                replace(
                    leaf, path=(*leaf.parent, Step(leaf.role, i)), pieces=(piece,), sizes=(size,), layout="gates_apart"
                )
                for i, (piece, size) in enumerate(zip(leaf.pieces, leaf.sizes))
            ]
    done = out != side.leaves
    side.leaves = out
    return done


@operator("validate", "layout", LAST, weight=1.0)
def projections_for_each_head(side: Side, rng: random.Random) -> bool:
    """Queries, keys, values and outputs as parameters of (heads, in, width), as code for looking inside has them."""
    chosen = [
        leaf for leaf in side.leaves if leaf.role in ("q", "k", "v", "o") and leaf.kind == "linear" and leaf.plain
    ]
    layouts = {id(leaf): "by_head:out" if leaf.role == "o" else "by_head" for leaf in chosen}
    side.leaves = [replace(leaf, layout=layouts[id(leaf)]) if id(leaf) in layouts else leaf for leaf in side.leaves]
    return bool(chosen)


# Layout: the same tensors in other shapes, kinds and modules --------------------------------------------------------

operator("validate", "layout", weight=0.4, name="turned_outside_attention")(
    _restore("transposed", "linear", lambda leaf: leaf.role not in ("q", "k", "v", "o", "qkv", "kv"))
)
operator("validate", "layout", weight=0.4, name="turned_at_the_top")(
    _restore("transposed", "linear", lambda leaf: not numbered(leaf))
)
operator("validate", "layout", LAST, weight=0.5, name="interleave_keys_values")(
    lambda side, rng: _mixed_by_head(side, rng)
)


def _mixed_by_head(side: Side, rng: random.Random) -> bool:
    """Keys and values fused by head; no shape and no name shows it."""
    role = rng.choice(["=memory_map", "=context_proj", "=to_memory"])
    if any(leaf.role in ("k", "v") and leaf.sizes[0][0] % 2 for leaf in side.leaves) or not _fuse(side, "kv", role):
        return False
    side.leaves = [replace(leaf, layout="interleaved") if leaf.role == role else leaf for leaf in side.leaves]
    return True


operator("validate", "layout", LAST, weight=0.5, name="bare_projections")(
    _restore("bare_matrix", "linear", lambda leaf: not leaf.bias and leaf.path[-1].index is None and numbered(leaf))
)
operator("validate", "layout", weight=0.5, name="maps_of_volumes")(
    _restore("pointwise_3d", "linear", lambda leaf: numbered(leaf))
)
operator("validate", "layout", weight=0.8, name="convolutions_of_videos")(
    _restore("inflated", "conv2d", lambda leaf: True)
)
operator("validate", "layout", weight=0.6, name="short_convolutions_as_maps")(
    _restore("flat", "conv1d", lambda leaf: leaf.sizes[0][2] == 1 and leaf.sizes[0][1] > 1)
)
operator("validate", "layout", weight=0.6, name="points_as_maps")(
    _restore("flat", "conv2d", lambda leaf: leaf.sizes[0][2] == 1)
)
operator("validate", "layout", weight=0.6, name="signals_as_pictures")(_restore("as_2d", "conv1d", lambda leaf: True))
operator("validate", "layout", weight=0.8, name="gain_and_shift")(
    _restore("named:gain,shift", "norm", lambda leaf: True)
)
operator("validate", "layout", weight=0.8, name="alpha_and_beta")(
    _restore("named:alpha,beta", "norm", lambda leaf: True)
)
operator("validate", "layout", weight=0.8, name="norms_as_one_group")(
    _restore("as_group", "norm", lambda leaf: leaf.bias)
)
operator("validate", "layout", weight=0.8, name="norms_of_signals")(_restore("as_column", "norm", lambda leaf: True))
operator("validate", "layout", LAST, weight=0.6, name="letters_of_algebra")(
    _restore("named:W,b", "linear", lambda leaf: True)
)
operator("validate", "layout", weight=1.0, name="statistics_of_gluon")(
    _restore("named:gamma,beta,running_mean,running_var", "batch_norm", lambda leaf: True)
)
operator("validate", "layout", weight=0.8, name="batch_norms_given")(
    _restore("frozen", "batch_norm", lambda leaf: True)
)
operator("validate", "layout", LAST, "source", weight=0.8, name="batches_not_counted")(
    _restore("uncounted", "batch_norm", lambda leaf: True)
)
operator("validate", "layout", weight=0.8, name="tables_in_bags")(_restore("bag", "embedding", lambda leaf: True))
operator("validate", "layout", weight=0.8, name="tables_without_modules")(
    _restore("bare", "embedding", lambda leaf: not numbered(leaf))
)
operator("validate", "layout", weight=1.0, name="codes_of_another_paper")(
    _restore("short", "codebook", lambda leaf: True)
)
operator("validate", "layout", weight=1.0, name="weight_norms_of_ones_own")(
    _restore("own", "weight_norm", lambda leaf: True)
)
operator("validate", "layout", weight=1.0, name="weight_norms_as_parametrisations")(
    _restore("style:parametrized", "weight_norm", lambda leaf: True)
)
operator("validate", "layout", weight=1.0, name="spectra_as_parametrisations")(
    _restore("style:parametrized", "spectral2d", lambda leaf: True)
)
operator("validate", "layout", weight=0.8, name="vectors_on_pictures")(
    _restore("trailing", "table", lambda leaf: len(leaf.sizes[0]) == 1)
)
operator("validate", "layout", weight=0.8, name="ones_left_out")(
    _restore("squeezed", "table", lambda leaf: 1 in leaf.sizes[0] and len(leaf.sizes[0]) > 1)
)
operator("validate", "layout", weight=0.8, name="places_in_tables")(
    _restore("embedding", "table", lambda leaf: len(leaf.sizes[0]) == 3 and leaf.sizes[0][1] > 4)
)
operator("validate", "layout", weight=0.8, name="given_at_the_top")(
    _restore("kind:buffer", "table", lambda leaf: len(leaf.path) == 1)
)
operator("validate", "layout", LAST, "source", weight=0.5, name="ready_for_pruning")(
    _restore("masked", "linear", lambda leaf: numbered(leaf))
)
operator("validate", "layout", LAST, "source", weight=0.5, name="updates_of_low_rank")(
    _restore("low_rank", "linear", lambda leaf: leaf.role in ("q", "k", "v", "o"))
)


@operator("validate", "layout", weight=1.0)
def given_or_learned(side: Side, rng: random.Random) -> bool:
    """What was a buffer is a parameter."""
    before = list(side.leaves)
    side.leaves = [replace(leaf, layout="") if leaf.layout == "kind:buffer" else leaf for leaf in side.leaves]
    return side.leaves != before


def _ported(layouts: dict[str, str], chosen: Callable[[Leaf], bool] = lambda leaf: True) -> Callable[[Side], bool]:
    def apply(side: Side) -> bool:
        before = list(side.leaves)
        side.leaves = [
            replace(leaf, layout=layouts[leaf.kind]) if leaf.kind in layouts and leaf.plain and chosen(leaf) else leaf
            for leaf in side.leaves
        ]
        return side.leaves != before

    return apply


@operator("validate", "layout", LAST, weight=1.0)
def port_from_paddle(side: Side, rng: random.Random) -> bool:
    """Another framework's layouts under PyTorch's names, but for the statistics: ``_mean``, ``_variance``."""
    return _ported({"linear": "transposed", "batch_norm": "named:weight,bias,_mean,_variance"})(side)


@operator("validate", "layout", LAST, weight=1.0)
def port_from_mlx(side: Side, rng: random.Random) -> bool:
    """Kernels with the channels behind; only where their shapes show it."""
    kernels = [leaf for leaf in side.leaves if leaf.kind in ("conv1d", "conv2d")]
    shown = all(leaf.sizes[0][1] != leaf.sizes[0][2] for leaf in kernels)
    return shown and _ported(dict.fromkeys(("conv1d", "conv2d"), "channels_behind"))(side)


@operator("validate", "layout", weight=0.8)
def scales_alone_in_lists(side: Side, rng: random.Random) -> bool:
    """The norms inside lists have no shift on this side, or have one here alone."""
    norms = [leaf for leaf in side.leaves if leaf.kind == "norm" and leaf.plain and numbered(leaf)]
    shifted = any(leaf.bias for leaf in norms)
    side.leaves = [replace(leaf, bias=not shifted) if leaf in norms else leaf for leaf in side.leaves]
    return bool(norms)


operator("validate", "layout", weight=0.7, name="biases_of_outputs_alone")(_biases(_plain_in("q", "k", "v"), False))
operator("validate", "layout", weight=0.7, name="biases_of_convolutions")(
    _biases(lambda leaf: leaf.kind != "linear", True)
)
operator("validate", "layout", weight=0.7, name="no_biases_at_all")(_biases(lambda leaf: True, False))


@operator("validate", "layout", weight=2)
def each_its_own(side: Side, rng: random.Random) -> bool:
    """A map that shared the parameter of a table has its own, which starts from the same values."""
    before = list(side.leaves)
    side.leaves = [replace(leaf, layout="") if leaf.layout == "tied" else leaf for leaf in side.leaves]
    return side.leaves != before


@operator("validate", "layout", where="source", weight=2)
def kept_under_one_name(side: Side, rng: random.Random) -> bool:
    """The file leaves out what shares its parameter with a table."""
    before = list(side.leaves)
    side.leaves = [leaf for leaf in side.leaves if leaf.layout != "tied"]
    return side.leaves != before
