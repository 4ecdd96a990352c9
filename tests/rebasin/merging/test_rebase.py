"""A fine-tuning on another release of its base: planted permutations and rotations, heads, statistics, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from handmade_specs import ALL, tensors
from torch import nn

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin import apply_permutation, infer_permutation_spec, rebase, reestimate_batchnorm, task_vector
from lit_wsl.rebasin.merging.fitting import identity_maps, procrustes, turn_tensor


def conv_net(seed: int = 0, classes: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 9, 12),
        nn.Tanh(),
        nn.Linear(12, classes),
    )
    with torch.no_grad():
        net[1].weight.uniform_(0.5, 1.5)
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    return net.eval()


IMAGES = [torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(4)]


def nearby(state: dict[str, torch.Tensor], seed: int, size: float = 0.1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t + size * t.std() * torch.randn(t.shape, generator=generator)
        if t.is_floating_point() and t.numel() > 1 and "running" not in n
        else t
        for n, t in state.items()
    }


def answers(state, images=IMAGES, classes=4):
    net = conv_net(0, classes)
    net.load_state_dict(state)
    with torch.no_grad():
        return torch.cat([net(x) for x in images])


@pytest.fixture
def spec():
    return infer_permutation_spec(conv_net(), (IMAGES[0][:2],))


@pytest.fixture
def case(spec):
    """Old base, fine-tuned, and the old base in another order with its fine-tuning in that order."""
    old = conv_net().state_dict()
    tuned = nearby(old, 1)
    order = spec.random_permutations(3)
    return old, tuned, apply_permutation(spec, order, old), apply_permutation(spec, order, tuned)


def test_without_data_a_planted_permutation_carries_everything_exactly(spec, case):
    old, tuned, new, wanted = case
    result = rebase(spec, task_vector(tuned, old), old, new)
    assert result.method == "permute"
    assert result.gap is None
    for name, tensor in wanted.items():
        torch.testing.assert_close(result.state_dict[name], tensor)
    assert any("quality unknown" in text for text in result.warnings)
    assert any("statistics" in text for text in result.warnings)
    assert not any("running" in name for name in result.task_vector)


def test_a_result_shows_itself_in_a_notebook_and_on_one_line(spec, case):
    old, tuned, new, _ = case
    result = rebase(spec, task_vector(tuned, old), old, new)
    page = result._repr_html_()
    assert page.startswith("<pre")
    assert "method: permute" in page
    assert all(warning[:20] in str(result) for warning in result.warnings)
    assert "tensor(" not in page + repr(result)
    assert "\n" not in repr(result)


def test_with_data_too_and_statistics_are_those_of_the_batches(spec, case):
    old, tuned, new, wanted = case
    state = copy.deepcopy(new)
    result = rebase(spec, task_vector(tuned, old), old, new, model=conv_net(5), batches=[(x, None) for x in IMAGES])
    assert result.method == "permute"
    assert result.missed < 1e-6
    assert result.gap < 1e-3
    assert result.warnings == ()
    for name, tensor in wanted.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(result.state_dict[name], tensor)
    x = torch.cat(IMAGES)
    mean = nn.functional.conv2d(x, result.state_dict["0.weight"], padding=1).mean((0, 2, 3))
    torch.testing.assert_close(result.state_dict["1.running_mean"], mean)
    assert all(torch.equal(state[n], t) for n, t in new.items())  # nothing given is changed


def test_units_in_place_are_added_as_they_are_with_their_factor(spec):
    old = conv_net().state_dict()
    tuned, new = nearby(old, 1), nearby(old, 2)
    vector = {n: t for n, t in task_vector(tuned, old).items() if "running" not in n}
    result = rebase(spec, vector, old, new, alpha=0.5)
    assert result.method == "add"
    assert result.matching.identity_share > 0.5
    for name, delta in vector.items():
        torch.testing.assert_close(result.state_dict[name], new[name] + 0.5 * delta)


@pytest.mark.parametrize("batches", [None, IMAGES])
def test_turning_a_planted_permutation_is_permuting(spec, case, batches):
    old, tuned, new, wanted = case
    model = None if batches is None else conv_net()
    result = rebase(spec, task_vector(tuned, old), old, new, model=model, batches=batches, method="turn")
    assert any("approximate" in text for text in result.warnings)
    for name, delta in result.task_vector.items():
        torch.testing.assert_close(delta, wanted[name] - new[name], rtol=1e-2, atol=2e-4)


def test_a_planted_rotation_is_turned_back():
    """Between two linear layers any rotation keeps the function; no permutation comes near it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 12), nn.Identity(), nn.Linear(12, 16)).double()
    spec = infer_permutation_spec(net, (torch.randn(2, 16).double(),))
    old = net.state_dict()
    tuned = nearby(old, 1)
    turn = torch.linalg.qr(torch.randn(12, 12).double())[0]

    def turned(state):
        return {**state, "0.weight": turn @ state["0.weight"], "0.bias": turn @ state["0.bias"],
                "2.weight": state["2.weight"] @ turn.T}  # fmt: skip

    new, wanted = turned(old), turned(tuned)
    vector = task_vector(tuned, old)
    errors = {}
    for method in ("permute", "turn"):
        result = rebase(spec, vector, old, new, method=method)
        errors[method] = sum(float((result.state_dict[n] - t).norm()) for n, t in wanted.items())
    assert errors["turn"] < 1e-3
    assert errors["permute"] > 100 * errors["turn"]
    assert rebase(spec, vector, old, new, model=net, batches=[torch.randn(40, 16).double()]).method in ("turn", "fit")


