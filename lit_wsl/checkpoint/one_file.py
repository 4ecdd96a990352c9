"""Checkpoints of one file: ``torch.save`` (zip and the older stream), pickled modules, plain pickles, safetensors."""

from __future__ import annotations

import io
import json
import mmap
import struct
import sys
import zipfile
import zlib
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_wsl.checkpoint.allowlist import RefusedError, Storage
from lit_wsl.checkpoint.document import Document, LazyTensor
from lit_wsl.checkpoint.records import as_mapping
from lit_wsl.checkpoint.unpickler import Unpickled, unpickle

MAX_MEMBERS = 4_000_000
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")


@dataclass(frozen=True)
class Member:
    """One member of the archive."""

    offset: int  # where its bytes begin in the data
    size: int
    crc: int  # CRC-32 that the archive states for them


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
        """Give a member's bytes, after comparing their CRC-32 where the archive has checksums."""
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
    """Read and check the directory of a zip archive."""
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
    names = [*members, *compressed]
    folders = {name.partition("/")[0] for name in names}  # torch puts all members in one
    folder = f"{folders.pop()}/" if len(folders) == 1 and all("/" in name for name in names) else ""
    return Archive(
        {name[len(folder) :]: member for name, member in members.items()},
        frozenset(name[len(folder) :] for name in compressed),
        checksums=any(member.crc for member in members.values()),
    )


def _checked_name(entry: zipfile.ZipInfo) -> str:
    name = entry.filename
    parts = name.split("/")
    is_drive = len(parts[0]) == 2 and parts[0][1] == ":"  # other colons are part of a name
    if name.startswith("/") or "\\" in name or is_drive or ".." in parts or entry.orig_filename != name:
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


LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_PICKLE = 1 << 30
VERIFIED = 64 << 20  # bytes up to which every checksum is compared when a file is opened; more only when asked for
MANY = 20_000  # names allowed to be read twice; beyond, the same answer is not worth the time

# Names of which a file may consist for torch's own weights_only reader to get it. Those of its list that call into
# torch with sizes of the file's choice (torch.Tensor(10**12), bytearray(10**12)) or import (_codecs.encode) are left
# out on purpose: our reader checks their arguments.
_PLAIN_PREFIXES = ("torch.float", "torch.bfloat", "torch.int", "torch.uint", "torch.bool", "torch.complex")

_PLAIN = {
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
}

# A private mapping counts as memory that might be needed, so a file larger than memory would be refused; this says it
# will not be. Python names it from 3.13 on.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def _map_privately(descriptor: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


class MappedFile:
    """A file in memory on demand: pages are read when touched, and writing to a tensor never reaches the file."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            self._map = _map_privately(file.fileno())
        self.data = memoryview(self._map)
        self._bytes: torch.UntypedStorage = torch.frombuffer(self._map, dtype=torch.uint8).untyped_storage()

    def storage(self, start: int, nbytes: int) -> torch.UntypedStorage:
        """Give a part of the file as a storage that shares its memory."""
        if start < 0 or nbytes < 0 or start + nbytes > len(self.data):
            raise RefusedError("a storage beyond the end of the file (truncated?)")
        if nbytes == 0:
            return torch.UntypedStorage(0)
        return self._bytes[start : start + nbytes]


def read_torch_file(path: Path) -> Document:
    """Read a file that ``torch.save`` or ``pickle`` wrote, running none of it."""
    file = MappedFile(path)
    if file.data[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        found = read_zip(file)
        return _document(found, _read_by_torch(path, found))
    found, legacy = _read_stream(file)
    document = _document(found, found.value)
    if legacy:
        return replace(document, notes=("written in the older, non-zip form of torch.save",))
    return replace(document, format="pickle", lossy=True)


def _document(found: Unpickled, tree: Any) -> Document:
    top = as_mapping(tree) or {}
    lightning = "pytorch-lightning_version" in top and "state_dict" in top
    return Document("lightning" if lightning else "torch", tree, found.stubbed, lossy=found.lossy)


def _read_by_torch(path: Path, found: Unpickled) -> Any:
    """Let torch's own weights_only reader have the last word on files that our machine found plain and sound."""
    if found.stubbed or found.lossy or found.end > MANY * 200 or not all(_is_plain(name) for name in found.known):
        return found.value
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # newer pickle protocols, for one; the same content has been read already
        return found.value


def _is_plain(name: str) -> bool:
    return (
        name in _PLAIN or name.startswith(_PLAIN_PREFIXES) or (name.startswith("torch.") and name.endswith("Storage"))
    )


