"""Weight matching: bring the units of one network into the order of another's (Ainsworth et al. 2023, Git Re-Basin).

The objective is the inner product of the reference with the permuted other model, summed over all parameters. One tree
of groups at a time is solved exactly with everything else fixed (:mod:`lit_wsl.rebasin.matching.assignment`), in random
order, and a step is kept only if the objective, recomputed in float64, grows.

From an arbitrary order of units the first steps of such a descent compare against noise and may never recover. So a
first pass settles the groups in the order of the evidence at hand: it starts where a tensor's other axes are fixed
(the classes behind the classifier, the colours in front of the stem), and each settled group gives evidence for its
neighbours. What other axes are not settled yet is left out instead of being compared in a wrong order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor

from lit_wsl.errors import ArgumentTypeError, RebasinError
from lit_wsl.rebasin.matching.descent import Descent, Progress, progress_bar
from lit_wsl.rebasin.matching.objective import dot
from lit_wsl.rebasin.merging.merge import is_continuous, is_statistic
from lit_wsl.rebasin.spec.axis import Permutations
from lit_wsl.rebasin.spec.spec import PermutationSpec, permute_tensor, require_spec
from lit_wsl.structure.description import require_state_dict, require_state_dicts

TaskVectors: TypeAlias = Sequence[Mapping[str, Tensor]]

CONSTANT = "moves a buffer that is the same in all models"


@dataclass(frozen=True, eq=False)
class MatchingResult(Mapping[str, Tensor]):
    """Permutations by group, as :func:`apply_permutation` takes them, and how they were found.

    Attributes:
        permutations: group name -> permutation (see :mod:`lit_wsl.rebasin.spec.spec` for the convention).
        objective: inner product of the reference with the permuted other model, over the matched tensors.
        objective_before: the same for the other model as it came.
        identity_share: share of the units that stay where they are, 0 to 1. Close to 1 for two fine-tunings of one
            initialisation, whose units never changed places.
        sweeps: passes over all groups of the start that won, the resolved-first pass not counted.
        converged: whether the last sweep changed nothing.
        certain: whether in the end the row-wise best partners of all units were different ones, so that no other
            start can do better at any group; further starts are then not tried.
        start: which start won: ``"identity"``, ``"resolved-first"`` or ``"restart N"``.
    """

    permutations: Mapping[str, Tensor] = field(repr=False)
    objective: float
    objective_before: float
    identity_share: float
    sweeps: int
    converged: bool
    certain: bool
    start: str

    def __getitem__(self, group: str) -> Tensor:
        return self.permutations[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self.permutations)

    def __len__(self) -> int:
        return len(self.permutations)


def identity_share(permutations: Mapping[str, Tensor]) -> float:
    """Share of the units that the permutations leave where they are; 1 where there are none.

    >>> identity_share({"hidden": torch.tensor([0, 1, 3, 2])})
    0.5
    """
    same = total = 0
    for permutation in permutations.values():
        same += int((permutation.cpu() == torch.arange(permutation.shape[-1])).sum())
        total += permutation.numel()
    return same / total if total else 1.0


def weight_matching(
    spec: PermutationSpec,
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    max_iter: int = 100,
    seed: int = 0,
    *,
    restarts: int = 2,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> MatchingResult:
    """Permutations that bring the units of ``other`` into the order of ``reference``.

    Deterministic by seed; torch's global random state is not touched. No argument is changed. A group stays if it would
    move a buffer that has the same values in both models (a mask, a table of positions): it is not trained.

    Args:
        spec: permutation spec of the architecture.
        reference: state dict that stays as it is.
        other: state dict of the same shapes. The result permutes this one.
        max_iter: maximum number of sweeps over all groups for each start.
        seed: of the random orders.
        restarts: further starts in other random orders, where the first one left room for doubt; the best is kept.
        device: where similarity matrices are computed; by default where the reference's tensors are.
        progress: show a progress bar; by default only on a terminal.

    Returns:
        Group name -> permutation, with the objective and how it was reached.

    Raises:
        RebasinError: a matched tensor is missing or has another shape than the spec, or is not finite.

    Example:
        >>> from torch import nn
        >>> from lit_wsl.rebasin import apply_permutation, infer_permutation_spec
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> spec = infer_permutation_spec(net, (torch.ones(1, 3),))
        >>> shuffled = apply_permutation(spec, spec.random_permutations(seed=0), net.state_dict())
        >>> found = weight_matching(spec, net.state_dict(), shuffled)
        >>> torch.equal(apply_permutation(spec, found, shuffled)["0.weight"], net[0].weight)
        True
    """
    require_spec(spec)
    require_state_dict(reference, "reference")
    require_state_dict(other, "other")
    whole, spec = spec, without_constants(spec, reference, other)
    names = matched_names(spec, reference, other)
    descent = Descent(spec, {n: reference[n] for n in names}, {n: other[n] for n in names}, device=device)
    before = descent.objective
    if not math.isfinite(before):
        bad = next(n for n in names if not (reference[n].isfinite().all() and other[n].isfinite().all()))
        raise RebasinError(f"{bad!r} has values that are not finite; models that diverged cannot be matched")
    with progress_bar(progress) as bar:
        best = _first_start(descent, max_iter, seed, bar)
        for number in range(1, restarts + 1):
            if best.certain:
                break
            descent.reset()
            candidate = _descend(descent, max_iter, seed + number, bar, f"restart {number}", before)
            if candidate.objective > best.objective:
                best = candidate
    return for_whole_spec(whole, best)


def without_constants(spec: PermutationSpec, *models: Mapping[str, Tensor]) -> PermutationSpec:
    """The spec without the groups that would change a constant of the architecture.

    A buffer that holds the same values in all models was not trained: a mask, frequencies, a table of positions. Moving
    it keeps the function of one model, but the merged model would have a mixture of two orders in it, which is neither.
    """
    fixed: set[str] = set()
    for name in spec.axes if spec.parameters else ():
        if name in spec.parameters or is_statistic(name) or not _same([model.get(name) for model in models]):
            continue
        for group in {group for axis in spec.axes[name].values() for group in axis.groups}:
            turned = torch.arange(spec.groups[group].size).roll(1).expand(spec.permutation_shape(group))
            if not torch.equal(permute_tensor(spec, {group: turned}, name, models[0][name]), models[0][name]):
                fixed.add(group)
    return spec.without(fixed, CONSTANT) if fixed else spec


def _same(tensors: Sequence[Tensor | None]) -> bool:
    first, *others = tensors
    return first is not None and all(
        other is not None and other.shape == first.shape and torch.equal(other.to(first), first) for other in others
    )


def for_whole_spec(spec: PermutationSpec, found: MatchingResult) -> MatchingResult:
    """A result for the spec with all its groups: those that were left out stay."""
    if set(found) == set(spec.groups):
        return found
    permutations = {**spec.identity(), **found}
    return replace(found, permutations=permutations, identity_share=identity_share(permutations))


def matched_names(spec: PermutationSpec, *vectors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that count in the objective: the parameters that the spec moves, sorted as in the spec.

    Buffers (the statistics of norms) are moved along, but have no say: their scale has nothing to do with weights.

    A tensor that all vectors lack has no say either (task vectors have no entry for a new head).

    Raises:
        RebasinError: one of the vectors lacks a tensor, or has another shape than the spec.
    """
    parameters = set(spec.parameters) or set(spec.axes)
    names = [name for name in spec.axes if name in parameters and any(name in vector for vector in vectors)]
    if spec.axes and not names:
        raise RebasinError("none of the tensors that the permutation spec moves is in the models: are the names right?")
    for vector in vectors:
        for name in names:
            if name not in vector:
                raise RebasinError(f"{name!r} is moved by the permutation spec but missing in one of the models")
            wanted = spec.shapes.get(name)
            if wanted is not None and tuple(vector[name].shape) != tuple(wanted):
                raise RebasinError(f"{name!r} has shape {tuple(vector[name].shape)}, the spec was made for {wanted}")
            if vector[name].shape != vectors[0][name].shape:
                shapes = f"{tuple(vectors[0][name].shape)} and {tuple(vector[name].shape)}"
                raise RebasinError(f"{name!r} has the shapes {shapes} in the two models")
    return names


