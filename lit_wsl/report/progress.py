"""Progress of long transfers, on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LONG = 1 << 30  # bytes; less is done before a bar could be read


@contextmanager
def transfer_progress(size: int, *, enabled: bool = True) -> Iterator[Callable[[str, int], None] | None]:
    """Show how far a transfer is, if it is long and somebody is watching.

    Args:
        size: Bytes of the model's tensors that will be filled.
        enabled: Whether to show anything.

    Yields:
        What to call with ``("verify" | "copy", bytes)``; ``None`` where nothing is shown.
    """
    if not enabled or size < _LONG or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TimeRemainingColumn(), TextColumn(""))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("copying weights", total=size)

        def advance(stage: str, count: int) -> None:
            if stage == "copy":
                bars.advance(task, count)

        yield advance
