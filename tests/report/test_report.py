"""The report, the coverage behind it, and the diagnosis when there is too little."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch
from torch import nn

from lit_wsl import TransferReport, transfer_weights
from lit_wsl.callbacks.remarks import scalars
from lit_wsl.errors import CoverageError, MappingError
from lit_wsl.plan.coverage import check_floor, likely_cause, measure_coverage, valid_floor
from lit_wsl.plan.entries import Ambiguity, Candidate, PlanEntry, SideSummary, Unmatched
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.report.rows import gaps
from lit_wsl.report.saving import SCHEMA
from lit_wsl.structure import describe


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.model.head = nn.Linear(6, 2)
        self.model.scale = nn.Parameter(torch.ones(3))


def parts(entries=(), ambiguous=(), buffers="lenient", source=None):
    target = describe(Wrapped(), label="Wrapped")
    source = source or describe({"a": torch.ones(6, 4), "b": torch.ones(6), "c": torch.ones(5, 5)}, label="old.pt")
    plan = TransferPlan(
        tuple(entries),
        SideSummary.of(source),
        SideSummary.of(target),
        ambiguous=tuple(ambiguous),
        unmatched_source=(Unmatched("c", (5, 5), "parameter", "no target of this shape"),),
        unmatched_target=(Unmatched("model.head.weight", (2, 6), "parameter", "no source of this shape"),),
        options={"buffers": buffers},
        notes=("a note of the plan",),
    )
    return plan, source, target


ENTRY = PlanEntry(("a",), ("model.body.0.weight",), (), ((6, 4),), ((6, 4),), score=0.87654, margin=0.5, reason="fits")
UNSURE = Ambiguity(("model.body.1.weight", "model.body.1.bias"), (Candidate(("b",), 0.7),), (6,), "both fit")


def report(**kwargs):
    plan, source, target = parts([ENTRY], [UNSURE], **kwargs)
    coverage = measure_coverage(plan, source, target)
    return TransferReport.of(plan, coverage, source, target, warnings=("look here",), notes=("a note",))


def test_every_tensor_is_in_exactly_one_list():
    r = report()
    assert r.loaded == ("model.body.0.weight",)
    assert r.ambiguous == ("model.body.1.weight", "model.body.1.bias")
    assert sorted([*r.loaded, *r.missing, *r.ambiguous]) == sorted(Wrapped().state_dict())
    assert r.unused == ("b", "c")


def test_without_buffers_none_is_missing():
    assert not [n for n in report(buffers="exclude").missing if "running" in n or "num_batches" in n]
    assert [n for n in report().missing if "running" in n]


def test_coverage_is_counted_by_hand():
    c = report().coverage
    assert (c.target.tensors, c.target.of_tensors, c.target.elements) == (1, 7, 24)
    assert c.target.of_elements == 24 + 6 + 12 + 12 + 2 + 3
    assert (c.source.elements, c.source.of_elements) == (24, 24 + 6 + 25)
    assert c.floor_share == pytest.approx(24 / 55)
    assert (c.target_buffers.tensors, c.target_buffers.of_tensors) == (0, 3)


def test_rows_start_where_the_model_branches():
    rows = {row.module: row for row in report().coverage.modules}
    assert list(rows) == ["model", "model.body", "model.head"]
    assert (rows["model"].loaded.of_tensors, rows["model"].missing) == (1, 1)
    assert (rows["model.body"].loaded.tensors, rows["model.body"].ambiguous, rows["model.body"].missing) == (1, 2, 4)
    assert rows["model.body"].ambiguous_elements == 12
    assert rows["model.head"].missing_elements == 14
    assert sum(row.loaded.of_tensors for row in rows.values()) == len(Wrapped().state_dict())


def test_a_model_that_is_one_chain_still_has_a_row():
    chain = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(2, 2)})})
    d = describe(chain)
    plan = TransferPlan((), SideSummary.of(d), SideSummary.of(d))
    assert [(r.module, r.loaded.of_tensors) for r in measure_coverage(plan, d, d).modules] == [("a.b", 2)]
    d = describe(nn.Linear(2, 2))
    assert [r.module for r in measure_coverage(plan, d, d).modules] == ["(root)"]


def test_long_tables_fold_what_is_loaded_in_full_and_keep_the_gaps():
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(100)])
    d = describe(model)
    entries = [PlanEntry((i.name,), (i.name,)) for i in d.parameters if i.name not in ("57.bias", "93.bias")]
    plan = TransferPlan(tuple(entries), SideSummary.of(d), SideSummary.of(d))
    r = TransferReport.of(plan, measure_coverage(plan, d, d), d, d)
    lines = str(r).splitlines()
    table = [line.split()[0] for line in lines if line.endswith("%")]
    assert table == ["{0..56,58..92,94..99}", "{57,93}"]
    assert len(r.to_dict()["coverage"]["modules"]) == 100
    assert sum("module_coverage" in name for name in scalars(r)) == 2


def test_long_tables_leave_out_what_is_loaded_in_full():
    model = nn.ModuleDict({f"part_{chr(97 + i)}": nn.Linear(2, 2 + i) for i in range(26)})
    d = describe(model)
    entries = [PlanEntry((i.name,), (i.name,)) for i in d.parameters if i.name != "part_z.bias"]
    plan = TransferPlan(tuple(entries), SideSummary.of(d), SideSummary.of(d))
    lines = str(TransferReport.of(plan, measure_coverage(plan, d, d), d, d)).splitlines()
    table = [line.split()[0] for line in lines if line.endswith("%")]
    assert table == [*(f"part_{chr(97 + i)}" for i in range(19)), "part_z"]
    assert any("and 6 more modules, all loaded in full" in line for line in lines)


def test_json_holds_what_the_report_holds(tmp_path):
    r = report()
    text = r.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == text
    data = json.loads(text)
    jsonschema.validate(data, json.loads(SCHEMA.read_text()))
    assert data["models"]["source"]["label"] == "old.pt"
    assert data["models"]["target"]["label"] == "Wrapped"
    assert data["applied"] is True
    (step,) = data["mappings"]
    assert (step["targets"], step["sources"], step["operation"]) == (["model.body.0.weight"], ["a"], "exact")
    assert (step["score"], step["margin"], step["reason"]) == (0.87654, 0.5, "fits")
    assert [item["name"] for item in data["unmatched"]["target"]] == list(r.missing)
    assert [item["name"] for item in data["unmatched"]["source"]] == list(r.unused)
    reasons = {item["name"]: item["reason"] for side in ("source", "target") for item in data["unmatched"][side]}
    assert reasons["model.head.weight"] == "no source of this shape"
    assert reasons["c"] == "no target of this shape"
    assert data["counts"]["unmatched_target"] == len(r.missing)
    assert data["ambiguous"][0]["candidates"] == [{"sources": ["b"], "score": 0.7}]
    assert data["coverage"]["source"]["share"] == pytest.approx(24 / 55)
    assert data["warnings"] == ["look here"]
    assert data["notes"] == ["a note"]


def test_it_prints_itself_as_text():
    text = str(report())
    for part in (
        "old.pt -> Wrapped",
        "40.7% of 59 elements, 1 of 7 tensors",
        "43.6% of 55 elements, 1 of 3 tensors",
        "warning: look here",
        "missing (7):\n  model.scale",
        "\n  model.head.weight 2x6\n    why: no source of this shape",
        "ambiguous, not loaded (2):\n",
        "  model.body.1.weight 6, model.body.1.bias 6 <- one of b 0.70\n    why: both fit",
        "unused in the source (2):\n  b 6\n",
        "\n  c 5x5\n    why: no target of this shape",
        "note: a note",
    ):
        assert part in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert lines["model.body"] == ["model.body", "1", "of", "7", "4", "2", "24", "of", "55", "43.6%"]


def test_floor():
    plan, source, target = parts([ENTRY])
    coverage = measure_coverage(plan, source, target)
    check_floor(plan, coverage, source, target, 24 / 55)
    with pytest.raises(CoverageError, match=r"43\.6%.*33\.3%.*min_coverage=0\.5.*Nothing was changed"):
        check_floor(plan, coverage, source, target, 0.5)
    for wrong in (-0.1, 1.1, "a", None, True):
        with pytest.raises(MappingError, match="min_coverage"):
            valid_floor(wrong)


def test_buffers_count_unless_they_are_excluded():
    """Batch norms whose statistics found no place are missing, also where every parameter was filled."""
    source, target = describe(nn.Linear(2, 3), label="old.pt"), describe(nn.BatchNorm1d(3), label="Net")
    entry = PlanEntry(("bias",), ("weight",), (), ((3,),), ((3,),), score=1.0, margin=1.0, reason="")
    for buffers, share in (("lenient", 3 / (3 + 3 + 7)), ("exclude", 3 / 6)):
        plan = TransferPlan((entry,), SideSummary.of(source), SideSummary.of(target), options={"buffers": buffers})
        assert measure_coverage(plan, source, target).floor_share == pytest.approx(max(share, 3 / 9))


def cause(source, target, **options):
    a, b = describe(source, label="old.pt"), describe(target, label="Net")
    plan = TransferPlan((), SideSummary.of(a), SideSummary.of(b), options=options)
    return likely_cause(plan, a, b)


def test_the_most_likely_cause_is_named():
    def conv(width, depth=3):
        return nn.Sequential(*[nn.Conv2d(width, width, 3) for _ in range(depth)])

    def under(prefix, module):
        return {prefix + n: t for n, t in module.state_dict().items()}

    assert "another width" in cause(conv(8).state_dict(), conv(16))
    assert "2 times as wide" in cause(under("model.", conv(8)), conv(16))
    assert "under other names" in cause({f"x{i}": t for i, t in enumerate(conv(8).state_dict().values())}, conv(8))
    assert "strategy='conservative'" in cause(under("a.", conv(8)), conv(8), strategy="conservative")
    assert "incompatible_pairs" in cause(under("a.", conv(8)), conv(8), incompatible_pairs=[[["a"], ["b"]]])
    deeper = cause(under("blocks.", conv(8)), nn.ModuleDict({"layers": conv(8, depth=4)}))
    assert "has 3 blocks in blocks and the model has 4 in layers" in deeper
    assert '{"map": "blocks.{0..2}.weight -> layers.{0..2}.weight"}' in deeper
    assert "another model" in cause(nn.LSTM(7, 9).state_dict(), conv(8))
    assert "only a part" in cause({"lora.a": torch.ones(3, 5)}, conv(8))
    assert "no trainable weights" in cause({"n": torch.tensor(1)}, conv(8))
    plan, source, target = parts(ambiguous=[Ambiguity(tuple(Wrapped().state_dict()), ())])
    assert "ambiguous" in likely_cause(plan, source, target)


def test_the_bias_of_a_last_norm_is_no_head():
    """What copies rows is said beside a head of another size, and not beside a norm that happens to stand last."""
    old, new = (nn.Sequential(nn.Linear(5, 6), nn.Linear(6, n), nn.BatchNorm1d(m)) for n, m in ((3, 8), (7, 9)))
    report = transfer_weights(new, old.state_dict(), min_coverage=0.0)
    advice = {g.pattern: g.advice for g in gaps(report.plan, "target", describe(old.state_dict()), describe(new))}
    assert "partial_head" in advice["1.weight"]
    assert "partial_head" in advice["1.bias"]
    assert not advice["2.weight"]
    assert not advice["2.bias"]
