"""What counts as a count: numbers, letters, the places of norms in a block, the matrices of a gated feed-forward."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from small_nets import Tree
from torch import nn

from lit_wsl import transfer_weights


def net(names: dict[str, nn.Module], order: tuple[str, ...] = ()) -> nn.Module:
    """A stem and two blocks of these layers, registered in an order of one's own."""
    root = nn.Module()
    root.stem = nn.Linear(5, 8)
    root.blocks = nn.ModuleList(
        Tree({name: type(names[name])(*_sizes(names[name])) for name in order or names}) for _ in range(2)
    )
    return root


def _sizes(layer: nn.Module) -> tuple[int, ...]:
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else tuple(layer.normalized_shape)


def block(norms: tuple[str, str], attention: str = "attn", feed: str = "mlp") -> dict[str, nn.Module]:
    return {
        norms[0]: nn.LayerNorm(8),
        f"{attention}.qkv": nn.Linear(8, 24),
        f"{attention}.proj": nn.Linear(8, 8),
        norms[1]: nn.LayerNorm(8),
        f"{feed}.fc1": nn.Linear(8, 11),
        f"{feed}.fc2": nn.Linear(11, 8),
    }


NORMS = (
    ("attention_norm", "ffn_norm"),
    ("input_layernorm", "post_attention_layernorm"),
    ("pre_attn_norm", "pre_mlp_norm"),
    ("layernorm_before", "layernorm_after"),
    ("self_attn_layer_norm", "final_layer_norm"),
)


@pytest.mark.parametrize(("ours", "theirs"), permutations(NORMS, 2))
@pytest.mark.parametrize("alphabetical", [False, True])
def test_two_norms_of_a_block_go_by_their_places(ours, theirs, alphabetical):
    old, new = net(block(ours)), net(block(theirs))
    for tensor in old.parameters():
        torch.nn.init.normal_(tensor)
    state = dict(sorted(old.state_dict().items())) if alphabetical else old.state_dict()
    transfer_weights(new, state, min_coverage=0.0)
    for k in range(2):
        for a, b in zip(ours, theirs):
            assert torch.equal(getattr(new.blocks[k], b).weight, getattr(old.blocks[k], a).weight)


def test_the_norm_behind_a_feed_forward_is_not_counted():
    ours, theirs = ("post_mlp_norm", "norm"), ("norm1", "norm2")
    layers = block(ours)
    old, new = net(layers, tuple(reversed(layers))), net(block(theirs))
    state = dict(sorted(old.state_dict().items()))
    before = {n: t.clone() for n, t in new.state_dict().items()}
    transfer_weights(new, state, min_coverage=0.0)
    assert all(torch.equal(t, before[n]) for n, t in new.state_dict().items() if "norm" in n)


@pytest.mark.parametrize("alphabetical", [False, True])
def test_gate_and_up_are_the_first_and_the_last_matrix_that_are_numbered(alphabetical):
    old = net({"ff.w1": nn.Linear(8, 11), "ff.w2": nn.Linear(11, 8), "ff.w3": nn.Linear(8, 11)})
    new = net({"mlp.gate_proj": nn.Linear(8, 11), "mlp.up_proj": nn.Linear(8, 11), "mlp.down_proj": nn.Linear(11, 8)})
    state = dict(sorted(old.state_dict().items())) if alphabetical else old.state_dict()
    transfer_weights(new, state)
    for k in range(2):
        for a, b in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            assert torch.equal(getattr(new.blocks[k].mlp, b).weight, getattr(old.blocks[k].ff, a).weight)


def test_square_experts_stay_open():
    old = net({f"ff.w{k}": nn.Linear(8, 8) for k in (1, 2, 3)})
    new = net({f"mlp.{n}": nn.Linear(8, 8) for n in ("gate", "up", "down")})
    state = dict(sorted(old.state_dict().items()))
    report = transfer_weights(new, state, min_coverage=0.0)
    assert not [t for e in report.plan for t in e.targets if "mlp" in t]


