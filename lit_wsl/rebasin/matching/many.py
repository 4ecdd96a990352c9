"""Many models at once: one common order of units, so that every pair of models agrees with every other.

Pair by pair, going from A to B to C and back to A need not arrive where it began. Here each model has one permutation
into a common order ("universe"; Crisostomi et al. 2024, C2M3), and what is maximised is the inner product of all pairs
in that order. One model at a time is matched to the mean of all others, which is that objective with the others fixed
(MergeMany; Ainsworth et al. 2023, Git Re-Basin), until nothing gains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.matching.activations import SHARES, merged_gap, with_responses
from lit_wsl.rebasin.matching.objective import dot
from lit_wsl.rebasin.matching.weights import (
    MatchingResult,
    for_whole_spec,
    identity_share,
    matched_names,
    weight_matching,
    without_constants,
)
from lit_wsl.rebasin.responses import Forward, Responses, call_on_inputs, module_responses
from lit_wsl.rebasin.spec.spec import (
    PermutationSpec,
    apply_permutation,
    compose_permutations,
    invert_permutations,
    permute_tensor,
    require_spec,
)
from lit_wsl.structure.description import require_state_dicts

StateDict = Mapping[str, Tensor]

#: Rounds over all models after which the common order is taken as it is.
ROUNDS = 20


def match_many(
    spec: PermutationSpec,
    state_dicts: Sequence[StateDict],
    *,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    max_iter: int = 100,
    seed: int = 0,
    restarts: int = 2,
    max_batches: int | None = None,
    forward: Forward = call_on_inputs,
    progress: bool | None = None,
) -> list[MatchingResult]:
    """Permutations that bring any number of models into one order, that of the first.

    Consistent: what takes the second model to the third by way of the first is what was matched between them. With
    batches, several candidates are found (on weights, and on weights and responses together), and the one is kept whose
    merged and repaired mean answers most like the mean of all models' answers; labels are not used.

    Args:
        spec: permutation spec of the architecture.
        state_dicts: two at least; the first gives the order.
        model: gives the architecture; needed with ``batches``. It is copied.
        batches: a list or loader that gives the same batches in the same order each time.
        max_iter: maximum number of sweeps of each matching.
        seed: of random orders and of the positions that are drawn from responses.
        restarts: further starts, from the common order of another first model.
        max_batches: use so many batches at most.
        forward: how to call the model on a batch.
        progress: show a progress bar; by default only on a terminal.

    Returns:
        One result per model, the identity for the first. The objective of each is its inner product with the mean of
        all others in the common order.

    Raises:
        RebasinError: there are fewer than two models, or they do not fit the spec.
    """
    require_spec(spec)
    require_state_dicts(state_dicts, "state_dicts")
    if len(state_dicts) < 2:
        raise RebasinError(f"{len(state_dicts)} model given: two at least can be aligned")
    whole, spec = spec, without_constants(spec, *state_dicts)
    names = matched_names(spec, *state_dicts)
    vectors = [{name: state[name] for name in names} for state in state_dicts]
    options: dict[str, Any] = {"max_iter": max_iter, "seed": seed, "progress": progress}
    if batches is None:
        return [for_whole_spec(whole, one) for one in _common_order(spec, vectors, "weights", restarts, options)]
    if model is None:
        raise RebasinError("batches say nothing without the model that takes them: give model=")
    used = list(islice(batches, max_batches))
    data = Responses(model, used, forward)
    answers = [module_responses(spec, data, state, seed=seed) for state in state_dicts]
    candidates = [_common_order(spec, vectors, "weights", restarts, options)]
    for share in SHARES:
        both, extended = with_responses(spec, model, vectors, answers, share)
        way = f"weights and activations (share {share:g})"
        candidates.append(_common_order(both, extended, way, restarts, options))
    gaps = []
    for found in candidates:
        aligned = [apply_permutation(spec, one, state) for one, state in zip(found, state_dicts)]
        gaps.append(merged_gap(model, spec, aligned, used, forward=forward))
    return [for_whole_spec(whole, one) for one in candidates[min(range(len(gaps)), key=gaps.__getitem__)]]


@torch.no_grad()
def _common_order(
    spec: PermutationSpec, vectors: Sequence[StateDict], way: str, restarts: int, options: Mapping[str, Any]
) -> list[MatchingResult]:
    """The best common order over all starts, told as permutations into the order of the first model."""
    starts = range(min(len(vectors), restarts + 1))
    _, order = max((_descend(spec, vectors, start, options) for start in starts), key=lambda found: found[0])
    back = invert_permutations(spec, order[0])
    results = []
    aligned = [_moved(spec, permutations, vector) for permutations, vector in zip(order, vectors)]
    for number, permutations in enumerate(order):
        others = _mean([vector for other, vector in enumerate(aligned) if other != number])
        before, after = (_inner(others, vector) for vector in (vectors[number], aligned[number]))
        found = compose_permutations(spec, permutations, back)
        results.append(
            MatchingResult(
                found, after, before, identity_share(found), ROUNDS, True, False, f"{way}, {len(order)} models"
            )
        )
    results[0] = replace(results[0], certain=True)
    return results


def _descend(
    spec: PermutationSpec, vectors: Sequence[StateDict], start: int, options: Mapping[str, Any]
) -> tuple[float, list[dict[str, Tensor]]]:
    """Each model to the mean of the others until nothing gains; what that is worth, and the permutations."""
    count = len(vectors)
    order = [(start + number) % count for number in range(count)]
    permutations = [spec.identity() for _ in vectors]
    aligned = [dict(vector) for vector in vectors]

    def step(number: int, others: Sequence[int], restarts: int) -> bool:
        reference = _mean([aligned[other] for other in others])
        found = weight_matching(spec, reference, aligned[number], restarts=restarts, **options)
        if found.identity_share == 1 or not found.objective > found.objective_before:
            return False
        permutations[number] = compose_permutations(spec, permutations[number], found)
        aligned[number] = _moved(spec, found, aligned[number])
        return True

    for place in range(1, count):
        step(order[place], order[:place], 2)
    generator = torch.Generator().manual_seed(options["seed"])
    for _ in range(ROUNDS if count > 2 else 0):
        turns = torch.randperm(count, generator=generator).tolist()
        if not sum(step(number, [other for other in range(count) if other != number], 0) for number in turns):
            break
    total = _mean(aligned)
    return _inner(total, total), permutations


def _moved(spec: PermutationSpec, permutations: Mapping[str, Tensor], vector: StateDict) -> dict[str, Tensor]:
    return {name: permute_tensor(spec, permutations, name, tensor) for name, tensor in vector.items()}


def _mean(vectors: Sequence[StateDict]) -> dict[str, Tensor]:
    return {name: torch.stack([vector[name] for vector in vectors]).mean(dim=0) for name in vectors[0]}


def _inner(a: StateDict, b: StateDict) -> float:
    return sum(dot(a[name], b[name]) for name in a)
