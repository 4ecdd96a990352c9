"""Folding batch norms: which norms of the source have no place in the target, and what folding each would make.

A batch norm in evaluation mode is an affine map per channel, so it goes into the linear map before it
(:class:`lit_wsl.transfer.adapt.FoldBatchNorm`). Of norms that both models have some of, whole families go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from lit_wsl.mapper.adaptation_proposals import Change, Proposals
from lit_wsl.mapper.names import split_numbers
from lit_wsl.mapper.norms import NormOf, norms_behind
from lit_wsl.structure.info import ModelDescription, Shape
from lit_wsl.transfer.adapt import FoldBatchNorm
from lit_wsl.transfer.plan import TransferPlan

MAX_FAMILIES = 12  # of norms, of which any may go
MAX_CHOICES = 4  # of norms that go, each of which is tried


def fold_batchnorm(plan: TransferPlan, source: ModelDescription, target: ModelDescription) -> Proposals:
    """Fold the batch norms of the source that stand behind a linear map and have no place in the target.

    Where the target keeps some norms, those that go are whole families (the second norm of every block), as many of
    each width as are too many. Several choices of families may fit; the matching decides.
    """
    norms, kept = norms_behind(source), norms_behind(target)
    if not kept:
        foldable = tuple(_fold(norm, source) for norm in norms if norm.weight is not None)
        alone = "fold_batchnorm: no convolution or linear layer stands directly before this norm"
        return Proposals(foldable, {norm.mean.name: alone for norm in norms if norm.weight is None})
    surplus = Counter(norm.mean.shape for norm in norms)
    surplus.subtract(Counter(norm.mean.shape for norm in kept))
    if not any(surplus.values()):
        return Proposals()
    families: dict[tuple[tuple[str, ...], str], list[NormOf]] = {}
    for norm in norms:
        parent, _, last = norm.mean.module_path.rpartition(".")
        families.setdefault((split_numbers(parent)[0], last), []).append(norm)
    whole = [members for members in families.values() if all(norm.weight is not None for norm in members)]
    fitting = [
        tuple(_fold(norm, source) for members in choice for norm in members)
        for size in range(1, len(whole) + 1)
        for choice in combinations(whole[:MAX_FAMILIES], size)
        if _counts(choice) == +surplus
    ]
    if not fitting or min(surplus.values()) < 0 or len(fitting) > MAX_CHOICES:
        why = f"fold_batchnorm: {len(fitting) or 'no'} choices of norms leave those that the model has"
        return Proposals((), {norm.mean.name: why for norm in norms})
    return Proposals(fitting[0], whole=True, others=tuple(fitting[1:]))


def _counts(choice: Sequence[Sequence[NormOf]]) -> Counter[Shape]:
    """How many norms of each width."""
    return Counter(norm.mean.shape for members in choice for norm in members)


def _fold(norm: NormOf, source: ModelDescription) -> Change:
    weight = norm.weight
    assert weight is not None
    head, dot, leaf = weight.name.rpartition(".")
    bias = norm.bias
    made = bias or replace(weight, name=f"{head}{dot}{leaf.replace('weight', 'bias')}", shape=weight.shape[:1])
    vectors = [i for i in (bias, norm.gamma, norm.beta, norm.mean, norm.var) if i is not None]
    operation = FoldBatchNorm(bias=bias is not None, affine=norm.gamma is not None)
    return Change(
        sources=(weight.name, *(i.name for i in vectors)),
        made=(weight, made),
        operations=(operation,),
        reason=f"batch norm {norm.mean.module_path} folded into the weights, eps={operation.eps:g} assumed ("
        "checkpoints do not hold it); the same function in evaluation mode only",
        dropped=norm.others,
    )
