"""Convert a checkpoint of the old model into one of the new model: weights, optimizers, and all the rest as it was.

What ``trainer.fit(ckpt_path="new.ckpt")`` then finds: the new ``state_dict``; optimizer states under the new model's
indices; schedulers, loops, precision, callbacks', datamodule's and hyper-parameter entries exactly as they were.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lit_wsl.checkpoint.document import build_plain, replace_at, with_entries
from lit_wsl.checkpoint.reader import open_checkpoint
from lit_wsl.checkpoint.records import as_mapping, contains_foreign, foreign_calls, names_of_classes
from lit_wsl.checkpoint.saving import atomic_save, save_safetensors
from lit_wsl.checkpoint.weights import Weights
from lit_wsl.convert.copies import CopyConverter, drop_entries
from lit_wsl.convert.optimizers import CarryOptions, OnLost, convert_optimizers
from lit_wsl.convert.saved_optimizer import NewGroup, Wins, groups_of
from lit_wsl.convert.schedulers import schedulers_for_file
from lit_wsl.convert.weights import Progress, Translation, convert_weights
from lit_wsl.errors import CheckpointError, PlanError, listed
from lit_wsl.plan.coverage import Conversion, Coverage, check_floor, measure_coverage, valid_floor
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure import ModelDescription
from lit_wsl.structure.description import ParameterInfo
from lit_wsl.transfer.memory import shown


def remembered_files(callbacks: Any) -> list[str]:
    """Checkpoints that callbacks remember hold the old model still, so that ``ckpt_path="best"`` would not load."""
    states = callbacks.values() if isinstance(callbacks, Mapping) else ()
    best = [state.get("best_model_path") for state in states if isinstance(state, Mapping)]
    files = [shown(path) for path in best if path]
    return [f"ModelCheckpoint remembers {file}, a file of the old model; convert it too" for file in files]


def find_optimizers(tree: Mapping[Any, Any]) -> list[tuple[Any, ...]]:
    """Where the states of optimizers are, by their form: Lightning's list, or entries of plain training scripts.

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


def is_lightning_key(key: Any) -> bool:
    """Whether an entry of a sharded folder is one of Lightning's optimizers."""
    return isinstance(key, str) and re.fullmatch(r"optimizer_\d+", key) is not None


def lightning_optimizers(content: Mapping[Any, Any]) -> tuple[tuple[str, ...], list[Any]] | None:
    """The keys that hold a Lightning checkpoint's optimizers, and their states in order; ``None`` if there are none.

    >>> lightning_optimizers({"optimizer_1": "b", "optimizer_0": "a"})
    (('optimizer_0', 'optimizer_1'), ['a', 'b'])
    """
    if "optimizer_states" in content:
        return ("optimizer_states",), list(content["optimizer_states"])
    single = [key for key in content if is_lightning_key(key)]
    single.sort(key=lambda key: int(key.rpartition("_")[2]))
    return (tuple(single), [content[key] for key in single]) if single else None


