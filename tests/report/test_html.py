"""The HTML report in a real headless browser: it loads, filters, expands, explains, and says nothing to the console."""

import json
import os
import re
import shutil
import time

import pytest

from lit_wsl.matching.options import MatchingOptions
from lit_wsl.plan.entries import PlanEntry, SideSummary
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.report.saving import save_html
from lit_wsl.report.scores import Material
from lit_wsl.structure.description import ModelDescription, ParameterInfo

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1500,900",
)


def test_page_is_one_file_without_links_and_names_cannot_leave_their_json(tmp_path):
    evil = "</script><img src=x onerror=alert(1)>.weight"
    info = ParameterInfo(evil, (2,))
    side = ModelDescription((info,), label="<b>&evil")
    plan = TransferPlan(
        (PlanEntry((evil,), (evil,), (), ((2,),), ((2,),)),), SideSummary.of(side), SideSummary.of(side)
    )
    page = save_html(plan, tmp_path / "r.html", source=side, target=side).read_text(encoding="utf-8")
    assert page.count("</script>") == 2  # the data's and the code's
    assert "<img" not in page
    assert "<title>&lt;b&gt;&amp;evil" in page
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S).group(1)
    rest = page.replace(embedded, "")
    assert not re.search(r"""(src|href)\s*=|https?://(?!www\.w3\.org/2000/svg)|@import|url\(""", rest)
    data = json.loads(embedded)
    assert data["source"]["names"] == [evil]


def test_same_input_gives_the_same_page(tmp_path, example):
    source, target, plan = example
    pages = [save_html(plan, tmp_path / n, source=source, target=target).read_bytes() for n in ("a", "b")]
    assert pages[0] == pages[1]


