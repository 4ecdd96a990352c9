"""What every terminal view shares: marks that need no colour, bars, and characters that the encoding can show."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

from lit_wsl.report.rows import Confidence, confidence

COLOURS: dict[Confidence, str] = {"high": "green", "medium": "yellow", "low": "red"}
MARKS: dict[Confidence, str] = {"high": "", "medium": "?", "low": "!"}
LEGEND = "score: no mark above 0.8, ? from 0.6 to 0.8, ! below 0.6"


def ascii_only(console: Console) -> bool:
    """Whether the console's encoding cannot show box and arrow characters (a log file in ASCII or Latin-1)."""
    return not console.encoding.lower().replace("-", "").startswith("utf")


def plain(text: str, console: Console) -> str:
    """Replace characters that a console's encoding cannot show."""
    if not ascii_only(console):
        return text
    table = {
        "→": "->",
        "█": "#",
        "░": ".",
        "├": "|",
        "└": "`",
        "│": "|",
        "─": "-",
        "×": "x",
        "●": "*",
        "◐": "~",
        "○": "o",
    }
    return "".join(table.get(c, c) for c in text)


def score_text(score: float) -> Text:
    """A score, coloured by confidence, with a mark that says the same without colour."""
    level = confidence(score)
    return Text(f"{score:.2f} {MARKS[level]}".rstrip(), style=COLOURS[level])


@dataclass(frozen=True)
class Bar:
    """A horizontal bar of shares, as wide as its cell.

    Attributes:
        share: Filled share, 0 to 1.
        style: Colour of the filled part.
        width: Width in characters.
    """

    share: float
    style: str = "green"
    width: int = 20

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, min(self.width, options.max_width))
        filled = round(max(0.0, min(1.0, self.share)) * width)
        if filled == width and self.share < 1.0:
            filled -= 1  # a full bar means all
        if filled == 0 and self.share > 0.0:
            filled = 1
        bar = Text(plain("█" * filled, console), style=self.style, no_wrap=True)
        yield bar.append(plain("░" * (width - filled), console), style="dim")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = max(1, min(self.width, options.max_width))
        return Measurement(width, width)
