"""Blocks of transformers in the words of other code bases: what of one kind of layer becomes no other.

All maps are squares, so that shapes tell nothing. What names and order leave open may stay open; nothing may be wrong.
"""

from __future__ import annotations

import pytest
import torch
from small_nets import Tree
from torch import nn

from lit_wsl import transfer_weights

WIDTH = 8
MAKES = {"map": lambda: nn.Linear(WIDTH, WIDTH), "whole": lambda: nn.Linear(WIDTH, 3 * WIDTH)}
MAKES |= {"pair": lambda: nn.Linear(WIDTH, 2 * WIDTH), "norm": lambda: nn.LayerNorm(WIDTH)}
MAKES |= {"table": lambda: nn.Embedding(19, WIDTH), "head": lambda: nn.Linear(WIDTH, 4)}
MAKES |= {"up": lambda: nn.Linear(4, WIDTH), "slim": lambda: nn.Linear(WIDTH, 6), "slim_norm": lambda: nn.LayerNorm(6)}
Row = tuple[str, str]  # what a layer is called and what it is


def network(rows: str, blocks: range) -> dict[str, Row]:
    """Layers by their paths, ``#`` being counted; what a layer is is its role, with the number of its block."""
    found: dict[str, Row] = {}
    parts = [part.split(":") for part in rows.split()]
    listed = [part for part in parts if "#" in part[0]]
    for name, make, *role in parts:
        if "#" not in name:
            found[name] = make, role[0] if role else make
        elif name == listed[0][0]:
            for number, k in enumerate(blocks):
                found |= {n.replace("#", str(k)): (m, f"{number}.{own}") for n, m, own in listed}
    return found


def wrong_and_right(old: dict[str, Row], new: dict[str, Row], *, ordered: bool = True) -> tuple[list[str], set[str]]:
    """The layers of the new network that hold something else than theirs, and the roles of those that hold theirs."""
    source, target = (Tree({name: MAKES[make]() for name, (make, _) in side.items()}) for side in (old, new))
    for tensor in (*source.state_dict().values(), *target.state_dict().values()):
        tensor.copy_(torch.randn_like(tensor))
    state = source.state_dict()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    transfer_weights(target, state if ordered else dict(sorted(state.items())), min_coverage=0.0)
    roles = {role: name for name, (_, role) in old.items()}
    wrong, right = [], set()
    for name, tensor in target.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        role = new[layer][1]
        if torch.equal(tensor, before[name]):
            continue
        if role in roles and torch.equal(tensor, state.get(f"{roles[role]}.{leaf}", torch.zeros(0))):
            right.add(role)
        elif role.rpartition(".")[2] not in ("qkv", "kv") and not role.endswith((".q", ".k", ".v")):
            wrong.append(name)
    return wrong, right


def block(text: str) -> str:
    """The rows of a block, each line below its own module."""
    rows = []
    for line in text.strip().splitlines():
        place, _, layers = line.strip().partition(" ")
        rows += [f"h.#.{place}.{layer}".replace("..", ".").replace("-.", "") for layer in layers.split()]
    return " ".join(["embed:table", *rows, "last_norm:norm"])


