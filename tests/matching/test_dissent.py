"""What speaks against a pair: numbers, letters, order, alphabets, and what stands in another module.

Each test holds one kind of refactor with known truth. Every tensor of the new model that is loaded must hold the right
values; what nothing tells may stay open.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest
import torch
from small_nets import Tree
from torch import Tensor, nn

from lit_wsl import transfer_weights
from lit_wsl.matching.fusion import order_of_parts
from lit_wsl.matching.likeness import liken
from lit_wsl.matching.planner import by_alphabet, has_order, is_sorted
from lit_wsl.structure.description import ParameterInfo, describe
from lit_wsl.structure.families import find_average

WIDTH = 8


def linear(inputs: int = WIDTH, outputs: int = WIDTH, *, bias: bool = True) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=bias)


def norm(width: int = WIDTH) -> nn.Module:
    return nn.LayerNorm(width)


def loaded(
    old: Mapping[str, nn.Module], new: Mapping[str, nn.Module], truth: Mapping[str, str], *, drop: str = ""
) -> set[str]:
    """Transfer, check that nothing is wrong, and return the new modules that were filled.

    Args:
        old: The old network.
        new: The new network.
        truth: New module -> the old module that it was.
        drop: End of the names that the checkpoint leaves out.
    """
    source, target = Tree(old), Tree(new)
    for tensor in (*source.state_dict().values(), *target.state_dict().values()):
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor))
    state = {k: v for k, v in source.state_dict().items() if not drop or not k.endswith(drop)}
    before = {k: v.clone() for k, v in target.state_dict().items()}
    transfer_weights(target, state, min_coverage=0.0)
    filled = set()
    for name, tensor in target.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if torch.equal(tensor, before[name]):
            continue
        wanted: Tensor | None = state.get(f"{truth.get(module)}.{leaf}")
        assert wanted is not None, f"{name} should have stayed"
        assert torch.equal(tensor, wanted), f"{name} holds something else"
        filled.add(module)
    return filled


def test_members_of_a_list_are_not_exchanged_where_sizes_coincide_by_chance():
    old = {f"groupings.{k}.{n}": m for k in (0, 1) for n, m in _stage(8 * (k + 1)).items()}
    new = {f"grouping.{k}.{n}": m for k in (0, 1) for n, m in _stage(8 * (k + 1)).items()}
    truth = {name: name.replace("grouping", "groupings") for name in new}
    # without the biases of the first stage's maps, sizes of one stage are those of another
    loaded(old, new, truth, drop="groupings.0.mlp.0.bias")


def _stage(width: int) -> dict[str, nn.Module]:
    return {"mlp.0": linear(4, width), "mlp.1": linear(width, 16), "norms.0": norm(16), "norms.1": norm(16)}


@pytest.mark.parametrize("names", [("to_q", "to_k"), ("query", "value"), ("wk", "wv")])
def test_queries_never_become_keys_or_values(names: tuple[str, str]):
    ours, theirs = names
    filled = loaded({f"block.{ours}": linear()}, {f"layer.{theirs}": linear()}, {})
    assert filled == set()


def test_a_value_beside_a_gate_is_no_value_of_an_attention():
    old = {f"b.{n}": linear() for n in ("wq", "wk", "wv", "wo", "mlp.act_fn", "mlp.value", "mlp.output")}
    new = {f"h.{n}": linear() for n in ("query", "key", "value", "proj", "ff.gate", "ff.up", "ff.down")}
    truth = dict(zip(new, old))
    assert "h.value" not in loaded(old, new, truth) or truth["h.value"] == "b.wv"


def test_norms_may_stand_in_other_modules_than_before():
    def block(attn: str, ff: str) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {f"{attn}.{n}": linear() for n in ("q", "k", "v", "out")}
        return parts | {f"{ff}.up": linear(WIDTH, 24), f"{ff}.down": linear(24, WIDTH)}

    # a post-norm network: the norm after the attention stood in the attention, now it stands in front of what follows
    old = {**block("attn", "ffn"), "attn.norm": norm(), "ffn.norm": norm()}
    new = {**block("attention", "mlp"), "mlp.norm": norm(), "norm_out": norm()}
    truth = {n: n.replace("attention", "attn").replace("mlp", "ffn") for n in new}
    truth |= {"mlp.norm": "attn.norm", "norm_out": "ffn.norm"}
    filled = loaded(old, new, truth)
    assert {n for n in new if "norm" not in n} <= filled


def test_two_heads_of_one_size_are_not_told_apart_by_their_order():
    body = {f"layers.{k}.fc": linear(WIDTH, WIDTH * (k + 2)) for k in range(3)}
    old = {**body, "begin": linear(32, 3), "finish": linear(32, 3)}
    new = {**body, "end": linear(32, 3), "start": linear(32, 3)}
    truth = {n: n for n in body} | {"end": "finish", "start": "begin"}
    assert {"end", "start"}.isdisjoint(loaded(old, new, truth))


def test_a_word_is_as_near_to_its_inflection_as_to_itself_beside_another_word():
    assert liken(["enrich"], ["enrichment"]).shared > liken(["enrich"], ["context", "enrich"]).shared
    assert liken(["enrich"], ["enrich"]).shared > liken(["enrich"], ["enrichment"]).shared


@pytest.mark.parametrize("pair", [("reg", "foreground"), ("ln", "latents"), ("fc", "focal")])
def test_letters_inside_a_word_are_no_abbreviation(pair: tuple[str, str]):
    assert liken([pair[0]], [pair[1]]).shared == 0


def test_a_word_for_a_kind_of_module_does_not_tell_which():
    parts = ("q", "k", "v", "out")
    old = {f"block.{a}.{p}": linear() for a in ("spatial", "time_attn") for p in parts}
    new = {f"block.{a}.{p}": linear() for a in ("space_attention", "temporal") for p in parts}
    truth = {
        f"block.{b}.{p}": f"block.{a}.{p}"
        for a, b in (("spatial", "space_attention"), ("time_attn", "temporal"))
        for p in parts
    }
    loaded(dict(reversed(old.items())), new, truth)


def test_a_map_of_one_output_is_no_norm():
    old = {"score": linear(WIDTH, 1, bias=False)}
    new = {"score_norm": nn.RMSNorm(WIDTH)}
    assert loaded(old, new, {}) == set()


def test_registration_in_alphabetical_order_says_nothing():
    names = [
        "attention.key.w",
        "attention.output.w",
        "attention.query.w",
        "embed.w",
        "ffn.down.w",
        "ffn.up.w",
        "norm.w",
    ]
    infos = [ParameterInfo(name, (2,)) for name in names]
    assert by_alphabet(infos)
    assert not by_alphabet([infos[2], *infos])
    assert not by_alphabet([ParameterInfo(f"net.{k}.w", (2,)) for k in range(9)])


def test_an_average_may_be_a_list_in_the_order_of_the_model():
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (2, 3), "a.mean": (2,), "b.weight": (4, 2), "b.bias": (4,)}
    average = {"ema.shadow_params.0": (2, 3), "ema.shadow_params.1": (4, 2), "ema.shadow_params.2": (4,)}
    found = find_average({**shapes, **average})
    assert found is not None
    assert found.pairs == {
        "a.weight": "ema.shadow_params.0",
        "b.weight": "ema.shadow_params.1",
        "b.bias": "ema.shadow_params.2",
    }
    assert find_average({**shapes, "ema.shadow_params.0": (9, 9), "ema.shadow_params.1": (4, 2)}) is None


def test_many_layers_at_the_root_are_no_averages_of_each_other():
    tensors = ("attn.in_proj_weight", "attn.in_proj_bias", "norm.weight", "norm.bias", "norm.mean", "norm.var")
    shapes: dict[str, tuple[int, ...]] = {f"{i}.{tensor}": (8, 8) for i in range(500) for tensor in tensors}
    began = time.process_time()
    assert find_average(shapes) is None
    assert time.process_time() - began < 5.0  # of hours, where every layer is compared with all others
    lost = {"shadow." + name.replace(".", ""): shape for name, shape in shapes.items()}
    found = find_average({**shapes, **lost})
    assert found is not None
    assert found.prefix == "shadow."
    assert found.pairs == {name: "shadow." + name.replace(".", "") for name in shapes}


def check(old: Mapping[str, nn.Module], new: Mapping[str, nn.Module], truth: Mapping[str, str]) -> None:
    """Nothing wrong, whatever the order of either side and with a checkpoint in alphabetical order."""
    for source in (old, dict(reversed(old.items())), dict(sorted(old.items()))):
        for target in (new, dict(reversed(new.items()))):
            loaded(source, target, truth)


def test_a_list_counted_down_is_seen_by_the_sizes_of_its_members():
    widths = (32, 16, 16, 8)  # the middle ones have one size, so only the ends tell
    old = {f"up.{k}": linear(24, w) for k, w in enumerate(widths)}
    new = {f"up_blocks.{k}": linear(24, w) for k, w in enumerate(reversed(widths))}
    filled = loaded(old, new, {f"up_blocks.{k}": f"up.{3 - k}" for k in range(4)})
    assert filled.isdisjoint({"up_blocks.1", "up_blocks.2"})


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (("reset_gate", "update_gate"), ("z", "r")),
        (("word2char", "char2word"), ("char_to_word", "word_to_char")),
        (("x2i", "x2f"), ("forget_gate", "input_gate")),
        (("gamma", "beta"), ("shift", "scale")),
    ],
)
def test_order_does_not_decide_against_names_that_are_a_little_alike(ours: tuple[str, str], theirs: tuple[str, str]):
    around = {"embed": linear(4, WIDTH), "hidden": linear(WIDTH, 12), "output": linear(12, 3)}
    old = {**around, **{f"cell.{n}": linear() for n in ours}}
    new = {**around, **{f"cell.{n}": linear() for n in theirs}}
    truth = {n: n for n in around} | {f"cell.{theirs[1]}": f"cell.{ours[0]}", f"cell.{theirs[0]}": f"cell.{ours[1]}"}
    loaded(old, new, truth)


class Bare(nn.Module):
    """Parameters without a module of their own."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