ARGUMENTS = frozenset({"hyper_parameters", "datamodule_hyper_parameters"})  # what nothing restores
TRAINING = frozenset({"optimizer_states", "lr_schedulers", "callbacks"})  # what ``save_weights_only`` leaves out


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    plan: TransferPlan,
    *,
    target: nn.Module | None = None,
    optimizers: Sequence[Optimizer] | None = None,
    parameter_names: Sequence[Sequence[str]] | None = None,
    on_lost: OnLost = "refuse",
    optimizer_settings: Wins = "checkpoint",
    schedule: Wins = "checkpoint",
    drop: Sequence[str] = (),
    weights_only: bool = False,
    keep_foreign: bool = False,
    checkpoint_weights: Weights = "auto",
    min_coverage: float = 0.0,
    progress: Progress | None = None,
) -> Conversion:
    """Write a checkpoint for the new model that training resumes from.

    The weights go through the plan's operations, and so do the states that optimizers keep for each of them, and
    whatever else in the file is a copy of the weights or a list of parameter names. A parameter without a source has no
    state in the new checkpoint: the optimizer starts it at its first step, which torch allows.

    Args:
        source: The old checkpoint.
        destination: The file to write, atomically. ``.safetensors`` holds the weights only, with the metadata of a
            safetensors source kept.
        plan: From the old model to the new.
        target: The new model. Needed where the plan alone does not tell the order in which the model registers its
            parameters (entries added by hand, parameters without a source), and to fill in tied names and the tensors
            without a source; it may be on the meta device, and then these are left out.
        optimizers: The optimizers of the new run, from ``target``, where their order or groups are not those of the
            old run.
        parameter_names: For each optimizer of the checkpoint the old names in index order, where they can't be
            inferred.
        on_lost: What to do where an optimizer's state can't go through the operation of its parameter: ``"refuse"`` or
            ``"initialize"`` it.
        optimizer_settings: Whose weight decays, betas, ... the new file holds: the ``"checkpoint"``'s, or those of the
            new ``"run"``'s ``optimizers``.
        schedule: Whose learning rates and schedulers; the new ``"run"``'s start anew.
        drop: Entries to leave out, by their keys joined with ``/`` (``"callbacks/EMA"``; ``*`` stands for any text).
        weights_only: Whether to leave optimizers, schedulers and callbacks out, as ``ModelCheckpoint`` does with
            ``save_weights_only``, and entries that hold calls of foreign functions.
        keep_foreign: Whether to write calls of foreign functions and classes again, as they are in the old file: they
            run when somebody loads the new file with ``weights_only=False``. Objects of foreign classes, which are data
            (:mod:`lit_wsl.checkpoint.records`), are always kept.
        checkpoint_weights: Which weights of the file the plan speaks of: the ``"model"``'s or its ``"ema"``; others of
            the same names and shapes are converted likewise.
        min_coverage: Minimum share, 0 to 1, of the checkpoint's elements that find a place or of the new model's that
            have a source, whichever is larger; buffers count unless the plan excludes them.
        progress: Called after each entry.

    Returns:
        What was done.

    Raises:
        CheckpointError: If a file cannot be read or written, an optimizer's state or a list of names cannot be carried,
            or the new file would call foreign functions that the old one names.
        CoverageError: If less is covered than asked for; nothing is written.
        PlanError: If the plan does not fit the checkpoint or the model.
    """
    checkpoint = open_checkpoint(source, weights=checkpoint_weights)
    sides = Translation.of(checkpoint, plan, target)
    coverage = _measure(sides, min_coverage)
    if Path(destination).suffix == ".safetensors" or not checkpoint.prefix:
        return replace(_convert_weights_alone(sides, destination, progress, keep_foreign), coverage=coverage)
    if checkpoint.lossy and not weights_only:
        raise CheckpointError(
            f"{source} holds objects that cannot be written again unchanged. Convert the weights only "
            "(weights_only=True, --weights-only)."
        )
    carry = CarryOptions(parameter_names, on_lost, optimizer_settings, schedule)
    document, done = _convert_document(sides, optimizers, carry, drop, weights_only, keep_foreign, progress)
    atomic_save(document, destination, keep_foreign=keep_foreign)
    return replace(done, coverage=coverage)


def _measure(sides: Translation, min_coverage: float) -> Coverage | None:
    """Coverage of the plan, checked against the minimum; the new model may be known from the plan alone."""
    plan, described = sides.plan, sides.new
    if described is None:
        known = [(n, s, e.kind) for e in plan.entries for n, s in zip(e.targets, e.target_shapes)]
        if len(known) < sum(len(entry.targets) for entry in plan.entries):
            return None
        known += [(u.name, u.shape, u.kind) for u in plan.unmatched_target]
        known += [(name, a.shape, "parameter") for a in plan.ambiguous for name in a.targets]
        infos = tuple(ParameterInfo(name, tuple(shape), kind=kind) for name, shape, kind in known)
        described = ModelDescription(infos, label="the new model")
    coverage = measure_coverage(plan, sides.old, described)
    if min_coverage:
        check_floor(plan, coverage, sides.old, described, valid_floor(min_coverage))
    return coverage


