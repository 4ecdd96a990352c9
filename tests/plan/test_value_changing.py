"""Value-changing operations: each against an independent reference, through plan files, and never backwards."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_wsl.errors import PlanError, TransferError
from lit_wsl.plan.file import plan_to_text
from lit_wsl.plan.operations import OPERATIONS, operation_from_dict
from lit_wsl.structure import describe
from lit_wsl.transfer import (
    Cast,
    FoldBatchNorm,
    NewInputChannels,
    PartialHead,
    PlanEntry,
    ResizePositionEmbedding,
    SideSummary,
    TransferPlan,
)
from lit_wsl.transfer.apply import apply_plan

ALL = [
    ResizePositionEmbedding((4, 4), (6, 6), 1),
    ResizePositionEmbedding((4, 4), (2, 3), 0, "channels_first"),
    PartialHead(10, 3),
    FoldBatchNorm(bias=True, affine=False, eps=1e-3),
    NewInputChannels(3, 5),
]
SHAPES = {
    ALL[0]: (((1, 17, 8),), ((1, 37, 8),)),
    ALL[1]: (((1, 8, 4, 4),), ((1, 8, 2, 3),)),
    ALL[2]: (((10, 6),), ((3, 6),)),
    ALL[3]: (((8, 3, 3, 3), (8,), (8,), (8,)), ((8, 3, 3, 3), (8,))),
    ALL[4]: (((8, 3, 3, 3),), ((8, 5, 3, 3),)),
}


def one_entry(operation, source, target, dtype=()):
    shapes = tuple(tuple(t.shape) for t in source.values())
    own = {n: t for n, t in target.state_dict().items() if n in ("weight", "bias")}
    entry = PlanEntry(
        tuple(source), tuple(own), (operation, *dtype), shapes, tuple(tuple(t.shape) for t in own.values())
    )
    return TransferPlan((entry,), SideSummary.of(describe(source)), SideSummary.of(describe(target)))


@pytest.mark.parametrize("operation", ALL, ids=lambda op: op.name)
def test_adaptations_are_data_and_have_no_way_back(operation):
    assert operation_from_dict(operation.to_dict()) == operation
    assert OPERATIONS[operation.name] is type(operation)
    assert not operation.lossless
    with pytest.raises(PlanError, match=f"{operation.name} cannot be reversed"):
        operation.reverse()


@pytest.mark.parametrize("operation", ALL, ids=lambda op: op.name)
@pytest.mark.parametrize("yaml", [False, True])
def test_plans_with_adaptations_survive_their_file(operation, yaml):
    given, made = SHAPES[operation]
    names = [tuple(f"{side}.{i}" for i in range(len(shapes))) for side, shapes in (("a", given), ("b", made))]
    entry = PlanEntry(*names, (operation,), given, made)
    summary = SideSummary("x", 1, 30, 0, 0, "")
    plan = TransferPlan((entry,), summary, summary)
    assert TransferPlan.from_text(plan_to_text(plan, yaml=yaml)).entries == plan.entries
    assert not plan.entries[0].lossless
    assert plan.entries[0].badge == operation.name
    with pytest.raises(PlanError, match="cannot be reversed"):
        plan.reverse()


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_table_of_tokens_is_resized_as_a_picture(prefix, rank, dtype):
    table = torch.randn(prefix + 16, 8).to(dtype)
    table = table if rank == 2 else table[None]
    (out,) = ResizePositionEmbedding((4, 4), (7, 5), prefix).apply([table])
    rows = table.reshape(-1, 8)
    wide = rows[prefix:].to(torch.float64 if dtype == torch.float64 else torch.float32)
    picture = wide.T.reshape(1, 8, 4, 4)
    wanted = F.interpolate(picture, (7, 5), mode="bicubic", antialias=True)[0].reshape(8, 35).T.to(dtype)
    assert out.dtype == dtype
    assert out.shape == (prefix + 35, 8) if rank == 2 else (1, prefix + 35, 8)
    assert torch.equal(out.reshape(-1, 8)[:prefix], rows[:prefix])
    torch.testing.assert_close(out.reshape(-1, 8)[prefix:], wanted)


def test_layouts_agree_and_a_constant_table_stays_constant():
    table = torch.randn(1, 9, 4)
    (tokens,) = ResizePositionEmbedding((3, 3), (5, 5)).apply([table])
    picture = table.reshape(1, 3, 3, 4)
    (last,) = ResizePositionEmbedding((3, 3), (5, 5), layout="channels_last").apply([picture])
    (first,) = ResizePositionEmbedding((3, 3), (5, 5), layout="channels_first").apply([picture.permute(0, 3, 1, 2)])
    torch.testing.assert_close(last.reshape(1, 25, 4), tokens)
    torch.testing.assert_close(first.permute(0, 2, 3, 1), last)
    (flat,) = ResizePositionEmbedding((3, 3), (5, 5), 1).apply([torch.full((10, 4), 2.5)])
    torch.testing.assert_close(flat, torch.full((26, 4), 2.5))


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 8, 3, groups=2), nn.Conv2d(6, 8, 3, bias=False), nn.Linear(6, 8)])
@pytest.mark.parametrize("affine", [True, False])
def test_a_folded_batch_norm_computes_the_same(layer, affine):
    layer = layer.double()
    norm = (nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d)(8, eps=1e-3, affine=affine).double()
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.1, 3.0)
    x = torch.randn(4, 6, 5, 5).double() if isinstance(layer, nn.Conv2d) else torch.randn(4, 6).double()
    wanted = norm.eval()(layer(x))
    bias = [layer.bias] if layer.bias is not None else []
    scale = [norm.weight, norm.bias] if affine else []
    operation = FoldBatchNorm(bias=bool(bias), affine=affine, eps=1e-3)
    weight, shift = operation.apply([layer.weight, *bias, *scale, norm.running_mean, norm.running_var])
    got = (
        F.conv2d(x, weight, shift, groups=layer.groups) if isinstance(layer, nn.Conv2d) else F.linear(x, weight, shift)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("classes", [3, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_that_stay_stay_bit_for_bit(classes, dtype):
    target = nn.Linear(6, classes)
    before = {n: t.clone() for n, t in target.state_dict().items()}
    source = {n: t.to(dtype) for n, t in nn.Linear(6, 10).state_dict().items()}
    cast = (Cast("float16", "float32"),) if dtype == torch.float16 else ()
    apply_plan(one_entry(PartialHead(10, classes), source, target, cast), source, target)
    rows = min(10, classes)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor[:rows], source[name][:rows].float())
        assert torch.equal(tensor[rows:], before[name][rows:])


def test_a_head_that_cannot_be_filled_leaves_the_model_whole():
    target, source = nn.Linear(6, 4), {"weight": torch.zeros(10, 6), "bias": torch.zeros(9)}
    before = {n: t.clone() for n, t in target.state_dict().items()}
    with pytest.raises(TransferError, match="partial_head does not fit"):
        apply_plan(one_entry(PartialHead(10, 4), source, target), source, target)
    assert all(torch.equal(t, before[n]) for n, t in target.state_dict().items())


def test_a_partial_head_needs_the_models_values():
    with pytest.raises(PlanError, match="the model's tensors must have the shapes"):
        PartialHead(10, 4).apply([torch.zeros(10, 6)])


def test_grey_pictures_give_what_their_colour_copies_gave():
    colour = nn.Conv2d(3, 4, 3).double()
    x = torch.randn(2, 1, 6, 6).double()
    (weight,) = NewInputChannels(3, 1).apply([colour.weight])
    torch.testing.assert_close(F.conv2d(x, weight, colour.bias), colour(x.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(("old", "new"), [(3, 6), (3, 4), (4, 2), (1, 3)])
def test_more_channels_repeat_and_keep_the_sum_where_they_divide(old, new):
    weight = torch.randn(5, old, 3, 3)
    (out,) = NewInputChannels(old, new).apply([weight])
    assert out.shape == (5, new, 3, 3)
    for channel in range(new):
        torch.testing.assert_close(out[:, channel], weight[:, channel % old] * old / new)
    if new % old == 0:
        torch.testing.assert_close(out.sum(1), weight.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("operation", "shape"),
    [
        (ResizePositionEmbedding((4, 4), (6, 6), 1), (16, 8)),
        (ResizePositionEmbedding((4, 4), (6, 6), 0, "channels_first"), (1, 4, 4, 8)),
        (PartialHead(10, 3), (11, 4)),
        (NewInputChannels(3, 1), (8, 4, 3, 3)),
        (NewInputChannels(3, 1), (8, 3)),
        (FoldBatchNorm(bias=False), (8, 3, 3, 3)),
    ],
)
def test_other_shapes_are_refused(operation, shape):
    with pytest.raises(PlanError, match="does not fit shapes"):
        operation.shapes([shape])


@pytest.mark.parametrize(
    "data",
    [
        {"op": "resize_position_embedding", "source": [4, 4], "target": [0, 4]},
        {"op": "resize_position_embedding", "source": [4, 4], "target": [4, 5], "layout": "wide"},
        {"op": "resize_position_embedding", "source": [4, 4], "target": [4, 5], "prefix": 1, "layout": "channels_last"},
        {"op": "partial_head", "source": 0, "target": 1},
        {"op": "new_input_channels", "source": 3, "target": -1},
        {"op": "fold_batchnorm", "bias": False, "eps": -1.0},
        {"op": "fold_batchnorm", "bias": 1},
    ],
)
def test_wrong_arguments_are_refused(data):
    with pytest.raises(PlanError):
        operation_from_dict(data)