NORMS = "- norm1:norm:a\n- norm2:norm:b\n"
OTHER_NORMS = "- prenorm_attn:norm:a\n- prenorm_mlp:norm:b\n"


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("w1 v1 w2", "fc_1 fc_2 proj"),  # numbers and order contradict each other
        ("fc_1 fc_2 proj", "w1 v1 w2"),
        ("w1 v1 w2", "proj fc_2 fc_1"),
        ("gate_proj up_proj down_proj", "w1 v1 w2"),
        ("act_fn value output", "fc_1 fc_2 proj"),
    ],
)
def test_a_gated_feed_forward_is_not_paired_by_its_numbers(old: str, new: str, ordered: bool):
    roles = ["gate", "up", "down"]
    one = "mlp " + " ".join(f"{name}:map:{role}" for name, role in zip(old.split(), roles))
    roles = roles[::-1] if new.startswith("proj") else roles
    other = "ff " + " ".join(f"{name}:map:{role}" for name, role in zip(new.split(), roles))
    attention = "q:map:q {0}k:map:k {0}v:map:v {0}o:map:o"
    sides = (
        block(f"{NORMS}- {attention.format('')}\n{one}"),
        block(f"{OTHER_NORMS}attn qkv:whole:qkv out:map:o\n{other}"),
    )
    wrong, right = wrong_and_right(network(sides[0], range(1, 3)), network(sides[1], range(2)), ordered=ordered)
    assert not wrong
    assert not ordered or {"0.a", "0.b", "1.a", "1.b"} <= right


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(
            "- query:map:q key:map:k value:map:v out:map:o w1:map:gate v1:map:up w2:map:down",
            """- wq:map:q kv:pair:kv wo:map:o
            ff act_fn:map:gate value:map:up output:map:down""",
            id="a value of the attention, spelled, beside the v1 of a gate",
        ),
        pytest.param(
            """- to_q:map:q to_k:map:k to_v:map:v to_out:map:o
            ff wi:pair:wi down_proj:map:down""",
            """attn c_attn:whole:qkv Wo:map:o
            ffn gate:map:gate value:map:up out:map:down""",
            id="what an attention and what a feed-forward puts out",
        ),
        pytest.param(
            """attn q_lin:map:q k_lin:map:k v_lin:map:v out_lin:map:o
            - lin1:map:up lin2:map:down""",
            "- intermediate:map:up query:map:q output:map:down value:map:v key:map:k proj:map:o",
            id="two that may be the output of the attention",
        ),
        pytest.param(
            """mixer query_key_value:whole:qkv linear_out:map:o
            ffn fc1_g:map:gate fc1_x:map:up fc2:map:down""",
            "- queries:map:q keys:map:k values:map:v unify:map:o gate:map:gate value:map:up out:map:down",
            id="values of an attention and the value of a gate in one module",
        ),
        pytest.param(
            """mixer linear_k:map:k linear_v:map:v linear_q:map:q
            - value:pair:up""",
            """attn qkv:whole:qkv
            ffn linear_in:pair:up""",
            id="keys and values make up nothing in a feed-forward",
        ),
    ],
)
def test_an_attention_and_a_feed_forward_share_no_layers(old: str, new: str, ordered: bool):
    wrong, _ = wrong_and_right(network(block(old), range(2)), network(block(new), range(2)), ordered=ordered)
    assert not wrong


def test_one_block_is_not_filled_from_two():
    old = """attn qkv:whole:qkv merge:map:o
    cross q_map:map:cq k_map:map:ck v_map:map:cv"""
    new = """attn query:map:q key:map:k value:map:v dense:map:o
    cross query:map:cq key:map:ck value:map:cv"""
    wrong, _ = wrong_and_right(network(block(old), range(2)), network(block(new), range(1, 2)))
    assert not wrong


@pytest.mark.parametrize("ordered", [True, False])
def test_the_norm_of_a_block_is_not_the_last_one_of_the_model(ordered: bool):
    old = "embed:table h.#.ln_1:norm:a h.#.up:map:up h.#.mlp_ln:norm:b final_layernorm:norm:last"
    new = "embed:table h.#.norm1:norm:a h.#.up:map:up h.#.final_layer_norm:norm:b post:norm:last"
    for one, other in ((old, new), (new, old)):
        wrong, _ = wrong_and_right(network(one, range(1)), network(other, range(1, 2)), ordered=ordered)
        assert not wrong


def test_norms_are_not_taken_by_an_order_that_their_names_deny():
    names = "self_attn_layer_norm:norm:x encoder_attn_layer_norm:norm:y final_layer_norm:norm:z"
    old, new = f"- a:map:a {names} b:map:b", "- a:map:a ff_norm:norm:z attn_norm:norm:x cross_norm:norm:y b:map:b"
    wrong, _ = wrong_and_right(network(block(old), range(2)), network(block(new), range(2)))
    assert not wrong


@pytest.mark.parametrize(
    ("old", "new", "roles"),
    [
        ("l_net r_net", "left right", "left right"),
        ("encoder_q encoder_p", "passage_encoder query_encoder", "passage query"),
        ("l_out r_out", "right left", "right left"),
    ],
)
def test_initials_tell_parts_whatever_their_order(old: str, new: str, roles: str):
    names = {role[0]: name for role, name in zip(roles.split(), new.split())}
    letters = [name.removeprefix("encoder_")[0] for name in old.split()]
    one = " ".join(f"{n}.{part}:map:{part}{x}" for n, x in zip(old.split(), letters) for part in "ab")
    other = " ".join(f"{n}.{part}:map:{part}{x}" for x, n in names.items() for part in "ab")
    wrong, right = wrong_and_right(network(one, range(1)), network(other, range(1)))
    assert not wrong
    assert right == {f"{part}{x}" for x in letters for part in "ab"}


