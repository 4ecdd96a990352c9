"""Tensors, storages, sizes and dtypes for the pickle machine, each checked against the file before it is built."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_DIMENSIONS = 64  # torch's own limit for most operations
MAX_EXPANDED = 1 << 24  # elements of a tensor that repeats its storage (stride 0); bounds what a copy of it can take


class RefusedError(Exception):
    """An allowed name was used in a way that no honest file uses it; becomes a CheckpointError with the file's name."""


class ForeignUseError(Exception):
    """An allowed name used with foreign arguments; the result is an inert record."""


@dataclass(frozen=True)
class Storage:
    """The bytes of one storage of the file, checked to lie inside it."""

    key: str
    dtype: torch.dtype
    data: torch.UntypedStorage

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.data.nbytes()


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not all(_is_size(item) for item in value):
        raise RefusedError(f"a tensor whose {what} is not a tuple of non-negative integers")
    if len(value) > MAX_DIMENSIONS:
        raise RefusedError(f"a tensor of {len(value)} dimensions")
    return tuple(value)


def _strided(storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Build a view of a storage after checking that every element of it lies inside."""
    if not isinstance(storage, Storage):
        raise RefusedError("a tensor without a storage")
    size, stride = _sizes(size, "size"), _sizes(stride, "stride")
    if not _is_size(offset) or len(size) != len(stride):
        raise RefusedError("a tensor of inconsistent offset, size and stride")
    dtype = dtype or storage.dtype
    numel = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride)) if numel else offset - 1
    available = storage.nbytes // dtype.itemsize
    if last >= available:
        raise RefusedError(
            f"a tensor of shape {size}, stride {stride} and offset {offset} that needs {last + 1} elements of storage "
            f"{storage.key!r}, which has {available}"
        )
    if numel > max(available, MAX_EXPANDED):
        raise RefusedError(
            f"a tensor of shape {size} that repeats a storage of {available} elements {numel} times over"
        )
    if numel == 0:
        if max(size, default=0) > 1 << 48 or max(stride, default=0) > 1 << 60:
            raise RefusedError(f"an empty tensor of shape {size}")
        return torch.empty(size, dtype=dtype)
    return torch.empty(0, dtype=dtype).set_(storage.data, offset, size, stride)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    return _strided(storage, offset, size, stride)


def _rebuild_tensor_v2(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any = None, metadata: Any = None
) -> Tensor:
    tensor = _strided(storage, offset, size, stride)
    flags = metadata if isinstance(metadata, dict) else {}
    if tensor.is_complex() and flags.get("conj") is True:
        tensor = tensor.conj()
    if flags.get("neg") is True:
        tensor = torch._neg_view(tensor)
    return _with_grad(tensor, requires_grad)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Tensor:
    if not isinstance(dtype, torch.dtype):
        raise RefusedError("a tensor without a dtype")
    return _with_grad(_strided(storage, offset, size, stride, dtype), requires_grad)


def _with_grad(tensor: Tensor, requires_grad: Any) -> Tensor:
    if requires_grad is True and (tensor.is_floating_point() or tensor.is_complex()):
        tensor.requires_grad_(True)
    return tensor


def _rebuild_parameter(data: Any, requires_grad: Any = True, *_: Any) -> torch.nn.Parameter:
    if not isinstance(data, Tensor):
        raise RefusedError("a parameter without a tensor")
    differentiable = data.is_floating_point() or data.is_complex()
    return torch.nn.Parameter(data.detach(), requires_grad is True and differentiable)


def _rebuild_meta(dtype: Any, size: Any, stride: Any, requires_grad: Any = False) -> Tensor:
    if not isinstance(dtype, torch.dtype):
        raise RefusedError("a tensor without a dtype")
    size, stride = _sizes(size, "size"), _sizes(stride, "stride")
    if len(size) != len(stride) or math.prod(size) > 1 << 50 or max(stride, default=0) > 1 << 50:
        raise RefusedError(f"a meta tensor of shape {size}")
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _rebuild_sparse(layout: Any, data: Any) -> Tensor:
    """Build a sparse tensor with torch's own check of its indices switched on."""
    if not isinstance(data, tuple) or not all(isinstance(part, (Tensor, tuple, bool, torch.Size)) for part in data):
        raise RefusedError("a sparse tensor of unknown form")
    if layout == torch.sparse_coo and len(data) in (3, 4) and all(isinstance(part, Tensor) for part in data[:2]):
        size = _sizes(data[2], "size")
        if math.prod(size) > 1 << 48:
            raise RefusedError(f"a sparse tensor of shape {size}")
        return torch.sparse_coo_tensor(data[0], data[1], size, check_invariants=True)
    layouts = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
    if layout in layouts and len(data) == 4 and all(isinstance(part, Tensor) for part in data[:3]):
        size = _sizes(data[3], "size")
        if math.prod(size) > 1 << 48:
            raise RefusedError(f"a sparse tensor of shape {size}")
        return torch.sparse_compressed_tensor(*data[:3], size, layout=layout, check_invariants=True)
    raise RefusedError("a sparse tensor of unknown form")


def _rebuild_quantized(
    storage: Any, offset: Any, size: Any, stride: Any, quantizer: Any, requires_grad: Any = False, hooks: Any = None
) -> Tensor:
    """Build a quantized tensor; its scales have to belong to its shape, which torch itself does not check."""
    codes = _strided(storage, offset, size, stride)
    if codes.dtype not in (torch.qint8, torch.quint8, torch.qint32) or not isinstance(quantizer, tuple):
        raise RefusedError("a quantized tensor of unknown dtype or form")
    shape, dtype = codes.shape, codes.dtype
    if len(quantizer) == 3 and quantizer[0] is torch.per_tensor_affine:
        _, scale, zero_point = quantizer
        if not isinstance(scale, float) or type(zero_point) is not int:
            raise RefusedError("a quantized tensor of unknown form")
        result = torch._empty_affine_quantized(shape, scale=scale, zero_point=zero_point, dtype=dtype)
    elif len(quantizer) == 4 and quantizer[0] in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
        _, scales, zero_points, axis = quantizer
        exact = quantizer[0] is torch.per_channel_affine
        scales = _per_channel(scales, torch.float64 if exact else torch.float32)
        zero_points = _per_channel(zero_points, torch.int64 if exact else torch.float32)
        if type(axis) is not int or not 0 <= axis < len(shape) or {len(scales), len(zero_points)} != {shape[axis]}:
            raise RefusedError("a quantized tensor whose scales are not those of its channels")
        result = torch._empty_per_channel_affine_quantized(
            shape, scales=scales, zero_points=zero_points, axis=axis, dtype=dtype
        )
    else:
        raise RefusedError("a quantized tensor of an unknown scheme")
    return result.set_(storage.data, offset, shape, codes.stride())


def _per_channel(values: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(values, list) and all(isinstance(value, (int, float)) for value in values):
        values = torch.tensor(values, dtype=dtype)
    if not isinstance(values, Tensor) or values.dim() != 1 or values.layout is not torch.strided or values.is_meta:
        raise RefusedError("a quantized tensor whose scales are not a vector")
    return values.to(dtype)


def _size(items: Any = ()) -> torch.Size:
    return torch.Size(_sizes(items, "size"))


def _device(kind: Any, index: Any = None) -> torch.device:
    if not isinstance(kind, str) or (index is not None and not (type(index) is int and 0 <= index < 128)):
        raise RefusedError("a device of unknown form")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _layout(name: Any) -> torch.layout:
    known = {str(layout): layout for layout in (torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)}
    known |= {str(layout): layout for layout in (torch.sparse_bsr, torch.sparse_bsc)}
    if name not in known:
        raise RefusedError(f"an unknown tensor layout {name!r:.50}")
    return known[name]


TENSOR_BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _rebuild_meta,
    ("torch._utils", "_rebuild_sparse_tensor"): _rebuild_sparse,
    ("torch._utils", "_rebuild_qtensor"): _rebuild_quantized,
    ("torch.nn.parameter", "Parameter"): _rebuild_parameter,
    ("torch.serialization", "_get_layout"): _layout,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
}

CONSTANTS: dict[tuple[str, str], Any] = {
    ("torch", name): value
    for name in sorted(dir(torch))
    if isinstance(value := getattr(torch, name), (torch.dtype, torch.qscheme)) and f"torch.{name}" == str(value)
}

STORAGE_DTYPES: dict[tuple[str, str], torch.dtype] = {
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
    ("torch", "ComplexDoubleStorage"): torch.complex128,
    ("torch", "ComplexFloatStorage"): torch.complex64,
    ("torch", "QUInt8Storage"): torch.quint8,
    ("torch", "QInt8Storage"): torch.qint8,
    ("torch", "QInt32Storage"): torch.qint32,
    ("torch", "QUInt4x2Storage"): torch.quint4x2,
    ("torch", "QUInt2x4Storage"): torch.quint2x4,
    ("torch", "UntypedStorage"): torch.uint8,
    ("torch.storage", "UntypedStorage"): torch.uint8,
}
STORAGE_DTYPES |= {(f"torch.{where}", name): dtype for (_, name), dtype in list(STORAGE_DTYPES.items())
                   for where in ("cuda",) if name != "UntypedStorage"}  # fmt: skip
