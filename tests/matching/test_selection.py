"""Which parts of the two sides take part: ``only``, ``skip`` and ``source_prefix``."""

import pytest
import torch
from torch import nn

from lit_wsl import WeightMapper, transfer_weights
from lit_wsl.errors import MappingError


def net():
    return nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4)), "head": nn.Linear(4, 2)})


def twins():
    """Two copies of one network in one checkpoint."""
    return nn.ModuleDict({"student": net(), "teacher": net()})


def untouched(model, before, names):
    return all(torch.equal(model.state_dict()[n], before[n]) for n in names)


def test_only_and_skip_leave_the_rest_alone_and_say_so():
    old, new = net(), net()
    before = {n: t.clone() for n, t in new.state_dict().items()}
    report = transfer_weights(new, old.state_dict(), only=["encoder"], skip=["encoder.1.*"])
    assert set(report.loaded) == {"encoder.0.weight", "encoder.0.bias"}
    assert untouched(new, before, set(before) - set(report.loaded))
    assert report.missing == ()  # nobody asked for the rest: it is excluded
    assert {u.name for u in report.plan.unmatched_target} == set(before) - set(report.loaded)
    assert "excluded" in str(report)
    assert all("only= and skip=" in u.reason for u in report.plan.unmatched_target)


def test_what_is_left_alone_is_not_given_to_another():
    old, new = net(), nn.ModuleDict({"encoder": net()["encoder"], "head": nn.Linear(4, 2), "other": nn.Linear(4, 2)})
    before = {n: t.clone() for n, t in new.state_dict().items()}
    report = transfer_weights(new, old.state_dict(), skip=["head"])
    assert untouched(new, before, ["head.weight", "head.bias", "other.weight", "other.bias"])
    assert set(report.loaded) == {n for n in before if n.startswith("encoder")}


def test_a_prefix_chooses_between_copies():
    old, new = twins(), net()
    report = transfer_weights(new, old.state_dict(), source_prefix="teacher")
    assert not report.missing
    assert all(torch.equal(t, old["teacher"].state_dict()[n]) for n, t in new.state_dict().items())
    assert {u.name.split(".")[0] for u in report.plan.unmatched_source} == {"student"}


def test_the_mapper_takes_the_same_options():
    mapper = WeightMapper.from_state_dict(twins().state_dict(), net(), source_prefix="student", skip=["head"])
    found = mapper.suggest_mapping()
    assert {s.removeprefix("student.") for s in found} == set(found.values())
    assert not any("head" in target for target in found.values())


@pytest.mark.parametrize("options", [{"only": ["decoder.*"]}, {"skip": ["nose"]}, {"source_prefix": "pupil"}])
def test_what_matches_nothing_is_refused_by_name(options):
    with pytest.raises(MappingError, match=str(next(iter(options.values()))).strip("[]'").replace("*", ".")):
        transfer_weights(net(), twins().state_dict(), **options)
