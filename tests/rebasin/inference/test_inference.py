"""Specs that are inferred: right by construction, complete where it can be known, and the model stays as it was."""

from __future__ import annotations

import copy

import pytest
import small_nets as nets
import torch
from torch import nn

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin import (
    PermutationSpec,
    PermutationSpecBuilder,
    apply_permutation,
    infer_permutation_spec,
    verify_permutation_spec,
)

IMAGE, TOKENS = torch.randn(2, 3, 4, 4), torch.randint(0, 11, (2, 5))


def randomised(model: nn.Module) -> nn.Module:
    """A float64 copy in evaluation mode without a parameter or statistic that is zero or one."""
    model = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(noise + 0.5 if name.endswith("var") else tensor + noise - 0.3)
    return model


def largest_change(model: nn.Module, spec: PermutationSpec, args: tuple, seed: int = 3) -> float:
    """Relative change of the output under a random element of the whole group; independent of the verification."""
    model = randomised(model)
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    other = copy.deepcopy(model)
    other.load_state_dict(apply_permutation(spec, spec.random_permutations(seed), model.state_dict()))
    with torch.no_grad():
        before, after = model(*args), other(*args)
    return float((before - after).abs().max() / before.abs().max())


def nested(spec: PermutationSpec) -> list[tuple[int, int]]:
    """(units of the parent, units inside) of all nested groups, sorted."""
    return sorted((spec.groups[g.parent].size, g.size) for g in spec.groups.values() if g.parent)


def top(spec: PermutationSpec) -> list[int]:
    """Sizes of the groups that are not nested, sorted."""
    return sorted(g.size for g in spec.groups.values() if g.parent is None)


