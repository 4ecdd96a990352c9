import json

import jsonschema
import pytest

from lit_wsl.report.saving import SCHEMA, report_dict, save_json

SCHEMA_DATA = json.loads(SCHEMA.read_text())
jsonschema.Draft202012Validator.check_schema(SCHEMA_DATA)


def test_report_fits_the_schema_with_and_without_descriptions(example, tmp_path):
    source, target, plan = example
    for details in ({"source": source, "target": target}, {}, {"breakdowns": False, "notes": ["a note"]}):
        path = save_json(plan, tmp_path / "r.json", **details)
        jsonschema.validate(json.loads(path.read_text()), SCHEMA_DATA)


def test_schema_refuses_what_is_not_documented(example):
    data = report_dict(example[2])
    for change in ({"surprise": 1}, {"version": 2}, {"proof": "maybe"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**data, **change}, SCHEMA_DATA)


def test_counts_agree_with_the_lists(example):
    source, target, plan = example
    data = report_dict(plan, source=source, target=target)
    counts = data["counts"]
    assert counts["mappings"] == len(data["mappings"]) == sum(counts["operations"].values())
    assert counts["unmatched_source"] == len(data["unmatched"]["source"])
    assert counts["sources_used"] == len({s for m in data["mappings"] for s in m["sources"]})
    assert counts["targets_filled"] == len({t for m in data["mappings"] for t in m["targets"]})
    assert data["coverage"]["target"]["tensors"] == counts["targets_filled"]
    for mapping, entry in zip(data["mappings"], plan.entries):
        assert tuple(mapping["sources"]) == entry.sources
        assert mapping["operation"] == entry.badge
        for pair in mapping["pairs"]:
            parts = sum(pair["weights"][k] * pair[k] for k in ("shape", "name", "hierarchy"))
            assert pair["score"] == pytest.approx(0.8 * parts + 0.2 * pair["parents"], abs=1e-5)


def test_same_input_gives_the_same_bytes(example, tmp_path):
    source, target, plan = example
    written = [save_json(plan, tmp_path / n, source=source, target=target).read_bytes() for n in "ab"]
    assert written[0] == written[1]


def test_pairs_of_a_real_mapping_score_as_its_steps_do():
    from torch import nn

    from lit_wsl.mapper import WeightMapper

    old = nn.Sequential(*[nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)) for _ in range(3)])
    new = nn.ModuleList(
        nn.ModuleDict({"up": nn.Linear(4, 8), "norm": nn.LayerNorm(8), "down": nn.Linear(8, 4)}) for _ in range(3)
    )
    mapper = WeightMapper(old, nn.ModuleDict({"blocks": new}))
    result = mapper.suggest_mapping()
    assert result.coverage.target.share == 1.0
    for mapping in report_dict(result, source=mapper.source, target=mapper.target)["mappings"]:
        assert [pair["score"] for pair in mapping["pairs"]] == pytest.approx([mapping["score"]], abs=0.01)


def test_mapping_and_transfer_have_one_layout(tmp_path):
    from torch import nn

    from lit_wsl import transfer_weights
    from lit_wsl.mapper import WeightMapper

    old = nn.ModuleDict({"one": nn.Linear(4, 8), "norm": nn.BatchNorm1d(8), "out": nn.Linear(8, 3)})
    new = nn.ModuleDict({"first": nn.Linear(4, 8), "bn": nn.BatchNorm1d(8), "head": nn.Linear(8, 5)})
    for buffers in ("lenient", "exclude"):
        mapper = WeightMapper(old, new, buffer_matching_mode=buffers)
        mapping = json.loads(mapper.export_mapping_report(tmp_path / "r.json").read_text())
        transfer = json.loads(transfer_weights(new, old, buffers=buffers).to_json())
        for data in (mapping, transfer):
            jsonschema.validate(data, SCHEMA_DATA)
        assert (mapping["applied"], transfer["applied"]) == (False, True)
        same = ("format", "version", "counts", "coverage", "mappings", "ambiguous", "unmatched")
        assert {key: mapping[key] for key in same} == {key: transfer[key] for key in same}
        assert [item["name"] for item in mapping["unmatched"]["target"]] == ["head.weight", "head.bias"]


def test_a_replayed_plan_that_forgets_a_tensor_still_reports_it(tmp_path):
    from dataclasses import replace

    from torch import nn

    from lit_wsl import transfer_weights

    old, new = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 3))
    plan = transfer_weights(new, old.state_dict()).plan
    shorter = replace(plan, entries=tuple(e for e in plan.entries if e.targets != ("0.bias",)))
    data = json.loads(transfer_weights(new, old.state_dict(), plan=shorter).to_json())
    jsonschema.validate(data, SCHEMA_DATA)
    for side in ("source", "target"):
        row = {"name": "0.bias", "shape": [3], "kind": "parameter", "reason": "not in the plan"}
        assert data["unmatched"][side] == [{**row, "nearest": {"name": "0.bias", "shape": [3]}, "advice": ""}]


def test_pairs_name_the_runner_up_and_very_many_steps_are_not_explained(example, large):
    source, target, plan = example
    data = report_dict(plan, source=source, target=target)
    rival = next(m for m in data["mappings"] if m["targets"] == ["blocks.3.norm.weight"])["pairs"][0]["runner_up"]
    assert rival["source"] != "encoder.layer.3.norm.weight"
    assert rival["source"].endswith(".norm.weight")
    assert rival["score"] < 0.95
    fused = next(m for m in data["mappings"] if m["targets"] == ["blocks.3.attn.qkv.weight"])
    assert all(pair["runner_up"]["source"] not in fused["sources"] for pair in fused["pairs"])
    source, target, plan = large
    assert "pairs" not in report_dict(plan, source=source, target=target)["mappings"][0]
