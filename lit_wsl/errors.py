"""One family of errors, so that ``except LitWslError`` catches everything this package raises on purpose.

Every message names the tensor, its shape, the file and the remedy, as far as they are known where it is raised. Errors
that Python has a class for derive from it too: a wrong value is a ``ValueError``, a missing file a
``FileNotFoundError``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence

# what moves the cursor, and what turns the direction of writing
_RANGES = ((0, 8), (0x0B, 0x1F), (0x7F, 0x9F), (0x61C, 0x61C), (0x200E, 0x200F), (0x2028, 0x202E), (0x2066, 0x2069))
_CONTROL = {code: ascii(chr(code))[1:-1] for first, last in _RANGES for code in range(first, last + 1)}


def printable(text: str) -> str:
    r"""A text from a file as a terminal may show it: control characters escaped, but for tabs and line breaks.

    >>> print(printable("weight\x1b[2J"))
    weight\x1b[2J
    """
    return text if text.isprintable() else text.translate(_CONTROL)


def listed(names: Sequence[object], most: int = 4) -> str:
    """The first names of some, and that there are more.

    >>> listed(["a", "b", "c"], 2)
    'a, b, ...'
    """
    return ", ".join([*map(str, names[:most]), *(["..."] if len(names) > most else [])])


def counted(names: Sequence[object], most: int) -> str:
    """The first names of some, and how many more there are.

    >>> counted(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def reason(error: BaseException, most: int = 160) -> str:
    """The kind of an error and the first line of what it says.

    >>> reason(ValueError("no such layer"))
    'ValueError: no such layer'
    """
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:most]}"


class LitWslError(Exception):
    """Base of all errors that lit_wsl raises on purpose."""

    def __str__(self) -> str:
        return printable(super().__str__())


class CheckpointError(LitWslError):
    """A file cannot be read as a checkpoint, or cannot be written."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no file or folder of this name."""


class MappingError(LitWslError, ValueError):
    """Matching was asked for something impossible: a wrong option, a model without tensors."""


class ArgumentTypeError(MappingError, TypeError):
    """An argument of the wrong kind: a path where a module belongs, a tensor where a tuple belongs."""


class PlanError(LitWslError, ValueError):
    """A plan does not fit the checkpoint or the model, or is not a valid plan."""


class CoverageError(LitWslError, ValueError):
    """Fewer weights found a place than ``min_coverage`` asks for; nothing was changed."""


class TransferError(LitWslError, RuntimeError):
    """Applying a plan failed; the model is as it was before, but for what ``not_restored`` names.

    Attributes:
        not_restored: The names of the tensors, and of whatever else was changed, that could not be put back.
    """

    not_restored: tuple[str, ...] = ()


class RebasinError(LitWslError, ValueError):
    """A permutation spec cannot be inferred, verified or applied."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'lenient'?``, or nothing where no known word is near.

    >>> did_you_mean("leniant", ["exclude", "lenient"])
    " Did you mean 'lenient'?"
    """
    from difflib import get_close_matches

    near = get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


PRE = '<pre style="line-height: 1.3; white-space: pre; overflow-x: auto">'  # notebooks wrap a bare one


class ShownInNotebooks:
    """Is HTML in a notebook, and one line wherever only text is shown."""

    @abstractmethod
    def _repr_html_(self) -> str: ...

    def _repr_mimebundle_(self, include: object = None, exclude: object = None, **_: object) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": self._repr_html_()}


class Summarised(ShownInNotebooks):
    """Shows its :meth:`summary` in a notebook, and prints it."""

    @abstractmethod
    def summary(self) -> str:
        """What it is, in a few lines."""

    def __str__(self) -> str:
        return printable(self.summary())

    def _repr_html_(self) -> str:
        from html import escape

        return f"{PRE}{escape(printable(self.summary()))}</pre>"