CASES = {
    # name: (model, arguments, sizes of top groups, nested groups, names that must not move at all)
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 7), nn.GELU(), nn.Linear(7, 5), nn.Linear(5, 2)), (torch.randn(2, 3),),
            [5, 7], [], ["3.bias"]),
    "residual": (nets.Residual, (IMAGE,), [6, 8], [], ["head.bias"]),
    "dense": (nets.Dense, (IMAGE,), [4, 4, 4, 6], [], ["head.bias"]),
    "grouped": (nets.Grouped, (IMAGE,), [2, 4, 6], [(2, 2), (2, 3), (2, 4)], ["head.bias"]),
    "encoder": (lambda: nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
                                      nn.Linear(8, 2)), (torch.randn(2, 5, 3),), [2, 8, 12], [(2, 4), (2, 4)], []),
    "attention": (nets.Transformer, (TOKENS,), [4, 16, 20], [(4, 6), (4, 6)], []),
    "grouped queries": (lambda: nets.Transformer(kv=2), (TOKENS,), [2, 16, 20], [(2, 6), (2, 6)], []),
    "rotary": (lambda: nets.Transformer(kv=2, rotary=True), (TOKENS,), [2, 16, 20], [(2, 6)], []),
    "recurrent": (nets.Recurrent, (torch.randn(4, 1, 3),), [4, 5, 5, 5, 5], [], ["head.bias"]),
    "cached bias": (nets.CachedBias, (torch.randn(2, 4),), [6], [], ["out.bias"]),
    "halves": (nets.Halves, (torch.randn(2, 3),), [4, 4], [], ["out.bias"]),
    "cumulative": (nets.Cumulative, (torch.randn(2, 3),), [6], [], ["inp.weight", "inp.bias"]),
    "no rule": (nets.Unruled, (torch.randn(2, 3),), [6], [], ["inp.weight", "inp.bias"]),
    "standardised": (nets.Standardised, (torch.randn(2, 3, 8, 8),), [2, 2], [(2, 3), (2, 4)], ["head.bias"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_structures(name):
    build, args, sizes, inside, fixed = CASES[name]
    torch.manual_seed(0)
    model = build()
    spec = infer_permutation_spec(model, args, verify=False)
    if name != "standardised":
        assert top(spec) == sizes
        assert nested(spec) == inside
    assert not set(fixed) & set(spec.axes)
    assert largest_change(model, spec, args) < 1e-12
    assert verify_permutation_spec(spec, model, args).ok


def test_shuffled_channels_are_followed():
    torch.manual_seed(0)
    model = nets.Shuffled()
    spec = infer_permutation_spec(model, (IMAGE,), verify=False)
    assert largest_change(model, spec, (IMAGE,)) < 1e-12
    assert sorted(set(spec.parameters) - set(spec.axes)) == ["last.bias"]
    assert spec.axes["head.weight"][0].coords.tolist() == [[0] * 4 + [1] * 4 + [2] * 4]


def test_blocks_that_cross_stay():
    """Grouped convolution with blocks of 6 channels into a norm with blocks of 4."""
    model = nets.Grouped()
    model.norm = nn.GroupNorm(3, 12)
    spec = infer_permutation_spec(model, (IMAGE,), verify=False)
    assert "grouped.bias" not in spec.axes
    assert largest_change(model, spec, (IMAGE,)) < 1e-12


@pytest.mark.parametrize("batched", [False, True])
def test_experts_change_places_and_permute_inside(batched):
    torch.manual_seed(0)
    model, args = nets.Experts(batched), (torch.randn(12, 5),)
    spec = infer_permutation_spec(model, args, verify=False)
    assert top(spec) == [4, 8]
    assert nested(spec) == [(4, 12)]
    assert verify_permutation_spec(spec, model, args).ok
    with torch.no_grad():
        before = model(*args)
        model.load_state_dict(apply_permutation(spec, spec.random_permutations(1), model.state_dict()))
        torch.testing.assert_close(model(*args), before, rtol=1e-4, atol=1e-5)


def read_as_number(x, w):
    return x * w[0].item()


def through_numpy(x, w):
    return x + torch.from_numpy(w.detach().numpy() * 2).to(x)


def through_a_list(x, w):
    return x + torch.tensor(w.detach().tolist()).to(x)


def picked_by_order(x, w):
    return x[:, w.argsort()]


def written_by_mask(x, w):
    x = x.clone()
    x[:, w > w.mean()] = 0.5
    return x


def branched(x, w):
    return x.relu() if w[0] > 0 else x.sin()


def added_at_positions(x, w):
    return torch.zeros_like(x).index_add(1, (w > w.mean()).long() + torch.arange(len(w)) % 5, x)


@pytest.mark.parametrize(
    "step",
    [read_as_number, through_numpy, through_a_list, picked_by_order, written_by_mask, branched, added_at_positions],
)
def test_values_that_leave_the_sight_of_the_tracer_stay(step):
    """Numbers, masks and positions made of a parameter's values: a permutation of it would change them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.out, self.w = nn.Linear(3, 6), nn.Linear(6, 2), nn.Parameter(torch.randn(6))

        def forward(self, x):
            return self.out(step(self.inp(x) * self.w, self.w))

    for seed in range(3):
        torch.manual_seed(seed)
        model, args = Net(), (torch.randn(4, 3),)
        spec = infer_permutation_spec(model, args, verify=False)
        assert verify_permutation_spec(spec, model, args).ok
        assert largest_change(model, spec, args) < 1e-12


def test_indices_of_a_pooling_move_with_their_channels():
    class Unpooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            where = nn.functional.max_pool2d(self.a(x), 2, return_indices=True)[1]
            return self.out(nn.functional.max_unpool2d(nn.functional.avg_pool2d(self.b(x), 2), where, 2))

    model = Unpooled()
    spec = infer_permutation_spec(model, (IMAGE,), verify=False)
    assert top(spec) == [6]
    assert set(spec.axes) == {"a.weight", "a.bias", "b.weight", "b.bias", "out.weight"}
    assert largest_change(model, spec, (IMAGE,)) < 1e-12


class AllPairs(nn.Module):
    """Products of all pairs of rows of one parameter, row by row times a matrix: a batch that is on two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.out = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pairs = self.rows[:, None, :] * self.rows[None, :, :]
        return torch.bmm(pairs, self.out.expand(4, 5, 3)).sum((0, 1)) + x


def test_a_batch_that_is_on_two_axes_of_a_product():
    model, args = AllPairs(), (torch.ones(3),)
    spec = infer_permutation_spec(model, args, verify=False)
    assert list(spec.axes["rows"]) == [0, 1]
    assert list(spec.axes["out"]) == [0]
    assert largest_change(model, spec, args) < 1e-12


def test_tied_weights_move_together():
    model = nets.Transformer()
    spec = infer_permutation_spec(model, (TOKENS,))
    assert spec.axes["head.weight"][1] == spec.axes["embed.weight"][1]
    state = apply_permutation(spec, spec.random_permutations(0), model.state_dict())
    assert torch.equal(state["head.weight"], state["embed.weight"])


def test_norm_statistics_move():
    spec = infer_permutation_spec(nets.Residual(), (IMAGE,))
    weight = spec.axes["norm.weight"][0]
    assert spec.axes["norm.running_mean"][0] == weight
    assert spec.axes["norm.running_var"][0] == weight
    assert "norm.num_batches_tracked" not in spec.axes


def test_flatten_keeps_pixels_of_a_channel_together():
    spec = infer_permutation_spec(nets.Residual(), (IMAGE,))
    coords = spec.axes["head.weight"][1].coords
    assert coords.tolist() == [[channel for channel in range(8) for _ in range(16)]]


def test_relative_position_table_moves_with_the_heads():
    spec = infer_permutation_spec(nets.Transformer(), (TOKENS,))
    (heads,) = spec.axes["attention.table"][1].groups
    assert spec.groups[heads].size == 4
    assert 0 not in spec.axes["attention.table"]


def test_query_heads_of_one_key_stay_together():
    spec = infer_permutation_spec(nets.Transformer(kv=2), (TOKENS,))
    q, k = spec.axes["attention.q.weight"][0], spec.axes["attention.k.weight"][0]
    assert spec.groups[k.groups[0]].size == 2
    assert q.coordinate(k.groups[0]).tolist() == [kv for kv in range(2) for _ in range(12)]


def test_the_same_as_by_hand():
    model = nets.Residual()
    spec = infer_permutation_spec(model, (IMAGE,))
    builder = PermutationSpecBuilder(model)
    builder.conv("stem", "s", None).norm("norm", "s").conv("a", "m", "s").norm("inner", "m").conv("b", "s", "m")
    hand = builder.linear("head", None, ("s", 16)).build()
    renamed = dict(zip(spec.groups, ("s", "m"), strict=True))
    assert {n: {a: tuple(renamed[g] for g in x.groups) for a, x in by.items()} for n, by in spec.axes.items()} == {
        n: {a: x.groups for a, x in by.items()} for n, by in hand.axes.items()
    }
    assert spec.coverage == hand.coverage


def test_what_is_fixed_says_why():
    spec = infer_permutation_spec(nets.Unruled(), (torch.randn(2, 3),))
    assert "no rule" in spec.frozen["inp.weight"][0]
    assert "output" in spec.frozen["out.weight"][0]
    assert "no rule" in spec.summary()


def test_unused_parameters_are_left_alone():
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.spare = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x))

    spec = infer_permutation_spec(Spare(), (torch.randn(1, 3),))
    assert not any(name.startswith("spare") for name in spec.axes)
    assert spec.frozen["spare.weight"][0] == "not used in the example call"


