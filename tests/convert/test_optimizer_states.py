"""Optimizer states through operations, and which parameter has which index: what is carried, and what is refused."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_wsl.convert.checkpoint import convert_checkpoint
from lit_wsl.convert.optimizers import CarryOptions, convert_optimizers
from lit_wsl.convert.saved_optimizer import NewOrder, SavedOptimizer, assign_names
from lit_wsl.convert.weights import NotCarriedError, carry_state
from lit_wsl.errors import CheckpointError, PlanError
from lit_wsl.plan.operations import Operation, run_operations, run_shapes
from lit_wsl.transfer import (
    Cast,
    Concat,
    FanOut,
    Permute,
    PlanEntry,
    Reshape,
    SideSummary,
    Split,
    Stack,
    Tie,
    TransferPlan,
    Transpose,
    Unmatched,
    Unstack,
)

SIDE = SideSummary("x", 0, 0, 0, 0, "")


def entry(operations, shapes):
    results = tuple(run_shapes(operations, shapes))
    sources = tuple(f"s{i}" for i in range(len(shapes)))
    return PlanEntry(sources, tuple(f"t{i}" for i in range(len(results))), tuple(operations), tuple(shapes), results)


def stepped(optimizer_class, shapes, **settings):
    """The states of a real optimizer after three steps on parameters of these shapes, and the gradients it saw."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(s)) for s in shapes]
    optimizer = optimizer_class(parameters, **settings)
    gradients = [[torch.randn(s) for s in shapes] for _ in range(3)]
    for step in gradients:
        for parameter, gradient in zip(parameters, step):
            parameter.grad = gradient
        optimizer.step()
    return [optimizer.state[p] for p in parameters], gradients


ELEMENTWISE = [
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.AdamW, {}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.Rprop, {}),
    (torch.optim.ASGD, {}),
]
OPERATIONS = {
    "split": ((Split(0, (2, 2, 4)),), [(8, 3)]),
    "concat": ((Concat(0, (2, 4)),), [(2, 3), (4, 3)]),
    "transpose and split": ((Transpose(), Split(0, (1, 2))), [(4, 3)]),
    "stack": ((Stack(0, 2),), [(4, 3), (4, 3)]),
    "unstack": ((Unstack(0, 2),), [(2, 4, 3)]),
    "reshape": ((Reshape((4, 3), (4, 3, 1, 1)),), [(4, 3)]),
    "permute": ((Permute((2, 0, 1)),), [(2, 3, 4)]),
}


@pytest.mark.parametrize(("optimizer", "settings"), ELEMENTWISE, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("case", OPERATIONS)
def test_the_carried_state_is_that_of_an_optimizer_of_the_new_parameters(optimizer, settings, case):
    operations, shapes = OPERATIONS[case]
    step = entry(operations, shapes)
    states, gradients = stepped(optimizer, shapes, **settings)
    torch.manual_seed(0)
    parameters = [nn.Parameter(t.clone()) for t in run_operations(operations, [torch.randn(s) for s in shapes])]
    fresh = optimizer(parameters, **settings)
    for seen in gradients:
        for parameter, gradient in zip(parameters, run_operations(operations, seen)):
            parameter.grad = gradient.clone()
        fresh.step()
    carried = carry_state(step, states, shapes)
    assert len(carried) == len(parameters)
    for state, parameter in zip(carried, parameters):
        expected = fresh.state[parameter]
        assert state.keys() == expected.keys()
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors if t.ndim)  # no views into the old ones
        for key, value in expected.items():
            assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(value)), key


FACTORED = {
    "rename": ((), [(4, 3)]),
    "transpose": ((Transpose(),), [(4, 3)]),
    "stack": ((Stack(0, 2),), [(4, 3), (4, 3)]),
    "unstack and transpose": ((Unstack(0, 2), Transpose()), [(2, 4, 3)]),
    "split of a batch axis": ((Split(0, (1, 1)),), [(2, 4, 3)]),
    "concat of a batch axis": ((Concat(0, (1, 2)),), [(1, 4, 3), (2, 4, 3)]),
    "permuted batch axes": ((Permute((1, 0, 3, 2)),), [(2, 3, 4, 5)]),
    "batch axes reshaped": ((Reshape((2, 3, 4, 5), (6, 4, 5)),), [(2, 3, 4, 5)]),
}


