"""Scores: the share of the parents is what the other matches say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_wsl.matching.scoring import CONTEXT_SHARE, Context, score_pair
from lit_wsl.structure.description import ParameterInfo

BLOCKS = [
    ((f"old.layers.{i}.{a}",), (f"new.blocks.{i}.{b}",))
    for i in range(3)
    for a, b in (("q.w", "wq.w"), ("n.w", "norm.w"))
]


def test_modules_whose_tensors_all_went_over_correspond_and_others_do_not():
    context = Context(BLOCKS)
    assert context.parents("old.layers.1.q.w", "new.blocks.1.wq.w") == 1.0
    assert context.parents("old.layers.1.q.w", "new.blocks.2.wq.w") == 0.0
    assert context.parents("old.layers.9.q.w", "new.blocks.9.wq.w") is None


def test_a_module_that_was_taken_apart_corresponds_to_each_by_its_share():
    context = Context(
        [(("m.a.w",), ("x.a.w",)), (("m.b.w",), ("x.b.w",)), (("m.c.w",), ("y.c.w",)), (("n.d.w",), ("y.d.w",))]
    )
    assert context.parents("m.a.w", "x.a.w") == 1.0  # all of x comes from m
    assert context.parents("m.c.w", "y.c.w") == 0.5  # half of y does


@given(st.lists(st.sampled_from(["p.", "q.r.", "z."]), max_size=3))
def test_a_container_around_everything_changes_nothing(prefixes):
    around = "".join(prefixes)
    wrapped = Context([((around + s,), (t,)) for (s,), (t,) in BLOCKS])
    for (s,), (t,) in BLOCKS:
        assert wrapped.parents(around + s, t) == Context(BLOCKS).parents(s, t)


@pytest.mark.parametrize("place", [1, 2])
def test_the_score_is_four_fifths_itself_and_one_fifth_the_parents(place):
    source, target = ParameterInfo("old.layers.1.q.w", (2, 3)), ParameterInfo(f"new.blocks.{place}.wq.w", (2, 3))
    found = score_pair(source, target, context=Context(BLOCKS))
    parts = {"shape": found.shape, "name": found.name, "hierarchy": found.hierarchy}
    base = sum(found.weights[key] * value for key, value in parts.items())
    assert found.parents == (1.0 if place == 1 else 0.0)
    assert found.total == pytest.approx((1 - CONTEXT_SHARE) * base + CONTEXT_SHARE * found.parents)
