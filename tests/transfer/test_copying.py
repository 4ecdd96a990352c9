"""Copying in pieces: the same bits as one copy, and no value that is not finite goes unnoticed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_wsl.transfer import apply
from lit_wsl.transfer.apply import all_finite, copy_in_pieces, copy_into, is_plain

KINDS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(apply, "_PIECE", 256)
    monkeypatch.setattr(apply, "_STRETCH", 1024)


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8)


def edge_values(dtype, n):
    """Every kind of finite number: signs of zero, subnormal, the largest of either sign."""
    info = torch.finfo(dtype)
    kinds = torch.tensor([0.0, -0.0, 1.0, -2.5, info.tiny / 2, info.max, info.min], dtype=dtype)
    return kinds.repeat(-(-n // len(kinds)))[:n]


@given(
    dtype=st.sampled_from(KINDS),
    n=st.integers(257, 3000),
    at=st.lists(st.floats(0, 1), max_size=3),
    bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
)
@settings(max_examples=150, deadline=None)
def test_bits_are_copied_and_what_is_not_finite_is_noticed(dtype, n, at, bad):
    value = torch.linspace(-100, 100, n).to(dtype)
    for place in at:
        value[int(place * (n - 1))] = bad
    target = nn.Parameter(torch.zeros(n, dtype=dtype))
    assert is_plain(target, value) == (target.nbytes > 256)
    if is_plain(target, value):
        assert copy_in_pieces(target, value) is (not at)
        assert torch.equal(bits(target), bits(value))
    assert all_finite(value) is (not at)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits_is_told_for_what_it_is(dtype):
    """All 65,536 of them; each one alone among zeros."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    check = apply._CHECKS[dtype]
    told = [check(apply._as_array(number)) for number in numbers.split(1)]
    assert told == torch.isfinite(numbers.float()).tolist()


@pytest.mark.parametrize("dtype", KINDS)
def test_extreme_numbers_pass_or_are_looked_at_closely(dtype):
    """Single and double precision may ask for a close look, since squares overflow; 16 bits never do."""
    value = edge_values(dtype, 1000)
    target = torch.ones(1000, dtype=dtype)
    finite = copy_in_pieces(target, value)
    assert torch.equal(bits(target), bits(value))
    assert finite or dtype.itemsize > 2


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("of", [*KINDS, torch.int64])
def test_casts_are_those_of_copy(of, to):
    value = (torch.randn(999, generator=torch.Generator().manual_seed(0)) * 1e5).to(of)
    target, wanted = torch.zeros(999, dtype=to), torch.zeros(999, dtype=to)
    wanted.copy_(value)
    assert copy_in_pieces(target, value) is bool(torch.isfinite(wanted).all())  # 1e5 is infinite in float16
    assert torch.equal(bits(target), bits(wanted))


@pytest.mark.parametrize("place", [0, 1500, 5999])
def test_threads_copy_all_and_notice_anything(place):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        value = torch.randn(2, 3000)
        target = nn.Parameter(torch.zeros(2, 3000))
        assert copy_in_pieces(target, value)
        assert torch.equal(target, value)
        value.view(-1)[place] = torch.nan
        assert not copy_in_pieces(target, value)
    finally:
        torch.set_num_threads(before)


def test_autograd_notices_the_write_as_it_notices_copy():
    weight = nn.Parameter(torch.randn(100))
    loss = (weight * weight).sum()
    version = weight._version
    assert copy_in_pieces(weight, torch.ones(100))
    assert weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_model_made_in_inference_mode_can_be_filled_there():
    with torch.inference_mode():
        target = torch.zeros(100)
        assert copy_in_pieces(target, torch.ones(100))
    assert target.is_inference()
    assert bool(target.all())


@pytest.mark.parametrize(
    ("target", "value"),
    [
        (torch.zeros(30, 40), torch.ones(40, 30).T),
        (torch.zeros(40, 30).T, torch.ones(30, 40)),
        (torch.zeros(2000, dtype=torch.int64), torch.ones(2000, dtype=torch.int64)),
        (torch.zeros(4000, dtype=torch.float8_e5m2), torch.ones(4000, dtype=torch.float8_e5m2)),
        (torch.zeros(8, 100), torch.ones(100)),
        (torch.zeros(3), torch.ones(3)),
        (torch.zeros(2000), torch._neg_view(-torch.ones(2000))),
    ],
    ids=["transposed source", "transposed target", "integers", "8 bits", "broadcast", "small", "negated view"],
)
def test_what_is_not_plain_is_left_to_copy(target, value):
    assert not is_plain(target, value)
    copy_into(target, value)
    assert all_finite(target)
    assert bool((target.float() == 1).all())
    if target.dtype.is_floating_point:
        target[(0,) * target.dim()] = torch.nan
        assert not all_finite(target)
