"""In which order a model's parameters stand: the old one's, as its optimizer numbered them, and the new one's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor, nn

from lit_wsl.checkpoint.optimizer_groups import NewOrder
from lit_wsl.errors import CheckpointError
from lit_wsl.structure import describe
from lit_wsl.structure.info import Shape
from lit_wsl.transfer.folding import registration_order
from lit_wsl.transfer.plan import TransferPlan


def old_parameters(checkpoint: Mapping[str, Tensor], plan: TransferPlan) -> dict[str, Shape]:
    """Names and shapes of the old model's parameters, in registration order, tied ones once.

    What the plan knows to be a buffer, from the model that it was matched with, goes before what is inferred.
    """
    kinds = {u.name: u.kind for u in plan.unmatched_source}
    kinds.update((source, entry.kind) for entry in plan.entries for source in entry.sources)
    inferred = describe(checkpoint).parameters
    return {info.name: info.shape for info in inferred if kinds.get(info.name, info.kind) != "buffer"}


def new_order(plan: TransferPlan, target: nn.Module | None = None) -> NewOrder:
    """The order in which the new model registers its parameters.

    Without the model it is worked out from the plan, and accepted only if the fingerprint of the target, a hash over
    all names and shapes in order, proves it.

    Raises:
        CheckpointError: If the plan alone does not tell.
    """
    if target is not None:
        gradients = {name: p.requires_grad for name, p in target.named_parameters(remove_duplicate=False)}
        names = [info.name for info in describe(target).parameters if info.kind == "parameter"]
        return NewOrder(tuple(names), frozenset(n for n in names if not gradients.get(n, True)), known=True)
    proven = proven_order(plan)
    if proven is not None:
        return NewOrder(tuple(name for name, kind in proven if kind == "parameter"))
    raise CheckpointError(
        "the order in which the new model registers its parameters, which is that of the optimizer's states, does not "
        "follow from the plan alone (it was edited, or some parameters have no source). Give the new model: "
        "target=..., or --model on the command line; or convert the weights only (weights_only=True, --weights-only)."
    )


def proven_order(plan: TransferPlan) -> list[tuple[str, str]] | None:
    """Names and kinds of the target's tensors in registration order, if the plan's fingerprint proves them."""
    known: list[tuple[str, Shape, str]] = [
        (name, shape, entry.kind) for entry in plan.entries for name, shape in zip(entry.targets, entry.target_shapes)
    ]
    loose = [(u.name, u.shape, str(u.kind)) for u in plan.unmatched_target]
    loose += [(name, a.shape, "parameter") for a in plan.ambiguous for name in a.targets]
    for listed in (known + loose, loose + known):
        by_module = [listed[i] for i in registration_order([name for name, _, _ in listed])]
        for candidate in (by_module, listed):
            digest = hashlib.sha256()
            for name, shape, _ in candidate:
                digest.update(f"{name}\0{shape}\0".encode())
            if digest.hexdigest() == plan.target.fingerprint:
                return [(name, kind) for name, _, kind in candidate]
    return None
