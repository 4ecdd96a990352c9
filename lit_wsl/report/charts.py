"""A proof on data as a picture: the loss of each decision's answer and of its best rival, beside the fresh model's."""

from __future__ import annotations

import html
import math
from collections.abc import Callable

from lit_wsl.errors import printable
from lit_wsl.plan.entries import Decided, Measured

WIDTH, ROW, TOP = 900, 46, 58
LEFT, RIGHT = 20, 660  # of the axis
BEYOND = 1.5  # where the axis ends, in falls of the loss from the fresh model
MOST = 40  # decisions that are drawn
GOOD, BAD, GREY = "var(--high, #15803d)", "var(--low, #c0262d)", "var(--muted, #667085)"


def decision_chart(measured: Measured) -> str:
    """An SVG with one row for each decision, on one axis of the loss.

    Returns:
        The SVG as text; empty if nothing was decided.
    """
    drawn = [d for d in measured.decisions if math.isfinite(d.loss)][:MOST]
    losses = [measured.fresh, measured.transferred, *(d.loss for d in drawn), *(d.rival_loss for d in drawn)]
    known = [loss for loss in losses if math.isfinite(loss)]
    if not drawn:
        return ""
    low, high = min(known), max(known)
    if measured.fresh > low:  # a rival that is far worse than the fresh model stands at the end
        high = min(high, low + BEYOND * (measured.fresh - low))
    span = (high - low) or 1.0

    def x(loss: float) -> float:
        return LEFT + (RIGHT - LEFT) * (min(loss, high) - low) / span

    height = TOP + ROW * len(drawn) + 26
    left_out = len(measured.decisions) - len(drawn)
    parts = [
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Loss of each decision and of its best rival" font-family="sans-serif" font-size="12" '
        'fill="currentColor">',
        _text(
            LEFT, 16, "loss: each answer (full) and its best rival (hollow), and the fresh model (dashed)", weight=600
        ),
        _text(
            LEFT,
            34,
            "risk: that the answer is no better than its rivals; where it is above 1 %, nothing is taken",
            GREY,
        ),
    ]
    if math.isfinite(measured.fresh):
        at = x(measured.fresh)
        parts.append(_line(at, TOP - 12, at, height - 22, GREY, ' stroke-dasharray="4 4"'))
        parts.append(
            _text(
                at,
                height - 8,
                f"fresh {measured.fresh:.4g}",
                GREY,
                anchor="middle" if 60 < at < 600 else "start" if at < 300 else "end",
            )
        )
    for row, decided in enumerate(drawn):
        parts += _row(decided, TOP + ROW * row, x)
    if left_out:
        parts.append(_text(LEFT, height - 8, f"and {left_out} more", GREY))
    return "".join([*parts, "</svg>"])


def _row(decided: Decided, y: int, x: Callable[[float], float]) -> list[str]:
    parts = [_text(LEFT, y + 8, f"{_short(decided.question, 46)}: {_short(decided.answer, 70)}")]
    parts.append(_line(LEFT, y + 24, RIGHT, y + 24, "var(--line, #dfe3ea)"))
    here = x(decided.loss)
    if math.isfinite(decided.rival_loss):
        there = x(decided.rival_loss)
        parts.append(_line(here, y + 24, there, y + 24, BAD, ' stroke-width="2"'))
        parts.append(
            f'<circle cx="{there:.1f}" cy="{y + 24}" r="5" fill="none" stroke="{BAD}" stroke-width="2">'
            f"<title>{_safe(f'{decided.rival}: {decided.rival_loss:.5g}')}</title></circle>"
        )
    parts.append(
        f'<circle cx="{here:.1f}" cy="{y + 24}" r="5" fill="{GOOD if decided.taken else GREY}">'
        f"<title>{_safe(f'{decided.answer}: {decided.loss:.5g}')}</title></circle>"
    )
    verdict = f"{decided.loss:.4g} against {decided.rival_loss:.4g}, "
    verdict += f"risk {decided.risk:.0e}" if decided.taken else "open"
    parts.append(_text(RIGHT + 16, y + 28, verdict, GOOD if decided.taken else GREY))
    return parts


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _safe(text: str) -> str:
    return html.escape(printable(text))


def _text(x: float, y: float, text: str, fill: str = "", *, weight: int = 400, anchor: str = "start") -> str:
    colour = f' fill="{fill}"' if fill else ""
    return f'<text x="{x:.1f}" y="{y}" font-weight="{weight}" text-anchor="{anchor}"{colour}>{_safe(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}"{more}/>'
