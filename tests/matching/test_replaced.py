"""Parts that were replaced, counted on or exchanged, as somebody wrote them down who did not know the rules.

Each case is an old network and a new one with known truth: a line per layer of the new one, and what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from small_nets import Tree
from torch import nn

from lit_wsl import transfer_weights

KINDS: Mapping[str, Callable[..., nn.Module]] = {
    "linear": nn.Linear,
    "matrix": lambda a, b: nn.Linear(a, b, bias=False),
    "table": nn.Embedding,
    "norm": nn.LayerNorm,
    "batch": nn.BatchNorm2d,
    "conv": lambda a, b: nn.Conv2d(a, b, 3, bias=False),
}


def network(text: str) -> Tree:
    """A network of lines such as ``head linear 8 5``; what stands behind an arrow is left out."""
    layers: dict[str, nn.Module] = {}
    for line in text.strip().splitlines():
        name, kind, *sizes = line.partition("<-")[0].split()
        layers[name] = KINDS[kind](*map(int, sizes))
    return Tree(layers)


def truth_of(text: str) -> dict[str, str]:
    """What each layer of the new network was: of the same name, what an arrow says, or nothing (``<- new``)."""
    lines = [line.partition("<-") for line in text.strip().splitlines()]
    return {new.split()[0]: old.strip() or new.split()[0] for new, _, old in lines}


def transferred(old: str, new: str, *, ordered: bool = True) -> set[str]:
    """Transfer, check that nothing is wrong, and return the layers of the new network that were filled."""
    source, target, truth = network(old), network(new), truth_of(new)
    for tensor in (*source.state_dict().values(), *target.state_dict().values()):
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor))
    state = source.state_dict() if ordered else dict(sorted(source.state_dict().items()))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    transfer_weights(target, state, min_coverage=0.0)
    filled = set()
    for name, tensor in target.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if tensor.is_floating_point() and not torch.equal(tensor, before[name]):
            assert truth[layer] != "new", f"{name} is new"
            assert torch.equal(tensor, state[f"{truth[layer]}.{leaf}"]), f"{name} holds something else"
            filled.add(layer)
    return filled


BODY = """
stem linear 12 8
blocks.0.qkv linear 8 24
blocks.0.proj linear 8 8
blocks.1.qkv linear 8 24
blocks.1.proj linear 8 8
head linear 8 5
"""
NEW_BODY = """
stem linear 12 8
layers.0.qkv linear 8 24 <- blocks.0.qkv
layers.0.proj linear 8 8 <- blocks.0.proj
layers.1.qkv linear 8 24 <- blocks.1.qkv
layers.1.proj linear 8 8 <- blocks.1.proj
head linear 8 5
"""


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("image_net", "text_net"),
        ("actor_net", "critic_net"),
        ("cls_net", "reg_net"),
        ("forward_net", "backward_net"),
        ("time_mlp", "class_mlp"),
        ("audio", "video"),
        ("depth_head", "confidence_head"),
        ("adversary", "calibrator"),
    ],
)
def test_a_part_of_another_meaning_is_new_though_a_list_was_renamed(part, other, ordered):
    inside = "{0}.fc1 linear 8 20{1}\n{0}.fc2 linear 20 6{1}\n"
    old, new = BODY + inside.format(part, ""), NEW_BODY + inside.format(other, " <- new")
    assert {"stem", "layers.0.qkv", "head"} <= transferred(old, new, ordered=ordered)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("names", ["embed_norm head_norm", "emb_norm final_norm", "stem_norm last_norm"])
def test_a_norm_at_the_front_does_not_become_one_at_the_end(names, ordered):
    front, end = names.split()
    old = f"stem linear 12 8\n{front} norm 8\n" + BODY.replace("stem linear 12 8\n", "").strip()
    new = f"{BODY.strip()}\n{end} norm 8 <- new"
    assert "stem" in transferred(old, new, ordered=ordered)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("conv1 bn1 conv2 bn2 conv3 bn3", "bn0 conv1 bn1 conv2 bn2 conv3"),
        ("bn1 bn2 bn3 conv1 conv2 conv3", "bn0 bn1 bn2 conv1 conv2 conv3"),
        ("conv1 bn1 conv2 bn2 conv3 bn3", "conv1 bn2 conv2 bn3 conv3 bn4"),
    ],
)
@pytest.mark.parametrize("ordered", [True, False])
def test_norms_are_not_counted_on_beside_layers_that_kept_their_numbers(old, new, ordered):
    kinds = {"c": "conv 8 8", "b": "batch 8"}
    lines = ["\n".join(f"{name} {kinds[name[0]]}" for name in side.split()) for side in (old, new)]
    new_text = "\n".join(line if line.split()[0] in old.split() else f"{line} <- new" for line in lines[1].splitlines())
    transferred(f"{lines[0]}\nfc linear 8 5", f"{new_text}\nfc linear 8 5", ordered=ordered)


def test_a_list_that_begins_later_and_ends_later_is_not_moved_on():
    rest = "stem linear 12 8\nhead linear 8 5\n"
    old = rest + "".join(f"levels.{k} linear 8 8\n" for k in (2, 3, 4))
    new = rest + "".join(f"levels.{k} linear 8 8{' <- new' if k == 5 else ''}\n" for k in (3, 4, 5))
    assert transferred(old, new) >= {"stem", "head"}


def test_a_list_that_is_counted_from_one_is_moved_by_one():
    rest = "stem linear 12 8\nhead linear 8 5\n"
    old = rest + "".join(f"levels.{k}.map linear 8 8\nlevels.{k}.norm norm 8\n" for k in range(3))
    new = rest + "".join(
        f"levels.{k + 1}.map linear 8 8 <- levels.{k}.map\nlevels.{k + 1}.norm norm 8 <- levels.{k}.norm\n"
        for k in range(3)
    )
    assert "levels.1.map" in transferred(old, new)


def test_of_twins_with_letters_none_becomes_the_other():
    pair = "{0}.0 linear 8 8{2}\n{0}.1 linear 8 8{2}\n{1}.out linear 8 1{2}\n"
    old = "gen_ab.map linear 8 12\ngen_ba.map linear 8 12\n"
    old += "".join(pair.format(f"body.disc_{x}", f"body.disc_{x}" if x == "a" else f"disc_{x}", "") for x in "ab")
    new = "netG_A.map linear 8 12 <- gen_ab.map\nnetG_B.map linear 8 12 <- gen_ba.map\n"
    for name, x in (("nA", "a"), ("nB", "b")):
        out = f"body.disc_{x}.out" if x == "a" else f"disc_{x}.out"
        new += f"{name}.0 linear 8 8 <- body.disc_{x}.0\n{name}.1 linear 8 8 <- body.disc_{x}.1\n"
        new += f"{name}.out linear 8 1 <- {out}\n"
    transferred(old, new)


@pytest.mark.parametrize("steps", [(3, 2, 1, 0), (2, 1, 0)])
def test_a_list_inside_renamed_modules_that_counts_down_on_one_side_tells_nothing(steps):
    row = sorted(steps)
    old = "".join(f"feed_forward.experts.{k}.up linear 8 24\n" for k in steps) + "feed_forward.router linear 8 4"
    new = "".join(f"ffn.experts.{k}.up linear 8 24 <- feed_forward.experts.{steps[k]}.up\n" for k in row)
    transferred(old, new + "ffn.router linear 8 4 <- feed_forward.router")


def test_numbers_tell_where_the_order_of_registration_was_changed():
    old = "".join(
        f"layers.{k}.attention.proj linear 8 8\nlayers.{k}.attention.qkv linear 8 24\nlayers.{k}.second_norm norm 8\n"
        f"layers.{k}.mlp.fc1 linear 8 16\nlayers.{k}.mlp.fc2 linear 16 8\nlayers.{k}.first_norm norm 8\n"
        for k in range(2)
    )
    new = "".join(
        f"blocks.{k}.norm1 norm 8 <- layers.{k}.first_norm\n"
        f"blocks.{k}.attn.qkv linear 8 24 <- layers.{k}.attention.qkv\n"
        f"blocks.{k}.attn.proj linear 8 8 <- layers.{k}.attention.proj\n"
        f"blocks.{k}.norm2 norm 8 <- layers.{k}.second_norm\n"
        f"blocks.{k}.mlp.fc1 linear 8 16 <- layers.{k}.mlp.fc1\nblocks.{k}.mlp.fc2 linear 16 8 <- layers.{k}.mlp.fc2\n"
        for k in range(2)
    )
    assert transferred(old, new) >= {"blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1"}


def test_what_stands_beside_certain_siblings_is_theirs():
    old = "patch linear 12 8\nblock linear 8 24\nnorm norm 8\nattn_pool.latent table 1 8\nattn_pool.map linear 8 10\n"
    old += "attn_pool.norm norm 8\n"
    new = "patch linear 12 8\nblock linear 8 24\npost norm 8 <- norm\nhead.probe table 1 8 <- attn_pool.latent\n"
    new += "head.map linear 8 10 <- attn_pool.map\nhead.ln norm 8 <- attn_pool.norm\n"
    assert transferred(old, new, ordered=False) >= {"head.ln", "post"}


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_layer_that_was_wrapped_keeps_its_weights(wrapped, ordered):
    plain = "".join(f"layers.{k}.q linear 8 8\nlayers.{k}.up linear 8 20\n" for k in range(2)) + "head linear 8 5\n"
    adapted = "".join(
        f"layers.{k}.q.base_layer linear 8 8{{0}}\nlayers.{k}.q.lora_A linear 8 2{{1}}\n"
        f"layers.{k}.q.lora_B linear 2 8{{1}}\nlayers.{k}.up linear 8 20\n"
        for k in range(2)
    )
    if wrapped:
        new = "".join(f"{line}\n" for line in adapted.format("", " <- new").splitlines()) + "head linear 8 5\n"
        new = "\n".join(f"{x} <- layers.{x.split('.')[1]}.q" if ".base_layer" in x else x for x in new.splitlines())
        assert transferred(plain, new, ordered=ordered) >= {"layers.0.q.base_layer", "layers.1.q.base_layer", "head"}
    else:
        new = "\n".join(f"{x} <- {x.split()[0]}.base_layer" if ".q " in x else x for x in plain.splitlines())
        old = adapted.format("", "") + "head linear 8 5\n"
        assert transferred(old, new, ordered=ordered) >= {"layers.0.q", "layers.1.q", "head"}


@pytest.mark.parametrize("ordered", [True, False])
def test_a_wrapped_layer_is_found_under_any_prefix(ordered):
    """Two biases of one block are no stack that has the shape of a low-rank factor."""
    layers = ("query", "key", "value", "output")
    plain = "".join(f"layer.{k}.attention.{n} linear 16 16\n" for k in range(3) for n in layers)
    adapted = "".join(
        f"base.model.layer.{k}.attention.{n}.base_layer linear 16 16\n"
        f"base.model.layer.{k}.attention.{n}.lora_A linear 16 2\n"
        f"base.model.layer.{k}.attention.{n}.lora_B linear 2 16\n"
        if n in ("query", "value")
        else f"base.model.layer.{k}.attention.{n} linear 16 16\n"
        for k in range(3)
        for n in layers
    )
    inside = {"query": ".base_layer", "value": ".base_layer"}
    new = "\n".join(
        f"{x} <- base.model.{x.split()[0]}{inside.get(x.split()[0].split('.')[-1], '')}" for x in plain.splitlines()
    )
    assert transferred(adapted, new, ordered=ordered) == {line.split()[0] for line in plain.splitlines()}


@pytest.mark.parametrize("ordered", [True, False])
def test_a_whole_may_be_called_by_its_part(ordered):
    old = "stem.conv conv 3 6\nstem.norm batch 6\nlateral_convs.0 conv 6 6\nlateral_convs.1 conv 6 6\nbox linear 6 4\n"
    new = "body.conv conv 3 6 <- stem.conv\nbody.bn batch 6 <- stem.norm\nfpn.0 conv 6 6 <- lateral_convs.0\n"
    new += "fpn.1 conv 6 6 <- lateral_convs.1\nroi linear 6 4 <- box\n"
    assert transferred(old, new, ordered=ordered) >= {"fpn.0", "fpn.1"}
    beside = (
        new.replace("fpn.", "fpn_convs.")
        .replace("<- lateral_convs.0", "<- new")
        .replace("<- lateral_convs.1", "<- new")
    )
    assert "fpn_convs.0" not in transferred(old, beside, ordered=ordered)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_version_is_no_letter(ordered):
    old = "".join(f"attn_v2.{n} linear 8 8\n" for n in ("q", "k", "v", "to_out_v2")) + "head linear 8 5\n"
    new = "".join(f"attn.{n} linear 8 8 <- attn_v2.{o}\n" for n, o in (("to_q", "q"), ("to_k", "k"), ("to_v", "v")))
    new += "attn.proj linear 8 8 <- attn_v2.to_out_v2\nhead linear 8 5\n"
    assert transferred(old, new, ordered=ordered) >= {"attn.to_q", "attn.to_k", "attn.to_v"}


def test_an_average_in_numbers_takes_no_part_in_any_order():
    """Sorted by name the list has another order than the weights; it is the average all the same."""
    sizes = [(12, 8), (8, 9), (9, 7), (7, 5)]
    names = ["vision.b", "vision.a", "trunk.second", "trunk.first"]
    old = "".join(f"{n} linear {a} {b}\n" for n, (a, b) in zip(names, sizes))
    new = "".join(f"net.{k} linear {a} {b} <- {n}\n" for k, (n, (a, b)) in enumerate(zip(names, sizes)))
    source, target = network(old), network(new)
    state = source.state_dict()
    average = {f"ema.shadow_params.{k}": torch.randn_like(t) for k, t in enumerate(state.values())}
    report = transfer_weights(target, dict(sorted((state | average).items())))
    for k, name in enumerate(names):
        assert torch.equal(target.state_dict()[f"net.{k}.weight"], state[f"{name}.weight"])
    assert any("lost its order" in note for note in report.notes)


@pytest.mark.parametrize("ordered", [True, False])
def test_lists_that_stand_in_each_other_the_other_way_round_keep_their_numbers(ordered):
    old = "".join(f"parts.{i}.rows.{j}.map conv 6 6\n" for i in range(2) for j in range(2)) + "head linear 6 4\n"
    new = "".join(f"rows.{j}.parts.{i}.map conv 6 6 <- parts.{i}.rows.{j}.map\n" for j in range(2) for i in range(2))
    assert "head" in transferred(old, new + "head linear 6 4\n", ordered=ordered)


@pytest.mark.parametrize("ordered", [True, False])
def test_parts_are_not_taken_from_one_of_two_copies(ordered):
    layers = "".join(f"{{0}}.cells.{k}.qkv linear 8 24\n{{0}}.cells.{k}.out linear 8 8\n" for k in range(2))
    parts = ("q", "k", "v")
    new = "".join(f"cells.{k}.{p}_map linear 8 8 <- new\n" for k in range(2) for p in parts)
    transferred(layers.format("tutor") + layers.format("learner"), new, ordered=ordered)


@pytest.mark.parametrize("ordered", [True, False])
def test_of_two_towers_of_one_make_the_wanted_one_is_told_by_what_it_reads(ordered):
    """As in CLIP: the image tower stands in a module, the text tower of one width and depth beside it."""

    def tower(place: str) -> str:
        return "".join(
            f"{place}blocks.{k}.ln norm 8\n{place}blocks.{k}.qkv linear 8 24\n{place}blocks.{k}.out linear 8 8\n"
            f"{place}blocks.{k}.up linear 8 20\n{place}blocks.{k}.down linear 20 8\n"
            for k in range(3)
        )

    old = f"visual.patch conv 3 8\n{tower('visual.transformer.')}words table 30 8\n{tower('transformer.')}"
    lines = ["patch conv 3 8", *tower("transformer.").splitlines()]
    for place in ("", "backbone."):
        new = "".join(f"{place}{line} <- visual.{line.split()[0]}\n" for line in lines)
        filled = transferred(old, new + "head linear 8 5 <- new\n", ordered=ordered)
        assert filled == {f"{place}{line.split()[0]}" for line in lines}
    beside = old.replace("visual.", "image_encoder.").replace("\ntransformer.", "\ntext_encoder.")
    new = "".join(f"vit.{line} <- image_encoder.{line.split()[0]}\n" for line in lines)
    assert transferred(beside, new, ordered=ordered) == {f"vit.{line.split()[0]}" for line in lines}


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("names", [("text", "image"), ("actor", "critic"), ("encoder", "decoder")])
def test_a_file_that_is_one_tower_is_no_model_of_the_other(names, ordered):
    lines = [f"blocks.{k}.{n} linear 8 {w}" for k in range(2) for n, w in (("up", 20), ("gate", 12), ("mix", 8))]
    old = "".join(f"{names[0]}.{line}\n" for line in lines)
    new = "".join(f"{names[1]}.{line.replace('blocks', 'layers')} <- new\n" for line in lines)
    assert not transferred(old, new, ordered=ordered)


@pytest.mark.parametrize("ordered", [True, False])
def test_lists_per_kind_become_blocks_by_their_numbers(ordered):
    """As in XLM: of ``norm1.1`` the first number is the kind's and the second the block's."""
    kinds = (
        ("attn", "linear 8 8"),
        ("norm1", "norm 8"),
        ("up", "linear 8 20"),
        ("down", "linear 20 8"),
        ("norm2", "norm 8"),
    )
    old = "".join(f"{n}.{k} {what}\n" for n, what in kinds for k in range(2))
    new = "".join(f"layers.{k}.{n} {what} <- {n}.{k}\n" for k in range(2) for n, what in kinds)
    assert transferred(old, new, ordered=ordered) >= {"layers.0.norm2", "layers.1.norm1"}
    convs = "".join(f"convs{j}.{k} conv 6 6\n" for j in (1, 2) for k in range(2))
    blocks = "".join(f"blocks.{k}.conv{j} conv 6 6 <- convs{j}.{k}\n" for k in range(2) for j in (1, 2))
    transferred(convs, blocks, ordered=ordered)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("width", [10, 8])
def test_what_only_numbers_tell_apart_stays_open_beside_a_list_that_was_reversed(width, ordered):
    sizes = (width, 4, 6) if width != 8 else (5, 4, 6)
    old = "".join(f"neck.lateral.{k} conv {c} 8\n" for k, c in enumerate(sizes))
    old += "".join(f"neck.convs.{k} conv 8 8\n" for k in range(3)) + "head linear 8 5\n"
    new = "".join(f"fpn.lateral.{2 - k} conv {c} 8 <- neck.lateral.{k}\n" for k, c in reversed(list(enumerate(sizes))))
    new += "".join(f"fpn.outputs.{k} conv 8 8 <- neck.convs.{2 - k}\n" for k in range(3)) + "head linear 8 5\n"
    assert "head" in transferred(old, new, ordered=ordered)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("names", [("scale_shift", "shift_scale"), ("gate_up_proj", "up_gate_proj")])
def test_parts_that_are_spelled_in_another_order_are_no_copy(names, ordered):
    old, new = (f"block.{name} linear 8 16\nblock.out linear 16 5\n" for name in names)
    new = new.replace("linear 8 16\n", "linear 8 16 <- new\n")
    assert transferred(old, new, ordered=ordered) == {"block.out"}


@pytest.mark.parametrize("ordered", [True, False])
def test_queries_keys_and_values_in_another_order_are_no_copy_where_all_is_renamed(ordered):
    parts = (("qkv", "kqv", "8 24"), ("proj", "dense", "8 8"), ("up", "fc1", "8 32"), ("down", "fc2", "32 8"))
    old = "".join(f"blocks.{k}.{name} linear {size}\n" for k in range(2) for name, _, size in parts)
    new = "".join(
        f"blocks.{k}.{name} linear {size} <- {'new' if name == 'kqv' else f'blocks.{k}.{was}'}\n"
        for k in range(2)
        for was, name, size in parts
    )
    assert transferred(old, new, ordered=ordered) == {
        f"blocks.{k}.{n}" for k in range(2) for n in ("dense", "fc1", "fc2")
    }


def test_norms_don_t_follow_an_order_that_their_matrices_refute():
    """The cross attention is registered first in the new block, and a norm is called after it."""
    old = "".join(
        f"layers.{k}.norm1 norm 8\nlayers.{k}.attn1 linear 8 8\nlayers.{k}.norm2 norm 8\nlayers.{k}.attn2 linear 12 8\n"
        f"layers.{k}.norm3 norm 8\nlayers.{k}.ff linear 8 20\n"
        for k in range(2)
    )
    parts = (("cross_norm", "norm 8", "norm2"), ("cross", "linear 12 8", "attn2"), ("self_norm", "norm 8", "norm1"))
    parts += (("own", "linear 8 8", "attn1"), ("ff_norm", "norm 8", "norm3"), ("ff", "linear 8 20", "ff"))
    new = "".join(f"blocks.{k}.{n} {what} <- layers.{k}.{o}\n" for k in range(2) for n, what, o in parts)
    assert transferred(old, new) >= {"blocks.0.cross", "blocks.1.ff"}


@pytest.mark.parametrize(
    "names", [("classifier", "rotation_classifier"), ("species_fc", "breed_fc"), ("head", "qa_head")]
)
def test_a_last_layer_that_is_called_after_another_task_is_new(names):
    old, new = (f"stem linear 12 8\nmix linear 8 9\nlast linear 9 8\n{name} linear 8 5\n" for name in names)
    assert f"{names[1]}" not in transferred(old, new.replace("linear 8 5", "linear 8 5 <- new"))


def test_norms_that_all_stand_behind_their_parts_are_no_norms_before_them():
    old = "".join(
        f"layers.{k}.attention_norm norm 8\nlayers.{k}.attn linear 8 8\nlayers.{k}.ffn_norm norm 8\n" for k in range(2)
    )
    new = "".join(
        f"layers.{k}.attn linear 8 8\nlayers.{k}.post_attention_layernorm norm 8 <- new\n"
        f"layers.{k}.post_feedforward_layernorm norm 8 <- new\n"
        for k in range(2)
    )
    transferred(old, new)
    transferred(old, new, ordered=False)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_value_of_a_gate_is_no_value_of_an_attention(ordered):
    names = ("q", "k", "v", "o", "act", "value", "output")
    old = "".join(f"h.0.{n} linear 8 8\n" for n in names) + "head linear 8 5\n"
    new = "".join(f"h.0.attn.{n} linear 8 8 <- h.0.{o}\n" for n, o in zip(("query", "key", "value", "out"), names))
    new += "h.0.ffn.gate_up linear 8 16 <- new\nh.0.ffn.output linear 8 8 <- h.0.output\nhead linear 8 5\n"
    assert transferred(old, new, ordered=ordered) >= {"h.0.attn.query", "h.0.attn.key"}


@pytest.mark.parametrize("ordered", [True, False])
def test_a_list_in_a_list_that_became_the_outer_one_keeps_its_numbers(ordered):
    pairs = [(i, j) for i in range(2) for j in range(2)]
    old = "".join(f"blocks.{i}.cells.{j}.{n} linear 8 8\n" for i, j in pairs for n in ("up", "down"))
    new = "".join(
        f"cells.{j}.units.{i}.{n} linear 8 8 <- blocks.{i}.cells.{j}.{n}\n" for j, i in pairs for n in ("up", "down")
    )
    transferred(old, new, ordered=ordered)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("copy", ["net_ema", "shadow", "avg_net"])
def test_a_copy_that_the_model_is_called_after_fills_it(copy, ordered):
    old = "".join(f"{net}.conv.{k} conv 8 8\n" for net in ("net", copy) for k in range(2))
    new = "".join(f"{copy}.layers.{k} conv 8 8 <- {copy}.conv.{k}\n" for k in range(2))
    assert transferred(old, new, ordered=ordered) == {f"{copy}.layers.0", f"{copy}.layers.1"}


@pytest.mark.parametrize("ordered", [True, False])
def test_a_part_that_was_saved_alone_goes_where_it_has_its_name(ordered):
    """What all of the file stands in is a name, too, where the model has it."""
    parts = (("layers.0", "linear 8 8"), ("norm", "norm 8"), ("head", "linear 8 5"))
    old = "".join(f"critic.{n} {what}\n" for n, what in parts)
    new = "".join(f"actor.{n} {what} <- new\n" for n, what in parts) + old
    assert transferred(old, new, ordered=ordered) == {"critic.layers.0", "critic.norm", "critic.head"}


@pytest.mark.parametrize("ordered", [True, False])
def test_frozen_copies_fill_a_model_of_averages_by_choice_alone(ordered):
    parts = (("trunk.0", "linear 12 8"), ("trunk.1", "linear 8 8"), ("trunk.2", "linear 8 8"), ("out", "linear 8 3"))
    old = "".join(f"{net}.{n} {what}\n" for net in ("critics", "frozen_critics") for n, what in parts)
    new = "".join(f"critics_ema.{n} {what} <- frozen_critics.{n}\n" for n, what in parts)
    transferred(old, new, ordered=ordered)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    ("kept", "gone", "new"), [(("fold0", "fold1"), "fold2", "fold3"), (("d6", "d12"), "d18", "d24")]
)
def test_a_number_in_a_word_is_a_name_where_others_kept_theirs(kept, gone, new, ordered):
    old = "".join(f"{name} linear 8 8\n" for name in (*kept, gone))
    transferred(old, "".join(f"{name} linear 8 8\n" for name in kept) + f"{new} linear 8 8 <- new\n", ordered=ordered)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("tower", ["{}_net", "{}"])
def test_a_sibling_that_is_something_else_is_not_the_last_one_left(tower, ordered):
    """All was renamed, one of two kept its word, and the other one is called after something else."""
    names = [tower.format(word) for word in ("user", "item", "context")]
    old = "trunk.0.fc linear 6 6\ntrunk.1.fc linear 6 6\n" + "".join(
        f"{name}.{layer} linear 8 8\n" for name in names[:2] for layer in ("fc1", "fc2")
    )
    new = "".join(f"stem.{k}.lin linear 6 6 <- trunk.{k}.fc\n" for k in range(2))
    new += "".join(f"user_tower.{layer} linear 8 8 <- {names[0]}.{layer}\n" for layer in ("fc1", "fc2"))
    new += "".join(f"context_tower.{layer} linear 8 8 <- new\n" for layer in ("fc1", "fc2"))
    assert transferred(old, new, ordered=ordered) >= {"user_tower.fc1", "user_tower.fc2"}


@pytest.mark.parametrize(("ordered", "first"), [(True, "bn1"), (True, "stem_norm"), (False, "stem_norm")])
@pytest.mark.parametrize("back", [True, False])
def test_norms_that_moved_to_the_neighbouring_block_stay_open(first, back, ordered):
    behind = [(f"{first}", "norm 8")]
    before = []
    for k in range(3):
        behind += [(f"layer.{k}.fc", "linear 8 8"), (f"layer.{k}.bn", "norm 8")]
        before += [(f"blocks.{k}.pre_norm", "norm 8"), (f"blocks.{k}.fc", "linear 8 8")]
    before += [("final_norm", "norm 8")]
    became = {first: "blocks.0.pre_norm", "layer.2.bn": "final_norm"}
    became |= {f"layer.{k}.bn": f"blocks.{k + 1}.pre_norm" for k in range(2)}
    became |= {f"layer.{k}.fc": f"blocks.{k}.fc" for k in range(3)}
    old, new = (before, behind) if back else (behind, before)
    origin = became if back else {value: key for key, value in became.items()}
    lines = "".join(f"{name} {what} <- {origin[name]}\n" for name, what in new)
    filled = transferred("".join(f"{name} {what}\n" for name, what in old), lines, ordered=ordered)
    assert filled == {name for name, what in new if what.startswith("linear")}


@pytest.mark.parametrize("ordered", [True, False])
def test_parts_of_a_whole_are_those_that_its_name_spells(ordered):
    """``head`` and ``dep`` stand in both wholes, and ``head`` is what many last layers are called."""
    torch.manual_seed(0)
    names = [(f"{kind}_head_mlp", f"{kind}_dep_mlp") for kind in ("arc", "lab")]
    old = Tree({f"{a}_{b}": nn.Linear(8, 16) for a, b in names})
    new = Tree({name: nn.Linear(8, 8) for pair in names for name in pair})
    state = old.state_dict() if ordered else dict(sorted(old.state_dict().items()))
    transfer_weights(new, state, min_coverage=0.0)
    for a, b in names:
        both = torch.cat([getattr(new, a).weight, getattr(new, b).weight])
        assert torch.equal(both, getattr(old, f"{a}_{b}").weight)


@pytest.mark.parametrize("ordered", [True, False])
def test_letters_of_a_whole_do_not_say_of_which_attention_its_parts_are(ordered):
    old = {f"{kind}{name}": nn.Linear(8, 8) for kind in ("cross_", "") for name in ("query", "key", "value", "proj")}
    new = {f"a.{name}": nn.Linear(8, 8) for name in "qkvo"} | {"x.q": nn.Linear(8, 8), "x.kv": nn.Linear(8, 16)}
    source, target = Tree(old), Tree(new)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    state = source.state_dict() if ordered else dict(sorted(source.state_dict().items()))
    transfer_weights(target, state, min_coverage=0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items() if "x.kv" in name)


def test_a_layer_norm_before_the_attention_is_the_first_one():
    old = "".join(
        f"layers_{k}.attention.query linear 8 12\nlayers_{k}.pre_attention_layer_norm norm 8\n"
        f"layers_{k}.mlp.wi linear 8 16\nlayers_{k}.pre_mlp_layer_norm norm 8\n"
        for k in range(2)
    )
    new = "".join(
        f"block.{k}.layer.0.attn.q linear 8 12 <- layers_{k}.attention.query\n"
        f"block.{k}.layer.0.layer_norm norm 8 <- layers_{k}.pre_attention_layer_norm\n"
        f"block.{k}.layer.1.mlp.wi linear 8 16 <- layers_{k}.mlp.wi\n"
        f"block.{k}.layer.1.layer_norm norm 8 <- layers_{k}.pre_mlp_layer_norm\n"
        for k in range(2)
    )
    transferred(old, new)
    transferred(old, new, ordered=False)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(("live", "average", "new"), [("model", "ema_model", "ema"), ("unet", "swa_unet", "unet_swa")])
def test_an_average_that_is_wanted_is_not_left_out(live, average, new, ordered):
    parts = [(f"layers.{k}", "linear 8 8") for k in range(4)] + [("head", "linear 8 3")]
    old = "".join(f"{net}.{name} {what}\n" for net in (live, average) for name, what in parts)
    transferred(old, "".join(f"{new}.{name} {what} <- {average}.{name}\n" for name, what in parts), ordered=ordered)


def test_a_prefix_is_no_longer_list_where_a_head_beside_it_was_dropped():
    """The head's map and norm have the shapes of a part of each block, and stand in no list."""
    parts = (("attn.q", "linear 8 8"), ("attn.out.dense", "linear 8 8"), ("attn.out.norm", "norm 8"))
    rows = [(f"layer.{k}.{name}", what) for k in range(2) for name, what in parts]
    old = "".join(f"bert.{name} {what}\n" for name, what in rows)
    old += "cls.transform.dense linear 8 8\ncls.transform.norm norm 8\ncls.decoder linear 8 40\n"
    new = "".join(f"model.{name} {what} <- bert.{name}\n" for name, what in rows) + "scores linear 8 9 <- new\n"
    assert transferred(old, new) == {f"model.{name}" for name, _ in rows}


