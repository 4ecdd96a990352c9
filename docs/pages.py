"""Run the code blocks of README and docs, page by page; ``python docs/pages.py`` also writes what they print.

- ``python`` blocks run in order, and what they ``assert`` holds; one with ``title="model.py"`` is written to that file.
- ``yaml`` and ``json`` blocks must parse; with a title they are written to that file too.
- ``bash`` blocks: ``lit-wsl`` and ``python`` lines run, and must end with exit code 0, or with the one that a comment
  ``# exit code 1`` behind them names; ``make`` lines must name a real target; ``pip`` and ``git`` lines must not name
  the package index, whose ``lit-wsl`` is another project.
- ``text`` blocks show something and are not run. After ``<!-- output -->`` such a block is what the block before it
  prints; after ``<!-- output: python FILE -->`` what that command prints.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
LANGUAGES = {"python", "bash", "yaml", "json", "text", "mermaid"}
WIDTH = "80"  # columns of what is printed into pages
_BLOCK = re.compile(
    r"(?:^<!-- output(?P<output>: [^\n]*?)? -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w+)(?P<title>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes:
        line: The line on which its code starts.
        language: The word behind the fence.
        title: The file that it is written to, if any.
        code: Its text.
        output: What it is the output of: ``"block"`` (the block before it), a command, or nothing.
        span: Where its text stands in the page.
    """

    line: int
    language: str
    title: str | None
    code: str
    output: str
    span: tuple[int, int]


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        title = re.search(r'title="([^"]+)"', match["title"])
        code = "".join(row[len(match["indent"]) :] for row in match["code"].splitlines(keepends=True))
        output = "" if not match[0].startswith("<!--") else (match["output"] or ": block")[2:]
        line = text[: match.start("code")].count("\n") + 1
        yield Block(line, match["language"], title and title[1], code, output, match.span("code"))


def run_page(page: Path, folder: Path) -> Iterator[tuple[Block, str]]:
    """Run a page's blocks in a folder, which is the current one; yields each output block with what it should say."""
    names: dict[str, object] = {"__name__": "docs"}
    printed = ""
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: blocks are one of {sorted(LANGUAGES)}, not {block.language}"
        if block.title:
            (folder / block.title).write_text(block.code)
        if block.language == "python" and block.title:
            compile(block.code, where, "exec")
        elif block.language == "python":
            with printing() as text:
                exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
            printed = text.getvalue()
        elif block.language == "bash":
            with printing() as text:
                run_shell(block.code, where)
            printed = text.getvalue()
        elif block.language == "yaml":
            yaml.safe_load(block.code)
        elif block.language == "json":
            json.loads(block.code)
        elif block.output == "block":
            yield block, tidy(printed)


@contextlib.contextmanager
def printing() -> Iterator[io.StringIO]:
    """What is printed inside, at the width of a page."""
    before, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), WIDTH
    try:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            yield text
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def shape(text: str) -> str:
    """Output without what differs between machines: numbers, and how long a rule is."""
    return re.sub(r"─+", "─", re.sub(r"\d[\d.,e+-]*", "0", re.sub(r" +", " ", text)))


def tidy(text: str) -> str:
    """Output as a page shows it: no trailing blanks, one newline at the end."""
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"


def run_shell(code: str, where: str) -> None:
    """Run or check the lines of a bash block."""
    for command in code.replace("\\\n", " ").splitlines():
        words = shlex.split(command, comments=True)
        if not words:
            continue
        if words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert {word for word in words[1:] if "=" not in word} <= set(targets), f"{where}: {command}"
        elif words[0] in ("pip", "git"):
            index = re.search(r"install (?:\S+ )*['\"]?lit[-_]wsl", command)
            assert not index, f"{where}: {command} installs another project"
        else:
            assert words[0] in ("lit-wsl", "python"), f"{where}: what is {words[0]}?"
            expected = re.search(r"#.*exit code (\d)", command)
            assert exit_code(words) == (int(expected[1]) if expected else 0), f"{where}: {command}"


def exit_code(words: list[str]) -> int:
    """Run a command in this process: starting torch and lightning anew for each would take most of the time."""
    before, sys.argv = sys.argv, words if words[0] == "lit-wsl" else words[1:]
    try:
        if words[0] == "lit-wsl":
            runpy.run_module("lit_wsl", run_name="__main__", alter_sys=False)
        elif words[1] == "-c":
            exec(words[2], {"__name__": "__main__"})
        else:
            runpy.run_path(words[1], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0


def main() -> None:
    """Run every page named, or all of them, and write what their blocks print into them."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "docs")])
    sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
    for page in [Path(name).resolve() for name in sys.argv[1:]] or PAGES:
        found = [(block, command_output(block.output)) for block in blocks(page) if block.output not in ("", "block")]
        if any(block.output == "block" for block in blocks(page)):
            found += _run_apart(page)
        text = page.read_text(encoding="utf-8")
        for block, output in sorted(found, key=lambda pair: pair[0].span, reverse=True):
            text = text[: block.span[0]] + output + text[block.span[1] :]
        if text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
            print(f"written: {page.relative_to(ROOT)}")


def _run_apart(page: Path) -> list[tuple[Block, str]]:
    """Run a page in an empty folder."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.path.insert(0, folder)
        try:
            return list(run_page(page, Path(folder)))
        finally:
            os.chdir(before)
            sys.path.remove(folder)


def command_output(command: str) -> str:
    """What a command prints, run at the top of the repository."""
    words = [sys.executable, *shlex.split(command)[1:]]
    env = {**os.environ, "COLUMNS": WIDTH}
    return tidy(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, env=env).stdout)


if __name__ == "__main__":
    main()
