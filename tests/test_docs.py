"""Every code block of README and docs runs, in order, page by page, in an empty folder.

- ``python`` blocks run, and what they ``assert`` holds; a block with ``title="model.py"`` is written to that file.
- ``yaml`` and ``json`` blocks must parse; with a title they are written to that file too.
- ``bash`` blocks: ``lit-wsl`` and ``python`` lines run, and must end with exit code 0, or with the one that a comment
  ``# exit code 1`` behind them names; ``make`` lines must name a real target; ``pip`` and ``git`` lines must not name
  the package index, whose ``lit-wsl`` is another project.
- ``<!-- setup ... -->`` comments hold python that readers need not see.
- ``text`` blocks show output and are not run.
"""

import importlib.util
import json
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|^(?P<indent> *)```(?P<language>\w+)(?P<title>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$",
    re.M | re.S,
)
LANGUAGES = {"python", "bash", "yaml", "json", "text", "mermaid"}


def blocks(page):
    """``(line, language, title, code)`` of every block of a page."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 2
        if match["setup"] is not None:
            yield line, "python", None, match["setup"]
            continue
        title = re.search(r'title="([^"]+)"', match["title"])
        code = "".join(row[len(match["indent"]) :] for row in match["code"].splitlines(keepends=True))
        yield line, match["language"], title and title[1], code


def run_shell(code, where, monkeypatch):
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
            assert exit_code(words, monkeypatch) == (int(expected[1]) if expected else 0), f"{where}: {command}"


def exit_code(words, monkeypatch):
    """Run a command in this process: starting torch and lightning anew for each would take most of the time."""
    monkeypatch.setattr(sys, "argv", words if words[0] == "lit-wsl" else words[1:])
    try:
        if words[0] == "lit-wsl":
            runpy.run_module("lit_wsl", run_name="__main__", alter_sys=False)
        else:
            runpy.run_path(words[1], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT / "docs"), str(ROOT)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shells = [code for _, language, _, code in blocks(page) if language == "bash"]
    if "lit-wsl " in "".join(shells) and importlib.util.find_spec("lit_wsl.__main__") is None:
        pytest.skip("the command is not there yet")
    modules = set(sys.modules)
    names = {"__name__": "docs"}
    for line, language, title, code in blocks(page):
        where = f"{page.relative_to(ROOT)}:{line}"
        assert language in LANGUAGES, f"{where}: blocks are one of {sorted(LANGUAGES)}, not {language}"
        if title:
            (tmp_path / title).write_text(code)
            if language == "python":
                compile(code, where, "exec")
                continue
        if language == "python":
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
        elif language == "bash":
            run_shell(code, where, monkeypatch)
        elif language == "yaml":
            yaml.safe_load(code)
        elif language == "json":
            json.loads(code)
    for name in set(sys.modules) - modules:  # files of this page must not shadow those of the next
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_project_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"https?:|mailto:", target):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load(re.sub(r"!!python\S+.*", "", (ROOT / "mkdocs.yml").read_text()))
    listed = set(re.findall(r"[\w/-]+\.md", json.dumps(config["nav"])))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


@pytest.mark.parametrize("figure", sorted((ROOT / "docs" / "figures").glob("*.py")), ids=lambda path: path.stem)
def test_figures_are_made_by_their_code(figure, tmp_path):
    spec = importlib.util.spec_from_file_location(f"figure_{figure.stem}", figure)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = tmp_path / figure.with_suffix(".svg").name
    module.draw(path)
    assert path.read_text().startswith("<?xml")
    assert figure.with_suffix(".svg").exists()


def test_measured_numbers_are_whatever_is_there(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import measured

    whole = measured.render()
    for name in ("Pairs with known truth", "Permutation symmetries"):
        assert f"### {name}" in whole
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    assert measured.render() == ""
    timing = {"wall": 2.0, "cpu": 1.5}
    row = {"trees": 4, "spec": timing, "sweep": timing, "pure": timing, "fine_tuned_pair": timing}
    (tmp_path / "rebasin_timing.json").write_text(
        json.dumps({"1 threads": {"net": {**row, "rebasin": {"error": "no"}}}})
    )
    (tmp_path / "rebasin_timing.txt").write_text("the same, printed\n")
    assert "| 1 | net | 4 | 1.50 (2.00) | 1.50 (2.00) | 1.50 (2.00) | 1.50 (2.00) | no |  |" in measured.render()
    assert "printed" not in measured.render()
    (tmp_path / "rebasin_timing.json").unlink()
    (tmp_path / "rebasin_timing.txt").unlink()
    (tmp_path / "rebasin_planted.txt").write_text("$ python -m benchmarks.rebasin_planted --seed 3\n\nall recovered\n")
    (tmp_path / "other.txt").write_text("one\ntwo\n")
    assert measured.render() == (
        "### Planted permutations, recovered\n\n```text\nall recovered\n```\n\n"
        "`python -m benchmarks.rebasin_planted --seed 3`\n\n"
        "### other\n\n```text\none\ntwo\n```\n\n`python -m benchmarks.other`\n\n"
    )
    barriers = {"unaligned": 2.0, "weights, REPAIR": 0.5, "activations, REPAIR": 0.4}
    rows = [{"net": "n", "seeds": [s, s + 1], **barriers, "best, REPAIR": best} for s, best in ((0, 0.1), (2, 0.3))]
    (tmp_path / "rebasin_digits.json").write_text(json.dumps({"bounds": {"n": 0.2}, "rows": rows}))
    table = measured.render()
    assert "| n | 0.2 | 2.0000 (2.0000) | 0.5000 (0.5000) | 0.4000 (0.4000) | 0.2000 (0.3000) | 1 of 2 |" in table
    assert "--seeds 0,1 2,3" in table


def test_the_readme_says_what_was_measured(monkeypatch):
    """The comparison page is written anew by ``make docs``."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import measured

    page = measured.README.read_text(encoding="utf-8")
    current = measured.filled(page, measured.summary())
    assert current == page, "README is older than benchmarks/results/gauntlet.json: python docs/measured.py"
