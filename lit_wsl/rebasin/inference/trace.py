"""Record one real forward pass at the ATen level, without disturbing the model.

The result is plain data: nodes with references to tensors instead of tensors. The rules that give it a meaning are in
``rules*.py`` and know nothing of how it was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from lit_wsl.errors import RebasinError
from lit_wsl.structure.running import nested_tensors, undisturbed

MAX_INDEX = 4_000_000
_READERS = {Tensor.numpy, Tensor.tolist, Tensor.__array__}
_DROPOUTS = {
    *(nn.functional.dropout, nn.functional.dropout1d, nn.functional.dropout2d, nn.functional.dropout3d),
    *(nn.functional.alpha_dropout, nn.functional.feature_alpha_dropout, torch.dropout, torch.feature_dropout),
}


class ForwardError(RebasinError):
    """The model fails on the example.

    Attributes:
        operations: Number of operations that had run by then.
    """

    def __init__(self, message: str, operations: int) -> None:
        super().__init__(message)
        self.operations = operations


@dataclass(frozen=True)
class Ref:
    """Reference to a tensor of a trace."""

    number: int


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor of a trace."""

    shape: tuple[int, ...]
    storage: int  # number of its storage: tensors of equal storage are views of one another
    stride: tuple[int, ...] = ()  # its strides when it was first seen
    # for constants of the model, on which axes their values differ; None where it is not known
    varies: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Node:
    """One ATen call: ``func(*args, **kwargs) -> outs``, with :class:`Ref` for tensors, args filled up with defaults."""

    number: int
    func: Any
    args: dict[str, Any]
    outs: tuple[Any, ...]

    @property
    def name(self) -> str:
        """Namespace and name without the overload, ``aten.convolution``."""
        return f"{self.func.namespace}.{self.func._opname}"


def flat_refs(value: Any) -> Iterator[Ref]:
    """References in nested tuples."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from flat_refs(item)


def tensor_args(node: Node) -> Iterator[Ref]:
    """All tensors that enter a node."""
    for value in node.args.values():
        yield from flat_refs(value)


def written_arguments(node: Node) -> set[int]:
    """Tensors that a node writes into."""
    written: set[int] = set()
    for argument in node.func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.update(ref.number for ref in flat_refs(node.args.get(argument.name)))
    return written


@dataclass
class Trace:
    """A recorded forward pass."""

    nodes: list[Node] = field(default_factory=list)
    tensors: list[TensorInfo] = field(default_factory=list)
    parameters: dict[int, tuple[str, ...]] = field(default_factory=dict)
    inputs: set[int] = field(default_factory=set)
    outputs: list[Ref] = field(default_factory=list)
    integers: dict[tuple[int, int], Tensor] = field(default_factory=dict)


class Escapes(TorchFunctionMode):
    """Function mode that notes where values leave for Python or NumPy past the dispatcher."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call; note it if it reads values, but not where they are only checked."""
        if func is nn.functional.one_hot and (known := _one_hot(*args, **(kwargs or {}))) is not None:
            return known
        if func in _READERS and args and isinstance(args[0], Tensor):
            self.recorder.note(torch.ops.aten._local_scalar_dense.default, {"self": args[0]})
        return func(*args, **(kwargs or {}))


class NoDropout(TorchFunctionMode):
    """Function mode without dropout, which some models forget to switch off: ``F.dropout(x, 0.5)``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call, or pass its input on where it is a dropout."""
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is nn.functional.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor | None:
    """``one_hot`` without its check of the positions, which reads them; None where their largest gives the size."""
    if num_classes < 1 or tensor.dtype != torch.int64:
        return None
    zeros = torch.zeros(*tensor.shape, num_classes, dtype=torch.int64, device=tensor.device)
    return zeros.scatter(-1, tensor.unsqueeze(-1), 1)


