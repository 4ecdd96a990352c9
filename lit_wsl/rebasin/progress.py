"""A progress bar that is silent where nobody watches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


@dataclass
class Progress:
    """Handle on a bar that is refilled stage by stage."""

    bar: RichProgress
    task: TaskID

    def start(self, description: str, total: int) -> None:
        """Begin a stage of so many steps."""
        self.bar.reset(self.task, description=description, total=total)

    def advance(self) -> None:
        """One step done."""
        self.bar.advance(self.task)


@contextmanager
def progress_bar(enabled: bool | None = None) -> Iterator[Progress]:
    """A transient progress bar on stderr.

    Args:
        enabled: by default only if stderr is a terminal.
    """
    console = Console(stderr=True)
    disable = not console.is_terminal if enabled is None else not enabled
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=console, transient=True, disable=disable) as bar:
        yield Progress(bar, bar.add_task("", total=None))