def _first_start(descent: Descent, max_iter: int, seed: int, bar: Progress) -> MatchingResult:
    """Descend from the order as it is if that is nearly right; else from the resolved-first pass, if that is better."""
    before = descent.objective
    bar.start("matching: is the order right as it is", len(descent.trees))
    if descent.identity_is_optimal(seed, bar):
        return _result(descent, 1, True, True, "identity", before)
    descent.resolve_first(bar)
    start = "resolved-first"
    if descent.objective < before:
        descent.reset()
        start = "identity"
    return _descend(descent, max_iter, seed, bar, start, before)


def _descend(descent: Descent, max_iter: int, seed: int, bar: Progress, start: str, before: float) -> MatchingResult:
    generator = torch.Generator().manual_seed(seed)
    sweeps, converged = 0, False
    while sweeps < max_iter and not converged:
        bar.start(f"matching: {start}, sweep {sweeps + 1}", len(descent.trees))
        converged = not descent.sweep(torch.randperm(len(descent.trees), generator=generator).tolist(), bar)
        sweeps += 1
    return _result(descent, sweeps, converged, converged and descent.certain, start, before)


def _result(descent: Descent, sweeps: int, converged: bool, certain: bool, start: str, before: float) -> MatchingResult:
    permutations = {name: p.clone() for name, p in descent.permutations.items()}
    return MatchingResult(
        permutations, descent.objective, before, identity_share(permutations), sweeps, converged, certain, start
    )


