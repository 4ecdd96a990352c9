"""Which inert records may be written again without being asked for: those that call nothing when they are loaded.

Reading a hostile file runs nothing here. But a record that says "call ``os.system`` with this text" and is written back
as it was would run wherever the new file is loaded with ``weights_only=False``, and the new file comes from a tool that
people trust. So records are told by their form: an object whose class is named and whose attributes are set
(dataclasses, namespaces, configurations) is data; a call is a program, unless it is one of the few below, which build
plain values from plain values. A name says nothing about what it would do, so there is no list of bad ones.
"""

from __future__ import annotations

from typing import Any

from lit_wsl.checkpoint.inert import ForeignName, ForeignObject, children_of

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
        return len(args) == 3 and all(isinstance(a, ForeignName) for a in args[:2]) and _name(args[1]) in _BASES
    if name in (("copyreg", "__newobj__"), ("copyreg", "__newobj_ex__")):
        return bool(args) and isinstance(args[0], ForeignName)
    if name == ("_codecs", "encode"):  # how bytes are said in protocol 2
        return len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1"
    if name == ("operator", "getitem"):  # typing.Dict[str, int]
        return bool(args) and isinstance(args[0], ForeignName) and args[0].module == "typing"
    return name in _CALLS


def _name(value: ForeignName) -> tuple[str, str]:
    return value.module, value.name


def foreign_calls(root: Any) -> list[str]:
    """Names of what would be called if a tree were written again and loaded, sorted; shared values are seen once."""
    found: set[str] = set()
    seen: set[int] = set()
    stack = [root]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, ForeignObject) and not is_harmless(value):
            found.add(value.type_name)
        stack.extend(children_of(value))
    return sorted(found)