def test_matrices_that_only_fit_crosswise_in_another_make_stay_open():
    old = {f"sae.{k}": Bare(W_enc=(WIDTH, 24), W_dec=(24, WIDTH)) for k in range(3)}
    for names in (("encode", "decode"), ("decode", "encode")):
        sizes = {"encode": linear(WIDTH, 24, bias=False), "decode": linear(24, WIDTH, bias=False)}
        new = {f"sae.{k}.{n}": sizes[n] for k in range(3) for n in names}
        assert loaded(old, new, {}) == set()


def test_stacked_experts_that_only_fit_crosswise_stay_open():
    old = {"layer": Bare(w1=(4, WIDTH, 24), w2=(4, 24, WIDTH))}
    new = {"layer.experts": Bare(up=(4, 24, WIDTH), down=(4, WIDTH, 24))}
    assert loaded(old, new, {}) == set()


@pytest.mark.parametrize(("ours", "theirs"), [("cls_token", "mask_token"), ("speaker_embed", "emotion_embed")])
def test_the_only_new_name_among_old_ones_may_be_a_new_part(ours: str, theirs: str):
    words = ("stem", "trunk", "neck", "tail")
    around: dict[str, nn.Module] = {word: linear(WIDTH, WIDTH * (k + 2)) for k, word in enumerate(words)}
    old, new = {**around, ours: nn.Embedding(6, WIDTH)}, {**around, theirs: nn.Embedding(6, WIDTH)}
    assert theirs not in loaded(old, new, {n: n for n in around})
    assert theirs not in loaded(dict(sorted(old.items())), new, {n: n for n in around})