def test_the_only_block_of_two_lists_is_one_though_its_parts_are_fused():
    old = "- pre_norm:norm:a wq:map:q wk:map:k wv:map:v wo:map:o mid_norm:norm:b"
    new = "- norm1:norm:a to_qkv:whole:qkv out:map:o norm2:norm:b"
    wrong, right = wrong_and_right(
        network(block(old), range(1)), network(block(new).replace("h.#", "trunk.#"), range(1))
    )
    assert not wrong
    assert {"0.a", "0.b"} <= right


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    ("names", "kept"), [("self_norm cross_norm ff_norm", True), ("cross_norm self_norm ff_norm", False)]
)
def test_three_norms_are_told_by_their_words_if_they_are_registered_so(names: str, kept: bool, ordered: bool):
    one = "- a:map:a " + " ".join(f"norm{k}:norm:{k}" for k in (1, 2, 3))
    other = "- a:map:a " + " ".join(f"{name}:norm:{k}" for k, name in enumerate(names.split(), 1))
    wrong, right = wrong_and_right(network(block(one), range(2)), network(block(other), range(2)), ordered=ordered)
    assert not wrong
    assert not kept or {f"{k}.{n}" for k in (0, 1) for n in (1, 2, 3)} <= right


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("names", ["norm_mlp norm_attn", "ffn_norm attention_norm"])
def test_where_a_block_begins_with_its_feed_forward_so_do_its_norms(names: str, ordered: bool):
    first, second = names.split()
    rows = "- {}:norm:1 mlp:map:m {}:norm:2 attn:map:n"
    one, other = (
        network(block(rows.format("norm1", "norm2")), range(2)),
        network(block(rows.format(first, second)), range(2)),
    )
    wrong, right = wrong_and_right(one, other, ordered=ordered)
    assert not wrong
    assert {"0.m", "0.n"} <= right


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_list_that_alone_was_renamed_may_be_another(blocks: int, ordered: bool):
    rows = "stem:table {0}.#.fc1:map:{0}1 {0}.#.fc2:map:{0}2 norm:norm head:head"
    one, other = (network(rows.format(name), range(blocks)) for name in ("lstm_layers", "attn_layers"))
    wrong, right = wrong_and_right(one, other, ordered=ordered)
    assert not wrong
    assert right == {"table", "norm", "head"}


REST = {"attn.qkv": "whole", "attn.proj": "map", "norm1": "norm", "norm2": "norm", "mlp.fc1": "pair"}


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("lists", ["layers blocks", "blocks blocks", "encoder.h net.trunk"])
@pytest.mark.parametrize("names", ["adapter cond", "rel_proj depth_proj", "se router", "prior_mlp side_mlp"])
def test_a_part_of_every_block_that_alone_has_another_name_may_be_another(names: str, lists: str, ordered: bool):
    rest = " ".join(f"{{0}}.#.{name}:{make}:{name}" for name, make in REST.items())
    sides = []
    for side, (blocks, part) in enumerate(zip(lists.split(), names.split())):
        rows = f"stem:table {rest} {{0}}.#.{part}:head:{part}{side} head:head"
        sides.append(network(rows.format(blocks), range(2)))
    wrong, right = wrong_and_right(*sides, ordered=ordered)
    assert not wrong
    assert {"table", "head", "0.mlp.fc1", "1.attn.qkv"} <= right


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("manner", ["{}_blocks", "{}.layers", "net.{}"])
@pytest.mark.parametrize("names", ["decoder predictor", "flow denoiser", "critic reward_model"])
def test_a_list_beside_another_one_that_alone_has_another_name_may_be_another(names: str, manner: str, ordered: bool):
    rest = " ".join(f"blocks.#.{name}:{make}:{name}" for name, make in REST.items())
    sides = []
    for name in names.split():
        path = manner.format(name)
        listed = network(f"{path}.#.attn.in_proj:head:{name}1 {path}.#.attn.out:up:{name}2", range(2))
        around = {f"{name}_embed": ("slim", name), f"{name}_norm": ("slim_norm", f"{name}_norm")}
        sides.append(network(f"stem:table {rest} head:head", range(2)) | around | listed)
    wrong, right = wrong_and_right(*sides, ordered=ordered)
    assert not wrong
    assert {"table", "head", "1.attn.qkv", "0.norm1"} <= right


