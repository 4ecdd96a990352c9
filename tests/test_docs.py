"""Every code block of README and docs runs, in order, page by page, in an empty folder, and prints what the page shows.

How is said in ``docs/pages.py``, which also writes the outputs: ``python docs/pages.py``.
"""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from pages import PAGES, ROOT as PAGES_ROOT, run_page, shape  # noqa: E402, I001


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run_and_print_what_the_page_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (ROOT, ROOT / "docs", tmp_path):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT / "docs"), str(ROOT)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    modules = set(sys.modules)
    for block, output in run_page(page, tmp_path):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        assert shape(block.code) == shape(output), f"{where} shows another output: python docs/pages.py"
    for name in set(sys.modules) - modules:  # files of this page must not shadow those of the next
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_no_page_runs_anything_that_its_reader_does_not_see():
    assert ROOT.resolve() == PAGES_ROOT
    for page in PAGES:
        assert "<!-- setup" not in page.read_text(encoding="utf-8"), page


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "guides"], ids=lambda page: page.stem)
def test_guides_start_with_what_to_use_when(page):
    text = page.read_text(encoding="utf-8")
    assert "\n|---" in text.split("\n## ")[0].split("\n```")[0] or "lightning-cli" in page.stem


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


def test_the_reference_has_every_public_name():
    packages = [
        importlib.import_module(f"lit_wsl{name}") for name in ("", ".checkpoint", ".plan", ".rebasin", ".structure")
    ]
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    for name in listed:  # each is a module, or something in one
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name
    for package in packages:
        for name in package.__all__:
            value = getattr(package, name)
            home = getattr(value, "__module__", None)
            if isinstance(home, str) and home.startswith("lit_wsl"):
                assert home in listed or f"{home}.{name}" in listed, f"{home}.{name}"


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
