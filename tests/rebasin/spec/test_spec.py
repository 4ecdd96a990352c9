"""Specs as data: application, inverse, composition, JSON, checks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin import (
    AxisSpec,
    PermutationGroup,
    PermutationSpec,
    PermutationSpecBuilder,
    apply_permutation,
    compose_permutations,
    invert_permutations,
)

SHAPES = {
    "qkv": (32, 5),
    "out": (5, 8),
    "flat": (2, 38),
    "grouped": (8, 3, 1, 1),
    "experts": (3, 4, 5),
    "shuffled": (10,),
    "fixed": (7,),
}


@pytest.fixture
def spec() -> PermutationSpec:
    builder = PermutationSpecBuilder(SHAPES)
    builder.group("heads", 4).group("qk", 3, "heads").group("vo", 2, "heads")
    builder.group("blocks", 2).group("in", 3, "blocks").group("to", 4, "blocks")
    builder.group("expert", 3).group("hidden", 4, "expert")
    builder.axis("qkv", 0, [("heads", "qk"), ("heads", "qk"), ("heads", "vo")])
    builder.axis("out", 1, ("heads", "vo"))
    builder.group("channels", 5).axis("flat", 1, [("channels", 7), 3])
    builder.axis("grouped", 0, ("blocks", "to")).axis("grouped", 1, "in", outer_axis=0)
    builder.axis("experts", 0, "expert").axis("experts", 1, "hidden", outer_axis=0)
    return builder.build()


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def test_nested_permutation_moves_heads_and_what_is_inside(spec, state):
    permutations = spec.random_permutations(1)
    new = apply_permutation(spec, permutations, state)
    before, after = state["qkv"][12:24].reshape(4, 3, 5), new["qkv"][12:24].reshape(4, 3, 5)
    for head in range(4):
        assert torch.equal(after[head], before[permutations["heads"][head]][permutations["qk"][head]])


def test_positions_of_one_unit_keep_their_order_and_the_rest_stays(spec, state):
    permutations = spec.random_permutations(2)
    new = apply_permutation(spec, permutations, state)
    before, after = state["flat"][:, :35].reshape(2, 5, 7), new["flat"][:, :35].reshape(2, 5, 7)
    assert torch.equal(after, before[:, permutations["channels"]])
    assert torch.equal(new["flat"][:, 35:], state["flat"][:, 35:])
    assert new["fixed"] is state["fixed"]


def test_grouped_convolution_commutes_with_its_permutation(spec, state):
    permutations = spec.random_permutations(3)
    weight = apply_permutation(spec, permutations, state)["grouped"]
    x = torch.randn(1, 2, 3, 4, 4)
    y = functional.conv2d(x.reshape(1, 6, 4, 4), state["grouped"], groups=2).reshape(1, 2, 4, 4, 4)
    outer = permutations["blocks"]
    moved = torch.stack([x[:, outer[k]][:, permutations["in"][k]] for k in range(2)], dim=1)
    expected = torch.stack([y[:, outer[k]][:, permutations["to"][k]] for k in range(2)], dim=1)
    found = functional.conv2d(moved.reshape(1, 6, 4, 4), weight, groups=2).reshape(1, 2, 4, 4, 4)
    torch.testing.assert_close(found, expected)


def test_outer_axis_gives_every_expert_its_own_permutation(spec, state):
    permutations = spec.random_permutations(4)
    new = apply_permutation(spec, permutations, state)["experts"]
    for expert in range(3):
        source = state["experts"][permutations["expert"][expert]]
        assert torch.equal(new[expert], source[permutations["hidden"][expert]])
    assert spec.index(permutations, "experts", 1).shape == (3, 4)


@settings(max_examples=25, deadline=None)
@given(first=st.integers(0, 10**6), second=st.integers(0, 10**6))
def test_inverse_and_composition(first, second):
    builder = PermutationSpecBuilder({"a": (24,), "b": (4, 6, 2), "c": (5,)})
    builder.group("p", 4).group("q", 3, "p").group("r", 2, "q").group("s", 6, "p")
    builder.axis("a", 0, ("p", "q", "r")).axis("b", 0, "p").axis("b", 1, "s", outer_axis=0).axis("c", 0, "free")
    spec = builder.build()
    state = {name: torch.arange(torch.Size(shape).numel()).reshape(shape) for name, shape in spec.shapes.items()}
    one, two = spec.random_permutations(first), spec.random_permutations(second)
    there = apply_permutation(spec, one, state)
    back = apply_permutation(spec, invert_permutations(spec, one), there)
    twice = apply_permutation(spec, two, there)
    at_once = apply_permutation(spec, compose_permutations(spec, one, two), state)
    for name in state:
        assert torch.equal(back[name], state[name])
        assert torch.equal(twice[name], at_once[name])
        assert sorted(there[name].flatten().tolist()) == sorted(state[name].flatten().tolist())


def test_json_round_trip(spec, tmp_path):
    path = tmp_path / "spec.json"
    text = spec.to_json(path)
    assert PermutationSpec.from_json(text) == spec
    assert PermutationSpec.from_json(path) == spec
    assert PermutationSpec.from_json(text).to_json() == text


def test_json_of_an_interleaved_axis():
    coords = torch.stack([torch.tensor([0, -1, 1, -1, 2, -1]), torch.tensor([-1, 2, -1, 0, -1, 1])])
    groups = {name: PermutationGroup(name, 3) for name in "ab"}
    spec = PermutationSpec(groups, {"x": {0: AxisSpec(("a", "b"), coords)}}, shapes={"x": (6,)}, parameters=("x",))
    again = PermutationSpec.from_json(spec.to_json())
    assert again == spec
    new = apply_permutation(again, {"a": torch.tensor([2, 0, 1])}, {"x": torch.arange(6)})["x"]
    assert new.tolist() == [4, 1, 0, 3, 2, 5]


def test_random_permutations_depend_on_the_seed_only(spec):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one, two = spec.random_permutations(5), spec.random_permutations(5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in spec.groups)
    assert any(not torch.equal(one[name], spec.random_permutations(6)[name]) for name in spec.groups)
    for name, group in spec.groups.items():
        assert one[name].shape == spec.permutation_shape(name)
        assert torch.equal(one[name].sort(dim=-1).values, spec.identity()[name])
        assert one[name].shape[-1] == group.size


def test_identity_changes_nothing(spec, state):
    new = apply_permutation(spec, spec.identity(), state)
    assert list(new) == list(state)
    assert all(torch.equal(new[name], state[name]) for name in state)


def test_coverage_counts_elements(spec):
    sizes = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    moved = sum(sizes[name] for name in ("qkv", "out", "grouped", "experts")) + sizes["flat"] * 35 / 38
    assert spec.coverage == pytest.approx(moved / sum(sizes.values()))


def test_without_removes_what_is_nested(spec):
    less = spec.without(["heads"], "a test")
    assert not {"heads", "qk", "vo"} & set(less.groups)
    assert less.dropped == dict.fromkeys(("heads", "qk", "vo"), "a test")
    assert "qkv" not in less.axes
    assert "Dropped: 3 groups" in less.summary()


def test_summary_says_groups_coverage_and_reasons(spec):
    text = PermutationSpec(spec.groups, spec.axes, spec.shapes, spec.parameters, {"fixed": {0: "because"}}).summary()
    assert "9 permutation groups (5 nested)" in text
    assert f"{spec.coverage:.1%}" in text
    assert "1 x because" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(31, 5)}, "'qkv' has shape (31, 5)"),
        ({"qkv": None}, "misses 1 tensors"),
    ],
)
def test_apply_names_the_tensor_that_does_not_fit(spec, state, change, message):
    broken = {name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}
    with pytest.raises(RebasinError) as error:
        apply_permutation(spec, spec.random_permutations(0), broken)
    assert message in str(error.value)


def test_apply_refuses_unknown_groups_and_wrong_shapes(spec, state):
    with pytest.raises(RebasinError, match="'nobody'"):
        apply_permutation(spec, {"nobody": torch.arange(3)}, state)
    with pytest.raises(RebasinError, match=r"\(4, 3\)"):
        apply_permutation(spec, {"qk": torch.arange(3)}, state)
    with pytest.raises(RebasinError, match="'qk' is no permutation"):
        apply_permutation(spec, {"qk": torch.zeros(4, 3, dtype=torch.long)}, state)


@pytest.mark.parametrize(
    ("groups", "axis", "message"),
    [
        ([("a", 3, "b"), ("b", 2, None)], None, "must be listed before"),
        ([("a", 3, None)], AxisSpec(("a",), torch.tensor([[0, 1, 1]])), "same number of positions"),
        ([("a", 2, None)], AxisSpec(("a",), torch.tensor([[0, 1, 2]])), "unit 2"),
        ([("a", 2, None)], AxisSpec(("a",), torch.tensor([[0, 1]])), "has length 2"),
        ([("b", 3, None), ("a", 3, "b")], AxisSpec(("a",), torch.tensor([[0, 1, 2]])), "is nested in 'b'"),
        ([], AxisSpec(("a",), torch.tensor([[0, 1, 2]])), "not among the groups"),
    ],
)
def test_inconsistent_specs_are_refused(groups, axis, message):
    table = {name: PermutationGroup(name, size, parent) for name, size, parent in groups}
    with pytest.raises(RebasinError, match=message):
        PermutationSpec(table, {"x": {0: axis}} if axis else {}, shapes={"x": (3,)})


@pytest.mark.parametrize("text", ["{", '{"format": "other"}', '{"format": "lit_wsl.permutation_spec", "version": 1}'])
def test_damaged_json_is_refused(text):
    with pytest.raises(RebasinError):
        PermutationSpec.from_json(text)


def test_builder_names_what_does_not_fit():
    builder = PermutationSpecBuilder({"w": (6, 4)})
    with pytest.raises(RebasinError, match="no tensor 'v'"):
        builder.axis("v", 0, "p")
    with pytest.raises(RebasinError, match="no axis 2"):
        builder.axis("w", 2, "p")
    with pytest.raises(RebasinError, match=r"has length 8"):
        builder.axis("w", 1, "p").axis("w", 0, ("p", 2)).build()
    with pytest.raises(RebasinError, match="'q' is not declared"):
        PermutationSpecBuilder({"w": (6, 4)}).axis("w", 0, ("q", 2)).build()
