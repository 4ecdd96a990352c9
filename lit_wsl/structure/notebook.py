"""Results that show themselves in a notebook: their summary, as preformatted text."""

from __future__ import annotations

import html
from abc import abstractmethod

from lit_wsl.errors import printable


class Summarised:
    """Shows its :meth:`summary` in a notebook, and prints it."""

    @abstractmethod
    def summary(self) -> str:
        """What it is, in a few lines."""

    def __str__(self) -> str:
        return printable(self.summary())

    def _repr_html_(self) -> str:
        return f'<pre style="line-height: 1.3">{html.escape(printable(self.summary()))}</pre>'
