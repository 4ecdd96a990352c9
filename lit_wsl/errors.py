"""One family of errors, so that ``except LitWslError`` catches everything this package raises on purpose.

Every message names the tensor, its shape, the file and the remedy, as far as they are known where it is raised. Errors
that Python has a class for derive from it too: a wrong value is a ``ValueError``, a missing file a
``FileNotFoundError``.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""A text from a file as a terminal may show it: control characters escaped, but for tabs and line breaks.

    >>> print(printable("weight\x1b[2J"))
    weight\x1b[2J
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def listed(names: Sequence[object], most: int = 4) -> str:
    """The first names of some, and that there are more.

    >>> listed(["a", "b", "c"], 2)
    'a, b, ...'
    """
    return ", ".join([*map(str, names[:most]), *(["..."] if len(names) > most else [])])


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