@pytest.mark.parametrize("cross_first", [True, False])
def test_three_norms_are_counted_as_their_parts_run(cross_first: bool):
    def rows(order: str, norms: str) -> str:
        parts = zip(order.split(), norms.split())
        return " ".join(f"l.#.{n}:norm:n_{p} l.#.{p}.q:map:{p}q l.#.{p}.o:map:{p}o" for p, n in parts)

    order = "cross_attn self_attn mlp" if cross_first else "self_attn cross_attn mlp"
    old = network(rows(order, "norm1 norm2 norm3"), range(2))
    new = network(rows("self_attn cross_attn mlp", "norm_self norm_cross norm_mlp"), range(2))
    wrong, right = wrong_and_right(old, new)
    assert not wrong
    assert cross_first or {"0.n_self_attn", "1.n_cross_attn"} <= right


def test_norms_that_are_not_registered_as_the_parts_they_are_called_after_have_no_order():
    attention = " ".join(f"l.#.attn.{name}:map:{name}" for name in "qkvo")
    parts = f"l.#.ff1:pair:ff1 {attention} l.#.conv_module.pw:whole:pw l.#.conv_module.dw:head:dw l.#.ff2:pair:ff2"
    norms = "macaron mha conv ff final"
    old = parts + "".join(f" l.#.norm{k}:norm:n_{norm}" for k, norm in enumerate(norms.split()))
    new = f"{attention} l.#.ff:pair:ff2 l.#.ff_macaron:pair:ff1 l.#.conv_module.pw:whole:pw l.#.conv_module.dw:head:dw"
    for norm in ["ff", "mha", "ff_macaron", "conv", "final"]:
        new += f" l.#.norm_{norm}:norm:n_{norm.removeprefix('ff_')}"
    wrong, right = wrong_and_right(network(old, range(2)), network(new, range(2)))
    assert not [name for name in wrong if "norm" in name]
    assert {"0.pw", "1.q"} <= right


@pytest.mark.parametrize("names", ["f c fc", "b n bn", "prenet.fc1 prenet.fc2 postnet.w12"])
@pytest.mark.parametrize("ordered", [True, False])
def test_a_whole_is_not_made_of_what_only_its_letters_or_numbers_spell(names: str, ordered: bool):
    *parts, whole = names.split()
    old = network(" ".join(["stem:table", *(f"{part}:map:{part}" for part in parts), "head:head"]), range(1))
    new = network(f"stem:table {whole}:pair:new head:head", range(1))
    wrong, right = wrong_and_right(old, new, ordered=ordered)
    assert not wrong
    assert right == {"table", "head"}


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("encoder.fc:map:1 encoder.norm:norm:2 head.fc:map:3", "encoder.lin:map:1 head.norm:norm:2 head.lin:map:3"),
        (
            "reward.trunk:map:1 cost.trunk:map:2 reward.norm:norm:3",
            "reward_model.body:map:1 cost_model.body:map:2 cost_model.norm:norm:4",
        ),
        ("l.0.qkv:map:1 l.0.gate:head:2 l.1.qkv:map:3", "b.0.sa.qkv:map:1 b.1.sa.qkv:map:3 b.1.gate:head:4"),
        ("down.0.res:map:1 down.0.ds:pair:2 down.1.res:map:3", "down.0.c:map:1 down.1.ds:pair:2 down.1.c:map:3"),
        ("text.h.0.fc:map:1 image.h.0.fc:map:2", "text.blocks.0.lin:map:1 audio.blocks.0.lin:map:3"),
        ("fc_pitch:head:1 fc_duration:head:2", "pitch.fc:head:1 tension.fc:head:3"),
        ("heads.mnli.dense:pair:1 heads.mnli.out_proj:slim:2", "heads.qnli.dense:pair:3 heads.qnli.out_proj:slim:4"),
        ("pose_head.dense:pair:1 pose_head.out_proj:slim:2", "mask_head.dense:pair:3 mask_head.out_proj:slim:4"),
    ],
    ids=["norm", "norm of other networks", "gate", "stage", "tower", "predictor", "task", "head"],
)
def test_names_are_not_crossed_by_a_part_that_moved_or_was_exchanged(old: str, new: str, ordered: bool):
    sides = (network(f"embed:table {rows} post:up", range(1)) for rows in (old, new))
    wrong, right = wrong_and_right(*sides, ordered=ordered)
    assert not wrong
    assert {"table", "up"} <= right


