"""Output for people on a terminal and for pipes: the same content, once laid out, once as plain lines."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lit_wsl.errors import printable
from lit_wsl.files import atomic_write_text


def on_terminal() -> bool:
    """Whether a person reads the standard output."""
    return sys.stdout.isatty()


def say(text: str = "") -> None:
    """Print a line of the result; control characters of names are escaped."""
    print(_cell(text) if "\t" not in text else "\t".join(map(_cell, text.split("\t"))))


def remark(text: str) -> None:
    """Print a remark beside the result."""
    print(printable(text), file=sys.stderr)


def put_json(data: Any, file: str) -> None:
    """Write JSON to a file, atomically, or to the standard output for ``-``."""
    text = json.dumps(data, indent=2, ensure_ascii=False, default=str)
    if file == "-":
        print(text)
    else:
        atomic_write_text(file, text + "\n")
        remark(f"report: {file}")


def fields(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values, aligned; on a terminal long values go on below themselves."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        line = f"{name:<{width}}  {_cell(value)}"
        if on_terminal():
            columns = max(width + 22, shutil.get_terminal_size().columns)
            line = textwrap.fill(line, columns, subsequent_indent=" " * (width + 2), break_on_hyphens=False)
        print(line)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Print a table: laid out to the width of a terminal, else one line of tab-separated cells per row."""
    if not on_terminal():
        for row in (header, *rows):
            print("\t".join(map(_cell, row)))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lit_wsl.report.drawing import Wrapped

    laid_out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, title in enumerate(header):
        laid_out.add_column(title, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        cells = [_cell(cell) for cell in row]
        laid_out.add_row(*(Text(c) if n in right else Wrapped((c,)) for n, c in enumerate(cells)))
    Console().print(laid_out)


def _cell(text: str) -> str:
    """A cell of a table: one line, control characters escaped."""
    return printable(text.replace("\t", "\\t").replace("\n", "\\n"))


Step = Callable[[int, int], None]


@contextmanager
def progress(title: str) -> Iterator[Step]:
    """A progress bar on the standard error where it is a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def size_text(count: float) -> str:
    """Bytes for people.

    >>> size_text(123), size_text(5 * 2**20)
    ('123 B', '5.0 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
