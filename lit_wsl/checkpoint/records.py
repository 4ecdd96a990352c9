"""Inert records: what stands in for a foreign class, function or object of a pickle, so that nothing is imported.

A pickle is a list of orders: "call this function with these arguments, then give the result this state". Reading one
safely means writing the orders down instead of following them. A record keeps all of them, in order, so that the same
pickle can be written again (:mod:`lit_wsl.checkpoint.saving`), and the tensors inside can be found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_wsl.errors import CheckpointError


@dataclass(frozen=True)
class ForeignName:
    """A class or function that a pickle names; never imported.

    Attributes:
        module: the module as the pickle names it, such as ``"argparse"``.
        name: the name inside the module, such as ``"Namespace"``.
    """

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def __repr__(self) -> str:
        return f"<{self.module:.100}.{self.name:.100}, not imported>"

    def __reduce__(self) -> Any:
        raise CheckpointError(f"{self!r} can be written by lit_wsl's own save functions only, such as atomic_save.")


@dataclass(eq=False)
class ForeignObject:
    """An object of a foreign class: the orders that would build it, none of them followed.

    Attributes:
        func: the class or function to be called (a name, or another record).
        args: its arguments.
        kwargs: its keyword arguments (``NEWOBJ_EX`` only).
        how: ``"reduce"`` for ``func(*args)``, ``"newobj"`` for ``func.__new__(func, *args)``.
        orders: what follows, in order: ``("append", value)``, ``("setitem", key, value)``, ``("build", state)``.
    """

    func: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    how: str = "reduce"
    orders: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def type_name(self) -> str:
        """The dotted name of the class or function, as far as it is known."""
        # copyreg._reconstructor(cls, base, state) and __newobj__ are how protocols 0 and 1 say "an object of cls"
        if isinstance(self.func, ForeignName):
            if self.func.module in ("copyreg", "copy_reg") and self.args and isinstance(self.args[0], ForeignName):
                return str(self.args[0])
            return str(self.func)
        return f"result of {self.func.type_name}" if isinstance(self.func, ForeignObject) else "unknown"

    @property
    def state(self) -> dict[str, Any]:
        """The instance attributes that BUILD orders would set: dicts, and the slots half of ``(dict, slots)``."""
        merged: dict[str, Any] = {}
        for order in self.orders:
            if order[0] != "build":
                continue
            parts = order[1] if isinstance(order[1], tuple) and len(order[1]) == 2 else (order[1],)
            for part in parts:
                if isinstance(part, dict):
                    merged.update((key, value) for key, value in part.items() if isinstance(key, str))
        return merged

    @property
    def entries(self) -> dict[Any, Any]:
        """The items that SETITEM orders would set, for subclasses of ``dict``."""
        return {order[1]: order[2] for order in self.orders if order[0] == "setitem"}

    def children(self) -> Iterator[Any]:
        """Go over every value the record holds."""
        yield self.func
        yield from self.args
        yield from self.kwargs.values()
        for order in self.orders:
            yield from order[1:]

    def __repr__(self) -> str:
        return f"<{self.type_name} object, not built>"

    def __reduce__(self) -> Any:
        raise CheckpointError(f"{self!r} can be written by lit_wsl's own save functions only, such as atomic_save.")


def as_mapping(value: Any) -> Mapping[Any, Any] | None:
    """See a dict, or a record of a dict subclass (Lightning's ``AttributeDict``, ``DictConfig``), as a mapping."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, ForeignObject):
        return value.entries or None
    return None


def children_of(value: Any) -> Iterator[Any]:
    """Go over the values inside a container or a record; nothing for leaves."""
    if isinstance(value, Mapping):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    elif isinstance(value, ForeignObject):
        yield from value.children()


def walk(root: Any) -> Iterator[Any]:
    """Go over a value and all that is inside it; a container or record that is shared comes once."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        value = stack.pop()
        if isinstance(value, (Mapping, list, tuple, set, frozenset, ForeignObject)):
            if id(value) in seen:
                continue
            seen.add(id(value))
            stack.extend(children_of(value))
        yield value


def contains_foreign(root: Any) -> bool:
    """Whether a record is anywhere inside."""
    return any(isinstance(value, (ForeignName, ForeignObject)) for value in walk(root))


_PATHS = ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_PLAIN = {
    "builtins": ("bytearray", "complex", "frozenset", "range", "set", "slice"),
    "collections": ("ChainMap", "Counter", "OrderedDict", "defaultdict", "deque"),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "functools": ("partial",),  # calls nothing before it is called itself
    "numpy": ("dtype",),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy.core.numeric": ("_frombuffer",),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.numeric": ("_frombuffer",),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "re": ("_compile",),
    "types": ("SimpleNamespace",),
    "zoneinfo": ("ZoneInfo._unpickle",),
}
_CALLS = frozenset((module, name) for module, names in _PLAIN.items() for name in names)
_BASES = frozenset(("builtins", name) for name in ("object", "dict", "list", "tuple", "str", "int", "float", "set"))


def is_harmless(record: ForeignObject) -> bool:
    """Whether building the object calls neither a function nor a class of the file's choice.

    What it holds is not looked at.

    >>> is_harmless(ForeignObject(ForeignName("my.code", "Config"), how="newobj"))
    True
    >>> is_harmless(ForeignObject(ForeignName("pathlib", "PosixPath"), ("data",)))
    True
    >>> is_harmless(ForeignObject(ForeignName("posix", "system"), ("ls",)))
    False
    """
    func, args = record.func, record.args
    if not isinstance(func, ForeignName):  # the result of something
        return False
    if record.how == "newobj":
        return True
    name = (func.module, func.name)
    if name == ("copyreg", "_reconstructor"):  # protocols 0 and 1; a base of the file's choice would be initialised
        return (
            len(args) == 3
            and all(isinstance(a, ForeignName) for a in args[:2])
            and (args[1].module, args[1].name) in _BASES
        )
    if name in (("copyreg", "__newobj__"), ("copyreg", "__newobj_ex__")):
        return bool(args) and isinstance(args[0], ForeignName)
    if name == ("_codecs", "encode"):  # how bytes are said in protocol 2
        return len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1"
    if name == ("operator", "getitem"):  # typing.Dict[str, int]
        return bool(args) and isinstance(args[0], ForeignName) and args[0].module == "typing"
    return name in _CALLS


def foreign_calls(root: Any) -> list[str]:
    """Names of what would be called if a tree were written again and loaded, sorted."""
    return sorted({v.type_name for v in walk(root) if isinstance(v, ForeignObject) and not is_harmless(v)})


def names_of_classes(root: Any) -> set[str]:
    """The dotted names of all classes and functions that a tree names."""
    return {str(value) for value in walk(root) if isinstance(value, ForeignName)}


def first_foreign(root: Any) -> tuple[tuple[Any, ...], str] | None:
    """The keys that lead to the first record inside a value, and the name of its class; ``None`` without any.

    >>> first_foreign({"a": [1, ForeignName("my.code", "Config")]})
    (('a', 1), 'my.code.Config')
    """
    seen: set[int] = set()
    stack: list[tuple[tuple[Any, ...], Any]] = [((), root)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, ForeignObject):
            return path, value.type_name
        if isinstance(value, ForeignName):
            return path, str(value)
        if id(value) in seen or not isinstance(value, (Mapping, list, tuple, set, frozenset)):
            continue
        seen.add(id(value))
        inside = list(value.items()) if isinstance(value, Mapping) else list(enumerate(value))
        stack.extend(((*path, key), item) for key, item in reversed(inside))
        if isinstance(value, Mapping):
            stack.extend(((*path, str(key)), key) for key in value if isinstance(key, (ForeignName, ForeignObject)))
    return None