def test_initials_pair_nothing_that_the_user_forbids():
    old, new = ({name: nn.Linear(WIDTH, WIDTH) for name in names.split()} for names in ("l_out r_out", "right left"))
    source, target = Tree(old | {"head": nn.Linear(WIDTH, 3)}), Tree(new | {"head": nn.Linear(WIDTH, 3)})
    report = transfer_weights(target, source.state_dict(), min_coverage=0.0, incompatible_pairs=[({"l"}, {"left"})])
    assert "head.weight" in report.loaded
    assert "left.weight" not in report.loaded


@pytest.mark.parametrize("ordered", [True, False])
def test_initials_pair_nothing_where_parts_are_gone_and_others_new(ordered: bool):
    old = network("embed:table l_out:map:1 r_out:map:2 extra:head:3 scale:norm:4", range(1))
    new = network("embed:table lidar_out:map:5 radar_out:map:6 shift:whole:7", range(1))
    wrong, right = wrong_and_right(old, new, ordered=ordered)
    assert not wrong
    assert right == {"table"}


def towers(names: str, inside: str = "stem:table:t fc1:map:a fc2:pair:b", more: str = "") -> dict[str, Row]:
    """Networks of the same layers beside each other, numbered by their order, and more beside them."""
    layers = [part.split(":") for part in inside.split()]
    rows = {f"{name}.{at}": (make, f"{k}.{own}") for k, name in enumerate(names.split()) for at, make, own in layers}
    return rows | network(more, range(1))


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("pi vf", "actor critic"),
        ("critic_mlp actor_mlp", "vf pi"),
        ("G_A2B G_B2A", "gen_ab gen_ba"),
        ("gen_ba gen_ab", "G_B2A G_A2B"),
        ("visual textual", "image_encoder text_encoder"),
        ("begin_net end_net", "start finish"),
    ],
)
def test_networks_are_told_by_words_that_mean_the_same(old: str, new: str, ordered: bool):
    wrong, right = wrong_and_right(towers(old), towers(new), ordered=ordered)
    assert not wrong
    assert right == {f"{k}.{part}" for k in range(2) for part in "tab"}


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    ("old", "new"),
    [("left right", "query_tower doc_tower"), ("rgb_stream flow_stream", "appearance motion"), ("pi vf", "left right")],
)
def test_networks_whose_names_say_nothing_of_each_other_stay_open(old: str, new: str, ordered: bool):
    assert not any(wrong_and_right(towers(old), towers(new), ordered=ordered))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("stem:table:t body:pair:b mu:head:1 logvar:head:2", "wte:table:t body:pair:b to_mean:head:1 to_logvar:head:2"),
        ("wte:table:t body:pair:b fc_mu:head:1 fc_var:head:2", "stem:table:t body:pair:b mu:head:1 logvar:head:2"),
        (
            "patch_embed:table:t body:pair:b begin:head:1 finish:slim:2",
            "embeddings.word:table:t body:pair:b start:head:1 end:slim:2",
        ),
    ],
)
@pytest.mark.parametrize("ordered", [True, False])
def test_entrances_and_heads_are_told_by_words_that_mean_the_same(old: str, new: str, ordered: bool):
    wrong, right = wrong_and_right(network(old, range(1)), network(new, range(1)), ordered=ordered)
    assert not wrong
    assert right == {"t", "b", "1", "2"}


@pytest.mark.parametrize("ordered", [True, False])
def test_the_output_of_an_attention_may_be_called_anything_where_the_rest_kept_its_names(ordered: bool):
    old = block("- norm1:norm:a\nattention query:map:q key:map:k value:map:v proj:map:o")
    new = block("- norm1:norm:a\nmixer query:map:q key:map:k value:map:v out:map:o")
    wrong, right = wrong_and_right(network(old, range(2)), network(new, range(2)), ordered=ordered)
    assert not wrong
    assert {"0.o", "1.o"} <= right