def test_maps_are_orthogonal_and_equal_models_are_not_turned(spec):
    a, b = ({n: t for n, t in conv_net(seed).state_dict().items() if n in spec.parameters} for seed in (0, 1))
    maps = procrustes(spec, a, b)
    for turn in maps.values():
        torch.testing.assert_close(turn @ turn.mT, torch.eye(turn.shape[-1]).double().expand_as(turn))
    same = procrustes(spec, a, a)
    for group, turn in identity_maps(spec).items():
        torch.testing.assert_close(same[group], turn, atol=1e-4, rtol=0)
    for name in ("3.weight", "6.weight"):
        back = turn_tensor(spec, {g: t.mT for g, t in maps.items()}, name, turn_tensor(spec, maps, name, b[name]))
        torch.testing.assert_close(back, b[name], atol=1e-4, rtol=1e-4)


def test_fitted_layers_answer_like_the_fine_tuned_model_where_no_order_of_units_fits(spec):
    old, new = conv_net(0).state_dict(), conv_net(1).state_dict()
    vector = task_vector(nearby(old, 2, 0.5), old)
    missed = {}
    for method in ("add", "permute", "turn", "fit"):
        result = rebase(spec, vector, old, new, model=conv_net(), batches=IMAGES, method=method)
        missed[method] = result.missed
        assert result.method == method
    assert missed["fit"] == min(missed.values())
    auto = rebase(spec, vector, old, new, model=conv_net(), batches=IMAGES)
    assert auto.missed == pytest.approx(min(missed.values()), rel=1e-3)
    assert any("start of a fine-tuning" in text for text in auto.warnings)
    assert any("may be better" in text for text in auto.warnings)


def test_what_the_fine_tuning_left_alone_is_left_alone_by_the_fit(spec):
    old, new = conv_net(0).state_dict(), conv_net(1).state_dict()
    tuned = {**old, "8.weight": old["8.weight"] + 0.3}
    result = rebase(spec, task_vector(tuned, old), old, new, model=conv_net(), batches=IMAGES, method="fit")
    assert sorted(n for n, t in result.task_vector.items() if t.any()) == ["8.bias", "8.weight"]