def _convert_weights_alone(
    sides: Translation, destination: str | Path, progress: Progress | None, keep_foreign: bool
) -> Conversion:
    """Write a bare state dict."""
    checkpoint = sides.checkpoint
    state, notes = convert_weights(sides, progress)
    if not state:
        raise PlanError(f"the plan has no entries, so {destination} would hold no weights.")
    if Path(destination).suffix == ".safetensors":
        left = [str(key) for key in checkpoint.content] + [k for k, v in state.items() if not isinstance(v, Tensor)]
        if left:
            notes.append(f"left out, as safetensors hold weights only: {', '.join(left)}")
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        save_safetensors(tensors, destination, metadata=checkpoint.metadata)
    else:
        atomic_save(state, destination, keep_foreign=keep_foreign)
    return Conversion(len(state), 0, 0, (*checkpoint.notes, *notes))


def _convert_document(
    sides: Translation,
    optimizers: Sequence[Optimizer] | None,
    carry: CarryOptions,
    drop: Sequence[str],
    weights_only: bool,
    keep_foreign: bool,
    progress: Progress | None,
) -> tuple[Any, Conversion]:
    """Convert the whole content of a checkpoint in memory."""
    checkpoint = sides.checkpoint
    document = without_dropped(checkpoint.document(), drop, str(checkpoint.path))
    tree = as_mapping(document)
    if tree is None or not checkpoint.prefix:
        raise CheckpointError(f"{checkpoint.path} holds weights only; there is nothing else to convert.")
    if optimizers is not None and sides.target is None:
        raise CheckpointError("optimizers= needs the model whose parameters they hold: give target= too.")
    state, notes = convert_weights(sides, progress)
    entries: dict[Hashable, Any] = {}
    calls = (lambda _: []) if keep_foreign else foreign_calls
    training = TRAINING | {place[0] for place in find_optimizers(tree)}
    copies = CopyConverter(sides)
    for key, value in tree.items():
        if weights_only and (key in training or (checkpoint.lossy and contains_foreign(value)) or calls(value)):
            notes.append(f"left out: {key!r}")
        elif key == checkpoint.prefix[0]:
            entries[key] = replace_at(value, checkpoint.prefix[1:], state)
        elif key in training and key != "callbacks":
            entries[key] = value
        else:
            entries[key] = copies.convert((key,), value)
    problem = next((p for p in copies.problems if p.grave and p.path[0] not in ARGUMENTS), None)
    if problem is not None:
        raise CheckpointError(f"{checkpoint.path}: {problem} {problem.remedy}")
    notes += [*copies.notes, *(f"{p} It was left as it is." for p in copies.problems)]
    states = carried = 0
    if not weights_only:
        notes += remembered_files(tree.get("callbacks"))
        made, saved, remarks = _convert_training(tree, optimizers, carry, copies)
        entries.update(made)
        if checkpoint.format == "dcp" and "optimizer_states" not in entries:
            # sharded files hold them one by one; in one file Lightning looks for a list
            keys, listed_states = lightning_optimizers(entries) or ((), [])
            entries = {key: value for key, value in entries.items() if key not in keys}
            entries |= {"optimizer_states": listed_states} if keys else {}
        notes += remarks
        carried, states = len(saved), sum(len(optimizer["state"]) for optimizer in saved)
    classes = sorted(names_of_classes(entries))
    if classes:
        notes.append(
            f"the new file names classes and functions that reading it with weights_only=False needs: {listed(classes)}"
        )
    return with_entries(document, entries), Conversion(len(state), carried, states, (*checkpoint.notes, *notes))


