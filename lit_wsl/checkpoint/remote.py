"""Checkpoints that lie elsewhere: whatever address fsspec opens is brought to a temporary folder."""

from __future__ import annotations

import os
import posixpath
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_wsl.errors import CheckpointError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*(://|::)")
_COLLAPSED = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+):/(?!/)")


@dataclass(frozen=True)
class Local:
    """Where the content of a path or an address can be read.

    Attributes:
        path: The file or folder on this machine.
        shown: What to call it: the path, or the address, as it was given.
        keep: What holds a temporary copy; the copy goes when this does.
    """

    path: Path
    shown: Path | str
    keep: Any = None

    @contextmanager
    def called_as_given(self) -> Iterator[None]:
        """Let errors speak of the path as it was given."""
        try:
            yield
        except CheckpointError as error:
            message = str(error).replace(str(self.path), str(self.shown))
            if message == str(error):
                raise
            raise CheckpointError(message) from error


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address for fsspec, ``scheme://...``; a colon in a local name makes none.

    >>> is_address("s3://bucket/old.ckpt"), is_address("model-abc:v3.ckpt"), is_address("hf:x/model.ckpt")
    (True, False, False)
    """
    return isinstance(path, str) and bool(_ADDRESS.match(path)) and not os.path.lexists(path)


def bring(path: str | os.PathLike[str]) -> Local:
    """The local form of a path; what an address names is fetched through fsspec, a folder with all that is in it.

    Raises:
        CheckpointError: If it cannot be fetched; the message has the address as it was given.
    """
    if not is_address(path):
        local = Path(path).expanduser()
        collapsed = _COLLAPSED.match(os.fspath(path))
        if collapsed and isinstance(path, Path) and not local.exists() and _is_scheme(collapsed[1]):
            raise CheckpointError(
                f"{path} looks like an address that went through pathlib.Path, which joins its slashes. Give the "
                f"address as a string, {collapsed[1]}://..."
            )
        return Local(local, Path(path))
    assert isinstance(path, str)
    import fsspec  # type: ignore[import-untyped]
    from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

    with _told(path):
        files, inside = fsspec.core.url_to_fs(path)
        if isinstance(files, LocalFileSystem):
            return Local(Path(inside), path)
        if not files.exists(inside):
            raise FileNotFoundError("there is nothing at this address")
        keep = tempfile.TemporaryDirectory(prefix="lit_wsl-", ignore_cleanup_errors=True)
        copy = Path(keep.name, posixpath.basename(inside.rstrip("/")) or "checkpoint")
        if copy.name.endswith(".index.json"):  # names its shards, which lie beside it
            files.get(posixpath.dirname(inside), keep.name + "/folder", recursive=True)
            return Local(Path(keep.name, "folder", copy.name), path, keep)
        files.get(inside, str(copy), recursive=files.isdir(inside))
        return Local(copy, path, keep)


def _is_scheme(word: str) -> bool:
    from fsspec import available_protocols

    return word in available_protocols()


@contextmanager
def _told(address: str) -> Iterator[None]:
    """Turn whatever a file system raises into an error that has the address and the remedy."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        why = str(error) if isinstance(error, (ImportError, ValueError, FileNotFoundError)) else repr(error)
        raise CheckpointError(
            f"{address} cannot be fetched through fsspec: {why.rstrip('.')}. Check the address, what has to be "
            "installed for it, and your access to it. Or: Download the file, and give its path."
        ) from error
