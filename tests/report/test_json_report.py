import json

import jsonschema
import pytest

from lit_wsl.report.json_report import SCHEMA, report_dict, save_json

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