def without_dropped(document: Any, drop: Sequence[str], label: str) -> Any:
    """Leave entries out of a checkpoint's content."""
    if isinstance(drop, str):
        raise CheckpointError(f"drop must be a list of entries, such as [{drop!r}].")
    rest, found = drop_entries(document, drop)
    strange = next((wish for wish in drop if wish not in found), None)
    if strange is not None:
        listed = [str(key) for key in as_mapping(document) or {}]
        callbacks = [f"callbacks/{key}" for key in as_mapping((as_mapping(document) or {}).get("callbacks")) or {}]
        raise CheckpointError(f"{label} has no entry {strange!r} to drop. It has: {', '.join(listed + callbacks)}.")
    return rest


def recorded_names(
    optimizers: Sequence[Any], copies: CopyConverter
) -> tuple[list[list[str] | None], list[list[NewGroup]] | None]:
    """Each optimizer's old names in index order and the new groups, as far as callbacks such as finetuning's tell."""
    told: list[list[str] | None] = []
    groups: list[list[NewGroup]] = []
    for number, data in enumerate(optimizers):
        listed = data.get("param_groups") if isinstance(data, Mapping) else None
        lengths = [len(group.get("params", ())) for group in listed or ()]
        fitting = [
            (old, new)
            for path, old, new in copies.groups
            if [len(names) for names in old] == lengths and (path[-1] == number or len(optimizers) == 1)
        ]
        same = bool(fitting) and all(found == fitting[0] for found in fitting)
        told.append([name for names in fitting[0][0] for name in names] if same else None)
        if same:
            groups.append([NewGroup(tuple(names)) for names in fitting[0][1]])
    return told, groups if groups and len(groups) == len(optimizers) else None


def _convert_training(
    tree: Mapping[Any, Any], optimizers: Sequence[Optimizer] | None, options: CarryOptions, copies: CopyConverter
) -> tuple[dict[Any, Any], list[dict[str, Any]], list[str]]:
    """Convert every optimizer's state in the file: the entries that hold them, the states, and remarks."""
    sides = copies.sides
    if optimizers is None and "run" in (options.settings, options.schedule):
        raise CheckpointError("settings of the new run are known from its optimizers only: give optimizers= too.")
    places = find_optimizers(tree)
    main = [place for place in places if place[0] == "optimizer_states" or is_lightning_key(place[0])] or places
    entries: dict[Any, Any] = {}
    made: list[dict[str, Any]] = []
    notes: list[str] = []
    for chosen in (main, [place for place in places if place not in main]):
        if not chosen:
            continue
        data = [build_plain(reduce(getitem, place, tree)) for place in chosen]
        names, groups = recorded_names(data, copies)
        if optimizers is not None and sides.target is not None and chosen is main:
            groups = groups_of(optimizers, sides.target)
        carried = convert_optimizers(
            data,
            sides.plan,
            sides.old_parameters,
            replace(sides.order, groups=groups),
            options=options if options.parameter_names is not None else replace(options, parameter_names=names),
            doubtful=sides.doubtful,
        )
        if chosen is main:
            schedulers, remarks = schedulers_for_file(
                build_plain(tree.get("lr_schedulers") or []), carried, options.schedule
            )
            notes += remarks
            if "lr_schedulers" in tree:
                entries["lr_schedulers"] = schedulers
        _put_states(entries, tree, chosen, carried.states)
        made += carried.states
        notes += carried.notes
    return entries, made, notes


def _put_states(
    entries: dict[Any, Any], tree: Mapping[Any, Any], places: Sequence[tuple[Any, ...]], states: Sequence[Any]
) -> None:
    """Put converted optimizers where the old ones were."""
    if len({place[0] for place in places}) == 1 and isinstance(tree[places[0][0]], (list, tuple)):
        entries[places[0][0]] = list(states)  # a list may have become shorter or longer
        return
    if len(states) != len(places):
        raise CheckpointError(
            f"the checkpoint has {len(places)} optimizers in entries of their own and the new run {len(states)}; "
            "configure as many."
        )
    for place, data in zip(places, states):
        if len(place) == 1:
            entries[place[0]] = data
        elif isinstance(tree[place[0]], Mapping):
            entries.setdefault(place[0], dict(tree[place[0]]))[place[1]] = data
        else:
            entries.setdefault(place[0], list(tree[place[0]]))[place[1]] = data
