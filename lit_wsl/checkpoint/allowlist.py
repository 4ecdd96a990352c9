"""The exact allowlist: what a pickle may name and get for real. Everything else becomes an inert record.

Each entry maps a name to a function of our own (or a constant) that checks its arguments and builds plain data: tensors
over the file's own storages, sizes, dtypes and plain containers. Nothing here imports, and no function of the file's
choice is ever called.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_wsl.checkpoint.records import ForeignName, ForeignObject
from lit_wsl.errors import CheckpointError

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
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, *_: Any
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
        return torch.sparse_coo_tensor(data[0], data[1], _sparse_size(data[2]), check_invariants=True)
    layouts = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
    if layout in layouts and len(data) == 4 and all(isinstance(part, Tensor) for part in data[:3]):
        return torch.sparse_compressed_tensor(*data[:3], _sparse_size(data[3]), layout=layout, check_invariants=True)
    raise RefusedError("a sparse tensor of unknown form")


def _sparse_size(sizes: Any) -> tuple[int, ...]:
    size = _sizes(sizes, "size")
    if math.prod(size) > 1 << 48:
        raise RefusedError(f"a sparse tensor of shape {size}")
    return size


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
    ("torch._utils", "_rebuild_tensor"): lambda storage, offset, size, stride, *_: _strided(
        storage, offset, size, stride
    ),
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _rebuild_meta,
    ("torch._utils", "_rebuild_sparse_tensor"): _rebuild_sparse,
    ("torch._utils", "_rebuild_qtensor"): _rebuild_quantized,
    ("torch.nn.parameter", "Parameter"): _rebuild_parameter,
    ("torch.serialization", "_get_layout"): _layout,
    ("torch", "Size"): lambda items=(): torch.Size(_sizes(items, "size")),
    ("torch", "device"): _device,
}
CONSTANTS: dict[tuple[str, str], Any] = {
    ("torch", name): value
    for name in sorted(dir(torch))
    if isinstance(value := getattr(torch, name), (torch.dtype, torch.qscheme)) and f"torch.{name}" == str(value)
}
_KINDS = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64,
    "QUInt8": torch.quint8, "QInt8": torch.qint8, "QInt32": torch.qint32,
    "QUInt4x2": torch.quint4x2, "QUInt2x4": torch.quint2x4,
}  # fmt: skip
STORAGE_DTYPES: dict[tuple[str, str], torch.dtype] = {
    **{(module, f"{kind}Storage"): dtype for module in ("torch", "torch.cuda") for kind, dtype in _KINDS.items()},
    **{(module, "UntypedStorage"): torch.uint8 for module in ("torch", "torch.storage")},
}
KEY_BUDGET = 256  # parts of one dict key; nested tuples hash in exponential time and unbounded recursion
MAX_INT_KEY = 1 << 60  # beyond, ints can be chosen so that their hashes all collide


def check_key(key: Any) -> Any:
    """Let only keys be hashed whose hash is cheap: scalars, strings, names, and small tuples of them."""
    budget = KEY_BUDGET
    stack = [key]
    while stack:
        budget -= 1
        if budget < 0:
            raise RefusedError("a dict key or set member of excessive size")
        part = stack.pop()
        if type(part) in (tuple, frozenset, torch.Size):
            stack.extend(part)
        elif isinstance(part, int):
            if not -MAX_INT_KEY < part < MAX_INT_KEY:
                raise RefusedError("an integer of excessive size as a dict key")
        elif isinstance(part, (Tensor, Storage, list, dict, set, bytearray)):
            raise RefusedError(f"a {type(part).__name__} as a dict key or set member")
    return key


def _rebuild_from_type(func: Any, kind: Any, args: Any, state: Any = None) -> Any:
    """Build the plain tensor inside a tensor subclass, or a tensor that carries attributes; both extras are dropped."""
    builder = BUILDERS.get((func.module, func.name)) if isinstance(func, ForeignName) else None
    if builder is None or builder is _rebuild_from_type or not isinstance(args, tuple):
        raise ForeignUseError  # DTensor and other wrappers: a record, reported when it is among the weights
    return builder(*args)


def _members(items: Any) -> Iterable[Any]:
    if isinstance(items, (ForeignName, ForeignObject)):
        raise ForeignUseError
    if not isinstance(items, (list, tuple, set, frozenset)):
        raise RefusedError(f"a container made from a {type(items).__name__}")
    return items


def _pairs(items: Any) -> list[tuple[Any, Any]]:
    if isinstance(items, Mapping):
        return list(items.items())
    pairs = list(_members(items))
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise RefusedError("a dict made from something other than pairs")
    return [(check_key(key), value) for key, value in pairs]


def _counter(items: Any = ()) -> Counter[Any]:
    result: Counter[Any] = Counter()
    for key, value in _pairs(items):
        dict.__setitem__(result, key, value)
    return result


_FACTORIES = {"list": list, "dict": dict, "set": set, "int": int, "float": float, "str": str, "tuple": tuple}


def _defaultdict(factory: Any = None, items: Any = ()) -> defaultdict[Any, Any]:
    known = None
    if factory is not None:
        known = _FACTORIES.get(factory.name) if isinstance(factory, ForeignName) else None
        if known is None or factory.module != "builtins":
            raise ForeignUseError
    return defaultdict(known, _pairs(items))


def _complex(real: Any = 0.0, imag: Any = 0.0) -> complex:
    if not isinstance(real, (int, float)) or not isinstance(imag, (int, float)):
        raise RefusedError("a complex number made from something other than numbers")
    return complex(real, imag)


def _octets(value: Any, encoding: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and encoding in (None, "latin1", "latin-1"):
        return value.encode("latin-1")
    if isinstance(value, list) and all(type(item) is int and 0 <= item < 256 for item in value):
        return bytes(value)
    raise RefusedError("bytes made from something other than bytes")  # bytes(10**12) would be a memory bomb


def _encode(value: Any, encoding: Any = None) -> bytes:
    # pickle's protocols 0 to 2 write bytes as _codecs.encode(text, "latin1"); any other codec would be an import
    if not isinstance(value, str) or encoding != "latin1":
        raise RefusedError("a text codec other than latin1")
    return value.encode("latin-1")


BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    **TENSOR_BUILDERS,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("collections", "OrderedDict"): lambda items=(): OrderedDict(_pairs(items)),
    ("collections", "Counter"): _counter,
    ("collections", "defaultdict"): _defaultdict,
    ("builtins", "dict"): lambda items=(): dict(_pairs(items)),
    ("builtins", "list"): lambda items=(): list(_members(items)),
    ("builtins", "tuple"): lambda items=(): tuple(_members(items)),
    ("builtins", "set"): lambda items=(): {check_key(item) for item in _members(items)},
    ("builtins", "frozenset"): lambda items=(): frozenset(check_key(item) for item in _members(items)),
    ("builtins", "complex"): _complex,
    ("builtins", "bytes"): lambda value=b"", encoding=None: _octets(value, encoding),
    ("builtins", "bytearray"): lambda value=b"", encoding=None: bytearray(_octets(value, encoding)),
    ("_codecs", "encode"): _encode,
}


def is_known(name: ForeignName) -> bool:
    """Whether a name stands on the allowlist (as a function, a storage class or a constant)."""
    key = (name.module, name.name)
    return key in BUILDERS or key in STORAGE_DTYPES or key in CONSTANTS


def build(func: ForeignName, args: tuple[Any, ...]) -> Any:
    """Call our own function for an allowed name."""
    builder = BUILDERS.get((func.module, func.name))
    if builder is None:
        raise ForeignUseError
    try:
        return builder(*args)
    except (RefusedError, ForeignUseError, CheckpointError):
        raise
    except Exception as error:  # a wrong number of arguments, or torch's own checks
        raise RefusedError(f"{func} with unusable arguments ({type(error).__name__}: {str(error)[:200]})") from error
