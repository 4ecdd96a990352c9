"""Renaming the tensors of a checkpoint, with everything else in the file as it was."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lit_wsl.checkpoint import Checkpoint, atomic_save, open_checkpoint, replace_at, save_safetensors
from lit_wsl.checkpoint.document import with_entries
from lit_wsl.checkpoint.records import as_mapping
from lit_wsl.errors import ArgumentTypeError, CheckpointError, MappingError


class WeightRenamer:
    """Renames the tensors of one checkpoint file.

    Nothing is written before :meth:`save`. Each change is all or nothing: if one name does not exist or two tensors
    would get the same name, an error says which, and no name has changed.

    Args:
        path: a checkpoint of any format that :func:`lit_wsl.checkpoint.open_checkpoint` reads.

    Raises:
        CheckpointError: if the file cannot be read.

    Example:
        >>> import tempfile, torch
        >>> file = tempfile.mkdtemp() + "/old.ckpt"
        >>> torch.save({"state_dict": {"net.weight": torch.ones(2)}, "epoch": 3}, file)
        >>> renamer = WeightRenamer(file)
        >>> renamer.rename_with_prefix("net", "backbone")
        1
        >>> renamer.list_keys()
        ['backbone.weight']
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(path)
        self.path = self.checkpoint.path
        self._names: dict[str, str] = {name: name for name in self.checkpoint}  # as loaded -> now

    def list_keys(self) -> list[str]:
        """List the tensors' names as they are now, in the file's order."""
        return list(self._names.values())

    def search_keys(self, pattern: str | re.Pattern[str]) -> list[str]:
        r"""List the names in which a pattern is found, in the file's order.

        Args:
            pattern: a regular expression, found anywhere in the name; a name that holds the text literally is listed
                too, so that ``"layers.0.(norm)"`` or ``"a+b"`` need no escaping.
        """
        if isinstance(pattern, re.Pattern):
            return [name for name in self.list_keys() if pattern.search(name)]
        try:
            compiled: re.Pattern[str] | None = re.compile(pattern)
        except re.error:
            compiled = None
        return [name for name in self.list_keys() if pattern in name or (compiled and compiled.search(name))]

    def rename_keys(self, mapping: Mapping[str, str]) -> int:
        """Rename by a mapping of old to new names, all at once, so that two names can be swapped.

        Args:
            mapping: any mapping of names as they are now, such as a ``MappingResult``.

        Returns:
            How many names changed.

        Raises:
            MappingError: if a name does not exist, or two tensors would get the same name; it names them.
        """
        if not isinstance(mapping, Mapping):
            raise ArgumentTypeError(f"mapping must map old names to new ones, but it is {mapping!r}.")
        current = set(self._names.values())
        unknown = sorted(name for name in mapping if name not in current)
        if unknown:
            near = difflib.get_close_matches(unknown[0], sorted(current), n=3)
            hint = f" Did you mean {', '.join(map(repr, near))}?" if near else " list_keys() shows the names."
            more = f" (and {len(unknown) - 1} more names)" if len(unknown) > 1 else ""
            raise MappingError(f"{self.path} has no tensor {unknown[0]!r} to rename{more}.{hint}")
        bad = sorted(name for name, new in mapping.items() if not isinstance(new, str) or not new)
        if bad:
            raise MappingError(f"The new name of {bad[0]!r} is {mapping[bad[0]]!r}; a name has to be a non-empty text.")
        renamed = {original: mapping.get(name, name) for original, name in self._names.items()}
        self._check_unique(renamed)
        changed = sum(renamed[original] != name for original, name in self._names.items())
        self._names = renamed
        return changed

    def rename_with_prefix(self, old: str, new: str) -> int:
        """Rename the module ``old`` to ``new``: ``old.layer.weight`` becomes ``new.layer.weight``.

        Args:
            old: a module's path, whole parts between dots; with a dot at its end, or without.
            new: its new path; ``""`` moves its contents one level up.

        Returns:
            How many names changed.

        Raises:
            MappingError: if no name begins so, or two tensors would get the same name.
        """
        head, goal = old.rstrip("."), new.rstrip(".")
        if not head:
            raise MappingError("The old prefix is empty; add_prefix puts one before every name.")
        mapping = {
            name: f"{goal}{name[len(head) :]}" if goal else name[len(head) + 1 :]
            for name in self.list_keys()
            if name.startswith(f"{head}.") or (name == head and goal)
        }
        if not mapping:
            heads = sorted({name.partition(".")[0] for name in self.list_keys()})
            raise MappingError(f"{self.path} has no name that begins with {head!r}. Names begin with: {heads[:20]}.")
        return self.rename_keys(mapping)

    def add_prefix(self, prefix: str, pattern: str | re.Pattern[str] | None = None) -> int:
        """Put a module's path before names: ``add_prefix("model")`` makes ``model.layer.weight``.

        Args:
            prefix: the path, with a dot at its end or without.
            pattern: only names found by :meth:`search_keys`; all if not given.

        Returns:
            How many names changed.

        Raises:
            MappingError: if two tensors would get the same name.
        """
        head = prefix.rstrip(".")
        if not head:
            raise MappingError("The prefix is empty.")
        names = self.list_keys() if pattern is None else self.search_keys(pattern)
        return self.rename_keys({name: f"{head}.{name}" for name in names})

    def remove_prefix(self, prefix: str) -> int:
        """Take a module's path off the names that begin with it.

        Returns:
            How many names changed.

        Raises:
            MappingError: if no name begins so, or two tensors would get the same name.
        """
        return self.rename_with_prefix(prefix, "")

    def rename_by(self, function: Callable[[str], str]) -> int:
        """Rename every tensor by a function of its name, such as ``lambda name: name.replace("_", ".")``."""
        return self.rename_keys({name: function(name) for name in self.list_keys()})

    def restore_backup(self) -> None:
        """Take back all changes: the names are again as they were loaded."""
        self._names = {name: name for name in self._names}

    def print_summary(self, console: Console | None = None) -> None:
        """Print what is in the file: per top-level module its tensors, elements and dtypes; and the changed names.

        Args:
            console: where to print; the terminal if not given.
        """
        console = console or Console()
        head = f"{self.path} ({self.checkpoint.format}, {len(self.checkpoint)} tensors)"
        console.print(escape(head), soft_wrap=True)
        table = Table()
        table.add_column("module")
        for column in ("tensors", "elements"):
            table.add_column(column, justify="right")
        table.add_column("dtypes")
        groups: dict[str, list[str]] = {}
        for original, name in self._names.items():
            groups.setdefault(name.partition(".")[0], []).append(original)
        for head, originals in groups.items():
            metas = [self.checkpoint.meta(name) for name in originals]
            dtypes = ", ".join(sorted({str(meta.dtype).removeprefix("torch.") for meta in metas}))
            table.add_row(escape(head), str(len(metas)), f"{sum(meta.numel() for meta in metas):,}", dtypes)
        console.print(table)
        changed = {original: name for original, name in self._names.items() if original != name}
        console.print(f"{len(changed)} of {len(self._names)} names changed")
        for original, name in list(changed.items())[:20]:
            console.print(f"  {escape(original)} -> {escape(name)}")
        if len(changed) > 20:
            console.print(f"  ... and {len(changed) - 20} more")

    def save(self, path: str | os.PathLike[str], *, keep_foreign: bool = False) -> None:
        """Write the checkpoint with the new names, atomically; everything else in the file is kept.

        Optimizer states, epoch, hyper-parameters and the rest stay as they were, objects of classes that are not
        installed included. To a ``.safetensors`` path, the tensors and the file's metadata are written.

        Args:
            path: where to; the file that was read can be given.
            keep_foreign: whether to write calls of foreign functions and classes again, as they are in the old file:
                they run when somebody loads the new file with ``weights_only=False``. Objects of foreign classes, which
                are data (:mod:`lit_wsl.checkpoint.records`), are always kept.

        Raises:
            CheckpointError: if it cannot be written, something of the file cannot be kept, or the new file would call
                foreign functions that the old one names; the old file is intact.
        """
        renamed = {name: self.checkpoint[original] for original, name in self._names.items()}
        if Path(path).suffix == ".safetensors":
            save_safetensors(renamed, path, self.checkpoint.metadata)
            return
        if self.checkpoint.format == "pickled-module":
            raise CheckpointError(
                f"{self.path} holds a whole pickled module, whose names are its attributes and cannot be changed. "
                "Save the tensors alone, to a .safetensors path."
            )
        if self.checkpoint.lossy:
            raise CheckpointError(
                f"{self.path} holds tensors or dicts with attributes of their own, which would be lost. "
                "Save the tensors alone, to a .safetensors path."
            )
        atomic_save(self._tree(renamed), path, keep_foreign=keep_foreign)

    def _tree(self, renamed: Mapping[str, Any]) -> Any:
        """The file's content with the state dict's entries renamed in their places, in their order."""
        tree = self.checkpoint.document()
        container = tree
        for key in self.checkpoint.prefix:
            container = (as_mapping(container) or {})[key]
        old = as_mapping(container)
        if old is None:
            return dict(renamed)
        entries = {self._names.get(str(key), key): value for key, value in old.items()}
        return replace_at(tree, self.checkpoint.prefix, with_entries(container, entries))

    def _check_unique(self, names: Mapping[str, str]) -> None:
        owners: dict[str, str] = {str(key): str(key) for key in self.checkpoint.extra}
        for original, name in names.items():
            if name in owners:
                raise MappingError(
                    f"Two tensors of {self.path} would be called {name!r}: {owners[name]!r} and {original!r}. "
                    "Nothing was renamed; give one of them another name."
                )
            owners[name] = original
