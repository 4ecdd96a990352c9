"""What belongs to training in a checkpoint's content: where optimizers are, schedulers, what callbacks remember."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from lit_wsl.errors import CheckpointError


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
