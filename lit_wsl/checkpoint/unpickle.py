"""A pickle machine that runs no code: it imports nothing, calls only :mod:`lit_wsl.checkpoint.rebuild`, and is bounded.

A pickle is a program for a stack machine (see the standard library's ``pickletools``). This is such a machine for all
protocols (0 to 5), written for untrusted input:

* a global is a :class:`~lit_wsl.checkpoint.inert.ForeignName`, never an import;
* REDUCE, NEWOBJ, NEWOBJ_EX, OBJ and INST call a function of the exact allowlist, or else write down a record;
* BUILD, APPEND(S) and SETITEM(S) fill plain containers and records, never an object of the file's choice;
* the extension registry, text persistent ids and out-of-band buffers are refused;
* every length is checked against the bytes that are left before anything is allocated, and the number of steps, of
  containers and the depth of the result are limited.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from lit_wsl.checkpoint import rebuild
from lit_wsl.checkpoint.inert import ForeignObject, children_of
from lit_wsl.checkpoint.machine import Machine
from lit_wsl.checkpoint.machine_core import CONTAINERS, MAX_DEPTH, LoadStorage
from lit_wsl.checkpoint.rebuild import RefusedError

MAX_EXPANSION = 100_000_000  # values if shared containers were written out: "billion laughs"


@dataclass(frozen=True)
class Unpickled:
    """What one pickle holds.

    Attributes:
        value: the tree; tensors over the file's storages, plain containers and inert records.
        stubbed: dotted names of the foreign classes and functions in it, sorted.
        known: dotted names of the allowed ones, sorted.
        end: where in the data the pickle ends.
        lossy: whether something was dropped that writing the tree again would not bring back.
    """

    value: Any
    stubbed: tuple[str, ...]
    known: tuple[str, ...]
    end: int
    lossy: bool


def unpickle(data: memoryview | bytes, start: int = 0, load_storage: LoadStorage | None = None) -> Unpickled:
    """Read one pickle without running any of it.

    Args:
        data: the bytes.
        start: where the pickle begins.
        load_storage: gives the storage of a torch persistent id from ``(dtype, key, number of elements)``;
            without it, persistent ids are refused.

    Raises:
        RefusedError: if the pickle is damaged, or does something that no honest checkpoint does.
    """
    machine = Machine(memoryview(data), start, load_storage)
    try:
        value = machine.run()
    except RefusedError:
        raise
    except IndexError as error:
        raise RefusedError("a damaged pickle (an operation without operands)") from error
    except (struct.error, UnicodeError, ValueError, TypeError, OverflowError, KeyError, AttributeError) as error:
        raise RefusedError(f"a damaged pickle ({type(error).__name__}: {str(error)[:200]})") from error
    except (RecursionError, MemoryError) as error:
        raise RefusedError("a pickle that needs excessive memory") from error
    check_tree(value)
    names = machine.names.values()
    return Unpickled(
        value=value,
        stubbed=tuple(
            sorted({_shown(str(name)) for name in names if not rebuild.is_known(name)} | machine.foreign_uses)
        ),
        known=tuple(sorted(str(name) for name in names if rebuild.is_known(name))),
        end=machine.at,
        lossy=machine.lossy,
    )


def _shown(name: str) -> str:
    """A name for people: a file can put terminal commands, or a megabyte of letters, into the name of a class."""
    printable = name if name.isprintable() else ascii(name)[1:-1]
    return printable if len(printable) <= 200 else f"{printable[:200]}..."


def check_tree(root: Any) -> None:
    """Refuse a tree too deep, or one whose shared containers write out to an astronomical size.

    A depth-first walk without recursion. ``size[id]`` counts the values under a container as if nothing were shared;
    what is still open is an ancestor, and counts as one (a cycle).

    Raises:
        RefusedError: if a limit is passed.
    """
    if not isinstance(root, (*CONTAINERS, ForeignObject)):
        return
    sizes: dict[int, int] = {id(root): 1}
    stack = [(root, iter(list(children_of(root))))]
    while stack:
        value, children = stack[-1]
        for child in children:
            if not isinstance(child, (*CONTAINERS, ForeignObject)):
                sizes[id(value)] += 1
                continue
            known = sizes.get(id(child))
            if known is None:
                sizes[id(child)] = 1
                stack.append((child, iter(list(children_of(child)))))
                break
            sizes[id(value)] += known
        else:
            stack.pop()
            size = sizes[id(value)]
            if size > MAX_EXPANSION:
                raise RefusedError("containers nested in each other to an astronomical size")
            if isinstance(value, ForeignObject):
                sizes[id(value)] = 1  # walks treat a record as one value
            if stack:
                sizes[id(stack[-1][0])] += sizes[id(value)]
        if len(stack) > MAX_DEPTH:
            raise RefusedError(f"containers nested more than {MAX_DEPTH} deep")
