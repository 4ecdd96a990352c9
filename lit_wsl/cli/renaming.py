"""``lit-wsl rename``: rename the tensors of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_wsl.cli.console import put_json, remark, say, table
from lit_wsl.cli.converting import refuse_same
from lit_wsl.cli.models import UsageError
from lit_wsl.renamer import WeightRenamer
from lit_wsl.structure.families import fold


def run(options: Any) -> int:
    """Run the command."""
    if not options.dry_run and options.output is None:
        raise UsageError("say where to write the result: -o new.ckpt, or look only: --dry-run.")
    if options.output is not None:
        refuse_same(options.checkpoint, options.output)
    renamer = WeightRenamer(options.checkpoint)
    before = renamer.list_keys()
    _apply(renamer, options)
    changed = [(old, new) for old, new in zip(before, renamer.list_keys()) if old != new]
    if not options.json:
        table(("old", "new"), [family.patterns for family in fold(changed)])
    if changed and not options.dry_run:
        renamer.save(options.output, keep_foreign=options.keep_foreign)
        if not options.json:
            say(f"{options.output}: {len(changed)} of {len(before)} tensors renamed")
    if options.json:
        put_json({"renamed": dict(changed), "tensors": len(before)}, options.json)
    if not changed:
        remark("lit-wsl rename: no name changes")
        return 1
    return 0


def _apply(renamer: WeightRenamer, options: Any) -> None:
    if options.map:
        names: dict[str, str] = {}
        for item in options.map:
            names.update(_mapping(item))
        renamer.rename_keys(names)
    for item in options.prefix or ():
        renamer.rename_with_prefix(*_pair(item, "--prefix"))
    for item in options.remove_prefix or ():
        renamer.remove_prefix(item.rstrip("."))
    for item in options.add_prefix or ():
        renamer.add_prefix(item.rstrip("."))
    for item in options.regex or ():
        pattern, new = _pair(item, "--regex")
        try:
            compiled = re.compile(pattern)
            compiled.sub(new, "")
        except (re.error, IndexError) as error:
            raise UsageError(f"--regex {item}: {error}") from error
        renamer.rename_by(lambda name, compiled=compiled, new=new: compiled.sub(new, name))  # type: ignore[misc]


def _pair(item: str, option: str) -> tuple[str, str]:
    old, mark, new = item.partition("=")
    if not mark or not old:
        raise UsageError(f"{option} takes OLD=NEW, got {item!r}.")
    return old, new


def _mapping(item: str) -> Mapping[str, str]:
    """``old=new``, or a JSON or YAML file of old and new names."""
    if not Path(item).is_file():
        return dict([_pair(item, "--map")])
    import yaml

    try:
        data = yaml.safe_load(Path(item).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{item} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(data, Mapping) or not all(isinstance(k, str) and isinstance(v, str) for k, v in data.items()):
        raise UsageError(f"{item} must be a mapping of old to new names.")
    return data
