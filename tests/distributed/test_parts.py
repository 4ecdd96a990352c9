"""Which part of a tensor a rank holds, for meshes of many ranks that a fake process group stands in for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lit_wsl import transfer_weights
from lit_wsl.errors import TransferError
from lit_wsl.structure.running import has_sharded_tensors, is_sharded
from lit_wsl.transfer.apply import copy_into
from lit_wsl.transfer.ranks import ALONE, Ranks, local_part


@contextmanager
def mesh_of(rank: int, shape: tuple[int, ...], names: tuple[str, ...]) -> Iterator[Any]:
    """A mesh as one of its ranks sees it; collectives do nothing."""
    size = int(torch.tensor(shape).prod())
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield init_device_mesh("cpu", shape, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def parts(shape: tuple[int, ...], placements: tuple[Any, ...], mesh_shape: tuple[int, ...]) -> list[torch.Tensor]:
    value = torch.arange(float(torch.tensor(shape).prod())).view(shape)
    found = []
    for rank in range(int(torch.tensor(mesh_shape).prod())):
        with mesh_of(rank, mesh_shape, ("a", "b")[: len(mesh_shape)]) as mesh:
            like = distribute_tensor(torch.zeros(shape), mesh, placements, src_data_rank=None)
            part = local_part(value, like)
            assert part.shape == like.to_local().shape
            copy_into(like, value)
            assert torch.equal(like.to_local(), part)
            found.append(part.clone())
    return found


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 8, 9])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_one_axis_in_uneven_and_empty_parts(rows, ranks):
    found = parts((rows, 3), (Shard(0),), (ranks,))
    assert torch.equal(torch.cat(found), torch.arange(3.0 * rows).view(rows, 3))


@pytest.mark.parametrize("dims", [(0, 1), (1, 0)])
def test_two_axes(dims):
    value = torch.arange(35.0).view(7, 5)
    found = parts((7, 5), (Shard(dims[0]), Shard(dims[1])), (2, 2))
    a, b = (torch.cat(found[i : i + 2], dim=dims[1]) for i in (0, 2))
    assert torch.equal(torch.cat([a, b], dim=dims[0]), value)


def test_one_axis_twice():
    found = parts((11, 2), (Shard(0), Shard(0)), (2, 3))
    assert torch.equal(torch.cat(found), torch.arange(22.0).view(11, 2))


def test_replicas_hold_everything():
    value = torch.arange(12.0).view(4, 3)
    for part in parts((4, 3), (Replicate(), Replicate()), (2, 2)):
        assert torch.equal(part, value)


def test_a_partial_sum_is_refused():
    with mesh_of(0, (2,), ("a",)) as mesh:
        target = DTensor.from_local(torch.zeros(4), mesh, [Partial()])
        with pytest.raises(TransferError, match="partial sums"):
            copy_into(target, torch.ones(4))


def test_the_value_is_cast_and_untouched():
    value = torch.arange(8, dtype=torch.float64)
    with mesh_of(1, (2,), ("a",)) as mesh:
        target = distribute_tensor(torch.zeros(8, dtype=torch.bfloat16), mesh, [Shard(0)], src_data_rank=None)
        copy_into(target, value)
        assert target.to_local().tolist() == [4, 5, 6, 7]
        assert target.dtype == torch.bfloat16
        assert is_sharded(target)
    assert value.tolist() == list(range(8))


def test_a_view_is_taken_where_placements_are_plain():
    value = torch.arange(12.0).view(6, 2)
    with mesh_of(1, (3,), ("a",)) as mesh:
        like = distribute_tensor(torch.zeros(6, 2), mesh, [Shard(0)], src_data_rank=None)
        part = local_part(value, like)
    assert part.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    assert part.tolist() == [[4, 5], [6, 7]]


def test_one_process_is_a_plain_call():
    assert Ranks.of_run() == ALONE == Ranks.of_model(nn.Linear(2, 2))
    assert not has_sharded_tensors(nn.Linear(2, 2))
    assert ALONE.is_zero
    assert ALONE.together(lambda: 3) == 3
    assert ALONE.once(lambda: 4) == 4
    assert ALONE.gather(5) == [5]
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        ALONE.together(lambda: 1 // 0)


def test_ranks_divide_a_work_without_gap_or_overlap():
    items = list(range(11))
    shared = [item for rank in range(4) for item in Ranks(rank, 4).share(items)]
    assert sorted(shared) == items


def test_a_plain_model_is_filled_by_one_process_alone_even_where_a_group_exists():
    """``if rank == 0: transfer_weights(...)`` must not wait for the others."""
    with mesh_of(0, (2,), ("a",)):
        a, b = nn.Linear(3, 4), nn.Linear(3, 4)
        transfer_weights(b, a.state_dict())
        assert torch.equal(a.weight, b.weight)
