"""The chart of a proof on data: one row for each decision, true to scale, and no markup from names."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from lit_wsl.plan.entries import Decided, Measured
from lit_wsl.report.saving import MOST, decision_chart, save_html

SVG = "{http://www.w3.org/2000/svg}"
TAKEN = Decided("order of qkv", "0, 1, 2", 1.0, "1, 0, 2", 3.0, 1e-6, taken=True)
OPEN = Decided("towers <b>", "a -> 'x' & y", 1.0, "b", 1.5, 0.4)


def circles(chart):
    return [(float(c.get("cx")), c.get("fill")) for c in ET.fromstring(chart).iter(f"{SVG}circle")]


def test_distances_are_those_of_the_losses_and_an_open_answer_is_not_shown_as_taken():
    chart = decision_chart(Measured(5.0, 1.0, decisions=(TAKEN, OPEN)))
    (rival, _), (answer, taken), (other, _), (same, left_open) = circles(chart)
    assert answer == same
    assert taken != left_open
    assert (rival - answer) == pytest.approx(4 * (other - same))
    texts = [t.text for t in ET.fromstring(chart).iter(f"{SVG}text")]
    assert {"towers <b>: a -> 'x' & y", "1 against 1.5, open", "fresh 5"} <= set(texts)


def test_a_rival_that_is_far_worse_than_the_fresh_model_stands_at_the_end():
    far = circles(decision_chart(Measured(2.0, 1.0, decisions=(replace(TAKEN, rival_loss=1e6), OPEN))))
    near = circles(decision_chart(Measured(2.0, 1.0, decisions=(replace(TAKEN, rival_loss=100.0), OPEN))))
    assert [x for x, _ in far] == [x for x, _ in near]


def test_what_is_no_number_and_what_is_too_much_is_left_out_and_said():
    nowhere = replace(TAKEN, rival_loss=float("inf"))
    assert len(circles(decision_chart(Measured(float("nan"), 1.0, decisions=(nowhere,))))) == 1
    assert decision_chart(Measured(5.0, 1.0)) == ""
    many = decision_chart(Measured(5.0, 1.0, decisions=(TAKEN,) * (MOST + 3)))
    assert len(circles(many)) == 2 * MOST
    assert "and 3 more" in many


def test_the_page_holds_the_chart_and_no_markup_of_names(tmp_path, example):
    source, target, plan = example
    proven = replace(plan, measured=Measured(5.0, 1.0, decisions=(TAKEN, OPEN)))
    page = save_html(proven, tmp_path / "r.html", source=source, target=target).read_text(encoding="utf-8")
    assert "<b>" not in page
    assert len(re.findall("<svg class=.chart.", page)) == 1
    assert "<svg class=" not in save_html(plan, tmp_path / "p.html", source=source, target=target).read_text("utf-8")