def task_vector(
    finetuned: Mapping[str, Tensor], pretrained: Mapping[str, Tensor], *, strict: bool = True
) -> dict[str, Tensor]:
    """``finetuned - pretrained`` (Ilharco et al. 2023), tensor by tensor.

    Args:
        finetuned: state dict after training.
        pretrained: state dict before training.
        strict: raise where names or shapes differ; otherwise such tensors (a new head) are left out.

    Returns:
        The differences by name, in single precision at least. Counters (neither floating point nor complex) are left
        out.

    Raises:
        RebasinError: names or shapes differ (with ``strict``), or nothing is left.

    >>> task_vector({"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])})
    {'w': tensor([2.])}
    """
    require_state_dict(finetuned, "finetuned")
    require_state_dict(pretrained, "pretrained")
    vector = {}
    for name, tensor in finetuned.items():
        if not is_continuous(tensor):
            continue
        before = pretrained.get(name)
        if before is None or before.shape != tensor.shape:
            if strict:
                found = "is missing" if before is None else f"has shape {tuple(before.shape)}"
                raise RebasinError(
                    f"{name!r} {found} in the pretrained state dict; the fine-tuned one has {tuple(tensor.shape)}. "
                    "Give the checkpoint that the fine-tuning started from, or strict=False to leave such tensors out."
                )
            continue
        dtype = torch.promote_types(torch.promote_types(tensor.dtype, before.dtype), torch.float32)
        vector[name] = tensor.detach().to(dtype) - before.detach().to(device=tensor.device, dtype=dtype)
    missing = [n for n, t in pretrained.items() if is_continuous(t) and n not in finetuned]
    if strict and missing:
        raise RebasinError(f"{missing[0]!r} of the pretrained state dict is missing in the fine-tuned one")
    if not vector:
        raise RebasinError("the two state dicts share no floating-point tensor of the same name and shape")
    return vector


