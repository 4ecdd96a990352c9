"""Coordinate descent over the trees of a permutation spec: the present order, the objective, single steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lit_wsl.rebasin.apply import permute_tensor
from lit_wsl.rebasin.evidence import Evidence
from lit_wsl.rebasin.nested import Similarity, Solution, TreeSolver
from lit_wsl.rebasin.progress import Progress
from lit_wsl.rebasin.spec import PermutationSpec
from lit_wsl.rebasin.terms import Term, Tree, build_trees

#: Gains below this share of the objective's scale are rounding.
TOLERANCE = 1e-12
#: Permuted tensors are kept while a step is judged, up to so many bytes; beyond it they are permuted again.
HELD_BYTES = 2**31


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
        self.trees = build_trees(spec, self.reference)
        self._scale = sum(_norm(self.reference[n]) * _norm(self.other[n]) for n in self.reference)
        self._initial_dots = {n: dot(self.reference[n], self.other[n]) for n in self.reference}
        self._spreads: dict[str, float] = {}
        self.reset()

    def reset(self) -> None:
        """Back to the order in which the other model came."""
        self.current = dict(self.other)
        self.dots = dict(self._initial_dots)
        self.permutations = self.spec.identity()
        self._clock = 0
        self._changed = dict.fromkeys(self.reference, 0)
        self._solved = dict.fromkeys(self.trees, -1)
        self._sure = dict.fromkeys(self.trees, False)

    @property
    def objective(self) -> float:
        """Inner product of the reference with the other model in its present order, in float64."""
        return math.fsum(self.dots.values())

    @property
    def certain(self) -> bool:
        """Whether the last solution of every tree was its row-wise maxima."""
        return all(self._sure.values())

    def move(self, permutations: Mapping[str, Tensor]) -> None:
        """Start from given permutations instead of the order in which the other model came."""
        self.reset()
        self.permutations.update({name: p.clone() for name, p in permutations.items()})
        self.current = {n: permute_tensor(self.spec, permutations, n, t) for n, t in self.other.items()}
        self.dots = {n: dot(self.reference[n], self.current[n]) for n in self.reference}

    # ---- passes ------------------------------------------------------------------------------------------------------

    def identity_is_optimal(self, seed: int, bar: Progress) -> bool:
        """Whether, at every tree, the units' best partners are where they stand. Stops at the first that is not."""
        generator = torch.Generator().manual_seed(seed)
        names = list(self.trees)
        for number in torch.randperm(len(names), generator=generator).tolist():
            tree = self.trees[names[number]]
            for solution in self._solutions(tree):
                if not solution.certain or not _is_identity(solution):
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
            found = self._similarities(terms, normalise=True)
            if tuple(found) and (len(tree.groups) > 1 or (root,) in found):
                self._accept(tree, TreeSolver(self.spec, tree, found).solve(), always=True)
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
        found = self._similarities([(t, {}) for t in terms])
        if not found or (len(tree.groups) == 1 and (tree.root,) not in found):
            return None
        return TreeSolver(self.spec, tree, found).solve()

    def solve_inner(self, tree: Tree) -> Solution | None:
        """Optimum of each group alone, with the terms that couple it to others of its tree taken at their present."""
        if len(tree.groups) == 1 or not any(t.quadratic and t.units[0] > 1 for t in tree.terms):
            return None
        found = self._similarities([(t, {}) for t in tree.terms if len(t.groups) == 1 and t.units[0] > 1])
        return TreeSolver(self.spec, tree, found).solve_inner()

    def _similarities(
        self, terms: Sequence[tuple[Term, Mapping[int, Tensor]]], normalise: bool = False
    ) -> dict[tuple[str, ...], Similarity]:
        found: dict[tuple[str, ...], Similarity] = {}
        for term, only in terms:
            weight = 1.0
            if normalise:
                spread = self._spread(term.tensor)
                if not spread > 0:
                    continue
                weight = 1.0 / spread
            if term.groups not in found:
                found[term.groups] = Similarity(term.units[0], math.prod(term.units[1:]))
            a = term.rows(self.reference[term.tensor], only)
            found[term.groups].add(a, term.rows(self.current[term.tensor], only), weight)
        return found

    def _spread(self, name: str) -> float:
        """Product of both standard deviations of a tensor, which no permutation changes."""
        if name not in self._spreads:
            self._spreads[name] = _spread(self.reference[name]) * _spread(self.other[name])
        return self._spreads[name]

    def _accept(self, tree: Tree, solution: Solution, always: bool = False) -> bool:
        """Permute all tensors of the tree if the objective grows by it (or always); whether anything was moved."""
        if _is_identity(solution):
            return False
        names = [name for name in tree.tensors if name in self.current]
        hold = sum(self.current[n].numel() * self.current[n].element_size() for n in names) <= HELD_BYTES
        moved: dict[str, Tensor] = {}
        dots = {}
        for name in names:
            tensor = permute_tensor(self.spec, solution.permutations, name, self.current[name])
            dots[name] = dot(self.reference[name], tensor)
            if always:
                self.current[name] = tensor
            elif hold:
                moved[name] = tensor
        if not always:
            gain = math.fsum([*dots.values(), *(-self.dots[name] for name in names)])
            if not gain > TOLERANCE * self._scale:
                return False
            for name in names:
                self.current[name] = (
                    moved[name] if hold else permute_tensor(self.spec, solution.permutations, name, self.current[name])
                )
        self._clock += 1
        self.dots.update(dots)
        self._changed.update(dict.fromkeys(names, self._clock))
        self._compose(tree, solution.permutations)
        return True

    def _compose(self, tree: Tree, later: Mapping[str, Tensor]) -> None:
        """Follow the present permutations of a tree by further ones."""
        identity = {g: self.permutations[g] for g in tree.groups}
        for group in tree.groups:
            shape = self.spec.permutation_shape(group)
            grid = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
            path = tuple(
                later[member][tuple(grid[: level + 1])] if member in later else grid[level]
                for level, member in enumerate((*self.spec.ancestors(group), group))
            )
            self.permutations[group] = identity[group][path]


def _is_identity(solution: Solution) -> bool:
    return all(bool((p == torch.arange(p.shape[-1])).all()) for p in solution.permutations.values())


def dot(a: Tensor, b: Tensor, chunk: int | None = None) -> float:
    """Inner product of two tensors of the same shape, accumulated in float64."""
    x, y = a.reshape(-1), b.reshape(-1)
    if chunk is None:
        chunk = 2**16 if x.device.type == "cpu" else 2**24  # converted pieces stay in the cache
    parts = [torch.dot(x[i : i + chunk].double(), y[i : i + chunk].double()) for i in range(0, x.numel(), chunk)]
    return float(torch.stack(parts).sum()) if parts else 0.0


def _norm(tensor: Tensor) -> float:
    return math.sqrt(dot(tensor, tensor))


def _spread(tensor: Tensor) -> float:
    return float(tensor.float().std(correction=0)) if tensor.numel() > 1 else 0.0
