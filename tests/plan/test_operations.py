"""Operations: shapes without data agree with the data, and what is done can be undone bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_wsl.errors import PlanError
from lit_wsl.plan.operations import OPERATIONS, operation_from_dict, run_operations, run_shapes
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
    Unstack,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)


def bits(tensors):
    """What must be equal; of NaN only that it is one, since a cast keeps no payload."""
    tensors = [t.nan_to_num(nan=12345.0, posinf=float("inf")) if t.is_floating_point() else t for t in tensors]
    flat = [torch.empty(t.numel(), dtype=t.dtype).copy_(t.reshape(-1)) for t in tensors]
    return [(t.dtype, tuple(t.shape), f.view(torch.uint8).tolist()) for t, f in zip(tensors, flat)]


@st.composite
def next_operation(draw, shapes, dtype):
    """An operation that fits tensors of these shapes."""
    common = shapes[0]
    equal = all(s == common for s in shapes)
    rank = min(map(len, shapes))
    options = ["fan_out"]
    if equal:
        options += ["permute", "reshape", "stack"]
    if rank >= 2:
        options.append("transpose")
    if equal and rank >= 1:
        options += ["split", "unstack", "concat"]
    if dtype == "float16":
        options.append("cast")
    kind = draw(st.sampled_from(options))
    dim = draw(st.integers(0, max(rank - 1, 0)))
    if kind == "permute":
        return Permute(tuple(draw(st.permutations(range(len(common))))))
    if kind == "transpose":
        return Transpose(dim, draw(st.integers(0, rank - 1)))
    if kind == "reshape":
        return Reshape(common, draw(st.sampled_from([(*common, 1), (1, *common), (int(torch.Size(common).numel()),)])))
    if kind == "split":
        cut = draw(st.integers(0, common[dim]))
        return Split(dim, (cut, common[dim] - cut))
    if kind == "unstack" and common[dim]:
        return Unstack(dim, common[dim])
    if kind in ("stack", "concat"):
        count = draw(st.sampled_from([n for n in range(1, len(shapes) + 1) if len(shapes) % n == 0]))
        if kind == "stack":
            return Stack(draw(st.integers(0, len(common))), count)
        return Concat(dim, (common[dim],) * count)
    if kind == "cast":
        return Cast("float16", "float32")
    return FanOut(draw(st.integers(1, 2)))


@st.composite
def chains(draw):
    """Source tensors and a chain of operations that fits them."""
    dtype = draw(st.sampled_from(DTYPES))
    count = draw(st.integers(1, 4))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    tensors = [torch.randint(-9, 9, shape, generator=generator).to(dtype) for _ in range(count)]
    if dtype.is_floating_point and draw(st.booleans()):
        tensors = [t / 7 * float("nan") if i % 2 else t / 7 for i, t in enumerate(tensors)]
    shapes = [shape] * count
    name = str(dtype).removeprefix("torch.")
    operations = []
    for _ in range(draw(st.integers(0, 5))):
        if len(shapes) > 12:
            break
        operation = draw(next_operation(shapes, name))
        name = operation.target if isinstance(operation, Cast) else name
        operations.append(operation)
        shapes = operation.shapes(shapes)
    return tensors, operations


@settings(max_examples=200, deadline=None)
@given(chains())
def test_reverse_of_apply_is_the_identity_for_random_chains(case):
    tensors, operations = case
    results = run_operations(operations, tensors)
    assert [tuple(t.shape) for t in results] == run_shapes(operations, [tuple(t.shape) for t in tensors])
    back = run_operations([operation.reverse() for operation in reversed(operations)], results)
    assert bits(back) == bits(tensors)


@settings(max_examples=100, deadline=None)
@given(chains())
def test_operations_come_back_from_plain_data(case):
    for operation in case[1]:
        assert operation_from_dict(operation.to_dict()) == operation


@settings(max_examples=100, deadline=None)
@given(chains())
def test_a_reversed_plan_undoes_its_plan(case):
    tensors, operations = case
    shapes = [tuple(t.shape) for t in tensors]
    results = run_shapes(operations, shapes)
    side = SideSummary("x", 0, 0, 0, 0, "")
    plan_entry = PlanEntry(
        tuple(f"s{i}" for i in range(len(tensors))),
        tuple(f"t{i}" for i in range(len(results))),
        tuple(operations),
        tuple(shapes),
        tuple(results),
    )
    reverse = TransferPlan((plan_entry,), side, side).reverse()
    assert reverse.entries[0].sources == plan_entry.targets
    assert reverse.entries[0].target_shapes == plan_entry.source_shapes
    there = run_operations(plan_entry.operations, tensors)
    assert bits(run_operations(reverse.entries[0].operations, there)) == bits(tensors)


def test_operations_mean_what_torch_means():
    x = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(run_operations([Permute((2, 0, 1))], [x])[0], x.permute(2, 0, 1))
    assert torch.equal(run_operations([Transpose(0, 2)], [x])[0], x.transpose(0, 2))
    assert [t.tolist() for t in run_operations([Split(1, (1, 2))], [x])] == [x[:, :1].tolist(), x[:, 1:].tolist()]
    pairs = [torch.full((1, 2), n) for n in range(4)]
    joined = run_operations([Concat(0, (1, 1)), Stack(0, 2)], pairs)[0]
    assert joined.tolist() == [[[0, 0], [1, 1]], [[2, 2], [3, 3]]]


def test_equal_tensors_tie_and_others_are_refused():
    x = torch.tensor([1.0, float("nan")])
    assert bits(run_operations([Tie(2)], [x, x.clone()])) == bits([x])
    with pytest.raises(PlanError, match="differ"):
        run_operations([Tie(2)], [x, x + 1])


@pytest.mark.parametrize(
    ("source", "target", "exact"),
    [
        ("float16", "float32", True),
        ("bfloat16", "float32", True),
        ("float32", "bfloat16", False),
        ("bfloat16", "float16", False),
        ("float8_e4m3fn", "float32", True),
        ("int32", "int64", True),
        ("int64", "int32", False),
        ("int64", "float64", False),
        ("int16", "float32", True),
        ("uint8", "int8", False),
        ("bool", "uint8", True),
        ("float32", "complex64", True),
    ],
)
def test_only_a_cast_that_keeps_every_value_can_be_undone(source, target, exact):
    if exact:
        assert Cast(source, target).reverse() == Cast(target, source)
    else:
        with pytest.raises(PlanError, match="rounds"):
            Cast(source, target).reverse()


@pytest.mark.parametrize(
    ("operation", "shapes"),
    [
        (Permute((0, 1)), [(1, 2, 3)]),
        (Transpose(0, 1), [(4,)]),
        (Reshape((2, 2), (4,)), [(4, 1)]),
        (Split(0, (2, 2)), [(5, 2)]),
        (Split(1, (2,)), [(2,)]),
        (Concat(0, (2, 2)), [(2, 3), (2, 4)]),
        (Concat(0, (2, 2)), [(2, 3), (1, 3)]),
        (Concat(0, (2, 2)), [(2, 3)] * 3),
        (Stack(0, 2), [(2,), (3,)]),
        (Stack(3, 1), [(2,)]),
        (Stack(0, 2), []),
        (Unstack(0, 3), [(2, 3)]),
        (Tie(2), [(2,), (3,)]),
    ],
)
def test_operations_refuse_what_they_were_not_planned_for(operation, shapes):
    with pytest.raises(PlanError, match=f"{operation.name} does not fit shapes"):
        operation.shapes(shapes)
    with pytest.raises(PlanError, match=f"{operation.name} does not fit shapes"):
        operation.apply([torch.zeros(s) for s in shapes])


@pytest.mark.parametrize(
    "data",
    [
        {"op": "permute", "dims": [0, 0]},
        {"op": "permute", "dims": 0},
        {"op": "transpose", "dim0": -1},
        {"op": "transpose", "dim0": True},
        {"op": "reshape", "source": [2], "target": [3]},
        {"op": "split", "dim": 0, "sizes": []},
        {"op": "split", "dim": 0, "sizes": [1.5]},
        {"op": "concat", "dim": 0, "sizes": [-1, 2]},
        {"op": "stack", "dim": 0, "count": 0},
        {"op": "unstack", "dim": 0},
        {"op": "fan_out", "count": "2"},
        {"op": "tie", "count": 2, "extra": 1},
        {"op": "cast", "source": "float32", "target": "nn"},
        {"op": "exec"},
        {"op": ["split"]},
        {},
    ],
)
def test_wrong_arguments_are_refused(data):
    with pytest.raises(PlanError):
        operation_from_dict(data)


def test_every_operation_knows_its_name():
    assert all(cls.name == name for name, cls in OPERATIONS.items())
