"""Coordinate descent over the trees of a permutation spec: the objective, passes over the trees, single steps.

A step costs what its matrix products and its assignment cost, and little else. No permuted copy of the other model is
kept (:mod:`lit_wsl.rebasin.order`). What a step gains is read off the similarity matrix that the assignment was solved
on; only where that gain is so small that rounding could explain it are the rows that would move compared in float64.
The objective is computed in float64 when somebody asks for it, not at every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lit_wsl.rebasin.evidence import Evidence
from lit_wsl.rebasin.nested import Solution, TreeSolver
from lit_wsl.rebasin.order import PresentOrder
from lit_wsl.rebasin.progress import Progress
from lit_wsl.rebasin.similarity import Similarity, dot, norm, spread
from lit_wsl.rebasin.spec import PermutationSpec
from lit_wsl.rebasin.terms import Term, Tree, build_trees

#: Gains below this share of the objective's scale are rounding of float64.
TOLERANCE = 1e-12
#: Gains below this share of their tree's scale could be rounding of float32 products.
DOUBT = 1e-6
#: Entries that are converted to float64 at a time.
CHUNK = 2**22


class Descent:
    """The other model in its present order, against the reference.

    Args:
        spec: permutation spec.
        reference: the tensors that count in the objective.
        other: tensors of the same names and shapes.
        device: where to compute; by default where the reference is.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        reference: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        device: torch.device | str | None = None,
    ) -> None:
        self.spec = spec
        self.reference = {n: t.detach().to(device or t.device) for n, t in reference.items()}
        self.other = {n: t.detach().to(self.reference[n].device) for n, t in other.items()}
        self.order = PresentOrder(spec, self.other)
        self.trees = build_trees(spec, self.reference)
        self._lone = {root: _is_lone(spec, tree) for root, tree in self.trees.items()}
        self._scales: dict[str, float] = {}
        self._spreads: dict[str, float] = {}
        self._potentials: dict[str, Tensor] = {}
        self._initial_dots: dict[str, float] = {}
        self.reset()

    def reset(self) -> None:
        """Back to the order in which the other model came."""
        self.order.reset()
        self._dots = dict(self._initial_dots)
        self._clock = 0
        self._changed = dict.fromkeys(self.reference, 0)
        self._solved = dict.fromkeys(self.trees, -1)
        self._sure = dict.fromkeys(self.trees, False)

    @property
    def permutations(self) -> dict[str, Tensor]:
        """The permutations that the other model stands under."""
        return self.order.permutations

    @property
    def objective(self) -> float:
        """Inner product of the reference with the other model in its present order, in float64."""
        value = math.fsum(self._dot(name) for name in self.reference)
        if self._clock == 0:
            self._initial_dots = dict(self._dots)
        return value

    @property
    def certain(self) -> bool:
        """Whether the last solution of every tree was its row-wise maxima."""
        return all(self._sure.values())

    def move(self, permutations: Mapping[str, Tensor]) -> None:
        """Start from given permutations instead of the order in which the other model came."""
        self.reset()
        self._clock += 1
        self._changed = dict.fromkeys(self.reference, self._clock)
        self._dots = {}
        self.order.move(permutations)

    # ---- passes ------------------------------------------------------------------------------------------------------

    def identity_is_optimal(self, seed: int, bar: Progress) -> bool:
        """Whether, at every tree, the units' best partners are where they stand. Stops at the first that is not."""
        generator = torch.Generator().manual_seed(seed)
        names = list(self.trees)
        for number in torch.randperm(len(names), generator=generator).tolist():
            tree = self.trees[names[number]]
            for solution in self._solutions(tree):
                if not solution.certain or self._moved(tree, solution):
                    return False
            self._solved[tree.root] = self._clock
            self._sure[tree.root] = True
            bar.advance()
        return True

    def sweep(self, order: Sequence[int], bar: Progress) -> bool:
        """One step for every tree that can have something to gain; whether any gained."""
        gained = False
        names = list(self.trees)
        for number in order:
            tree = self.trees[names[number]]
            if any(self._changed[n] > self._solved[tree.root] for n in tree.tensors if n in self._changed) or (
                self._solved[tree.root] < 0
            ):
                gained |= self.step(tree)
            bar.advance()
        return gained

    def step(self, tree: Tree) -> bool:
        """Solve one tree with everything else fixed, and keep the solution if the objective grows."""
        gained, sure = False, True
        for solution in self._solutions(tree):
            sure &= solution.certain
            gained |= self._accept(tree, solution)
        # A linear step leaves its own tree at the optimum; a quadratic one only looked at the neighbourhood.
        linear = not any(term.quadratic for term in tree.terms)
        self._solved[tree.root] = self._clock if linear or not gained else -1
        self._sure[tree.root] = sure
        return gained

    def resolve_first(self, bar: Progress) -> None:
        """Settle all trees in the order of the evidence at hand, see :mod:`lit_wsl.rebasin.matching`."""
        bar.start("matching: resolved first", len(self.trees))
        evidence = Evidence(self.spec, self.trees, self.reference)
        while evidence.open:
            root = evidence.strongest()
            tree = self.trees[root]
            terms = evidence.terms(root) or [(term, {}) for term in tree.terms if not term.quadratic]
            found = self._similarities(tree, terms, normalise=True)
            if found and (len(tree.groups) > 1 or (root,) in found):
                after = self._moved(tree, TreeSolver(self.spec, tree, found).solve())
                if after:
                    self._keep(tree, after)
            evidence.settle(root)
            bar.advance()

    # ---- one tree ----------------------------------------------------------------------------------------------------

    def _solutions(self, tree: Tree) -> Iterator[Solution]:
        """The solutions of one tree; the second is computed only after the first was dealt with."""
        for solve in (self.solve_joint, self.solve_inner):
            solution = solve(tree)
            if solution is not None:
                yield solution

    def solve_joint(self, tree: Tree) -> Solution | None:
        """Optimum of the whole tree, without the terms that are not linear in it (except at a lone group)."""
        terms = [t for t in tree.terms if not t.quadratic or t.units[0] == 1]
        found = self._similarities(tree, [(t, {}) for t in terms])
        if not found or (len(tree.groups) == 1 and (tree.root,) not in found):
            return None
        return TreeSolver(self.spec, tree, found).solve()

    def solve_inner(self, tree: Tree) -> Solution | None:
        """Optimum of each group alone, with the terms that couple it to others of its tree taken at their present."""
        if len(tree.groups) == 1 or not any(t.quadratic and t.units[0] > 1 for t in tree.terms):
            return None
        found = self._similarities(tree, [(t, {}) for t in tree.terms if len(t.groups) == 1 and t.units[0] > 1])
        return TreeSolver(self.spec, tree, found).solve_inner()

    def _similarities(
        self, tree: Tree, terms: Sequence[tuple[Term, Mapping[int, Tensor]]], normalise: bool = False
    ) -> dict[tuple[str, ...], Similarity]:
        lone = self._lone[tree.root]
        plain = lone and not normalise
        found: dict[tuple[str, ...], Similarity] = {}
        for term, only in terms:
            weight = 1.0
            if normalise:
                deviation = self._spread(term.tensor)
                if not deviation > 0:
                    continue
                weight = 1.0 / deviation
            if term.groups not in found:
                potential = self._potential(tree) if plain else None
                found[term.groups] = Similarity(term.units[0], math.prod(term.units[1:]), potential)
            a = term.rows(self.reference[term.tensor], only)
            other = self.order.behind(term) if lone else self.order.tensor(term.tensor)
            found[term.groups].add(a, term.rows(other, only), weight)
        return found

    def _potential(self, tree: Tree) -> Tensor:
        """(1, size) half the squared norms behind the units of a lone group, in the order in which they came."""
        if tree.root not in self._potentials:
            squares = [term.squares(self.other[term.tensor]) for term in tree.terms]
            self._potentials[tree.root] = torch.stack(squares).sum(dim=0).mul_(0.5)[None]
        return self._potentials[tree.root]

    def _spread(self, name: str) -> float:
        """Product of both standard deviations of a tensor, which no permutation changes."""
        if name not in self._spreads:
            self._spreads[name] = spread(self.reference[name]) * spread(self.other[name])
        return self._spreads[name]

    def _scale(self, name: str) -> float:
        """Product of both norms of a tensor, which no permutation changes."""
        if name not in self._scales:
            self._scales[name] = norm(self.reference[name]) * norm(self.other[name])
        return self._scales[name]

    # ---- what a solution is worth ------------------------------------------------------------------------------------

    def _moved(self, tree: Tree, solution: Solution) -> dict[str, Tensor]:
        """The permutations of a tree that a solution leads to; empty if it changes none."""
        if self._lone[tree.root]:  # the solution says which unit, as it came, goes where
            after = dict(solution.permutations)
        else:  # the solution continues from the present order
            after = self.order.followed_by(tree.groups, solution.permutations)
        if all(torch.equal(p, self.permutations[group]) for group, p in after.items()):
            return {}
        return after

    def _keep(self, tree: Tree, after: Mapping[str, Tensor], dots: Mapping[str, float] | None = None) -> None:
        """Move a tree."""
        self.order.move(after)
        self._clock += 1
        for name in tree.tensors:
            if name in self._changed:
                self._changed[name] = self._clock
                self._dots.pop(name, None)
        self._dots.update(dots or {})

    def _accept(self, tree: Tree, solution: Solution) -> bool:
        """Move a tree if the objective grows by it; whether it was moved."""
        after = self._moved(tree, solution)
        if not after:
            return False
        if solution.similarity is not None and self._lone[tree.root]:
            now, then = self.permutations[tree.root], after[tree.root]
            gain = solution.similarity.worth(then) - solution.similarity.worth(now)
            scale = sum(self._scale(term.tensor) for term in tree.terms)
            if not gain > DOUBT * scale:
                gain = self._exact_gain(tree, now, then)
            if not gain > TOLERANCE * scale:
                return False
            self._keep(tree, after)
            return True
        names = [name for name in tree.tensors if name in self.reference]
        before = {group: self.permutations[group] for group in after}
        value = math.fsum(self._dot(name) for name in names)
        self.order.move(after)
        dots = {name: dot(self.reference[name], self.order.tensor(name)) for name in names}
        if math.fsum([*dots.values(), -value]) > TOLERANCE * sum(self._scale(name) for name in names):
            self._keep(tree, after, dots)
            return True
        self.order.move(before)
        return False

    def _exact_gain(self, tree: Tree, now: Tensor, then: Tensor) -> float:
        """What a lone group gains, from the rows that would move alone, in float64."""
        rows = torch.nonzero(now != then).flatten()
        gain = 0.0
        for term in tree.terms:
            a = term.rows(self.reference[term.tensor])[0]
            b = term.rows(self.order.behind(term))[0]
            step = max(1, CHUNK // a.shape[1])
            for part in rows.split(step):
                change = b[then[part].to(b.device)].double() - b[now[part].to(b.device)].double()
                gain += float((a[part.to(a.device)].double() * change).sum())
        return gain

    def _dot(self, name: str) -> float:
        """Share of one tensor in the objective."""
        if name not in self._dots:
            self._dots[name] = dot(self.reference[name], self.order.tensor(name))
        return self._dots[name]


def _is_lone(spec: PermutationSpec, tree: Tree) -> bool:
    """Whether a tree is one group that enters every tensor's share in the objective linearly.

    Its units can then be compared as they came, wherever they stand now.
    """
    return len(tree.groups) == 1 and not any(
        term.quadratic or any(axis.outer_axis == term.axis for axis in spec.axes[term.tensor].values())
        for term in tree.terms
    )
