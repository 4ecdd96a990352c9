"""The present order of the other model: gathered tensors equal permuted ones, lone groups as they came."""

from __future__ import annotations

import pytest
import torch
from handmade_specs import ALL, mlp, tensors

from lit_wsl.rebasin import apply_permutation, compose_permutations
from lit_wsl.rebasin.matching.descent import DOUBT, Descent, PresentOrder
from lit_wsl.rebasin.matching.objective import dot

every_spec = pytest.mark.parametrize("name", sorted(ALL))


@every_spec
def test_gathered_tensors_are_the_permuted_ones(name):
    spec = ALL[name]
    state = tensors(spec, 0)
    order = PresentOrder(spec, {key: state[key] for key in spec.axes})
    for seed in range(2):  # the second time every index is there already
        permutations = spec.random_permutations(seed)
        order.move(permutations)
        expected = apply_permutation(spec, permutations, state)
        assert all(torch.equal(order.tensor(key), expected[key]) for key in spec.axes)
    order.reset()
    assert all(torch.equal(order.tensor(key), state[key]) for key in spec.axes)


@every_spec
def test_permutations_follow_one_another(name):
    spec = ALL[name]
    first, second = spec.random_permutations(0), spec.random_permutations(1)
    order = PresentOrder(spec, {})
    order.move(first)
    found = {**first, **order.followed_by(spec.groups, second)}
    expected = compose_permutations(spec, first, second)
    assert all(torch.equal(found[group], expected[group]) for group in spec.groups)


@every_spec
def test_units_of_a_lone_group_are_compared_as_they_came(name):
    spec = ALL[name]
    state = tensors(spec, 0)
    descent = Descent(spec, state, state)
    descent.move(spec.random_permutations(3))
    for root, tree in descent.trees.items():
        if not descent._lone[root]:
            continue
        for term in tree.terms:
            as_it_came = term.rows(descent.order.behind(term))[0]
            present = term.rows(descent.order.tensor(term.tensor))[0]
            assert torch.equal(as_it_came[descent.permutations[root]], present)


@every_spec
def test_a_step_changes_the_objective_by_what_it_says(name):
    spec = ALL[name]
    a, b = tensors(spec, 1), tensors(spec, 2)
    descent = Descent(spec, a, b)
    for tree in descent.trees.values():
        before = descent.objective
        gained = descent.step(tree)
        after = sum(dot(a[key], x) for key, x in apply_permutation(spec, descent.permutations, b).items() if key in a)
        assert descent.objective == pytest.approx(after, rel=1e-9)
        assert descent.objective > before if gained else descent.objective == before


def test_gains_that_rounding_could_hide_are_looked_at_in_double():
    spec = mlp(64)
    a = tensors(spec, 0)
    twin = {key: value.clone() for key, value in a.items()}
    group = next(iter(spec.groups))
    swap = torch.arange(64)
    swap[[3, 4]] = torch.tensor([4, 3])
    for key, axes in spec.axes.items():  # the fourth unit is nearly the third
        for axis, axis_spec in axes.items():
            if axis_spec.groups == (group,):
                row, other = a[key].select(axis, 3), a[key].select(axis, 4)
                a[key].select(axis, 4).copy_(row + 3e-3 * other)
        twin[key] = a[key].clone()
    shuffled = apply_permutation(spec, {group: swap}, twin)
    descent = Descent(spec, a, shuffled)
    scale = sum(descent._scale(term.tensor) for term in descent.trees[group].terms)
    best = sum(dot(a[key], a[key]) for key in a)
    assert 0 < best - descent.objective < DOUBT * scale
    assert descent.step(descent.trees[group])
    assert torch.equal(descent.permutations[group], swap)