@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize("case", FACTORED)
def test_factors_follow_rows_and_columns(case, squeezed):
    operations, shapes = FACTORED[case]
    step = entry(operations, shapes)
    torch.manual_seed(0)
    squares = [torch.rand(s) for s in shapes]

    def factors(square):
        return {
            "step": torch.tensor(3.0),
            "row_var": square.mean(-1, keepdim=not squeezed),
            "col_var": square.mean(-2, keepdim=not squeezed),
        }

    carried = carry_state(step, [factors(square) for square in squares], shapes)
    for state, square in zip(carried, run_operations(operations, squares)):
        expected = factors(square)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_torchs_own_adafactor_is_carried_under_transpose():
    shapes = [(4, 3)]
    step = entry((Transpose(),), shapes)
    states, gradients = stepped(torch.optim.Adafactor, shapes)
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(4, 3).t().clone())
    fresh = torch.optim.Adafactor([parameter])
    for (gradient,) in gradients:
        parameter.grad = gradient.t().clone()
        fresh.step()
    (carried,) = carry_state(step, states, shapes)
    for key, value in fresh.state[parameter].items():
        torch.testing.assert_close(carried[key], value)


REFUSED = {
    "joined rows of factors": ((Concat(0, (4, 4)),), [(4, 3)] * 2, "adafactor", "mean over whole rows or columns"),
    "cut rows of factors": ((Split(0, (2, 2)),), [(4, 3)], "adafactor", "mean over whole rows or columns"),
    "another matrix": ((Reshape((4, 3), (3, 4)),), [(4, 3)], "adafactor", "mean over whole rows or columns"),
    "rows become batches": ((Permute((1, 0, 2)),), [(2, 4, 3)], "adafactor", "mean over whole rows or columns"),
    "matrix to vector": ((Reshape((4, 1), (4,)),), [(4, 1)], "adafactor", "makes a matrix of a vector"),
    "fan out": ((FanOut(2),), [(4, 3)], "adam", "changes which gradients are summed"),
    "tie": ((Tie(2),), [(4, 3)] * 2, "adam", "changes which gradients are summed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_mathematics_does_not_allow_is_refused_with_the_reason(case):
    operations, shapes, kind, message = REFUSED[case]
    optimizer = torch.optim.Adafactor if kind == "adafactor" else torch.optim.Adam
    states, _ = stepped(optimizer, shapes)
    with pytest.raises(NotCarriedError, match=message):
        carry_state(entry(operations, shapes), states, shapes)


def test_counters_must_agree_where_parameters_are_joined():
    shapes = [(2, 3), (4, 3)]
    states, _ = stepped(torch.optim.Adam, shapes)
    states[1] = {**states[1], "step": states[1]["step"] + 1}
    with pytest.raises(NotCarriedError, match=r"'step' differs .*3\.0, 4\.0"):
        carry_state(entry((Concat(0, (2, 4)),), shapes), states, shapes)


def test_states_of_unknown_form_are_carried_only_by_a_rename():
    state = {"preconditioner": torch.eye(4), "history": [torch.ones(3)]}
    assert carry_state(entry((), [(4, 3)]), [state], [(4, 3)]) == [state]
    with pytest.raises(NotCarriedError, match="neither one value per weight"):
        carry_state(entry((Transpose(),), [(4, 3)]), [state], [(4, 3)])


def test_a_cast_takes_moments_along_but_not_counters():
    state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(4, dtype=torch.float16)}
    (carried,) = carry_state(entry((Cast("float16", "float32"),), [(4,)]), [state], [(4,)])
    assert (carried["exp_avg"].dtype, carried["step"].dtype) == (torch.float32, torch.float32)
    (carried,) = carry_state(entry((Cast("float32", "float16"),), [(4,)]), [{"step": torch.tensor(3.0)}], [(4,)])
    assert carried["step"].dtype == torch.float32


# ---------------------------------------------------------------- which parameter has which index


def saved(groups, shapes, names=None):
    """An Adam state dict; ``groups`` hold parameter numbers, indices run through the groups; None: without state."""
    state, made, index = {}, [], 0
    for number, group in enumerate(groups):
        indices = []
        for parameter in group:
            if shapes[parameter] is not None:
                state[index] = {"step": torch.tensor(1.0), "exp_avg": torch.full(shapes[parameter], float(parameter))}
            indices.append(index)
            index += 1
        made.append({"lr": 0.1 * (number + 1), "params": indices})
        if names is not None:
            made[-1]["param_names"] = [names[parameter] for parameter in group]
    return {"state": state, "param_groups": made}


SHAPES = {"a.w": (2, 3), "a.b": (2,), "b.w": (3, 2), "b.b": (3,), "c.w": (2, 2), "c.b": (2,)}
LISTED = list(SHAPES.values())


def assign(*saved_states, parameters=SHAPES, **given):
    optimizers = [SavedOptimizer.read(data, f"optimizer {n}") for n, data in enumerate(saved_states)]
    return assign_names(optimizers, parameters, **given)[0]


def names_of(*groups):
    names = list(SHAPES)
    return tuple(tuple(names[n] for n in group) for group in groups)


@pytest.mark.parametrize(
    "groups",
    [
        [[0, 1, 2, 3, 4, 5]],
        [[0, 2, 4], [1, 3, 5]],  # weights and biases, interleaved in the model
        [[2, 3], [0, 1, 4, 5]],  # one layer with a learning rate of its own
        [[2, 3, 4]],  # the rest is frozen
        [[4, 5], [0, 1]],
    ],
)
def test_indices_are_told_by_order_and_shapes(groups):
    assert assign(saved(groups, LISTED)) == [names_of(*groups)]


def test_several_optimizers_share_the_parameters():
    found = assign(saved([[0, 1]], LISTED), saved([[2, 3], [4, 5]], LISTED))
    assert found == [names_of([0, 1]), names_of([2, 3], [4, 5])]
    both = assign(saved([[0, 1, 2, 3, 4, 5]], LISTED), saved([[0, 1, 2, 3, 4, 5]], LISTED))
    assert both == [names_of([0, 1, 2, 3, 4, 5])] * 2


def test_names_in_the_file_decide_with_or_without_a_common_prefix():
    names = list(SHAPES)
    groups = [[5, 0, 3], [1, 2]]
    assert assign(saved(groups, LISTED, names)) == [names_of(*groups)]
    under = {f"model.{name}": shape for name, shape in SHAPES.items()}
    found = assign(saved(groups, LISTED, names), parameters=under)
    assert found == [tuple(tuple(f"model.{n}" for n in group) for group in names_of(*groups))]
    with pytest.raises(CheckpointError, match=r"no parameter of this name"):
        assign(saved(groups, LISTED, [f"x.{n}" for n in names]))


def test_names_given_by_the_user_decide():
    names = list(SHAPES)
    groups = [[5, 0, 3], [1, 2]]
    assert assign(saved(groups, LISTED), given=[[names[n] for n in (5, 0, 3, 1, 2)]]) == [names_of(*groups)]
    with pytest.raises(CheckpointError, match="has 5 parameters, but parameter_names gives 1"):
        assign(saved(groups, LISTED), given=[["a.w"]])
    with pytest.raises(CheckpointError, match=r"does not belong to 'b\.w'"):
        assign(saved(groups, LISTED), given=[[names[n] for n in (2, 0, 3, 1, 5)]])


SAME = {f"l.{n}.w": (2, 2) for n in range(3)}


@pytest.mark.parametrize(
    ("groups", "shapes", "message"),
    [
        ([[0]], [(2, 2)] * 3, "not unique: 'l.0.w' .*left out"),
        ([[0], [1, 2]], [(2, 2)] * 3, "not unique: 'l.0.w' .*index 0 in group 0 .* index 1 in group 1"),
        ([[0, 1, 2]], [(2, 2), (3,), (2, 2)], r"index 1 \(.*exp_avg \(3,\)\) does not belong to 'l.1.w'"),
        ([[0, 1], [2]], [(2, 2), (5,), (2, 2)], "no assignment"),
        ([[0, 1, 2, 0]], [(2, 2)] * 3, "has 4 parameters, but the weights in the file only 3"),
    ],
)
def test_what_is_not_unique_or_does_not_fit_is_refused(groups, shapes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        assign(saved(groups, shapes), parameters=SAME)
    assert "parameter_names" in str(caught.value)


def test_a_hopeless_search_ends():
    parameters = {f"l.{n}.w": (2, 2) for n in range(400)}
    groups = [list(range(start, start + 40)) for start in range(0, 400, 40)]
    with pytest.raises(CheckpointError, match=r"too many assignments|not unique"):
        assign(saved(groups, [(2, 2)] * 400), parameters=parameters)


def every_assignment(groups, state_shapes, shapes):
    """All ways to give parameters to groups in order so that the shapes agree, found by trying everything."""
    found = []
    for owners in itertools.product(range(-1, len(groups)), repeat=len(shapes)):
        members = [[n for n, owner in enumerate(owners) if owner == g] for g in range(len(groups))]
        if [len(m) for m in members] != [len(g) for g in groups]:
            continue
        pairs = [(p, i) for m, g in zip(members, groups) for p, i in zip(m, g)]
        if all(state_shapes[i] is None or state_shapes[i] == shapes[p] for p, i in pairs):
            found.append(tuple(map(tuple, members)))
    return found


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_an_assignment_is_accepted_exactly_if_it_is_the_only_one(data):
    shapes = data.draw(st.lists(st.sampled_from([(2,), (3,), (2, 2), (2, 3)]), min_size=1, max_size=6))
    owners = data.draw(st.lists(st.sampled_from([-1, 0, 0, 1]), min_size=len(shapes), max_size=len(shapes)))
    truth = [[n for n, owner in enumerate(owners) if owner == g] for g in (0, 1)]
    known = data.draw(st.lists(st.sampled_from([True, True, True, False]), min_size=len(shapes), max_size=len(shapes)))
    state_shapes = [shape if has else None for shape, has in zip(shapes, known)]
    indices, groups = itertools.count(), []
    for group in truth:
        groups.append([next(indices) for _ in group])
    by_index = [state_shapes[n] for group in truth for n in group]
    possible = every_assignment(groups, by_index, shapes)
    names = {f"p{n}": shape for n, shape in enumerate(shapes)}
    file = saved(truth, state_shapes)
    if len(possible) == 1:
        assert assign(file, parameters=names) == [tuple(tuple(f"p{n}" for n in g) for g in truth)]
    else:
        assert tuple(map(tuple, truth)) in possible
        with pytest.raises(CheckpointError, match="not unique"):
            assign(file, parameters=names)


@pytest.mark.parametrize("data", [None, [], {"state": {}}, {"state": [], "param_groups": []}, {"param_groups": [{}]}])
def test_what_is_no_optimizer_is_refused(data):
    with pytest.raises(CheckpointError, match="is not the state of a torch optimizer"):
        SavedOptimizer.read(data, "optimizer 0")


# ---------------------------------------------------------------- groups of the new run


def renamed(*pairs, unmatched=()):
    entries = tuple(PlanEntry((a,), (b,), (), (SHAPES[a],), (SHAPES[a],)) for a, b in pairs)
    return TransferPlan(
        entries, SIDE, SIDE, unmatched_target=tuple(Unmatched(n, (1,), "parameter", "") for n in unmatched)
    )


PAIRS = [(name, f"new.{name}") for name in SHAPES]


def test_groups_and_settings_go_with_their_parameters():
    order = [f"new.{n}" for n in ("c.w", "a.b", "a.w", "b.b", "b.w", "c.b")]
    (made,) = convert_optimizers(
        [saved([[0, 2, 4], [1, 3, 5]], LISTED)], renamed(*PAIRS), SHAPES, NewOrder(order)
    ).states
    assert [g["params"] for g in made["param_groups"]] == [[0, 1, 2], [3, 4, 5]]
    assert [g["lr"] for g in made["param_groups"]] == [0.1, 0.2]
    found = [int(made["state"][n]["exp_avg"].flatten()[0]) for n in range(6)]
    assert found == [4, 0, 2, 1, 3, 5]  # c.w, a.w, b.w; then a.b, b.b, c.b


def test_names_are_written_where_the_file_had_them():
    order = [f"new.{n}" for n in reversed(SHAPES)]
    data = saved([[0, 1, 2, 3, 4, 5]], LISTED, list(SHAPES))
    carried = convert_optimizers([data], renamed(*PAIRS), SHAPES, NewOrder(order))
    (made,), notes = carried.states, carried.notes
    assert made["param_groups"][0]["param_names"] == order
    assert notes == []


def test_parameters_from_different_groups_cannot_be_joined():
    plan = TransferPlan((PlanEntry(("a.w", "c.w"), ("new",), (Concat(0, (2, 2)),), ((2, 3), (2, 3))),), SIDE, SIDE)
    shapes = {"a.w": (2, 3), "c.w": (2, 3), "b": (1,)}
    with pytest.raises(CheckpointError, match="different parameter groups"):
        convert_optimizers(
            [saved([[0, 2], [1]], [(2, 3), (2, 3), (1,)], list(shapes))], plan, shapes, NewOrder(("new",))
        )


def test_a_parameter_without_source_starts_fresh_in_the_only_group():
    plan = renamed(*PAIRS[:-1], unmatched=["head"])
    order = ("head", *(new for _, new in PAIRS[:-1]))
    carried = convert_optimizers([saved([[0, 1, 2, 3, 4, 5]], LISTED)], plan, SHAPES, NewOrder(order))
    (made,), notes = carried.states, carried.notes
    assert made["param_groups"][0]["params"] == list(range(6))
    assert sorted(made["state"]) == [1, 2, 3, 4, 5]
    assert any("head" in note for note in notes)
    with pytest.raises(CheckpointError, match="'head' has no source, so it is not known which parameter group"):
        convert_optimizers([saved([[0, 2, 4], [1, 3, 5]], LISTED)], plan, SHAPES, NewOrder(order))


def test_what_cannot_be_carried_is_refused_or_starts_fresh():
    entries = (PlanEntry(("a",), ("x", "y"), (FanOut(2),), ((2, 2),), ((2, 2),) * 2),)
    plan = TransferPlan(entries, SIDE, SIDE)
    data, shapes, new = saved([[0]], [(2, 2)]), {"a": (2, 2)}, NewOrder(("x", "y"))
    with pytest.raises(CheckpointError, match=r"state of 'x' cannot be carried: fan_out .*on_lost='initialize'"):
        convert_optimizers([data], plan, shapes, new)
    carried = convert_optimizers([data], plan, shapes, new, options=CarryOptions(on_lost="initialize"))
    (made,), notes = carried.states, carried.notes
    assert made["state"] == {}
    assert made["param_groups"][0]["params"] == [0, 1]
    assert sum("starts anew" in note for note in notes) == 2


# ---------------------------------------------------------------- whole files


def test_a_plan_for_another_checkpoint_is_refused_and_nothing_is_written(tmp_path):
    torch.save({"state_dict": {"a.w": torch.ones(3, 3)}, "epoch": 1}, tmp_path / "old.ckpt")
    for pairs, message in (([("a.w", "x")], r"has shape \(3, 3\)"), ([("b.w", "x")], "no tensor 'b.w'")):
        with pytest.raises(PlanError, match=message):
            convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt", renamed(*pairs))
    assert not (tmp_path / "new.ckpt").exists()


def test_a_written_view_does_not_drag_its_whole_storage_along(tmp_path):
    torch.save({"qkv": torch.randn(300, 100)}, tmp_path / "old.pt")
    plan = TransferPlan(
        (PlanEntry(("qkv",), ("q", "k", "v"), (Split(0, (100, 100, 100)),), ((300, 100),), ((100, 100),) * 3),),
        SIDE,
        SIDE,
    )
    convert_checkpoint(tmp_path / "old.pt", tmp_path / "new.pt", plan)
    assert (tmp_path / "new.pt").stat().st_size < 130_000
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in torch.load(tmp_path / "new.pt").values())


class Tied(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.add_module(first, nn.Embedding(7, 4))
        self.middle = nn.Linear(4, 4)
        self.add_module(second, nn.Linear(4, 7, bias=False))
        getattr(self, second).weight = getattr(self, first).weight


def test_tied_weights_count_once_and_come_back_under_both_names(tmp_path):
    torch.manual_seed(0)
    old, new = Tied("wte", "lm_head"), Tied("tokens", "out")
    optimizer = torch.optim.Adam(old.parameters())
    for parameter in old.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    content = {"state_dict": old.state_dict(), "optimizer_states": [optimizer.state_dict()], "lr_schedulers": []}
    torch.save(content | {"pytorch-lightning_version": "2.6.0"}, tmp_path / "old.ckpt")
    pairs = {"wte.weight": "tokens.weight", "middle.weight": "middle.weight", "middle.bias": "middle.bias"}
    plan = TransferPlan(tuple(PlanEntry((a,), (b,)) for a, b in pairs.items()), SIDE, SIDE)
    done = convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt", plan, target=new)
    assert done.states == 3
    content = torch.load(tmp_path / "new.ckpt", weights_only=True)
    new.load_state_dict(content["state_dict"])
    assert torch.equal(new.out.weight, old.wte.weight)
    fresh = torch.optim.Adam(new.parameters())
    fresh.load_state_dict(content["optimizer_states"][0])
    assert torch.equal(fresh.state[new.tokens.weight]["exp_avg"], optimizer.state[old.wte.weight]["exp_avg"])


def trained_pair():
    """An old and a new model, the old one's optimizer after a step, and the plan."""
    torch.manual_seed(0)
    old = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    new = nn.ModuleDict({"out": nn.Linear(4, 2), "into": nn.Linear(3, 4)})
    optimizer = torch.optim.Adam(old.parameters(), lr=0.01)
    for parameter in old.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    pairs = {f"{a}.{leaf}": f"{b}.{leaf}" for a, b in (("0", "into"), ("2", "out")) for leaf in ("weight", "bias")}
    plan = TransferPlan(tuple(PlanEntry((a,), (b,)) for a, b in pairs.items()), SIDE, SIDE)
    return old, new, optimizer, plan, pairs


def check_states(made, new, old, optimizer, pairs):
    fresh = torch.optim.Adam(new.parameters())
    fresh.load_state_dict(made)
    assert fresh.param_groups[0]["lr"] == 0.01
    before, after = dict(old.named_parameters()), dict(new.named_parameters())
    for a, b in pairs.items():
        assert torch.equal(fresh.state[after[b]]["exp_avg"], optimizer.state[before[a]]["exp_avg"])


def test_checkpoints_of_plain_training_scripts_are_converted_too(tmp_path):
    old, new, optimizer, plan, pairs = trained_pair()
    average = {f"module.{k}": v + 1 for k, v in old.state_dict().items()} | {"n_averaged": torch.tensor(7)}
    content = {"model": old.state_dict(), "optimizer": optimizer.state_dict(), "ema": average, "epoch": 3}
    content["optimizers"] = {"main": optimizer.state_dict(), "note": "x"}
    torch.save(content, tmp_path / "old.pt")
    done = convert_checkpoint(tmp_path / "old.pt", tmp_path / "new.pt", plan, target=new)
    assert done.optimizers == 2
    made = torch.load(tmp_path / "new.pt", weights_only=True)
    assert list(made) == list(content)
    new.load_state_dict(made["model"])
    check_states(made["optimizer"], new, old, optimizer, pairs)
    check_states(made["optimizers"]["main"], new, old, optimizer, pairs)
    assert made["optimizers"]["note"] == "x"
    assert set(made["ema"]) == {f"module.{name}" for name in pairs.values()} | {"n_averaged"}
    assert torch.equal(made["ema"]["module.out.bias"], average["module.2.bias"])


def test_sharded_folders_with_states_by_name_become_one_file(tmp_path):
    import torch.distributed.checkpoint as dcp

    old, new, optimizer, plan, pairs = trained_pair()
    state = optimizer.state_dict()
    names = [name for name, _ in old.named_parameters()]
    by_name = {"state": {names[i]: s for i, s in state["state"].items()}}
    by_name["param_groups"] = [{**state["param_groups"][0], "params": names}]
    dcp.save({"state_dict": old.state_dict(), "optimizer_0": by_name}, checkpoint_id=tmp_path / "folder", no_dist=True)
    torch.save({"pytorch-lightning_version": "2.6.0", "lr_schedulers": [], "epoch": 2}, tmp_path / "folder" / "meta.pt")
    convert_checkpoint(tmp_path / "folder", tmp_path / "new.ckpt", plan, target=new)
    made = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert "optimizer_0" not in made
    assert made["epoch"] == 2
    new.load_state_dict(made["state_dict"])
    assert made["optimizer_states"][0]["param_groups"][0]["params"] == [name for name, _ in new.named_parameters()]
    check_states(made["optimizer_states"][0], new, old, optimizer, pairs)


def test_what_goes_nowhere_is_said(tmp_path):
    *_, plan, pairs = trained_pair()
    state = {name: torch.ones(2) for name in pairs} | {"old_head": torch.ones(1), "added": torch.ones(1)}
    torch.save({"state_dict": state}, tmp_path / "old.ckpt")
    plan = TransferPlan(
        plan.entries[:2], SIDE, SIDE, unmatched_source=(Unmatched("old_head", (1,), "parameter", "no partner"),)
    )
    done = convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt", plan)
    assert any("4 tensors of the checkpoint are not used: 2.weight, 2.bias, old_head, added" in n for n in done.notes)
    assert any("does not know 2.weight, 2.bias, added" in note for note in done.notes)


class Doubled(Operation):
    """An operation that changes values and looks at the target's."""

    name = "doubled"
    lossless = False
    needs_target = True

    def shapes(self, inputs):
        return list(inputs)

    def apply(self, inputs, targets=()):
        return [2 * x + y for x, y in zip(inputs, targets)]

    def reverse(self):
        raise PlanError("no way back")


def test_operations_that_need_the_target_are_given_it(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(3)}}, tmp_path / "old.ckpt")
    plan = TransferPlan((PlanEntry(("a",), ("bias",), (Doubled(),), ((3,),), ((3,),)),), SIDE, SIDE)
    with pytest.raises(PlanError, match="give the target model"):
        convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt", plan)
    model = nn.Linear(2, 3)
    convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt", plan, target=model)
    made = torch.load(tmp_path / "new.ckpt")["state_dict"]
    assert torch.equal(made["bias"], 2 + model.bias.detach())
    with pytest.raises(NotCarriedError, match="changes values"):
        carry_state(plan.entries[0], [{"exp_avg": torch.ones(3)}], [(3,)])
    with pytest.raises(PlanError, match="cannot be reversed"):
        plan.reverse()


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_a_plan_may_speak_of_the_average(weights, tmp_path):
    old, new, optimizer, plan, pairs = trained_pair()
    average = {name: tensor + 1 for name, tensor in old.state_dict().items()}
    content = {"state_dict": old.state_dict(), "state_dict_ema": average, "optimizer": optimizer.state_dict()}
    torch.save(content, tmp_path / "old.pt")
    convert_checkpoint(tmp_path / "old.pt", tmp_path / "new.pt", plan, target=new, checkpoint_weights=weights)
    made = torch.load(tmp_path / "new.pt", weights_only=True)
    for key in ("state_dict", "state_dict_ema"):
        assert {b: made[key][b].tolist() for b in pairs.values()} == {
            b: content[key][a].tolist() for a, b in pairs.items()
        }
    check_states(made["optimizer"], new, old, optimizer, pairs)
