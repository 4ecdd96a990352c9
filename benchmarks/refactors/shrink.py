"""The smallest configuration that is still wrong: changes taken back, words made equal, sizes set to the least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

from benchmarks.refactors.config import Config
from benchmarks.refactors.pair import Pair, run
from benchmarks.refactors.structures import Sizes

PLAIN = {"depth": 1, "stages": 1, "experts": 2, "bias": False, "kv": 8, "outputs": 4, "hidden": 16, "same_heads": True}


def is_wrong(config: Config) -> bool:
    """Whether something is silently wrong; what cannot be built is not."""
    try:
        return bool(run(Pair(config)).wrong)
    except Exception:
        return False


def shrink(config: Config, bad: Callable[[Config], bool] = is_wrong) -> Config:
    """Simplify as long as it stays wrong."""
    tried: set[str] = set()
    while True:
        for simpler in _simpler(config):
            key = repr(simpler)
            if key not in tried and bad(simpler):
                config = simpler
                break
            tried.add(key)
        else:
            return config


def _simpler(config: Config) -> Iterator[Config]:
    for at in range(len(config.changes)):
        yield replace(config, changes=config.changes[:at] + config.changes[at + 1 :])
    if config.sample:
        yield replace(config, sample=False)
    if config.file != "state_dict":
        yield replace(config, file="state_dict")
    if config.file == "safetensors":
        yield replace(config, file="sorted")
    for size in fields(Sizes):
        plain = PLAIN.get(size.name, getattr(config.sizes, size.name))
        if getattr(config.sizes, size.name) != plain:
            yield replace(config, sizes=replace(config.sizes, **{size.name: plain}))
        elif size.name == "depth" and plain > 2:
            yield replace(config, sizes=replace(config.sizes, depth=2))
    first, second = config.words
    for role in sorted(first):
        if second.get(role) not in (None, first[role]):
            yield replace(config, words=(first, {**second, role: first[role]}))
            yield replace(config, words=({**first, role: second[role]}, second))


def differences(config: Config) -> str:
    """What says something: the changes, the words that differ, the sizes that are not the plain ones."""
    first, second = config.words
    words = {role: f"{first[role]} -> {second.get(role)}" for role in sorted(first) if first[role] != second.get(role)}
    sizes = {name: value for name, value in vars(config.sizes).items() if name in PLAIN and value != PLAIN[name]}
    changes = [f"{change.operator} ({('source', 'target')[change.side]})" for change in config.changes]
    parts = [config.structure, *changes]
    if config.file != "state_dict":
        parts.append(config.file)
    if config.sample:
        parts.append("sample")
    return ", ".join(parts) + (f"; sizes {sizes}" if sizes else "") + (f"; words {words}" if words else "")
