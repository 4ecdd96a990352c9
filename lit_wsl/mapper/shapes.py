"""Which lossless operation takes one shape into another."""

from __future__ import annotations

from lit_wsl.structure.info import Shape
from lit_wsl.transfer.operations import Operation, Permute, Reshape, Transpose

EXACT, RESHAPED, TRANSPOSED = 0.0, 0.2, 0.3


def _core(shape: Shape) -> Shape:
    return tuple(d for d in shape if d != 1)


def operations_between(source: Shape, target: Shape, *, transposed: bool = False) -> tuple[Operation, ...] | None:
    """The operations that take a tensor of one shape into another, or ``None`` if no lossless one does.

    Reshapes are taken only where the order of the elements leaves no doubt: axes of size one come and go, and a
    flattened convolution ``(O, I, H, W)`` is a matrix ``(O, I*H*W)``.

    Args:
        source: Shape in the checkpoint.
        target: Shape in the model.
        transposed: The pair is known to store its matrices the other way round, so square ones are transposed too.

    >>> operations_between((3, 8), (8, 3))
    (Transpose(dim0=0, dim1=1),)
    >>> operations_between((8, 3, 2, 2), (8, 12))
    (Reshape(source=(8, 3, 2, 2), target=(8, 12)),)
    >>> operations_between((8, 3), (8, 4)) is None
    True
    """
    s, t = _core(source), _core(target)
    if transposed and len(source) == len(target) == 2 and len(s) == 2 and source == target[::-1]:
        return (Transpose(),)
    if source == target:
        return ()
    if s == t:
        return (Reshape(source, target),)
    if len(source) == len(target) == 2 and source == target[::-1]:
        return (Transpose(),)
    if len(source) == len(target) == 3 and source[0] == target[0] and source[1:] == target[1:][::-1]:
        return (Permute((0, 2, 1)),)
    if min(len(s), len(t)) == 2 and max(len(s), len(t)) >= 3 and s[0] == t[0] and _product(s) == _product(t):
        return (Reshape(source, target),)
    return None


def _product(shape: Shape) -> int:
    n = 1
    for d in shape:
        n *= d
    return n


def operation_cost(source: Shape, target: Shape, *, transposed: bool = False) -> float | None:
    """Cost of taking one shape into another for the assignment; ``None`` where it is impossible."""
    operations = operations_between(source, target, transposed=transposed)
    if operations is None:
        return None
    if not operations:
        return EXACT
    turned = any(op.name in ("transpose", "permute") for op in operations)
    return (EXACT if transposed else TRANSPOSED) if turned else RESHAPED
