"""The zip container of ``torch.save``, checked before anything in it is used.

torch writes plain, uncompressed members, each once, under one folder, in order and without overlap. An honest file is
therefore easily told from one that plays tricks (compressed bombs, two members of one name, members that share bytes,
absolute paths, local headers that say something else than the directory), and those are refused.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from itertools import pairwise

from lit_wsl.checkpoint.rebuild import RefusedError

MAX_MEMBERS = 4_000_000
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")


@dataclass(frozen=True)
class Member:
    """One member of the archive.

    Attributes:
        offset: where its bytes begin in the data.
        size: their number.
        crc: CRC-32 that the archive states for them.
    """

    offset: int
    size: int
    crc: int


@dataclass(frozen=True)
class Archive:
    """A checked archive: its members by their names inside the one folder, and the names of compressed ones.

    Compressed members (the code of a script module) are never read, so nothing can be unpacked to a monstrous size.
    ``checksums`` is False for files written with ``torch.serialization.set_crc32_options(False)``: zeros all over.
    """

    members: dict[str, Member]
    compressed: frozenset[str] = frozenset()
    checksums: bool = True

    def bytes_of(self, data: memoryview, name: str) -> memoryview:
        """Give a member's bytes, after comparing their CRC-32 where the archive has checksums.

        Raises:
            RefusedError: if the bytes are not those that were written.
        """
        member = self.members[name]
        part = data[member.offset : member.offset + member.size]
        if self.checksums and zlib.crc32(part) != member.crc:
            raise RefusedError(f"a damaged file: the checksum (CRC-32) of its part {name!r:.200} is wrong")
        return part


class _View(io.RawIOBase):
    """A read-only file over a memory view, for ``zipfile``, without a copy of the data."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = len(self._data) if size is None or size < 0 else self._at + size
        part = bytes(self._data[self._at : end])
        self._at += len(part)
        return part


def read_archive(data: memoryview) -> Archive:
    """Read and check the directory of a zip archive.

    Args:
        data: the bytes of the whole archive.

    Raises:
        RefusedError: if it is damaged, truncated, or not of the form that torch writes.
    """
    try:
        # zipfile keeps a reference to the view only while it is open
        with zipfile.ZipFile(_View(data)) as opened:
            entries = opened.infolist()
    except zipfile.BadZipFile as error:
        raise RefusedError(f"a zip archive that is truncated or damaged ({error})") from error
    except (ValueError, struct.error, OverflowError, NotImplementedError, EOFError, UnicodeError) as error:
        raise RefusedError(f"a damaged zip archive ({type(error).__name__}: {error})") from error
    if len(entries) > MAX_MEMBERS:
        raise RefusedError(f"a zip archive of {len(entries)} members")
    members: dict[str, Member] = {}
    compressed: set[str] = set()
    spans: list[tuple[int, int, str]] = []
    for entry in entries:
        if entry.is_dir():
            continue
        name = _checked_name(entry)
        if name in members or name in compressed:
            raise RefusedError(f"a zip archive with two members named {name!r:.200}")
        start = _data_start(data, entry)
        if entry.compress_type == zipfile.ZIP_STORED:
            members[name] = Member(start, entry.file_size, entry.CRC)
        else:
            compressed.add(name)
        spans.append((entry.header_offset, start + entry.compress_size, name))
    spans.sort()
    for (_, end, name), (begin, _, other) in pairwise(spans):
        if end > begin:
            raise RefusedError(f"a zip archive whose members {name!r:.200} and {other!r:.200} overlap")
    folder = _common_folder([*members, *sorted(compressed)])
    return Archive(
        {name[len(folder) :]: member for name, member in members.items()},
        frozenset(name[len(folder) :] for name in compressed),
        checksums=any(member.crc for member in members.values()),
    )


def _checked_name(entry: zipfile.ZipInfo) -> str:
    name = entry.filename
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or ":" in parts[0] or ".." in parts or entry.orig_filename != name:
        raise RefusedError(f"a zip archive with a member outside its folder ({entry.orig_filename!r:.200})")
    if entry.flag_bits & 0x1:
        raise RefusedError(f"a zip archive with an encrypted member ({name!r:.200})")
    if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
        raise RefusedError(f"a zip archive that states two sizes of the member {name!r:.200}")
    return name


def _data_start(data: memoryview, entry: zipfile.ZipInfo) -> int:
    """Find a member's bytes by its local header, which has to agree with the directory."""
    at = entry.header_offset
    if at < 0 or at + _LOCAL_HEADER.size > len(data):
        raise RefusedError(f"a zip archive with the member {entry.filename!r:.200} outside the file")
    signature, *_, name_length, extra_length = _LOCAL_HEADER.unpack_from(data, at)
    start = at + _LOCAL_HEADER.size
    local = bytes(data[start : start + name_length])
    if signature != b"PK\x03\x04" or local.decode("utf-8", "replace") != entry.filename:
        raise RefusedError(f"a zip archive whose parts disagree about the member {entry.filename!r:.200}")
    start += name_length + extra_length
    if start + entry.compress_size > len(data):
        raise RefusedError(f"a zip archive with the member {entry.filename!r:.200} beyond its end (truncated?)")
    return start


def _common_folder(names: list[str]) -> str:
    """The one folder that torch puts all members in, with its slash; empty for other archives."""
    folders = {name.partition("/")[0] for name in names}
    return f"{folders.pop()}/" if len(folders) == 1 and all("/" in name for name in names) else ""