def test_values_of_a_function_are_other_values():
    assert loaded(
        {"net": linear(), "p": Bare(log_sigma=(3,))}, {"net": linear(), "p": Bare(sigma=(3,))}, {"net": "net"}
    ) <= {"net"}


def test_a_kernel_along_one_axis_is_none_along_the_other():
    old = {"a": nn.Conv2d(4, 4, (1, 7)), "b": nn.Conv2d(4, 4, (7, 1))}
    new = {"a": nn.Conv2d(4, 4, (7, 1)), "b": nn.Conv2d(4, 4, (1, 7))}
    check(old, new, {"a": "b", "b": "a"})


def test_a_map_whose_biases_show_its_outputs_is_not_transposed():
    assert "proj" not in loaded({"proj": linear(8, 32)}, {"proj": linear(32, 8)}, {})


@pytest.mark.parametrize(
    "parts", [["b._.weight", "b.__.weight"], ["b.w_", "b.w"], ["b.weight_g.weight", "b.weight_.weight"]]
)
def test_parts_without_a_letter_of_their_own_have_no_known_order(parts: list[str]):
    found = order_of_parts("b.qkv.weight", parts)
    assert sorted(found.order) == [0, 1]


@pytest.mark.parametrize("towers", [("rgb_stream", "flow_stream"), ("left", "right")])
def test_towers_of_other_names_need_more_than_one_sibling_in_order(towers: tuple[str, str]):
    def net(names: tuple[str, ...]) -> dict[str, nn.Module]:
        inner = {f"{n}.{k}.{b}": linear() if b < "d" else norm() for n in names for k in (0, 1) for b in "abcdef"}
        return {"stem": linear(5, WIDTH), **inner}

    assert loaded(net(towers), net(("appearance", "motion")), {"stem": "stem"}) == {"stem"}


def test_a_head_called_after_a_letter_is_no_other_head():
    old = {"stem": linear(5, WIDTH), "d_out": linear(WIDTH, 1), "n_out": linear(WIDTH, 3)}
    new = {"stem": linear(5, WIDTH), "domain_discriminator": linear(WIDTH, 1), "n_out": linear(WIDTH, 3)}
    assert loaded(old, new, {"stem": "stem", "n_out": "n_out"}) == {"stem", "n_out"}


def test_a_batch_norm_is_no_layer_norm():
    """Running statistics tell the kind of a norm, whatever the names share."""
    old = {f"blocks.{k}.{n}": m() for k in range(2) for n, m in (("ln_convolution", norm), ("convolution.normal", bn))}
    new = {f"layers.{k}.{n}": m() for k in range(2) for n, m in (("conv_layer_norm", norm), ("bn", bn))}
    truth = {
        f"layers.{k}.{ours}": f"blocks.{k}.{theirs}"
        for k in range(2)
        for ours, theirs in (("conv_layer_norm", "ln_convolution"), ("bn", "convolution.normal"))
    }
    assert loaded(old, new, truth) == set(new)


def bn() -> nn.Module:
    return nn.BatchNorm1d(WIDTH)


def test_parts_of_a_whole_stand_equally_deep():
    old = {"ff.hidden": linear(), "ff.out": linear(8, 12), "hidden": linear(), "head": linear(8, 3)}
    new = {"ff.hidden": linear(8, 16), "ff.out": linear(8, 12), "head": linear(8, 3)}
    assert "ff.hidden" not in loaded(old, new, {n: n for n in ("ff.out", "head")})


def test_twins_counted_from_another_number_are_not_mixed():
    """``qf1`` and ``qf2`` became ``qf0`` and ``qf1``; one of them was written otherwise, and lost a layer since."""
    layers = {"qf1": ("fcs.0", "fcs.1", "fcs.2"), "qf2": ("one.0", "one.1", "two.0")}
    old = {f"{q}.{n}": linear() for q, names in layers.items() for n in names}
    old |= {"qf1.out": linear(8, 1), "qf2.out": linear(8, 1)}
    new = {f"qf{q}.net.{n}": linear() for q, count in ((0, 2), (1, 3)) for n in range(count)}
    new |= {"qf0.value": linear(8, 1), "qf1.value": linear(8, 1)}
    truth = {"qf0.net.0": "qf1.fcs.0", "qf0.net.1": "qf1.fcs.2", "qf0.value": "qf1.out", "qf1.value": "qf2.out"}
    truth |= {f"qf1.net.{k}": f"qf2.{n}" for k, n in enumerate(layers["qf2"])}
    loaded(old, new, truth)


