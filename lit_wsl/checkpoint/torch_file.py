"""Files of ``torch.save`` (zip and the older stream), whole pickled modules and plain pickles."""

from __future__ import annotations

import mmap
import struct
import sys
from pathlib import Path
from typing import Any

import torch

from lit_wsl.checkpoint.archive import Archive, read_archive
from lit_wsl.checkpoint.document import Document
from lit_wsl.checkpoint.inert import as_mapping
from lit_wsl.checkpoint.rebuild import RefusedError, Storage
from lit_wsl.checkpoint.unpickle import Unpickled, unpickle

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
    """Read a file that ``torch.save`` or ``pickle`` wrote, running none of it.

    Raises:
        RefusedError: if it is damaged or does something that no honest checkpoint does.
    """
    file = MappedFile(path)
    if file.data[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        found = read_zip(file)
        return _document(found, _read_by_torch(path, found))
    found, legacy = _read_stream(file)
    document = _document(found, found.value)
    note = ("written in the older, non-zip form of torch.save",) if legacy else ()
    return Document(
        document.format if legacy else "pickle",
        document.tree,
        document.stubbed,
        note,
        lossy=document.lossy or not legacy,
    )


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
    """Read the zip form, which may be a part of a larger file (the shards of ``torch.distributed.checkpoint``).

    Raises:
        RefusedError: if it is not a sound archive of ``torch.save``.
    """
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
    """Read a whole file of ``torch.save`` and compare the CRC-32 of each of its parts.

    Returns:
        The number of bytes compared; 0 for files without checksums.

    Raises:
        RefusedError: naming the part that is damaged.
    """
    file = MappedFile(path)
    if file.data[:2] != b"PK":
        return 0
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
