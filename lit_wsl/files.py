"""Atomic writing: the old file stays whole until the new one is complete on disk.

A temporary file is written in the folder of the target, flushed to disk (fsync), and renamed over it; then the folder's
entry is flushed too. A crash, a full disk or ``kill -9`` at any moment leaves either the old file or the new one. What
``kill -9`` leaves of the temporary file is removed by the next write of the same target.
"""

from __future__ import annotations

import errno
import glob
import os
import platform
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_wsl.errors import CheckpointError, CheckpointNotFoundError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def not_found(path: Path) -> CheckpointNotFoundError:
    """What to say of a file that is not there: what a relative path is relative to, and files of nearly its name."""
    near = sorted(path.parent.glob(f"{glob.escape(path.stem)}*"))[:3] if path.parent.is_dir() else []
    hint = f" Did you mean {', '.join(map(str, near))}?" if near else " Check the path."
    folder = "" if path.is_absolute() else f" in {Path.cwd()}"
    return CheckpointNotFoundError(f"{path} does not exist{folder}.{hint}")


def begin(path: Path) -> tuple[int, Path]:
    """Make the temporary file for a target, in its folder, locked; leftovers of killed writers are removed first.

    Its descriptor is to be closed when the file has its final name or is gone.
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


_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or write to another disk",
    errno.EDQUOT: "the disk quota is used up; free some space or write to another disk",
    errno.EFBIG: "the file system does not allow a file of this size; write to another disk",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "no permission to write there; choose another folder or change its permissions",
    errno.EPERM: "no permission to write there; choose another folder or change its permissions",
    errno.ENOENT: "the folder does not exist; create it first",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EISDIR: "the path is a folder; give the name of a file",
    errno.ENAMETOOLONG: "the file name is too long for the file system; choose a shorter one",
}


def _write_error(path: Path, error: Exception) -> CheckpointError:
    """Say what failed in words, and what to do; the old file is untouched whenever this is raised."""
    number = error.errno if isinstance(error, OSError) else None
    remedy = _REMEDIES.get(number) if number is not None else None
    detail = remedy or f"{type(error).__name__}: {error}"
    kept = " The file that was there is unchanged." if path.is_file() else " Nothing was written."
    return CheckpointError(f"Cannot write {path}: {detail}.{kept}")


def _fsync_folder(folder: Path) -> None:
    """Flush a folder's entries; file systems that cannot do this (some network ones, Windows) are left as they are."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _final_mode(path: Path) -> int:
    """The permissions that an ordinary ``open(path, "w")`` would leave: those of the old file, else the umask's."""
    with suppress(OSError):
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path in the same folder; rename it over ``path`` when the block ends without an error.

    A symbolic link is followed, so that its target is replaced and the link stays.

    Args:
        path: the file to write.

    Yields:
        The path of an empty temporary file, to be filled by the block.

    Raises:
        CheckpointError: if the folder cannot be written or the disk is full. The old file is intact.
        Exception: whatever the block raises that is not an ``OSError``; the old file is intact then too.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
        >>> with atomic(file) as temporary:
        ...     _ = temporary.write_text("hello")
        >>> file.read_text()
        'hello'
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise _write_error(path, IsADirectoryError(errno.EISDIR, "is a directory"))
    try:
        lock, temporary = begin(path)
    except OSError as error:
        raise _write_error(path, error) from error
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDWR)
        try:
            hold(descriptor)  # whoever filled the file may have put another in its place, as safetensors does
            os.fsync(descriptor)
            os.chmod(temporary, _final_mode(path))
            os.replace(temporary, path)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        with suppress(OSError):  # gone already where the rename was done
            temporary.unlink()
        os.close(lock)
    _fsync_folder(path.parent)


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path``, all or nothing.

    Raises:
        CheckpointError: if it cannot be written; the old file is intact.
    """
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, all or nothing.

    Raises:
        CheckpointError: if it cannot be written; the old file is intact.
    """
    atomic_write_bytes(path, text.encode("utf-8"))


def package_version() -> str:
    """The version of this package that is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lit_wsl")
    except PackageNotFoundError:  # a checkout on the path, not installed
        return "0+unknown"