def read_zip(file: MappedFile, start: int = 0, length: int | None = None) -> Unpickled:
    """Read the zip form, which may be a part of a larger file (the shards of ``torch.distributed.checkpoint``)."""
    data = file.data[start:] if length is None else file.data[start : start + length]
    archive = read_archive(data)
    member = archive.members.get("data.pkl")
    if member is None:
        raise RefusedError(_what_archive(archive))
    if member.size > MAX_PICKLE:
        raise RefusedError(f"a pickle of {member.size} bytes")
    swap = _byte_order(data, archive) != sys.byteorder
    verified = sum(entry.size for entry in archive.members.values()) <= VERIFIED
    cache: dict[str, torch.UntypedStorage] = {}

    def load_storage(dtype: torch.dtype, key: str, numel: int) -> Storage:
        nbytes = numel * dtype.itemsize
        entry = archive.members.get(f"data/{key}")
        if entry is None:
            packed = " (compressed, which torch.save never does)" if f"data/{key}" in archive.compressed else ""
            raise RefusedError(f"a tensor whose storage {key!r:.100} is not in the file{packed}")
        if nbytes > entry.size:
            raise RefusedError(f"a storage {key!r:.100} of {nbytes} bytes, of which the file has {entry.size}")
        if key not in cache:
            if verified:
                archive.bytes_of(data, f"data/{key}")
            cache[key] = file.storage(start + entry.offset, entry.size)
            if swap and entry.size:
                cache[key] = cache[key].clone()
                cache[key].byteswap(dtype)
        return Storage(key, dtype, cache[key])

    return unpickle(archive.bytes_of(data, "data.pkl"), 0, load_storage)


def verify_checksums(path: Path) -> int:
    """Read a whole file of ``torch.save``, compare the CRC-32 of each part, and give the number of bytes compared."""
    file = MappedFile(path)
    archive = read_archive(file.data)
    for name in archive.members:
        archive.bytes_of(file.data, name)
    return sum(member.size for member in archive.members.values()) if archive.checksums else 0


def _byte_order(data: memoryview, archive: Archive) -> str:
    member = archive.members.get("byteorder")
    order = bytes(archive.bytes_of(data, "byteorder")) if member and member.size < 16 else b"little"
    if order not in (b"little", b"big"):
        raise RefusedError(f"a file of unknown byte order {order!r}")
    return order.decode()


def _what_archive(archive: Archive) -> str:
    names = sorted([*archive.members, *archive.compressed])
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz); load it with numpy, wrap its arrays as tensors and torch.save them"
    if any(name.endswith((".ckpt", ".pt", ".pth", ".bin", ".safetensors")) for name in names):
        return f"a zip archive that packs other checkpoints ({', '.join(names[:3])}); unpack it first"
    if "data.pkl" in archive.compressed:
        return "a compressed zip archive; torch.save never compresses. Unpack it and save it again"
    if "archive_format" in names or any(name.endswith("model.json") for name in names):
        return "a program exported by torch.export; take the checkpoint it was exported from"
    if "config.json" in names and any(name.endswith(".weights.h5") for name in names):
        return "a Keras model; convert it to safetensors first"
    return "a zip archive without data.pkl, so not written by torch.save" + (
        f" (it holds {', '.join(names[:3])}, ...)" if names else " (it is empty)"
    )


def _read_stream(file: MappedFile) -> tuple[Unpickled, bool]:
    """Read a bare pickle, or torch's older form: four pickles, the storage keys, then the storages one by one."""
    data = file.data
    first = unpickle(data)
    if first.value != LEGACY_MAGIC or type(first.value) is not int:
        return first, False
    version = unpickle(data, first.end)
    if version.value != LEGACY_PROTOCOL:
        raise RefusedError(f"a torch file of unknown protocol {version.value!r:.50}")
    system = unpickle(data, version.end)
    little = system.value.get("little_endian", True) if isinstance(system.value, dict) else True
    wanted: dict[str, tuple[torch.dtype, int]] = {}

    def note_storage(dtype: torch.dtype, key: str, numel: int) -> Storage:
        """First pass: where the storages lie is known only behind the pickle, so stand-ins of the right size do."""
        if wanted.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise RefusedError(f"a storage {key!r:.100} of two sizes")
        return Storage(key, dtype, file.storage(0, numel * dtype.itemsize))

    draft = unpickle(data, system.end, note_storage)
    keys = unpickle(data, draft.end)
    storages = _stream_storages(file, keys, wanted, bool(little) != (sys.byteorder == "little"))

    def load_storage(dtype: torch.dtype, key: str, numel: int) -> Storage:
        if key not in storages:
            raise RefusedError(f"a tensor whose storage {key!r:.100} is not in the file")
        return Storage(key, dtype, storages[key])

    return unpickle(data, system.end, load_storage), True