OPPOSITES = [("self_attn", "cross_attn"), ("text_proj", "vision_proj"), ("lora_q", "lora_k"), ("down_net", "up_net")]


@pytest.mark.parametrize(("ours", "theirs"), [*OPPOSITES, *((b, a) for a, b in OPPOSITES)])
def test_words_that_tell_siblings_apart_are_no_other_names(ours, theirs):
    """A part gave way to its counterpart; everything else kept its name."""
    old = {f"blocks.{k}.{n}": m for k in range(2) for n, m in _with(ours).items()}
    new = {f"blocks.{k}.{n}": m for k in range(2) for n, m in _with(theirs).items()}
    kept = {n: n for n in new if theirs not in n}
    assert loaded(old, new, kept) == set(kept)


def _with(part: str) -> dict[str, nn.Module]:
    return {"norm": norm(), f"{part}.a": linear(8, 4), f"{part}.b": linear(4, 8), "fc": linear(8, 16)}


RESIZED: list[tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]] = [
    ({"image.fc": (8, 12), "text.fc": (8, 16)}, {"image.fc": (8, 16), "text.fc": (8, 12)}),
    ({"critic.0": (8, 1), "actor.0": (6, 2)}, {"critic_net.0": (10, 1), "actor_net.0": (8, 1)}),
    ({"body": (8, 8), "fc": (8, 5)}, {"body": (8, 8), "fc": (8, 7), "fc_rotation": (8, 5)}),
    ({"encoder.0": (16, 4), "decoder.0": (4, 16)}, {"encoder.0": (4, 16), "decoder.0": (16, 4)}),
]


@pytest.mark.parametrize(("ours", "theirs"), RESIZED)
def test_what_was_resized_is_not_free_for_a_stranger_of_its_old_size(ours, theirs):
    old, new = ({n: linear(*size) for n, size in side.items()} for side in (ours, theirs))
    kept = {n: n for n, size in theirs.items() if ours.get(n) == size}
    assert loaded(old, new, kept) == set(kept)


def test_towers_that_exchanged_their_depths_are_not_exchanged():
    def towers(names: tuple[str, str], blocks: str, depths: tuple[int, int]) -> dict[str, nn.Module]:
        return {f"{n}.{blocks}.{k}.fc": linear() for n, depth in zip(names, depths) for k in range(depth)}

    old = towers(("image", "text"), "layers", (1, 3))
    new = towers(("image_tower", "text_tower"), "blocks", (3, 1))
    truth = {f"{n}_tower.blocks.{k}.fc": f"{n}.layers.{k}.fc" for n in ("image", "text") for k in range(3)}
    loaded(old, new, truth)


def test_a_number_that_something_else_has_is_not_given_away():
    old = {"trunk.0.kv": linear(8, 16), "trunk.0.up": linear(), "trunk.0.down": linear()}
    new = {f"trunk.{k}.{n}": linear() for k in range(2) for n in ("k", "v", "ff.up", "ff.down")}
    loaded(old, new, {f"trunk.0.ff.{n}": f"trunk.0.{n}" for n in ("up", "down")})


def _ordered(names: list[str]) -> bool:
    side = describe({n: torch.zeros(1) for n in names})
    return has_order(side) and not is_sorted(side)


def test_a_dict_whose_modules_are_torn_apart_has_no_order():
    names = [f"{b}.{m}.{p}" for b in ("stem", "body") for m in ("norm", "conv", "fc") for p in ("weight", "bias")]
    assert _ordered(names)
    assert not _ordered([*names[1:], names[0]])  # a module's tensors apart
    assert not _ordered([*names[:2][::-1], *names[2:]])  # a bias before its weight, in one module
    lists = [f"net.{k}.weight" for k in (0, 2, 1)]
    assert not _ordered([*names, *lists])
    assert _ordered([*names, *sorted(lists)])


def test_sorted_files_one_after_another_have_no_order():
    names = [f"{b}.{m}.weight" for b in ("z", "a") for m in "fedcba" for _ in range(2)]
    names = list(dict.fromkeys(f"{n}{k}" for k, n in enumerate(names)))
    assert _ordered(names)
    assert not _ordered([*sorted(names[:12]), *sorted(names[12:])])


def test_what_is_a_logarithm_is_not_the_number():
    old, new = nn.Module(), nn.Module()
    for net, name in ((old, "A_log"), (new, "A")):
        net.fc = linear()
        setattr(net, name, nn.Parameter(torch.randn(8, 4)))
    before = new.A.clone()
    transfer_weights(new, old.state_dict(), min_coverage=0.0)
    assert torch.equal(new.A, before)
    assert torch.equal(new.fc.weight, old.fc.weight)


def test_eight_bits_wait_for_their_scale():
    old, new = Tree({"fc": linear()}), Tree({"fc": linear()})
    state = old.state_dict()
    state["fc.weight"] = state["fc.weight"].to(torch.float8_e4m3fn)
    report = transfer_weights(Tree({"fc": linear()}), state)
    assert "fc.weight" in report.plan.by_target  # without a scale the numbers are what they say
    state["fc.weight_scale_inv"] = torch.rand(1, 1)
    report = transfer_weights(new, state, min_coverage=0.0)
    assert "fc.weight" not in report.plan.by_target
    assert any("dequantise" in note for note in report.plan.notes)


