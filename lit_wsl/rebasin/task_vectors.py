"""Task vectors (fine-tuned minus pretrained), and their alignment to a reference.

Aligning task vectors is for comparing them. A permutation found on task vectors does not keep the function of the
network it belongs to in relation to the other one: two fine-tunings of one initialisation have the same order of units
already, and only whole weights tell. So whatever is merged is aligned by permutations found on whole weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.apply import permute_tensor
from lit_wsl.rebasin.matching import MatchingResult, identity_share, matched_names, weight_matching
from lit_wsl.rebasin.spec import Permutations, PermutationSpec


def task_vector(
    finetuned: Mapping[str, Tensor], pretrained: Mapping[str, Tensor], *, strict: bool = True
) -> dict[str, Tensor]:
    """``finetuned - pretrained`` (Ilharco et al. 2023), tensor by tensor.

    Args:
        finetuned: state dict after training.
        pretrained: state dict before training.
        strict: raise where names or shapes differ; otherwise such tensors (a new head) are left out.

    Returns:
        The differences by name, in float32 at least. Tensors that are not floating point (counters) are left out.

    Raises:
        RebasinError: names or shapes differ (with ``strict``), or nothing is left.

    >>> task_vector({"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])})
    {'w': tensor([2.])}
    """
    vector = {}
    for name, tensor in finetuned.items():
        if not tensor.is_floating_point():
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
    missing = [n for n, t in pretrained.items() if t.is_floating_point() and n not in finetuned]
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
        max_iter: most sweeps for each start.
        seed: of the random orders.
        restarts: further starts, see :func:`weight_matching`.
        device: where similarity matrices are computed.
        progress: show a progress bar; by default only on a terminal.

    Returns:
        One result per task vector, the identity for the first. For merging, match whole weights instead.

    Raises:
        RebasinError: there is no task vector, or one does not fit the spec.
    """
    if not task_vectors:
        raise RebasinError("no task vectors to match: give the reference and at least one other")
    reference = task_vectors[0]
    results = [_identity(spec, reference)]
    for vector in task_vectors[1:]:
        found = weight_matching(
            spec, reference, vector, max_iter, seed, restarts=restarts, device=device, progress=progress
        )
        results.append(found)
    return results


def _identity(spec: PermutationSpec, reference: Mapping[str, Tensor]) -> MatchingResult:
    from lit_wsl.rebasin.descent import dot

    square = sum(dot(reference[n], reference[n]) for n in matched_names(spec, reference))
    permutations = spec.identity()
    return MatchingResult(permutations, square, square, identity_share(permutations), 0, True, True, "identity")


def apply_permutation_to_task_vectors(
    spec: PermutationSpec, permutations: Sequence[Permutations], task_vectors: Sequence[Mapping[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """Permute every task vector by its own permutations.

    Args:
        spec: permutation spec of the architecture.
        permutations: one for each task vector, as :func:`weight_matching_for_task_vectors` returns them.
        task_vectors: the task vectors; unlike state dicts they may lack tensors, such as buffers.

    Raises:
        RebasinError: the numbers differ, or a tensor has another shape than the spec.
    """
    if len(permutations) != len(task_vectors):
        raise RebasinError(f"{len(task_vectors)} task vectors but {len(permutations)} permutations")
    return [
        {name: permute_tensor(spec, p, name, tensor) for name, tensor in vector.items()}
        for p, vector in zip(permutations, task_vectors)
    ]