def _stream_storages(
    file: MappedFile, keys: Unpickled, wanted: dict[str, tuple[torch.dtype, int]], swap: bool
) -> dict[str, torch.UntypedStorage]:
    """Find each storage: eight bytes with its number of elements, then its data, in the order of ``keys``."""
    if not isinstance(keys.value, list) or len(set(map(str, keys.value))) != len(keys.value):
        raise RefusedError("a torch file whose list of storages is damaged")
    at = keys.end
    storages: dict[str, torch.UntypedStorage] = {}
    for key in keys.value:
        if not isinstance(key, str) or key not in wanted:
            raise RefusedError(f"a storage {key!r:.100} that no tensor uses")
        if at + 8 > len(file.data):
            raise RefusedError("a torch file that ends before its last storage (truncated)")
        dtype, numel = wanted[key]
        stated = struct.unpack_from("<q" if swap == (sys.byteorder == "big") else ">q", file.data, at)[0]
        if stated != numel:
            raise RefusedError(f"a storage {key!r:.100} of {stated} elements where {numel} are named")
        storages[key] = file.storage(at + 8, numel * dtype.itemsize)
        if swap:
            storages[key] = storages[key].clone()
            storages[key].byteswap(dtype)
        at += 8 + numel * dtype.itemsize
    return storages


_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
} | {
    code: getattr(torch, name)
    for code, name in (
        ("F8_E8M0", "float8_e8m0fnu"),
        ("F8_E4M3FNUZ", "float8_e4m3fnuz"),
        ("F8_E5M2FNUZ", "float8_e5m2fnuz"),
    )
    if hasattr(torch, name)  # newer versions of torch only
}


def is_safetensors(head: bytes, path: Path) -> bool:
    """Tell the format by its first bytes: the length of a JSON header, and the header's brace."""
    if len(head) < 9 or head[:2] == b"PK":
        return False
    (length,) = struct.unpack_from("<Q", head)
    return head[8:9] == b"{" and (length < 1 << 40 or path.suffix == ".safetensors")


def read_safetensors(path: Path) -> Document:
    """Read the header of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(str(path), framework="pt", device="cpu")
        names = opened.offset_keys() if hasattr(opened, "offset_keys") else opened.keys()
        slices = {name: opened.get_slice(name) for name in names}
        metadata = dict(opened.metadata() or {})
        tree = {
            name: LazyTensor(torch.Size(part.get_shape()), _dtype(name, part.get_dtype()), partial(_get, opened, name))
            for name, part in slices.items()
        }
    except SafetensorError as error:
        raise RefusedError(f"a damaged or truncated safetensors file ({error})") from error
    except (MemoryError, OSError, RuntimeError) as error:
        if "mmap" not in str(error) and not isinstance(error, MemoryError):
            raise
        return _read_larger_than_memory(path)
    return Document("safetensors", tree, metadata=metadata, lazy=True)


def _read_larger_than_memory(path: Path) -> Document:
    """Read a file that the library cannot map, because it is larger than memory, by a mapping that reserves none."""
    file = MappedFile(path)
    (length,) = struct.unpack_from("<Q", file.data)
    if 8 + length > len(file.data):
        raise RefusedError("a truncated safetensors file")
    try:
        header = json.loads(bytes(file.data[8 : 8 + length]))
        metadata = header.pop("__metadata__", {})
        tree: dict[str, LazyTensor] = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape, dtype = torch.Size(entry["shape"]), _dtype(name, entry["dtype"])
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= len(file.data) - 8 - length or end - start != shape.numel() * dtype.itemsize:
                raise RefusedError(f"a damaged or truncated safetensors file ({name!r} is out of place)")
            tree[name] = LazyTensor(shape, dtype, partial(_view, file, 8 + length + start, shape, dtype))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RefusedError(f"a damaged safetensors file ({error})") from error
    return Document("safetensors", tree, metadata=dict(metadata), lazy=True)


def _view(file: MappedFile, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    storage = file.storage(start, shape.numel() * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload]


def _get(opened: Any, name: str) -> Tensor:
    from safetensors import SafetensorError

    try:
        tensor: Tensor = opened.get_tensor(name)
    except SafetensorError as error:
        raise RefusedError(f"a damaged safetensors file ({error})") from error
    return tensor


def _dtype(name: str, code: object) -> torch.dtype:
    if code not in _DTYPES:
        raise RefusedError(f"a safetensors file whose tensor {name!r} has the dtype {code}, which is not supported")
    return _DTYPES[str(code)]
