"""The temporary file of a write, and what killed writers left of theirs.

Whoever writes holds a lock on its temporary file, which the system takes back when the process ends, however it ends.
So a temporary file of the same target that nobody has locked belongs to nobody, and the next writer removes it. Locks
may not reach from one machine to another, therefore the name says on which one a file was begun, and only those of the
same machine are removed. Where there are no locks (Windows, some network file systems), none are.
"""

from __future__ import annotations

import os
import platform
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def begin(path: Path) -> tuple[int, Path]:
    """Make the temporary file for a target, in its folder, locked; leftovers of killed writers are removed first.

    Args:
        path: the target.

    Returns:
        A descriptor, to be closed when the file has its final name or is gone; the temporary file's path.

    Raises:
        OSError: if it cannot be made.
    """
    _remove_leftovers(path)
    while True:
        descriptor, name = tempfile.mkstemp(prefix=_prefix(path), suffix=".tmp", dir=path.parent)
        taken = hold(descriptor)
        if fcntl is None or (taken and os.fstat(descriptor).st_nlink > 0):
            break
        os.close(descriptor)  # another writer took it for a leftover before it was locked
    return descriptor, Path(name)


def hold(descriptor: int) -> bool:
    """Lock an open temporary file until the descriptor is closed; False if it is locked already.

    True also where the system or the file system has no locks.
    """
    with suppress(OSError):
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _prefix(path: Path) -> str:
    host = zlib.crc32(platform.node().encode())
    return f".{path.name[:100]}.{host:08x}-"


def _remove_leftovers(path: Path) -> None:
    if fcntl is None:
        return
    prefix = _prefix(path)
    with suppress(OSError):
        names = sorted(entry.name for entry in os.scandir(path.parent) if entry.name.startswith(prefix))
        for name in names:
            if name.endswith(".tmp") and "." not in name[len(prefix) : -len(".tmp")]:
                _remove_if_unlocked(path.parent / name)


def _remove_if_unlocked(file: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()
        finally:
            os.close(descriptor)