def test_outputs_choose_what_counts():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            hidden = self.a(x)
            return {"hidden": hidden, "logits": self.b(hidden)}

    assert not infer_permutation_spec(Two(), (torch.randn(1, 3),)).groups
    spec = infer_permutation_spec(Two(), (torch.randn(1, 3),), outputs=lambda output: output["logits"])
    assert top(spec) == [5]


def test_the_spec_is_the_same_every_time():
    model = nets.Transformer(kv=2)
    one, two = (infer_permutation_spec(model, (TOKENS,)) for _ in range(2))
    assert one.to_json() == two.to_json()


def test_the_model_is_not_disturbed():
    model = nn.Sequential(nets.Residual(), nn.Dropout(0.5))
    model[0].norm.eval()  # a mode of its own
    model[0].stem.weight.grad = torch.ones_like(model[0].stem.weight)
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    flags = torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype()
    infer_permutation_spec(model, (IMAGE,))
    assert torch.equal(state, torch.random.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(tensor.dtype == before[name].dtype for name, tensor in model.state_dict().items())
    assert torch.equal(model[0].stem.weight.grad, torch.ones_like(model[0].stem.weight))
    assert model[0].stem.weight.requires_grad
    assert model[0].head.weight.grad is None
    assert (torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype()) == flags
    assert handle.id in model[0]._forward_hooks
    assert calls


def test_a_failing_forward_says_so():
    with pytest.raises(RebasinError, match="forward pass of Residual"):
        infer_permutation_spec(nets.Residual(), (torch.randn(1, 5, 4, 4),))


def test_batch_size_does_not_matter():
    model = nets.Transformer()
    one = infer_permutation_spec(model, (TOKENS[:1],), verify=False)
    two = infer_permutation_spec(model, (TOKENS.repeat(2, 1),), verify=False)
    assert one == two


@pytest.mark.parametrize("sizes", [(1, 1), (2, 3)])
def test_constants_of_several_parts_are_not_exchanged(sizes):
    """Each part is constant, but they are not equal: zeros beside ones, two single frequencies beside one another."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.out = nn.Parameter(torch.randn(sum(sizes))), nn.Linear(sum(sizes), 2)

        def forward(self, x):
            parts = [torch.full((len(x), size), float(value)) for value, size in enumerate(sizes)]
            return self.out((torch.cat(parts, dim=1).to(x) + self.gain).sin()) * x

    model, args = Beside(), (torch.randn(3, 2),)
    spec = infer_permutation_spec(model, args, verify=False)
    assert top(spec) == [size for size in sizes if size > 1]
    assert largest_change(model, spec, args) < 1e-12
