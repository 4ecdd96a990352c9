"""Convert a checkpoint of the old model into one of the new model: weights, optimizers, and all the rest as it was.

What ``trainer.fit(ckpt_path="new.ckpt")`` then finds: the new ``state_dict``; optimizer states under the new model's
indices; schedulers, loops, precision, callbacks', datamodule's and hyper-parameter entries exactly as they were.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lit_wsl.checkpoint.edit import replace_at, with_entries
from lit_wsl.checkpoint.reader import Checkpoint, open_checkpoint
from lit_wsl.checkpoint.records import as_mapping, contains_foreign, foreign_calls
from lit_wsl.checkpoint.saving import atomic_save, save_safetensors
from lit_wsl.checkpoint.weights import Weights
from lit_wsl.convert.optimizers import OnLost, convert_optimizers
from lit_wsl.convert.saved_optimizer import groups_of
from lit_wsl.convert.weights import Progress, convert_twin, convert_weights, new_order, old_parameters
from lit_wsl.errors import CheckpointError, PlanError
from lit_wsl.plan.plan import TransferPlan


def remembered_files(callbacks: Any) -> list[str]:
    """Checkpoints that callbacks remember hold the old model still, so that ``ckpt_path="best"`` would not load."""
    states = callbacks.values() if isinstance(callbacks, Mapping) else ()
    best = [state.get("best_model_path") for state in states if isinstance(state, Mapping)]
    return [f"ModelCheckpoint remembers {path}, a file of the old model; convert it too" for path in best if path]


def find_optimizers(tree: Mapping[Any, Any]) -> list[tuple[Any, ...]]:
    """Where the states of optimizers are, told by their form: Lightning's list, or entries of plain training scripts.

    >>> optimizer = {"state": {}, "param_groups": []}
    >>> find_optimizers({"optimizer_states": [optimizer], "epoch": 3, "optimizer": optimizer})
    [('optimizer_states', 0), ('optimizer',)]
    """

    def is_optimizer(value: Any) -> bool:
        return isinstance(value, Mapping) and {"state", "param_groups"} <= set(value)

    found: list[tuple[Any, ...]] = []
    for key, value in tree.items():
        if is_optimizer(value):
            found.append((key,))
        elif isinstance(value, (list, tuple)) and (key == "optimizer_states" or any(map(is_optimizer, value))):
            found += [(key, number) for number in range(len(value))]
        elif isinstance(value, Mapping) and any(map(is_optimizer, value.values())):
            found += [(key, name) for name in value if is_optimizer(value[name])]
    return found


def at(tree: Any, place: Sequence[Any]) -> Any:
    """What is at a place of nested containers."""
    for key in place:
        tree = tree[key]
    return tree


def lightning_optimizers(content: Mapping[Any, Any]) -> tuple[tuple[str, ...], list[Any]] | None:
    """The optimizers of a Lightning checkpoint: a list in a file, entries of their own in a sharded folder.

    Returns:
        The keys that hold them and their states in order; ``None`` if there are none.

    >>> lightning_optimizers({"optimizer_1": "b", "optimizer_0": "a"})
    (('optimizer_0', 'optimizer_1'), ['a', 'b'])
    """
    if "optimizer_states" in content:
        return ("optimizer_states",), list(content["optimizer_states"])
    single = [key for key in content if isinstance(key, str) and re.fullmatch(r"optimizer_\d+", key)]
    single.sort(key=lambda key: int(key.rpartition("_")[2]))
    return (tuple(single), [content[key] for key in single]) if single else None


def gather_optimizers(entries: dict[Hashable, Any]) -> None:
    """Put optimizers that are entries of their own into Lightning's list."""
    keys, states = lightning_optimizers(entries) or ((), [])
    if keys and "optimizer_states" not in entries:
        for key in keys:
            del entries[key]
        entries["optimizer_states"] = states


