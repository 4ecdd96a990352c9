"""What every view is drawn with: a renderable for terminals, log files and notebooks, bars, names that wrap.

:func:`plain` and :func:`as_html` give a view other forms. Nothing is said by colour alone, and all of it can be read at
80 columns, where names that don't fit beside each other stand below each other. Control characters are escaped.
"""

from __future__ import annotations

import io
import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.jupyter import JupyterMixin
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text as RichText

from lit_wsl.errors import PRE, printable
from lit_wsl.report.rows import Confidence, confidence

COLOURS: dict[Confidence, str] = {"high": "green", "medium": "yellow", "low": "red"}
MARKS: dict[Confidence, str] = {"high": "", "medium": "?", "low": "!"}
LEGEND = "score: no mark above 0.8, ? from 0.6 to 0.8, ! below 0.6"
# what stands in, column for column, where the encoding of a log file lacks the character
_STAND_INS = str.maketrans("→█░├└│─×●○", ">#.|`|-x*o")


class Text(RichText):
    """Text that shows every control character escaped, also those that rich would take out."""

    def __init__(self, text: str = "", style: str | Style = "", **how: Any) -> None:
        super().__init__(printable(text), style, **how)

    def append(self, text: RichText | str, style: str | Style | None = None) -> RichText:
        """Add text."""
        return super().append(printable(text) if isinstance(text, str) else text, style)


class View(JupyterMixin, ABC):
    """A rich renderable for a terminal, a log file of any encoding, or a notebook."""

    @abstractmethod
    def _draw(self, width: int) -> Iterator[RenderableType]:
        """Yield what is shown in so many columns, in any characters."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        encoding = console.encoding
        for segment in console.render(Group(*self._draw(options.max_width)), options):
            text = segment.text if segment.control else _encodable(printable(segment.text), encoding)
            yield Segment(text, segment.style, segment.control)

    def _repr_html_(self) -> str:
        return as_html(self)


def _encodable(text: str, encoding: str) -> str:
    """The text itself, or with stand-ins for what the encoding lacks: ``?`` where nothing is alike."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_STAND_INS).encode(encoding, "replace").decode(encoding)
    except LookupError:
        pass
    return text


def short_columns(table: Table, *titles: str, justify: JustifyMethod = "left") -> None:
    """Add columns of words and numbers that are never broken."""
    for title in titles:
        table.add_column(title, justify=justify, no_wrap=True, overflow="crop")


def score_text(score: float) -> Text:
    """A score, coloured by confidence, with a mark that says the same without colour."""
    level = confidence(score)
    return Text(f"{score:.2f} {MARKS[level]}".rstrip(), style=COLOURS[level])


@dataclass(frozen=True)
class Wrapped:
    """Names that are broken behind dots and blanks only, what follows indented, so that words stay whole."""

    lines: tuple[str, ...]  # each with names
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [piece for line in self.lines for piece in broken(line, options.max_width)]
        yield Text("\n".join(lines), style=self.style, overflow="fold")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max(map(len, self.lines), default=0)
        word = max((len(piece) for line in self.lines for piece in broken(line, 1)), default=0)
        return Measurement(min(word, options.max_width), min(longest, options.max_width))


def pieces(line: str) -> list[str]:
    """What a line of names may be broken into: behind blanks, and behind dots that are not those of ``{0..11}``.

    >>> pieces("layers.{0..11}.0.attn + b")
    ['layers.', '{0..11}.', '0.', 'attn ', '+ ', 'b']
    """
    return re.split(r"(?<=[. ])(?!\.)(?!\d+[},])", line)


def broken(line: str, width: int) -> list[str]:
    """A line of names as lines of at most ``width`` columns, as far as its words allow.

    >>> broken("encoder.layers.0.self_attention → blocks.0.attn", 22)
    ['encoder.layers.0.', '  self_attention →', '  blocks.0.attn']
    """
    lines = [""]
    for piece in pieces(line):
        if lines[-1].strip() and len((lines[-1] + piece).rstrip()) > width:
            lines.append("  ")
        lines[-1] += piece
    return [text.rstrip() for text in lines]


@dataclass(frozen=True)
class Hanging:
    """A line of text; what does not fit goes on below it, indented further. Whole where lines are not wrapped."""

    line: str
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        indent = " " * (len(self.line) - len(self.line.lstrip()) + 2)
        lines = [self.line]
        if not options.no_wrap:
            lines = textwrap.wrap(
                self.line, max(20, options.max_width), subsequent_indent=indent, break_on_hyphens=False
            )
        yield Text("\n".join(lines), style=self.style)


@dataclass(frozen=True)
class Bar:
    """A horizontal bar of shares, as wide as its cell."""

    share: float  # filled share, 0 to 1
    style: str = "green"  # colour of the filled part
    width: int = 20  # in characters

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, min(self.width, options.max_width))
        filled = round(max(0.0, min(1.0, self.share)) * width)
        if filled == width and self.share < 1.0:
            filled -= 1  # a full bar means all
        if filled == 0 and self.share > 0.0:
            filled = 1
        yield Text("█" * filled, style=self.style, no_wrap=True).append("░" * (width - filled), style="dim")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = max(1, min(self.width, options.max_width))
        return Measurement(width, width)


def plain(view: RenderableType, width: int = 100) -> str:
    """A view as plain text: no colour, no trailing blanks, long lines of text whole."""
    text = io.StringIO()
    # in a notebook rich would show what is printed there, and write none of it to the file
    Console(file=text, width=width, color_system=None, legacy_windows=False, force_jupyter=False).print(
        view, soft_wrap=True
    )
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


def as_html(view: RenderableType) -> str:
    """A view as a piece of HTML, in the terminal's colours."""
    console = Console(record=True, width=120, file=io.StringIO(), legacy_windows=False, force_jupyter=False)
    console.print(view)
    return console.export_html(inline_styles=True, code_format=f"{PRE}{{code}}</pre>")
