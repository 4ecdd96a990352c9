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
            assert pair["score"] == pytest.approx(parts, abs=1e-5)


def test_same_input_gives_the_same_bytes(example, tmp_path):
    source, target, plan = example
    written = [save_json(plan, tmp_path / n, source=source, target=target).read_bytes() for n in "ab"]
    assert written[0] == written[1]