@pytest.mark.parametrize("turned", [False, True])
def test_a_list_of_blocks_that_stand_the_other_way_round_may_be_counted_so_too(turned):
    def layers(names: tuple[str, ...]) -> dict[str, nn.Module]:
        return {name: nn.Linear(8, 9 + 2 * k) if k % 2 else nn.Linear(9 + 2 * k, 8) for k, name in enumerate(names)}

    old, named = layers(tuple("abcde")), layers(tuple("vwxyz"))
    source = net(old)
    target = nn.Module()
    target.stem, target.units = nn.Linear(5, 8), net(named, tuple(reversed(named)) if turned else ()).blocks
    transfer_weights(target, source.state_dict(), min_coverage=0.0)
    same = [torch.equal(target.units[0].v.weight, source.blocks[k].a.weight) for k in (0, 1)]
    assert same == [not turned, False]


@pytest.mark.parametrize("names", [("m2019 m2020", "model_2020 model_2021"), ("k3 k5", "kernel5 kernel7")])
def test_a_number_in_a_word_that_both_sides_have_names_its_own(names):
    ours, theirs = (side.split() for side in names)

    def net(first, second):
        return nn.ModuleDict({"stem": nn.Linear(4, 8), first: nn.Linear(8, 8), second: nn.Linear(8, 8)})

    old, new = net(*ours), net(*theirs)
    fresh = {n: t.clone() for n, t in new.state_dict().items()}
    transfer_weights(new, old.state_dict(), min_coverage=0.0)
    held = new.state_dict()
    for leaf in ("weight", "bias"):  # the first of the new ones is the second of the old ones, the other one is new
        assert any(
            torch.equal(held[f"{theirs[0]}.{leaf}"], x[n])
            for x, n in ((old.state_dict(), f"{ours[1]}.{leaf}"), (fresh, f"{theirs[0]}.{leaf}"))
        )
        assert torch.equal(held[f"{theirs[1]}.{leaf}"], fresh[f"{theirs[1]}.{leaf}"])


def lists(encoder: str, decoder: str, name: str, *, down: bool) -> nn.Module:
    """Two lists: one of widths that tell the direction, one of equal blocks."""
    rising = [nn.Linear(4 + k, 5 + k) for k in range(3)]
    equal = [nn.Sequential(nn.Linear(7, 7), nn.LayerNorm(7)) for _ in range(3)]
    inside = {
        f"{around}.{name}.{2 - k if down else k}": layer
        for around, row in ((encoder, rising), (decoder, equal))
        for k, layer in enumerate(row)
    }
    return Tree(inside)


def test_a_list_that_counts_down_where_sizes_show_it_tells_nothing_by_number_under_that_name():
    old, new = lists("encoder", "decoder", "stages", down=True), lists("encoder", "decoder", "levels", down=False)
    for tensor in old.parameters():
        torch.nn.init.normal_(tensor)
    before = {n: t.clone() for n, t in new.state_dict().items()}
    transfer_weights(new, dict(sorted(old.state_dict().items())), min_coverage=0.0)
    state = old.state_dict()
    for name, tensor in new.state_dict().items():
        around, _, number, *leaf = name.split(".")
        right = state[".".join((around, "stages", str(2 - int(number)), *leaf))]
        assert torch.equal(tensor, before[name]) or torch.equal(tensor, right), name


def test_members_that_hold_one_module_each_are_asked_for_their_direction():
    """Registered from 2 down to 0, under another name: the numbers may stand for other places."""
    old = Tree(
        {
            f"trunk.{k}.m.{name}": layer
            for k in (2, 1, 0)
            for name, layer in (("a", nn.Linear(6, 7)), ("b", nn.Linear(7, 6)))
        }
    )
    new = Tree(
        {
            f"chain.{k}.m.{name}": layer
            for k in (0, 1, 2)
            for name, layer in (("a", nn.Linear(6, 7)), ("b", nn.Linear(7, 6)))
        }
    )
    before = {n: t.clone() for n, t in new.state_dict().items()}
    transfer_weights(new, old.state_dict(), min_coverage=0.0)
    assert all(torch.equal(t, before[n]) for n, t in new.state_dict().items() if ".1." not in n)