@pytest.mark.parametrize("names", [("male", "female"), ("symmetric", "asymmetric"), ("word", "subword")])
def test_a_word_in_another_word_is_not_the_same(names):
    old, new = (f"trunk.0 linear 6 6\ntrunk.1 linear 6 6\nheads.{name}.fc1 linear 8 7\n" for name in names)
    transferred(old, new.replace("linear 8 7", "linear 8 7 <- new"))


HELD_BACK = {  # by the guard that holds it back, and nothing else does: an old network and a new one
    "order: lists cut": (
        "a linear 3 4\nb linear 4 8\n" + "".join(f"layers.{k} linear 8 8\n" for k in range(4)) + "head linear 8 3",
        """
        a linear 3 4
        b linear 4 8
        fine.0 linear 8 8 <- layers.0
        fine.1 linear 8 8 <- layers.2
        coarse.0 linear 8 8 <- layers.1
        coarse.1 linear 8 8 <- layers.3
        head linear 8 3
        """,
    ),
    "order: namesakes moved": (
        "a linear 3 4\nb linear 4 8\nnorm0 norm 8\nnorm1 norm 8\nnorm2 norm 8\nhead linear 8 3",
        """
        a linear 3 4
        b linear 4 8
        norm2 norm 8
        norm3 norm 8 <- new
        norm4 norm 8 <- new
        head linear 8 3
        """,
    ),
    "letters of twins": (
        "stem linear 4 8\ngen_a.up linear 8 16\ngen_a.down linear 16 8\ngen_b.up linear 8 24\ngen_b.down linear 24 8",
        """
        stem linear 4 8
        net_b.up linear 8 16 <- new
        net_b.down linear 16 8 <- new
        net_a.up linear 8 24 <- new
        net_a.down linear 24 8 <- new
        """,
    ),
    "a module left without its layer": (
        "stem linear 3 8\n"
        + "".join(
            f"layers.{k}.enter linear 8 16\nlayers.{k}.ff.inner linear 8 32\n"
            f"layers.{k}.side.gate linear 8 32\nlayers.{k}.ff.side linear 8 16\n"
            for k in range(2)
        )
        + "last linear 8 5",
        "stem linear 3 8\n"
        + "".join(
            f"layers.{k}.enter linear 8 16\nlayers.{k}.mlp.inner linear 8 32 <- layers.{k}.ff.inner\n"
            f"layers.{k}.ff.key linear 8 32 <- new\nlayers.{k}.mlp.up linear 8 16 <- layers.{k}.ff.side\n"
            for k in range(2)
        )
        + "last linear 8 5",
    ),
    "its own path, in another size": (
        "stem linear 3 8\nnet.up.enter linear 8 16\nnet.up.extra linear 8 24\n"
        "net.side.extra linear 8 32\nlast linear 8 5",
        """
        stem linear 3 8
        net.up.enter linear 8 16
        net.up.groups linear 8 32 <- new
        net.up.stages linear 8 24 <- new
        net.up.extra linear 8 32 <- net.side.extra
        last linear 8 5
        """,
    ),
}


@pytest.mark.parametrize("guard", HELD_BACK)
def test_each_guard_holds_back_what_nothing_else_does(guard: str):
    transferred(*HELD_BACK[guard])


def test_a_square_beside_matrices_that_are_turned_by_their_names_stays_open():
    old = "".join(f"mlp.{k}.cells matrix 8 24\nmlp.{k}.proj matrix 8 8\nmlp.{k}.mix matrix 24 8\n" for k in range(2))
    new = "".join(f"ffn.{k}.mix matrix 8 24\nffn.{k}.stages matrix 24 8\nffn.{k}.proj matrix 8 8\n" for k in range(2))
    parts = "stem linear 3 8\n"
    plan = transfer_weights(network(parts + new), network(parts + old).state_dict(), min_coverage=0.0).plan
    assert not [name for name in plan.by_target if name.endswith("proj.weight")]