def test_a_torn_dict_may_still_contradict_numbers():
    """A dict whose modules are torn apart confirms nothing; that its blocks stand the other way round is not lost."""
    parts = ("up", "down", "query", "out")
    sizes = {"up": (8, 12), "down": (12, 8), "query": (8, 6), "out": (6, 8)}
    old = {f"a.{k}.{n}": linear(*sizes[n]) for k in (1, 0) for n in reversed(parts)}
    state = {n: torch.randn_like(t) for n, t in Tree(old).state_dict().items()}
    first, *rest = state
    state = {**{n: state[n] for n in rest}, first: state[first]}
    new = Tree({f"blocks.{k}.{n}": linear(*sizes[n]) for k in (0, 1) for n in parts})
    before = {n: t.clone() for n, t in new.state_dict().items()}
    transfer_weights(new, state, min_coverage=0.0)
    assert all(torch.equal(t, before[n]) for n, t in new.state_dict().items())


@pytest.mark.parametrize(("stages", "blocks"), [(3, 2), (2, 2)])
def test_lists_that_exchanged_their_levels_are_not_paired_by_their_place(stages, blocks):
    old = {f"stages.{i}.cells.{j}.fc": linear() for i in range(stages) for j in range(blocks)}
    new = {f"cells.{j}.stages.{i}.fc": linear() for j in range(blocks) for i in range(stages)}
    truth = {f"cells.{j}.stages.{i}.fc": f"stages.{i}.cells.{j}.fc" for i in range(stages) for j in range(blocks)}
    loaded(old, new, truth)


@pytest.mark.parametrize(
    ("ours", "theirs", "truth"),
    [
        (("undilated", "atrous"), ("plain", "kernel_dilated"), {"plain": "undilated", "kernel_dilated": "atrous"}),
        (("causal", "context"), ("sa", "ca"), {"sa": "causal", "ca": "context"}),
        (("cs", "selector"), ("static", "choose"), {"static": "cs", "choose": "selector"}),
        (("tail_norm", "g_norm"), ("dec_norm", "final"), {"dec_norm": "tail_norm", "final": "g_norm"}),
    ],
)
def test_a_negation_a_syllable_and_a_kind_are_no_shared_words(ours, theirs, truth):
    def net(names):
        return {name: linear() for name in names}

    loaded(dict(sorted(net(ours).items())), net(theirs), truth)


def test_what_is_counted_backwards_has_no_order():
    def block(first: str, second: str) -> dict[str, nn.Module]:
        return {"enter": linear(4), first: norm(), "fc1": linear(8, 16), second: norm(), "fc2": linear(16, 8)}

    old = {f"blocks.{k}.{n}": m for k in range(4) for n, m in block("norm2", "norm1").items()}
    new = {f"layers.{k}.{n}": m for k in range(4) for n, m in block("ln_m", "ln_t").items()}
    names = {"ln_m": "norm1", "ln_t": "norm2"}
    truth = {n: ".".join(names.get(w, w) for w in n.replace("layers", "blocks").split(".")) for n in new}
    loaded(old, new, truth)


def test_another_head_of_the_same_size_waits_for_a_word():
    def net(head: str) -> dict[str, nn.Module]:
        return {"stem": linear(4), "trunk": linear(), head: linear(8, 3)}

    assert loaded(net("fc"), net("reward_model"), {"stem": "stem", "trunk": "trunk"}) == {"stem", "trunk"}


def test_a_part_of_a_fused_matrix_shows_how_squares_beside_it_are_stored():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = (nn.Parameter(torch.randn(8, n)) for n in (16, 8))

    old = Tree({"attn.q": linear(bias=False), "attn.k": linear(8, 4, bias=False), "attn.v": linear(8, 4, bias=False)})
    old.attn.out = linear(bias=False)
    new = nn.ModuleDict({"attn": Bare()})
    before = new.attn.out.clone()
    transfer_weights(new, old.state_dict(), min_coverage=0.0)
    assert torch.equal(new.attn.out, old.attn.out.weight.T) or torch.equal(new.attn.out, before)


def test_norms_counted_by_number_are_those_counted_by_place():
    def block(first: str, second: str) -> dict[str, nn.Module]:
        return {first: norm(), second: norm(), "attn": linear(), "mlp.up": linear(8, 16), "mlp.down": linear(16, 8)}

    new = block("self_attn_layer_norm", "final_layer_norm")
    truth = {n: n for n in new} | {"self_attn_layer_norm": "norm1", "final_layer_norm": "norm2"}
    assert loaded(dict(sorted(block("norm1", "norm2").items())), new, truth) == set(new)


def test_queries_beside_a_fused_whole_are_queries():
    old = {"self_attn.query": linear(), "self_attn.key": linear(8, 4), "self_attn.value": linear(8, 4)}
    new = {"attn.self.query_proj": linear(), "attn.kv": linear()}
    old["self_attn.output"], new["attn.output.dense"] = linear(), linear()
    net, source = Tree(new), Tree(old)
    plan = transfer_weights(net, source.state_dict(), min_coverage=0.0).plan
    reasons = {a.targets[0]: a.reason for a in plan.ambiguous}
    assert "named after the queries" not in reasons.get("attn.self.query_proj.weight", "")


