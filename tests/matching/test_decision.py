"""What evidence may never do: each kind of silent wrong load that was reported, with known truth."""

import copy

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
    old, new = named(left=mlp(), right=mlp()), named(doc_tower=mlp(), query_tower=mlp())
    _, wrong, left = fill(old, new, renamed(doc_tower="right", query_tower="left"))
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


def test_another_part_of_the_same_size_is_another_part_where_the_others_kept_their_names():
    def net(gate):
        return named(embed=nn.Linear(5, 8), lift=nn.Linear(8, 12), lower=nn.Linear(12, 8), **{gate: nn.Linear(8, 3)})

    right, wrong, left = fill(net("mixing"), net("routing"), lambda name: None if "routing" in name else name)
    assert not wrong
    assert len(right) == 6
    assert left == {"routing.weight", "routing.bias"}


def test_a_word_of_a_neighbour_is_no_word_where_only_one_side_says_before():
    def layer(first, second):
        parts = {"attention": nn.Linear(8, 8), "output": nn.Linear(8, 16)}
        return named(**{first: nn.LayerNorm(8), second: nn.LayerNorm(8)}, **parts)

    old = layer("pre_mlp_norm", "pre_attention_norm")
    new = layer("attention_norm", "output_norm")
    truth = renamed(attention_norm="pre_mlp_norm", output_norm="pre_attention_norm")
    assert not fill(old, new, truth)[1]
    assert not fill(old, new, truth, lambda state: dict(sorted(state.items())))[1]


def test_statistics_do_not_go_by_their_path_where_the_lists_are_counted_otherwise():
    def net(start):
        return nn.ModuleDict({"blocks": nn.ModuleDict({str(k + start): norm() for k in range(3)})})

    def norm():
        return nn.ModuleDict({"bn": nn.BatchNorm1d(6, affine=False)})

    _, wrong, _ = fill(net(1), net(0), lambda name: f"blocks.{int(name.split('.')[1]) + 1}.{name.split('.', 2)[2]}")
    assert not wrong


def test_a_renamed_list_that_is_registered_downwards_stays_open():
    def net(name, order):
        return nn.ModuleDict({name: nn.ModuleDict({k: nn.Linear(6, 6) for k in order}), "stem": nn.Linear(4, 6)})

    _, wrong, left = fill(net("layers", "01"), net("blocks", "10"), renamed(blocks="layers"))
    assert not wrong
    assert len(left) == 4


def test_small_modules_of_one_size_are_not_paired_against_the_path_of_a_part():
    def side(first, second):
        conv, norm = (lambda: nn.Conv2d(6, 6, 3)), (lambda: nn.BatchNorm2d(6))
        return nn.ModuleDict({"a": nn.ModuleDict(first(conv, norm)), "b": nn.ModuleDict(second(conv, norm))})

    old = side(lambda c, n: {"norm": n()}, lambda c, n: {"conv": c(), "norm": n(), "last": c()})
    new = side(lambda c, n: {"norm": n(), "conv": c()}, lambda c, n: {"norm": n(), "last": c()})
    _, wrong, _ = fill(old, new, lambda name: name.replace("a.conv", "b.conv"))
    assert not wrong


@pytest.mark.parametrize("spelled", [str, lambda name: name.replace(".", "_"), lambda name: name.replace(".", "")])
def test_an_average_beside_the_weights_takes_no_part(spelled):
    def with_average(state):
        return {"ema." + spelled(n): t + 1 for n, t in state.items()} | {"net." + n: t for n, t in state.items()}

    old, new = named(stem=nn.Linear(5, 8), head=nn.Linear(8, 3)), named(entry=nn.Linear(5, 8), head=nn.Linear(8, 3))
    right, wrong, _ = fill(old, new, renamed(entry="stem"), with_average)
    assert not wrong
    assert {"head.weight", "head.bias"} <= right


def test_a_wrapped_layer_is_still_the_layer_that_it_is_called():
    def net(wrap):
        layers = {name: nn.Linear(8, width) for name, width in (("query", 4), ("value", 6), ("up", 9), ("down", 5))}
        return named(**{n: nn.ModuleDict({"base_layer": m}) if wrap and n == "query" else m for n, m in layers.items()})

    _, wrong, left = fill(net(wrap=True), net(wrap=False), lambda name: name.replace("query.", "query.base_layer."))
    assert not wrong
    assert not left


def test_statistics_of_a_longer_list_go_to_the_layer_of_their_number():
    def net(layers):
        return named(list=nn.ModuleList(nn.BatchNorm1d(6, affine=False) for _ in range(layers)), stem=nn.Linear(5, 8))

    right, wrong, left = fill(net(3), net(5), lambda name: None if name[:6] in ("list.3", "list.4") else name)
    assert not wrong
    assert {"list.0.running_mean", "list.2.running_var"} <= right
    assert all(name[:6] in ("list.3", "list.4") or "num_batches" in name for name in left)


def test_statistics_without_weights_stand_where_the_maps_around_them_stand():
    def head():
        return nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False))))

    body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    old, new = named(online=nn.Sequential(body, head())), named(backbone=copy.deepcopy(body), head=head())
    _, wrong, left = fill(old, new, lambda name: name.replace("backbone.", "online.0.").replace("head.", "online.1."))
    assert not wrong
    assert not [name for name in left if "num_batches" not in name]