def weight_matching_for_task_vectors(
    spec: PermutationSpec,
    task_vectors: Sequence[Mapping[str, Tensor]],
    max_iter: int = 100,
    seed: int = 0,
    *,
    restarts: int = 2,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> list[MatchingResult]:
    """Align every task vector to the first one.

    Args:
        spec: permutation spec of the architecture.
        task_vectors: the reference first; parameters at least (buffers have no say).
        max_iter: maximum number of sweeps for each start.
        seed: of the random orders.
        restarts: further starts, see :func:`weight_matching`.
        device: where similarity matrices are computed.
        progress: show a progress bar; by default only on a terminal.

    Returns:
        One result per task vector, the identity for the first. For merging, match whole weights instead.

    Raises:
        RebasinError: there is no task vector, or one does not fit the spec.
    """
    require_spec(spec)
    require_state_dicts(task_vectors, "task_vectors")
    if not task_vectors:
        raise RebasinError("no task vectors to match: give the reference and at least one other")
    reference, still = task_vectors[0], spec.identity()
    square = sum(dot(reference[n], reference[n]) for n in matched_names(spec, reference))
    results = [MatchingResult(still, square, square, identity_share(still), 0, True, True, "identity")]
    for vector in task_vectors[1:]:
        how: dict[str, Any] = {"restarts": restarts, "device": device, "progress": progress}
        results.append(weight_matching(spec, reference, vector, max_iter, seed, **how))
    return results


@overload
def apply_permutation_to_task_vectors(
    spec: PermutationSpec, permutations: Sequence[Permutations], task_vectors: TaskVectors, /
) -> list[dict[str, Tensor]]: ...


@overload
def apply_permutation_to_task_vectors(
    task_vectors: TaskVectors, /, *, spec: PermutationSpec, max_iter: int = 100, seed: int = 0
) -> list[dict[str, Tensor]]: ...


def apply_permutation_to_task_vectors(
    *arguments: Any,
    spec: PermutationSpec | None = None,
    permutations: Sequence[Permutations] | None = None,
    task_vectors: TaskVectors | None = None,
    max_iter: int = 100,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Permute every task vector: by its own permutations, or into the order of the first one.

    ``apply_permutation_to_task_vectors(spec, permutations, task_vectors)`` applies what was found before,
    ``apply_permutation_to_task_vectors(task_vectors, spec=spec)`` matches and applies in one call.

    Args:
        arguments: ``spec, permutations, task_vectors``, or ``task_vectors`` alone.
        spec: permutation spec of the architecture.
        permutations: one for each task vector, as :func:`weight_matching_for_task_vectors` returns them.
        task_vectors: the task vectors; unlike state dicts they may lack tensors, such as buffers.
        max_iter: maximum number of sweeps for each start of the matching.
        seed: of the matching's random orders.

    Raises:
        RebasinError: the numbers differ, or a tensor has another shape than the spec.
    """
    alone = len(arguments) == 1 and not isinstance(arguments[0], PermutationSpec)
    names = ("task_vectors",) if alone else ("spec", "permutations", "task_vectors")
    given: dict[str, Any] = {"spec": spec, "permutations": permutations, "task_vectors": task_vectors}
    given.update(zip(names, arguments))
    if len(arguments) > len(names) or given["spec"] is None or given["task_vectors"] is None:
        raise ArgumentTypeError("give spec, permutations and task_vectors; or task_vectors and spec=spec to match them")
    require_spec(given["spec"])
    require_state_dicts(given["task_vectors"], "task_vectors")
    vectors = list(given["task_vectors"])
    found = given["permutations"]
    if found is None:
        found = weight_matching_for_task_vectors(given["spec"], vectors, max_iter, seed)
    if len(found) != len(vectors):
        raise RebasinError(f"{len(vectors)} task vectors but {len(found)} permutations")
    return [
        {name: permute_tensor(given["spec"], p, name, tensor) for name, tensor in vector.items()}
        for p, vector in zip(found, vectors)
    ]