def test_a_numbered_list_of_projections_may_stand_in_any_order():
    letters = "kvqo"  # as in Whisper's attention

    def layer(*names: str) -> dict[str, nn.Module]:
        return {f"attn.{n}": linear() for n in names} | {"attn.norm": norm()}

    new = layer(*(f"{letter}_proj" for letter in letters))
    names = {f"{letter}_proj": f"lins.{k}" for k, letter in enumerate(letters)}
    truth = {n: n.replace(n.rpartition(".")[2], names.get(n.rpartition(".")[2], "norm")) for n in new}
    loaded(layer(*names.values()), new, truth)


def test_a_shortcut_is_known_from_the_stages_where_its_size_tells():
    def stage(before: int, width: int, names: tuple[str, str], *, first: bool) -> dict[str, nn.Module]:
        body, shortcut = names
        parts = {f"{body}.0": nn.Linear(before, 8), f"{body}.1": nn.Linear(8, width)}
        around = {shortcut: nn.Linear(before, width)}
        return {**around, **parts} if first else {**parts, **around}

    def net(lists: str, names: tuple[str, str], *, first: bool) -> dict[str, nn.Module]:
        sizes = ((8, 32), (32, 48), (48, 64))
        return {
            f"{lists}.{k}.{n}": m for k, size in enumerate(sizes) for n, m in stage(*size, names, first=first).items()
        }

    new = net("stages", ("body", "shortcut"), first=True)
    truth = {n: n.replace("stages", "layer").replace("body", "path").replace("shortcut", "downsample") for n in new}
    assert {"stages.0.shortcut", "stages.0.body.1"} <= loaded(
        net("layer", ("path", "downsample"), first=False), new, truth
    )


def test_a_norm_inside_a_backbone_is_the_one_of_its_path_where_the_new_head_has_a_norm_too():
    def body(around: str = "") -> dict[str, nn.Module]:
        blocks = {f"blocks.{k}.{n}": m for k in range(3) for n, m in {"norm": norm(), "fc": linear()}.items()}
        return {f"{around}{n}": m for n, m in {"stem": linear(4), **blocks, "norm": norm()}.items()}

    new = {**body("backbone."), "head.0": norm(), "head.1": linear(8, 3)}
    assert loaded(body(), new, {n: n.removeprefix("backbone.") for n in body("backbone.")}) == set(body("backbone."))


def test_a_branch_inside_of_a_model_is_no_head():
    def net(names: str) -> dict[str, nn.Module]:
        stem, out, *branches = names.split()
        parts = {f"mixed.{b}.map": linear(8, 5 + k) for k, b in enumerate(branches)}
        return {stem: linear(4), **parts, f"{stem}_2": linear(), f"{stem}_3": linear(), out: linear(26, 3)}

    new = net("entry head stream_x stream_y stream_z stream_w")
    truth = dict(zip(new, net("begin head branch_a branch_b branch_c branch_d")))
    filled = loaded(net("begin head branch_a branch_b branch_c branch_d"), new, truth)
    assert {"mixed.stream_x.map", "mixed.stream_w.map"} <= filled


@pytest.mark.parametrize(("more", "kept"), [({}, True), ({"mask": "segment"}, False)])
def test_one_of_several_heads_is_not_told_by_its_size_alone(more: dict[str, str], kept: bool):
    def net(stem: str, list_name: str, layer: str, *heads: str) -> dict[str, nn.Module]:
        body = {stem: linear(4), **{f"{list_name}.{k}.{layer}": linear() for k in range(3)}}
        return body | {name: linear(8, 3 + k) for k, name in enumerate(heads)}

    old, new = net("embed", "blocks", "mix", "bbox_head", *more), net("entry", "trunk", "lift", "roi", *more.values())
    assert ("roi" in loaded(old, new, dict(zip(new, old)))) == kept


def _mlp(name: str, inputs: int = 6, outputs: int = 4) -> dict[str, nn.Module]:
    return {f"{name}.0": linear(inputs), f"{name}.2": linear(), f"{name}.4": linear(WIDTH, outputs)}