@pytest.mark.parametrize("ordered", [True, False])
def test_parts_are_joined_wherever_a_feed_forward_is_one(ordered: bool):
    old = block("attn qkv:whole:qkv wo:map:o\nffn gate:pair:gate up:pair:up")
    source = Tree({n: MAKES[m]() for n, (m, _) in network(old, range(2)).items()})
    whole = {n: m for n, (m, _) in network(block("attn qkv:whole:qkv wo:map:o"), range(2)).items()}
    target = Tree(
        {n: MAKES[m]() for n, m in whole.items()}
        | {f"h.{k}.feed_forward.gate_up_proj": nn.Linear(WIDTH, 4 * WIDTH) for k in range(2)}
    )
    state = source.state_dict()
    transfer_weights(target, state if ordered else dict(sorted(state.items())), min_coverage=0.0)
    for k in range(2):
        parts = [state[f"h.{k}.ffn.{part}.weight"] for part in ("gate", "up")]
        assert torch.equal(target.state_dict()[f"h.{k}.feed_forward.gate_up_proj.weight"], torch.cat(parts))


@pytest.mark.parametrize("ordered", [True, False])
def test_what_is_called_like_an_output_is_none_beside_one_that_is_called_like_the_queries(ordered: bool):
    old = block("attn wq:map:q wk:map:k wv:map:v wo:map:o\nfeed_forward fc1:map:1 fc2:map:2")
    new = block("- query:map:q key:map:k value:map:v proj:map:o wi:map:1 wo:map:2")
    wrong, _ = wrong_and_right(network(old, range(2)), network(new, range(2)), ordered=ordered)
    assert not wrong


@pytest.mark.parametrize("ordered", [True, False])
def test_the_tables_of_two_towers_are_no_head_that_puts_out_words(ordered: bool):
    inside = "stem:table:t {}:map:q {}:map:k {}:map:v {}:map:o neck:norm:n"
    old = towers("left right", inside.format("wq", "wk", "wv", "wo"), "loss:head:l")
    new = towers("left right", inside.format("query", "key", "value", "out"), "loss:head:l")
    wrong, right = wrong_and_right(old, new, ordered=ordered)
    assert not wrong
    assert {"0.q", "1.k"} <= right


def test_a_list_of_blocks_in_a_tower_without_a_name_is_that_of_the_named_one_whose_like_is_told():
    inside = "{}.0.fc1:map:1 {}.0.fc2:pair:2 {}.1.fc1:map:3 {}.1.fc2:pair:4"
    old = towers("visual.transformer transformer", inside.replace("{}", "resblocks"), "embed:table head:head")
    new = towers("visual_model.encoder text_model.encoder", inside.replace("{}", "layers"), "embed:table head:head")
    wrong, right = wrong_and_right(old, new)
    assert not wrong
    assert {"0.1", "1.4"} <= right


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("attn.q_proj:map:q attn.v_proj:map:v", "attn.q_proj:map:q attn.wg:map:g"),
        ("attn.q:map:q attn.k:map:k gate_msa:norm:a", "attn.q:map:q attn.k:map:k gate_mlp:norm:b"),
        ("q:map:q obs_rms.mean:norm:a", "q:map:q ret_rms.mean:norm:b"),
    ],
    ids=["letters", "gates", "statistics"],
)
def test_what_is_left_is_no_partner_if_letters_or_its_place_mean_something_else(old: str, new: str, ordered: bool):
    sides = (network(f"embed:table {rows} head:head", range(1)) for rows in (old, new))
    wrong, right = wrong_and_right(*sides, ordered=ordered)
    assert not wrong
    assert {"table", "head", "q"} <= right


@pytest.mark.parametrize("ordered", [True, False])
def test_words_that_mean_the_same_tell_nothing_beside_rivals_of_which_nothing_tells(ordered: bool):
    old = towers("visual audio", more="embed:table head:head")
    new = towers("image depth", more="embed:table head:head")
    wrong, right = wrong_and_right(old, {n: (m, k.replace("1.", "2.")) for n, (m, k) in new.items()}, ordered=ordered)
    assert not wrong
    assert {"table", "head"} <= right