def test_material_from_the_plan_alone_counts_like_the_descriptions(example):
    source, target, plan = example
    with_sides = Material.gather(plan, source=source, target=target).coverage
    assert Material.gather(plan).coverage.source == with_sides.source
    assert Material.gather(plan).coverage.target == with_sides.target


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a reader does with the page."""

    def __init__(self, driver, path):
        self.driver = driver
        driver.get(path.as_uri())
        self.wait("return document.documentElement.dataset.ready === 'true' && !!document.querySelector('.row')")

    def js(self, code, *args):
        return self.driver.execute_script(code, *args)

    def wait(self, code, *args, seconds=120):
        end = time.monotonic() + seconds
        while not (value := self.js(code, *args)):
            assert time.monotonic() < end, f"never came true: {code} {args}"
            time.sleep(0.02)
        return value

    def rows(self, side):
        """Labels of the rows, once the page has drawn what it was told."""
        return self.driver.execute_async_script(
            "const [side, done] = arguments; requestAnimationFrame(() => requestAnimationFrame(() => "
            "done([...document.querySelectorAll(`#${side} .row .label`)].map(label => label.textContent))))",
            side,
        )

    def row(self, side, label):
        """The row of a label, looked up in one go once the page has drawn: rows that it draws anew are gone."""
        found = self.driver.execute_async_script(
            "const [side, label, done] = arguments; requestAnimationFrame(() => requestAnimationFrame(() => "
            "done([...document.querySelectorAll(`#${side} .row`)]"
            ".find(row => row.innerText.split('\\n').includes(label)))))",
            side,
            label,
        )
        assert found, f"no row {label} in {self.rows(side)}"
        return found

    def search(self, text):
        box = self.driver.find_element("id", "search")
        box.clear()
        box.send_keys(text)
        # The page filters 80 ms after the last key; timers of one page fire in their order, however slow the machine.
        self.driver.execute_async_script("setTimeout(arguments[0], 160)")

    def chip(self, name):
        self.driver.find_element("css selector", f"[data-chip={name}]").click()

    @property
    def details(self):
        return self.driver.find_element("id", "details").text

    def lines(self, kind="path"):
        return self.js("return document.querySelectorAll('#lines ' + arguments[0]).length", kind)


@pytest.fixture
def page(browser, tmp_path, example):
    source, target, plan = example
    save_html(plan, tmp_path / "r.html", source=source, target=target, warnings=["2 tensors hold <i>NaN</i>"])
    browser.get_log("browser")
    shown = Page(browser, tmp_path / "r.html")
    yield shown
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_layers_are_folded_and_lines_join_the_fused_tensors(page):
    assert "encoder.layer.{0..11}" in page.rows("source")
    assert "blocks.{0..11}" in page.rows("target")
    page.wait("return document.querySelectorAll('#lines path').length === 6")  # 3 into qkv, mlp, norm, embed
    assert page.lines("path.transformed") == 4
    assert "98.4%" in page.driver.find_element("id", "coverage").text
    assert "2 tensors hold <i>NaN</i>" in page.driver.find_element("id", "remarks").text


def test_click_shows_the_breakdown_and_marks_the_partners(page):
    page.row("target", "attn.qkv.weight").click()
    page.wait("return document.querySelectorAll('#source .row.partner').length === 3")
    page.driver.find_element("css selector", "#details .pairlist button").click()
    page.wait("return document.querySelectorAll('#details table.parts').length === 3")
    shown = page.details
    for word in ("0.83", "margin 0.20", "concat", "fused", "shape", "hierarchy", "token", "edit", "substring", "depth"):
        assert word in shown
    assert page.lines("path.chosen") == 3


def test_the_details_compare_with_the_runner_up_that_the_terminal_names(page, example):
    from lit_wsl.report.scores import candidates

    source, target, plan = example
    material = Material.gather(plan, source=source, target=target)
    entry = plan.by_target["blocks.3.norm.weight"]
    best = candidates(material, target["blocks.3.norm.weight"], "source", (8,), partners=entry.sources)[0]
    assert MatchingOptions.of(plan.options) == material.options
    page.driver.find_element("id", "fold").click()
    page.search("blocks.3.norm")
    page.wait("return document.getElementById('found').textContent === '1 match'")
    page.row("target", "norm.weight").click()
    page.wait("return document.querySelectorAll('#details .runner').length === 1")
    shown = page.driver.find_element("css selector", "#details .runner").text
    expected = f"Runner-up {best.total:.2f} {best.source} 8, goes to "
    assert shown.startswith(expected)
    assert re.fullmatch(r"blocks\.\d+\.norm\.weight", shown.removeprefix(expected))
    cells = page.js(
        "return [...document.querySelectorAll('#details tr')].map(r => r.cells[0].textContent + r.cells[5].textContent)"
    )
    assert cells[0] == "partrunner-up"
    for part, value in (("shape", best.shape), ("name", best.name), ("score", best.total), *best.name_parts.items()):
        assert f"{part}{value:.2f}" in cells
    page.driver.find_element("css selector", "#details .runner .name").click()  # hidden by the filter so far
    page.wait("return document.querySelectorAll('#source .row.selected').length === 1")
    assert page.js("return document.getElementById('search').value") == ""
    page.wait("return document.querySelectorAll('#details h3').length >= 2")
    assert best.source in page.details


def test_search_and_chips_filter_both_trees(page):
    page.search("qkv")
    page.wait("return document.getElementById('found').textContent === '12 matches'")
    page.wait("return ![...document.querySelectorAll('.row')].some(r => r.textContent.includes('embed'))")
    assert "query.weight" in page.rows("source")  # found by its partner's name
    page.search("nothing like this")
    page.wait("return document.getElementById('found').textContent === '0 matches'")
    assert page.rows("source") == []
    page.search(" ")
    page.chip("unmatched")
    page.wait("return document.getElementById('found').textContent === '3 matches'")
    assert any("old_head" in label for label in page.rows("source"))
    assert any("new_head" in label for label in page.rows("target"))
    page.chip("doubtful")
    page.wait("return document.getElementById('found').textContent === '13 matches'")


def test_ambiguous_tensors_show_candidates_and_reason(page):
    page.chip("ambiguous")
    page.wait("return document.getElementById('found').textContent === '2 matches'")
    page.row("target", "x").click()
    page.wait("return document.querySelectorAll('#lines path.candidate').length === 2")
    for word in ("both orders fit equally well", "twin.a", "twin.b", "0.61"):
        assert word in page.details


def test_chips_count_what_they_list(page):
    for search in ("", "layer.3"):
        page.search(search or " ")
        for name in ("doubtful", "transformed", "ambiguous", "unmatched"):
            page.chip(name)
            page.wait(
                "return document.getElementById('found').textContent.split(' ')[0] === "
                "document.querySelector(`[data-chip=${arguments[0]}]`).textContent.trim().split(' ').pop()",
                name,
            )


def test_search_takes_whole_parts_of_a_path(page):
    page.search("layer.1")
    page.wait("return document.getElementById('found').textContent === '3 matches'")  # qkv, mlp and norm of layer 1
    page.search("layer.1 qkv")
    page.wait("return document.getElementById('found').textContent === '1 match'")
    page.search("laye")  # no whole part of any name: any part of one
    page.wait("return document.getElementById('found').textContent === '36 matches'")


def test_both_partners_open_together(page):
    page.driver.find_element("id", "collapse").click()
    page.wait("return document.querySelectorAll('#target .row').length === 5")
    page.row("source", "encoder.layer.{0..11}").find_element("css selector", ".twist").click()
    page.wait("return document.querySelectorAll('#target .row').length > 5")
    assert "attn.qkv.weight" in page.rows("target")
    page.row("target", "blocks.{0..11}").find_element("css selector", ".twist").click()
    page.wait("return ![...document.querySelectorAll('#source .label')].some(l => l.textContent.startsWith('norm'))")


def test_parts_of_a_block_are_not_folded_as_layers(browser, tmp_path):
    rows = [(f"blocks.{i}.{leaf}.weight", (4, 4)) for i in range(3) for leaf in ("fc1", "fc2", "mlp.0", "mlp.2")]
    side = ModelDescription(tuple(ParameterInfo(n, s, index=i) for i, (n, s) in enumerate(rows)), label="net")
    plan = TransferPlan(
        tuple(PlanEntry((n,), (n,), (), (s,), (s,)) for n, s in rows), SideSummary.of(side), SideSummary.of(side)
    )
    page = Page(browser, save_html(plan, tmp_path / "net.html", source=side, target=side))
    assert page.rows("target") == ["net", "blocks.{0..2}", "fc1.weight", "fc2.weight", "mlp", "0.weight", "2.weight"]


def test_gaps_of_both_sides_are_listed_with_nearest_partners_and_remedies(browser, tmp_path):
    from torch import nn

    from lit_wsl import transfer_weights

    old, new = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)), nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7))
    transfer_weights(new, old).save_html(tmp_path / "head.html")
    shown = Page(browser, tmp_path / "head.html").details
    for line in ("2 target tensors found no source", "nearest: 1.weight 3x6", "2 source tensors found no target"):
        assert line in shown
    assert 'adapt=["partial_head"]' in shown


@pytest.mark.parametrize("width", [420, 500, 900, 1400])
def test_nothing_is_cut_off_at_any_width(browser, tmp_path, example, width):
    source, target, plan = example
    save_html(plan, tmp_path / "r.html", source=source, target=target)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    try:
        page = Page(browser, tmp_path / "r.html")
        assert page.js("return document.documentElement.scrollWidth <= window.innerWidth")
        heads = page.js("return [...document.querySelectorAll('.head')].map(h => h.scrollHeight <= h.clientHeight + 1)")
        assert all(heads)
        cut = page.js(
            "return [...document.querySelectorAll('#source .row .label')].filter(l => l.scrollWidth > l.clientWidth)"
            ".map(l => l.textContent)"
        )
        assert cut == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_opens_with_what_is_doubtful(page):
    shown = page.details
    for words in ("Look here first", "2 target tensors are ambiguous", "1 target tensor found no source"):
        assert words in shown
    assert page.driver.find_elements("css selector", "#details .pairlist wbr")  # names are broken behind their dots
    assert shown.index("pair.x") < shown.index("new_head.weight") < shown.index("0.55")
    buttons = page.driver.find_elements("css selector", "#details .pairlist button")
    next(button for button in buttons if "new_head" in button.text).click()
    page.wait("return document.getElementById('details').textContent.includes('no source of shape (3, 8) is free')")


def test_unfolding_and_the_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    page.driver.find_element("id", "fold").click()
    page.wait("return ![...document.querySelectorAll('.row')].some(r => r.textContent.includes('{0..11}'))")
    page.driver.find_element("id", "collapse").click()
    page.wait("return document.querySelectorAll('#target .row').length === 5")
    tree = page.driver.find_element("id", "target")
    tree.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    page.wait("return document.querySelectorAll('#target .row').length === 17")
    assert page.js("return document.querySelector('#target .row.active').getAttribute('aria-expanded')") == "true"
    tree.send_keys(Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ENTER)
    page.wait("return document.getElementById('details').textContent.includes('wte.weight')")


STILL = "* { transition: none !important; animation: none !important; }"


def test_light_and_dark_both_have_contrast(page):
    code = """
        const linear = (v) => (v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        const light = (c) => c.match(/[\\d.]+/g).slice(0, 3).map(v => linear(v / 255))
            .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
        const style = (s) => getComputedStyle(document.querySelector(s));
        const page = light(style('.scroll').backgroundColor);
        return ['.label', '.shape', '.matched', '.ambiguous', '.unmatched'].map(s => {
            const [y, x] = [light(style('.row ' + s).color), page].sort((p, q) => p - q);
            return (x + .05) / (y + .05);
        });
    """
    page.js("document.head.append(Object.assign(document.createElement('style'), {textContent: arguments[0]}))", STILL)
    for _ in range(2):
        assert min(page.js(code)) >= 4.5  # WCAG AA
        page.driver.find_element("id", "theme").click()


def test_a_plan_that_moves_nothing_still_makes_a_page(browser, tmp_path):
    sides = [
        ModelDescription((ParameterInfo("a.weight", (3,)),), label="old"),
        ModelDescription((ParameterInfo("b.weight", (4,)), ParameterInfo("b.count", (), kind="buffer")), label="new"),
    ]
    plan = TransferPlan((), SideSummary.of(sides[0]), SideSummary.of(sides[1]))
    page = Page(browser, save_html(plan, tmp_path / "none.html", source=sides[0], target=sides[1]))
    assert page.rows("source") == ["old", "a.weight"]
    assert "0.0%" in page.driver.find_element("id", "coverage").text
    page.row("source", "a.weight").click()
    page.wait("return document.getElementById('details').textContent.includes('unmatched')")
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def test_ten_thousand_tensors_stay_quick(browser, tmp_path, large):
    source, target, plan = large
    path = save_html(plan, tmp_path / "large.html", source=source, target=target)
    assert path.stat().st_size < 6_000_000
    page = Page(browser, path)
    page.driver.find_element("id", "fold").click()
    page.driver.find_element("id", "expand").click()
    page.wait("return document.getElementById('source').querySelector('.spacer').clientHeight > 240000")
    assert page.js("return document.querySelectorAll('.row').length") < 200  # only what is in view is drawn
    page.js("document.getElementById('source').scrollTop = 120000")
    page.wait("return parseInt(document.querySelector('#source .row').style.top) > 110000")
    page.search("layers.7.experts.90.up")
    page.wait("return document.getElementById('found').textContent === '1 match'")
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def test_the_callback_leaves_a_page_in_the_log_directory(tmp_path):
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel
    from lightning.pytorch.loggers import CSVLogger

    from lit_wsl import WeightTransferCallback

    torch.save(BoringModel().state_dict(), tmp_path / "old.ckpt")
    logger = CSVLogger(tmp_path, name="", version="run")
    callback = WeightTransferCallback(tmp_path / "old.ckpt", verbose=False)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    Trainer(logger=logger, max_epochs=0, callbacks=[callback], **quiet).fit(BoringModel())
    page = (tmp_path / "run" / "weight_transfer.html").read_text(encoding="utf-8")
    assert "old.ckpt → BoringModel" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S).group(1))
    assert data["target"]["types"] == ["Linear", "Linear"]
    assert data["coverage"]["target"]["share"] == 1.0


def test_names_that_look_like_markup_are_shown_as_text(browser, tmp_path):
    evil = ["<img src=x onerror=document.title='hacked'>.weight", "</script><script>document.title='hacked'</script>.w"]
    evil += ["a&amp;b.weight", "{{data}}.weight", "\u2028line.weight", "x\"'`${1}.weight"]
    infos = tuple(ParameterInfo(name, (2,), index=i) for i, name in enumerate(evil))
    side = ModelDescription(infos, label="<i>old</i>")
    entries = tuple(PlanEntry((n,), (n,), (), ((2,),), ((2,),), reason="<u>why</u>") for n in evil)
    plan = TransferPlan(entries, SideSummary.of(side), SideSummary.of(side), notes=("<b>note</b>",))
    page = Page(browser, save_html(plan, tmp_path / "evil.html", source=side, target=side))
    assert page.rows("source") == ["<i>old</i>", *evil]
    page.row("source", evil[0]).click()
    page.wait("return document.getElementById('details').textContent.includes('<u>why</u>')")
    assert page.js("return document.querySelectorAll('img, i:not([class]) *, u, b').length") == 0
    assert "hacked" not in browser.title
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
