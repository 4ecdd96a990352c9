"""Files of the safetensors format, by the safetensors library; tensors are read when asked for."""

from __future__ import annotations

import json
import struct
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_wsl.checkpoint.allowlist import RefusedError
from lit_wsl.checkpoint.document import Document, LazyTensor
from lit_wsl.checkpoint.torch_file import MappedFile

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