@pytest.mark.parametrize("method", ["auto", "permute", "turn", "fit"])
def test_a_fresh_head_is_carried_with_its_input_axes(case, method):
    old, tuned, new, _ = (dict(state) for state in case)
    head = {"8.weight": torch.randn(7, 12), "8.bias": torch.randn(7)}
    model = conv_net(0, 7)
    spec = infer_permutation_spec(model, (IMAGES[0][:2],))
    vector = task_vector({**tuned, **head}, old, strict=False)
    assert "8.weight" not in vector
    result = rebase(spec, vector, old, new, model=model, batches=IMAGES, fresh=head, method=method)
    network = conv_net(0, 7)
    network.load_state_dict({**tuned, **head})
    with torch.no_grad():
        reestimate_batchnorm(network, IMAGES)
        expected = torch.cat([network(x) for x in IMAGES])
    found = answers(result.state_dict, classes=7)
    assert float((found - expected).norm() / expected.norm()) < 0.02
    if method == "auto":
        assert result.method == "permute"


def test_what_does_not_fit_is_refused_by_name(spec, case):
    old, tuned, new, _ = case
    vector = task_vector(tuned, old)
    with pytest.raises(RebasinError, match=r"'6.weight'.*missing in the new base"):
        rebase(spec, vector, old, {n: t for n, t in new.items() if n != "6.weight"})
    with pytest.raises(RebasinError, match=r"'8.weight' has shape \(4, 12\).*fresh"):
        rebase(spec, vector, old, {**new, "8.weight": torch.ones(9, 12)})
    with pytest.raises(RebasinError, match=r"'other.weight'.*infer the spec"):
        rebase(spec, vector, old, new, fresh={"other.weight": torch.ones(3, 12)})
    with pytest.raises(RebasinError, match=r"8 positions|moves 12"):
        rebase(spec, vector, old, new, fresh={"8.weight": torch.ones(3, 11)})
    with pytest.raises(RebasinError, match="model="):
        rebase(spec, vector, old, new, batches=IMAGES)
    with pytest.raises(RebasinError, match=r"does not take a batch.*forward="):
        rebase(spec, vector, old, new, model=conv_net(), batches=[torch.zeros(2, 9)])
    with pytest.raises(RebasinError, match=r"old_base is a Sequential.*state_dict"):
        rebase(spec, vector, conv_net(), new)
    with pytest.raises(RebasinError, match="spec is a dict"):
        rebase(vector, spec, old, new)
    with pytest.raises(RebasinError, match="unlabelled batches"):
        rebase(spec, vector, old, new, method="fit")
    with pytest.raises(RebasinError, match="'magic'"):
        rebase(spec, vector, old, new, method="magic")
    with pytest.raises(RebasinError, match="no batch"):
        rebase(spec, vector, old, new, model=conv_net(), batches=[])
    headless = {n: t for n, t in vector.items() if not n.startswith("8.")}
    bases = [{n: t for n, t in state.items() if not n.startswith("8.")} for state in (old, new)]
    with pytest.raises(RebasinError, match=r"'8.weight' of shape \(4, 12\).*fresh="):
        rebase(spec, headless, *bases, model=conv_net(), batches=IMAGES)


@pytest.mark.parametrize("name", sorted(ALL))
def test_turning_by_permutation_matrices_is_permuting_innermost_groups(name):
    """On every layout of axes that specs have: nested, fused, stacked, experts on another axis."""
    spec = ALL[name]
    innermost = [group for group in spec.groups if not spec.children(group)]
    permutations = {**spec.identity(), **{g: spec.random_permutations(2)[g] for g in innermost}}
    maps = {}
    for group in innermost:
        rows = permutations[group].reshape(-1, spec.groups[group].size)
        maps[group] = torch.eye(rows.shape[1]).double()[rows]
    state = tensors(spec, 0)
    for tensor, expected in apply_permutation(spec, permutations, state).items():
        for scale in (False, True):
            torch.testing.assert_close(turn_tensor(spec, maps, tensor, state[tensor], scale=scale), expected)
