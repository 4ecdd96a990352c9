"""What evidence may never do: each kind of silent wrong load that was reported, with known truth."""

import pytest
import torch
from torch import nn

from lit_wsl import transfer_weights


def fill(old, new, truth, source=None, **options):
    """Transfer, and give the names that hold the truth, hold something else, and were left alone."""
    for seed, net in enumerate((old, new)):
        with torch.no_grad():
            for k, t in enumerate(t for t in net.state_dict(keep_vars=True).values() if t.is_floating_point()):
                t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(1000 * seed + k)))
    state = {n: t.clone() for n, t in old.state_dict().items()}
    before = {n: t.clone() for n, t in new.state_dict().items()}
    transfer_weights(new, source(state) if source else state, min_coverage=0.0, **options)
    right, wrong, left = set(), set(), set()
    for name, value in new.state_dict().items():
        want = truth(name)
        if want is not None and torch.equal(state[want], value):
            right.add(name)
        else:
            (left if torch.equal(value, before[name]) else wrong).add(name)
    return right, wrong, left


def same(name):
    return name


def renamed(**words):
    return lambda name: ".".join(words.get(part, part) for part in name.split("."))


def mlp():
    return nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 4))


def named(**modules):
    return nn.ModuleDict(modules)


def test_two_networks_of_one_shape_are_not_told_apart_by_order_alone():
    old, new = named(actor=mlp(), critic=mlp()), named(value_net=mlp(), policy_net=mlp())
    _, wrong, left = fill(old, new, renamed(value_net="critic", policy_net="actor"))
    assert not wrong
    assert len(left) == 12


def block(*norms):
    return nn.ModuleDict(
        {norms[0]: nn.LayerNorm(8)}
        | {k: nn.Linear(8, 8) for k in "qkvo"}
        | {norms[1]: nn.LayerNorm(8), "up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}
    )


def stack(*norms):
    return named(layers=nn.ModuleList(block(*norms) for _ in range(2)), head=nn.Linear(8, 3))


@pytest.mark.parametrize("pair", [("norm_attn", "norm_mlp"), ("pre_attn_norm", "pre_ffn_norm"), ("norm1", "norm2")])
def test_a_neighbour_in_a_name_does_not_say_which_norm_it_is(pair):
    old, new = stack("input_layernorm", "post_attention_layernorm"), stack(*pair)
    words = dict(zip(pair, ("input_layernorm", "post_attention_layernorm")))
    _, wrong, _ = fill(old, new, renamed(**words))
    assert not wrong
    _, wrong, _ = fill(old, new, renamed(**words), lambda state: dict(sorted(state.items())))
    assert not wrong


@pytest.mark.parametrize("ordered", [True, False])
def test_order_decides_where_there_is_one_and_so_much_agrees(ordered):
    old, new = stack("first_law", "other_law"), stack("some_rule", "next_rule")
    sort = None if ordered else lambda state: dict(sorted(state.items()))
    _, wrong, left = fill(old, new, renamed(some_rule="first_law", next_rule="other_law"), sort)
    assert not wrong
    assert all("rule" in name for name in left)
    assert bool(left) is not ordered


def test_the_same_path_is_never_given_away():
    old = named(mask=nn.Linear(4, 4), point=nn.Linear(4, 4), body=mlp())
    new = named(point=nn.Linear(4, 4), mask=nn.Linear(4, 4), body=mlp())
    _, wrong, left = fill(old, new, same)
    assert not wrong
    assert not left


@pytest.mark.parametrize("counts", [(4, 5), (5, 4), (6, 3)])
def test_lists_of_another_length_have_more_than_one_reading(counts):
    old, new = (named(layers=nn.ModuleList(block("a", "b") for _ in range(n)), stem=nn.Linear(5, 8)) for n in counts)
    right, wrong, _ = fill(old, new, lambda name: None if name.startswith("layers") else name)
    assert not wrong
    assert right == {"stem.weight", "stem.bias"}


def test_another_head_of_the_same_size_is_not_the_same_head():
    old, new = named(body=mlp(), rotation_head=nn.Linear(4, 3)), named(body=mlp(), class_head=nn.Linear(4, 3))
    _, wrong, left = fill(old, new, lambda name: None if "head" in name else name)
    assert not wrong
    assert left == {"class_head.weight", "class_head.bias"}


class Experts(nn.Module):
    def __init__(self, *shapes):
        super().__init__()
        for name, shape in zip(("gate_up", "down"), shapes):
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def test_squares_are_stored_like_the_others_of_their_make():
    old = named(moe=Experts((3, 8, 8), (3, 4, 8)))
    new = named(moe=Experts((3, 8, 8), (3, 8, 4)))
    report = transfer_weights(new, old.state_dict(), min_coverage=0.0)
    turned = {t: bool(e.operations) for e in report.plan for t in e.targets}
    assert turned == {"moe.gate_up": True, "moe.down": True}


def test_norms_without_weights_find_their_statistics():
    def norms():
        return nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False)
        )

    _, wrong, left = fill(named(online=norms()), named(backbone=norms()), renamed(backbone="online"))
    assert not wrong
    assert {n for n in left if not n.endswith("num_batches_tracked")} == set()


def test_every_entry_names_its_evidence():
    report = transfer_weights(stack("a", "b"), stack("a", "b").state_dict())
    assert {e.evidence for e in report.plan} == {"path"}
    assert all(e.reason.startswith("the same path") for e in report.plan)
