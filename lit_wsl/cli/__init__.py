"""The ``lit-wsl`` command: inspect, map, convert, rename, diff, rebasin and rebase from a terminal or a script.

Exit codes: 0 success, 1 a negative result (coverage below ``--min-coverage``, checkpoints that differ), 2 wrong usage
or unreadable input. Results go to the standard output; notes, progress and errors to the standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

DONE, NO, WRONG = 0, 1, 2

COMMANDS = {
    "inspect": "lit_wsl.cli.inspecting:inspect",
    "map": "lit_wsl.cli.mapping:map_",
    "convert": "lit_wsl.cli.mapping:convert",
    "rename": "lit_wsl.cli.mapping:rename",
    "diff": "lit_wsl.cli.inspecting:diff",
    "rebasin": "lit_wsl.cli.rebasing:rebasin",
    "rebase": "lit_wsl.cli.rebasing:rebase_",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    try:
        from lit_wsl.cli.parser import build_parser
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("jsonargparse", "yaml"):
            raise
        print(
            f"lit-wsl: the command line needs {error.name}, which is not installed. Install the 'cli' extra of "
            "lit_wsl, or: pip install 'jsonargparse[signatures]>=4.51'",
            file=sys.stderr,
        )
        return WRONG
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        options = build_parser(given).parse_args(given)
    except SystemExit as end:  # --help, --version, wrong usage
        return end.code if isinstance(end.code, int) else WRONG
    return _run(options)


def _check_outputs(command: str, settings: object) -> None:
    """Refuse to write a result over something else, such as a checkpoint that was named behind ``--json``."""
    kinds = {"json": ((".json",), ".json file (--json - prints it)"), "html": ((".html", ".htm"), ".html file")}
    if command == "map":
        kinds["plan"] = (".json", ".yaml", ".yml"), ".json or a .yaml file"
    for option, (suffixes, words) in kinds.items():
        file = getattr(settings, option, None)
        if file is None or file == "-" or file.lower().endswith(suffixes):
            continue
        if os.path.isfile(file) or not os.path.exists(file):  # and not /dev/stderr
            from lit_wsl.cli.models import UsageError

            raise UsageError(f"--{option} {file}: it is written to a {words}.")


def _run(options: object) -> int:
    """Run the chosen command; every error on purpose becomes a message."""
    from pkgutil import resolve_name

    from lit_wsl.errors import LitWslError, printable

    chosen: str = options.subcommand  # type: ignore[attr-defined]
    settings = getattr(options, chosen)
    try:
        _check_outputs(chosen, settings)
        code = resolve_name(COMMANDS[chosen])(settings)
        sys.stdout.flush()
        return int(code)
    except LitWslError as error:
        if settings.debug:
            raise
        print(printable(f"lit-wsl {chosen}: {error}"), file=sys.stderr)
        return WRONG
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        if settings.debug:
            raise
        print(f"lit-wsl {chosen}: interrupted; no file was left half-written", file=sys.stderr)
        return 130
    except Exception as error:
        if settings.debug:
            raise
        print(
            printable(f"lit-wsl {chosen}: unexpected {type(error).__name__}: {error} (--debug shows where)"),
            file=sys.stderr,
        )
        return WRONG


__all__ = ["COMMANDS", "DONE", "NO", "WRONG", "main"]