def _between(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Parts between siblings whose names and sizes say who they are."""
    first: dict[str, nn.Module] = {"stem": linear(4, 12), "norm0": norm(12)}
    return {**first, **parts, "norm1": norm(6), "head": linear(12, 5)}


@pytest.mark.parametrize(
    "names",
    [
        ("encoder_q encoder_k", "online_encoder momentum_encoder"),
        ("search template", "instance exemplar"),
        ("actor critic", "pi vf"),
        ("fc_mu fc_logvar", "to_loc to_scale"),
    ],
)
def test_twins_that_alone_were_renamed_may_stand_in_another_order(names: tuple[str, str]):
    ours, theirs = (side.split() for side in names)
    old = _between({n: m for name in ours for n, m in _mlp(name).items()})
    new = _between({n: m for name in reversed(theirs) for n, m in _mlp(name).items()})
    truth = {n: n.replace(theirs[0], ours[0]).replace(theirs[1], ours[1]) for n in new}
    loaded(old, new, truth)


def test_of_two_that_follow_one_order_none_follows_it_alone():
    old = _between({"src_tok_emb": nn.Embedding(20, 8), "tgt_tok_emb": nn.Embedding(20, 8)})
    new = _between({"embed_out": nn.Embedding(20, 8), "embed_in": nn.Embedding(20, 8)})
    loaded(old, new, {n: n for n in old} | {"embed_out": "tgt_tok_emb", "embed_in": "src_tok_emb"})


def _members(name: str, numbers: range) -> dict[str, nn.Module]:
    parts = {"norm": norm(), "attn.qkv": linear(WIDTH, 24), "attn.proj": linear()}
    return {f"{name}.{k}.{n}": m for k in numbers for n, m in parts.items()}


@pytest.mark.parametrize("by_turns", [True, False])
def test_a_list_that_became_two_was_cut_or_dealt_out(by_turns: bool):
    old = {"embed": linear(4), **_members("layers", range(6)), "head": linear(8, 2)}
    first, second = ("self_layers", "cross_layers") if by_turns else ("late", "early")
    new = {"embed": linear(4), **_members(first, range(3)), **_members(second, range(3)), "head": linear(8, 2)}

    def place(name: str) -> str:
        part, _, rest = name.partition(".")
        if part not in (first, second):
            return name
        number, _, inside = rest.partition(".")
        k = int(number)
        at = 2 * k + (part == second) if by_turns else k + 3 * (part == first)
        return f"layers.{at}.{inside}"

    loaded(old, new, {n: place(n) for n in new})


def test_a_whole_list_is_no_member_of_the_list_of_its_name():
    old = {n: m for k in range(2) for n, m in _members(f"stacks.item{k}.deep", range(2)).items()}
    new = {n: m for k in range(3) for n, m in _members(f"stacks.{k}.blocks", range(4)).items()}
    loaded(old, new, {})  # two blocks of each of the new stacks are new, nobody knows which


def test_twins_that_are_counted_down_on_one_side_only_have_no_order():
    old = {n: m for name in ("proposal", "final") for n, m in _mlp(f"{name}_field").items()}
    new = {n: m for k in (1, 0) for n, m in _mlp(f"field_{k}").items()}
    truth = {n: n.replace("field_0", "proposal_field").replace("field_1", "final_field") for n in new}
    assert loaded(old, new, truth) == set()


def test_where_nothing_else_was_renamed_another_token_is_another_one():
    class Tokens(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            for name in names:
                self.register_parameter(name, nn.Parameter(torch.randn(1, 1, WIDTH)))
            self.fc = linear(WIDTH, 3)

    for ours, theirs in ((("cls_token",), "mask_token"), (("cls_token", "mask_token"), "dist_token")):
        old, new = Tokens(*ours), Tokens(*ours[:-1], theirs)
        fresh = getattr(new, theirs).clone()
        transfer_weights(new, old.state_dict(), min_coverage=0.0)
        assert torch.equal(getattr(new, theirs), fresh)


def test_what_is_left_of_two_towers_is_not_the_last_one_if_it_says_something_else():
    old = {**_mlp("audio_encoder"), **_mlp("text_encoder"), "fusion": linear(8, 3)}
    new = {**_mlp("video_enc"), **_mlp("text_enc"), "fuse": linear(8, 3)}
    truth = {n: n.replace("text_enc", "text_encoder").replace("fuse", "fusion") for n in new if "video" not in n}
    loaded(old, new, truth)


def test_buffers_of_one_network_are_not_those_of_another_that_lost_a_block():
    def network(name: str, blocks: int) -> dict[str, nn.Module]:
        parts = {f"{name}.{k}.bn": nn.BatchNorm1d(WIDTH, affine=False) for k in range(blocks)}
        return parts | {f"{name}.{k}.fc": linear() for k in range(blocks)}

    old = {**network("encoder_q.layer", 1), **network("encoder_k.layer", 2)}
    loaded(old, network("encoder_q.convs", 2), {})


@pytest.mark.parametrize(
    "names",
    ["seg_decoder depth_decoder", "classifier regressor", "lm_head tag_head", "time_mlp cond_mlp", "policy value"],
)
@pytest.mark.parametrize("deep", [True, False])
def test_where_all_else_kept_its_name_another_task_is_a_new_part(names: str, deep: bool):
    ours, theirs = names.split()
    part = _mlp if deep else (lambda name: {name: linear(WIDTH, 3)})

    def net(name: str) -> dict[str, nn.Module]:
        return {"entry": linear(5), "body": linear(), **part(name)}

    kept = {"entry", "body"}
    assert loaded(net(ours), net(theirs), {n: n for n in kept}) == kept


def test_the_letter_of_a_network_names_no_key():
    old = {**_mlp("encoder_q"), **_mlp("encoder_k"), "out": linear(WIDTH, 3)}
    new = {**_mlp("keypoints"), **_mlp("queue"), "out": linear(WIDTH, 3)}
    assert loaded(old, new, {"out": "out"}) == {"out"}


def test_what_stands_before_something_is_not_what_stands_before_all():
    def block(*norms: str) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {f"attn.{n}": linear() for n in "qkv"}
        return {f"blocks.0.{n}": m for n, m in {norms[0]: norm(), **parts, norms[1]: norm()}.items()}

    # registered the other way round, so that order says nothing
    old = dict(reversed(block("input_layernorm", "pre_feedforward_layernorm").items()))
    new = block("pre_norm", "mid_norm")
    truth = {n: n for n in new} | {"blocks.0.pre_norm": "blocks.0.input_layernorm"}
    loaded(old, new, truth | {"blocks.0.mid_norm": "blocks.0.pre_feedforward_layernorm"})


def _encoder(entry: nn.Module, around: str, attention: Mapping[str, int], end: str) -> dict[str, nn.Module]:
    feed = {"mlp.linear_fc1": linear(WIDTH, 16, bias=False), "mlp.linear_fc2": linear(16, WIDTH, bias=False)}
    block = {
        **{f"attention.{n}": linear(WIDTH, size, bias=False) for n, size in attention.items()},
        "layernorm_before": norm(),
        **feed,
    }
    return {"entry": entry, **{f"{around}.0.{n}": m for n, m in block.items()}, end: norm()}


def test_two_towers_are_told_apart_by_what_only_one_of_them_holds():
    """A tower's name is like the other's, but it holds the table of words, and the other the patches."""
    fused = {"self.query": WIDTH, "kv": 16, "output.dense": WIDTH}
    apart = dict.fromkeys(("q", "k", "v", "output.dense"), WIDTH)
    entries = nn.Conv2d(3, WIDTH, 2), nn.Embedding(19, WIDTH)
    sides = []
    for names, *inside in (
        (("my_vision_encoder", "my_detr_encoder"), "my_resblocks", fused, "final_layer_norm"),
        (("keypoint_detector", "transformer_layers"), "layer1", apart, "ln_out"),
    ):
        towers = {name: _encoder(entry, *inside) for name, entry in zip(names, entries)}
        sides.append(Tree({f"{name}.{n}": m for name, tower in towers.items() for n, m in tower.items()}))
    plan = transfer_weights(sides[1], sides[0].state_dict(), min_coverage=0.0).plan
    found = {(e.targets[0].split(".")[0], s.split(".")[0]) for e in plan for s in e.sources}
    assert found <= {("keypoint_detector", "my_vision_encoder"), ("transformer_layers", "my_detr_encoder")}


def test_a_unit_that_left_its_module_under_another_name_may_be_a_new_part():
    """The norm of ``part2`` is still there, but its map is gone; a gate of that size stands beside it."""

    def blocks(middle: str) -> dict[str, nn.Module]:
        row: dict[str, nn.Module] = {}
        for k in range(2):
            row |= {f"blocks.{k}.part1.0": linear(WIDTH, 16), f"blocks.{k}.part1.1": norm(16)}
            row |= {f"blocks.{k}.{middle}": linear(16, WIDTH), f"blocks.{k}.part2.1": norm()}
        return row

    new = blocks("memory_gate")
    truth = {n: n for n in new if "gate" not in n}
    filled = loaded(blocks("part2.0"), new, truth)
    assert {n for n in new if n.endswith(".1")} <= filled


def test_parts_of_an_attention_registered_against_its_formula_are_not_counted():
    """On the other side they have only numbers, which may follow the formula or the registration."""
    formula = ("q", "k", "v", "out")
    old = {f"blocks.{k}.attn.{n}": linear() for k in range(3) for n in ("out", "q", "k", "v")}
    new = {f"blocks.{k}.attn.{n}": linear() for k in range(3) for n in range(4)}
    truth = {n: f"{n.rpartition('.')[0]}.{formula[int(n[-1])]}" for n in new}
    same = {f"blocks.{k}.feed.{n}": linear(WIDTH, width) for k in range(3) for n, width in zip("abcde", range(9, 14))}
    loaded({**old, **same}, {**new, **same}, truth | {n: n for n in same})


def test_families_of_other_lengths_follow_no_order():
    """Three evaluators and three older ones: the older ones have words now, and no numbers."""
    sizes = {"mlp": (6, 7), "score": (7, 1)}
    old = {
        f"{name}.{k}.{n}": linear(*sizes[n])
        for name in ("evaluators", "evaluators_old")
        for k in range(3)
        for n in sizes
    }
    words = ("early", "mid", "late")
    new = {f"critics.{k}.{n}": linear(*sizes[n]) for k in range(3) for n in sizes}
    new |= {f"critics_ema_{w}.{n}": linear(*sizes[n]) for w in words for n in sizes}
    truth = {n: n.replace("critics", "evaluators") for n in new if n.startswith("critics.")}
    truth |= {f"critics_ema_{w}.{n}": f"evaluators_old.{k}.{n}" for k, w in enumerate(words) for n in sizes}
    before = {"lagrange": linear(1, 2), "controller.mlp": linear(4, 6), "controller.mean": linear(6, 5)}
    after = {"log_temp": linear(1, 2), "agent.actor": linear(4, 6), "agent.mean": linear(6, 5)}
    loaded({**before, **old}, {**after, **new}, truth | dict(zip(after, before)))


def test_the_only_new_name_of_a_module_is_a_new_part_whatever_is_called_otherwise_elsewhere():
    def network(stem: str, last: str) -> dict[str, nn.Module]:
        row: dict[str, nn.Module] = {stem: linear(5)}
        for k in range(2):
            sizes = {"query": (WIDTH, 9), "key": (WIDTH, 10), "scale": (10, 11), last: (11, 12)}
            row |= {f"up.{k}.{n}": linear(*size) for n, size in sizes.items()}
        return row

    new = network("entry", "router_map")
    truth = {n: n for n in new if "router" not in n} | {"entry": "stem"}
    loaded(network("stem", "upsample"), new, truth)