def check_schedulers(schedulers: Sequence[Any], saved: Sequence[Any], made: Sequence[Any]) -> None:
    """Refuse schedulers that hold a learning rate per group where the number of groups has changed.

    Raises:
        CheckpointError: If there is one.
    """
    before = {len(optimizer["param_groups"]) for optimizer in saved}
    after = {len(optimizer["param_groups"]) for optimizer in made}
    if before == after:
        return
    for scheduler in schedulers:
        rates = scheduler.get("base_lrs") if isinstance(scheduler, Mapping) else None
        if isinstance(rates, (list, tuple)) and len(rates) not in after:
            raise CheckpointError(
                f"a scheduler holds learning rates for {len(rates)} parameter groups, but the new run's optimizers "
                f"have {sorted(after)}. Keep the number of groups, or transfer the weights only."
            )


TRAINING = frozenset({"optimizer_states", "lr_schedulers", "callbacks"})  # what ``save_weights_only`` leaves out


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        tensors: Number of tensors in the new state dict.
        optimizers: Number of optimizers whose states were carried.
        states: Number of parameters that have an optimizer state in the new checkpoint.
        notes: Remarks, one line each.
    """

    tensors: int
    optimizers: int
    states: int
    notes: tuple[str, ...] = ()


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    plan: TransferPlan,
    *,
    target: nn.Module | None = None,
    optimizers: Sequence[Optimizer] | None = None,
    parameter_names: Sequence[Sequence[str]] | None = None,
    on_lost: OnLost = "refuse",
    weights_only: bool = False,
    keep_foreign: bool = False,
    checkpoint_weights: Weights = "auto",
    progress: Progress | None = None,
) -> Conversion:
    """Write a checkpoint for the new model that training resumes from.

    The weights go through the plan's operations, and so do the states that optimizers keep for each of them. A
    parameter without a source has no state in the new checkpoint: the optimizer starts it at its first step, which
    torch allows.

    Args:
        source: The old checkpoint.
        destination: The file to write, atomically. ``.safetensors`` holds the weights only, with the metadata of a
            safetensors source kept.
        plan: From the old model to the new.
        target: The new model. Needed where the plan alone does not tell the order in which the model registers its
            parameters (entries added by hand, parameters without a source), and to fill in tied names; it may be on the
            meta device.
        optimizers: The optimizers of the new run, where their groups are not those of the old run.
        parameter_names: For each optimizer of the checkpoint the old names in index order, where they can't be
            inferred.
        on_lost: What to do where an optimizer's state can't go through the operation of its parameter: ``"refuse"`` or
            ``"initialize"`` it.
        weights_only: Whether to leave optimizers, schedulers and callbacks out, as ``ModelCheckpoint`` does with
            ``save_weights_only``, and entries that hold calls of foreign functions.
        keep_foreign: Whether to write calls of foreign functions and classes again, as they are in the old file: they
            run when somebody loads the new file with ``weights_only=False``. Objects of foreign classes, which are data
            (:mod:`lit_wsl.checkpoint.records`), are always kept.
        checkpoint_weights: Which weights of the file the plan speaks of: the ``"model"``'s or its ``"ema"``; others of
            the same names and shapes are converted likewise.
        progress: Called after each entry.

    Returns:
        What was done.

    Raises:
        CheckpointError: If a file cannot be read or written, an optimizer's state cannot be carried, or the new file
            would call foreign functions that the old one names.
        PlanError: If the plan does not fit the checkpoint or the model.
    """
    checkpoint = open_checkpoint(source, weights=checkpoint_weights)
    safetensors = Path(destination).suffix == ".safetensors"
    if safetensors or not checkpoint.prefix:
        return _convert_weights_alone(
            checkpoint, destination, plan, target, progress, safetensors=safetensors, keep_foreign=keep_foreign
        )
    if checkpoint.lossy and not weights_only:
        raise CheckpointError(
            f"{source} holds objects that cannot be written again unchanged. Convert the weights only "
            "(weights_only=True, --weights-only)."
        )
    document, done = convert_document(
        checkpoint,
        plan,
        target=target,
        optimizers=optimizers,
        parameter_names=parameter_names,
        on_lost=on_lost,
        weights_only=weights_only,
        keep_foreign=keep_foreign,
        progress=progress,
    )
    atomic_save(document, destination, keep_foreign=keep_foreign)
    return done


def _convert_weights_alone(
    checkpoint: Checkpoint,
    destination: str | Path,
    plan: TransferPlan,
    target: nn.Module | None,
    progress: Progress | None,
    *,
    safetensors: bool,
    keep_foreign: bool,
) -> Conversion:
    """Write a bare state dict."""
    state, notes = convert_weights(checkpoint, plan, target=target, progress=progress)
    if not state:
        raise PlanError(f"the plan has no entries, so {destination} would hold no weights.")
    if safetensors:
        left = [str(key) for key in checkpoint.content] + [k for k, v in state.items() if not isinstance(v, Tensor)]
        if left:
            notes.append(f"left out, as safetensors hold weights only: {', '.join(left)}")
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        save_safetensors(tensors, destination, metadata=checkpoint.metadata)
    else:
        atomic_save(state, destination, keep_foreign=keep_foreign)
    return Conversion(len(state), 0, 0, (*checkpoint.notes, *notes))


def convert_document(
    checkpoint: Checkpoint,
    plan: TransferPlan,
    *,
    target: nn.Module | None = None,
    optimizers: Sequence[Optimizer] | None = None,
    parameter_names: Sequence[Sequence[str]] | None = None,
    on_lost: OnLost = "refuse",
    weights_only: bool = False,
    keep_foreign: bool = False,
    progress: Progress | None = None,
) -> tuple[Any, Conversion]:
    """Convert the whole content of a checkpoint in memory; arguments as :func:`convert_checkpoint`.

    Returns:
        The new content, and what was done.
    """
    tree = as_mapping(checkpoint.document())
    if tree is None or not checkpoint.prefix:
        raise CheckpointError(f"{checkpoint.path} holds weights only; there is nothing else to convert.")
    state, notes = convert_weights(checkpoint, plan, target=target, progress=progress)
    entries: dict[Hashable, Any] = {}
    calls = (lambda _: []) if keep_foreign else foreign_calls
    training = TRAINING | {place[0] for place in find_optimizers(tree)}
    for key, value in tree.items():
        if weights_only and (key in training or (checkpoint.lossy and contains_foreign(value)) or calls(value)):
            notes.append(f"left out: {key!r}")
        elif key == checkpoint.prefix[0]:
            entries[key] = replace_at(value, checkpoint.prefix[1:], state)
        elif (copied := convert_twin(value, checkpoint, plan, target)) is not None:
            entries[key] = copied
            notes.append(f"{key!r}, a copy of the weights, was converted likewise")
        else:
            entries[key] = value
    states = carried = 0
    if not weights_only:
        notes += remembered_files(tree.get("callbacks"))
        made, saved, remarks = _convert_training(
            checkpoint, tree, plan, target, optimizers, parameter_names=parameter_names, on_lost=on_lost
        )
        entries.update(made)
        if checkpoint.format == "dcp":  # sharded files hold them one by one; in one file Lightning looks for a list
            gather_optimizers(entries)
        notes += remarks
        carried, states = len(saved), sum(len(optimizer["state"]) for optimizer in saved)
    document = with_entries(checkpoint.document(), entries)
    return document, Conversion(len(state), carried, states, (*checkpoint.notes, *notes))


def _convert_training(
    checkpoint: Checkpoint,
    tree: Mapping[Any, Any],
    plan: TransferPlan,
    target: nn.Module | None,
    optimizers: Sequence[Optimizer] | None,
    *,
    parameter_names: Sequence[Sequence[str]] | None,
    on_lost: OnLost,
) -> tuple[dict[Any, Any], list[dict[str, Any]], list[str]]:
    """Convert every optimizer's state in the file: the entries that hold them, the states, and remarks."""
    places = find_optimizers(tree)
    if not places:
        return {}, [], []
    made, notes = convert_optimizers(
        [at(tree, place) for place in places],
        plan,
        old_parameters(checkpoint, plan),
        new_order(plan, target),
        groups=groups_of(optimizers, target) if optimizers is not None and target is not None else None,
        parameter_names=parameter_names,
        on_lost=on_lost,
    )
    check_schedulers(tree.get("lr_schedulers") or [], [at(tree, place) for place in places], made)
    entries: dict[Any, Any] = {}
    for place, data in zip(places, made):
        if len(place) == 1:
            entries[place[0]] = data
        elif isinstance(tree[place[0]], Mapping):
            entries.setdefault(place[0], dict(tree[place[0]]))[place[1]] = data
        else:
            entries.setdefault(place[0], list(tree[place[0]]))[place[1]] = data
    return entries, made, notes