class Recorder(TorchDispatchMode):
    """Dispatch mode that writes every ATen call into a :class:`Trace`."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self._numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._storages: dict[int, tuple[int, StorageWeakRef]] = {}

    def number(self, tensor: Tensor) -> int:
        """Number of a tensor in the trace; a new one if it was not seen before."""
        found = self._numbers.get(tensor)
        if found is not None:
            return int(found)
        number = len(self.trace.tensors)
        self._numbers[tensor] = number
        self.trace.tensors.append(self._info(tensor))
        return number

    def _info(self, tensor: Tensor) -> TensorInfo:
        stride = tuple(tensor.stride()) if tensor.layout == torch.strided else ()
        return TensorInfo(tuple(tensor.shape), self._storage(tensor), stride)

    def _storage(self, tensor: Tensor) -> int:
        """Number of a storage, in order of appearance.

        A weak reference keeps the storage's address from being taken by a later one, but not its memory.
        """
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):
            return -1 - len(self.trace.tensors)  # nothing shares it
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = (len(self._storages), StorageWeakRef(storage))
        return self._storages[storage._cdata][0]

    def _layout_changed(self, tensor: Tensor) -> bool:
        known, now = self.trace.tensors[self._numbers[tensor]], self._info(tensor)
        return (known.shape, known.stride, known.storage) != (now.shape, now.stride, now.storage)

    def refer(self, value: Any) -> Any:
        """A value with tensors replaced by references."""
        if isinstance(value, Tensor):
            return Ref(self.number(value))
        if isinstance(value, (list, tuple)):
            return tuple(self.refer(v) for v in value)
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call and write it down."""
        kwargs = kwargs or {}
        number = len(self.trace.nodes)
        schema = func._schema.arguments
        named = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
        named.update({argument.name: value for argument, value in zip(schema, args, strict=False)})
        named.update(kwargs)
        recorded = self._referred(named)
        for value in nested_tensors(list(named.values())):
            if not value.is_floating_point() and not value.is_complex() and value.numel() <= MAX_INDEX:
                self.trace.integers[(number, self.number(value))] = value.detach().clone()
        result = func(*args, **kwargs)
        for value in nested_tensors(result):
            if value in self._numbers and self._layout_changed(value):  # transpose_: the same object, another view
                del self._numbers[value]
        outs = tuple(self.refer(v) for v in (result if isinstance(result, (list, tuple)) else (result,)))
        self.trace.nodes.append(Node(number, func, recorded, outs))
        return result

    def _referred(self, named: dict[str, Any]) -> dict[str, Any]:
        for value in nested_tensors(list(named.values())):
            if value not in self._numbers:  # a constant: nothing made it, and it is neither parameter nor input
                self.trace.tensors[self.number(value)] = replace(self._info(value), varies=_varies(value))
        return {name: self.refer(value) for name, value in named.items()}

    def note(self, func: Any, named: dict[str, Any]) -> None:
        """Write down a call that returns no tensor."""
        self.trace.nodes.append(Node(len(self.trace.nodes), func, self._referred(named), ()))


def _varies(tensor: Tensor) -> tuple[bool, ...] | None:
    """Axes along which the values of a tensor differ; a table of zeros goes with any permutation."""
    if tensor.is_meta or tensor.numel() > MAX_INDEX or tensor.layout != torch.strided:
        return None
    return tuple(not torch.equal(tensor, tensor.narrow(a, 0, 1).expand_as(tensor)) for a in range(tensor.ndim))


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors that a model returned, floating and complex ones only."""
    return [tensor for tensor in nested_tensors(output) if tensor.is_floating_point() or tensor.is_complex()]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and persistent floating or complex buffers, under every name that the state dict has for them."""
    known = set(model.state_dict(keep_vars=True))
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in known and buffer.layout == torch.strided and (buffer.is_floating_point() or buffer.is_complex()):
            found[name] = buffer
    return found


@contextmanager
def traceable(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """The model undisturbed, without gradients, without dropout, by plain kernels; tells if it wrote to itself.

    Train mode is entered for a moment first: some networks cache attention biases on the way into evaluation mode.
    """
    with ExitStack() as stack:
        wrote = stack.enter_context(undisturbed(model)).wrote
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        stack.enter_context(NoDropout())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # The fused kernel hides the gates; the plain one shows them.
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        model.train()
        model.eval()
        yield wrote


def trace_forward(
    model: nn.Module,
    example_args: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    outputs: Callable[[Any], Any] | None = None,
) -> Trace:
    """Record one run of a model that the caller keeps undisturbed (:func:`traceable`)."""
    recorder = Recorder()
    trace = recorder.trace
    names: dict[int, list[str]] = {}
    for name, tensor in named_tensors(model).items():
        names.setdefault(recorder.number(tensor), []).append(name)
    trace.parameters = {number: tuple(of) for number, of in names.items()}
    for tensor in nested_tensors([list(example_args), dict(example_kwargs or {})]):
        trace.inputs.add(recorder.number(tensor))
    try:
        with Escapes(recorder), recorder:
            output = model(*example_args, **(example_kwargs or {}))
        found = list(nested_tensors(outputs(output) if outputs else output))  # positions and masks, too
    except RebasinError:
        raise
    except Exception as error:
        raise ForwardError(
            f"The forward pass of {type(model).__name__} with the example arguments failed "
            f"({type(error).__name__}: {error}); pass example_args and example_kwargs that fit its forward().",
            len(trace.nodes),
        ) from error
    trace.outputs = [Ref(recorder.number(tensor)) for tensor in found]
    return trace
