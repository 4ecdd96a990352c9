"""DDP in two real processes: one plan, identical weights, and one rank's failure stops all."""

from __future__ import annotations

import pytest

SCENARIOS = "scenarios_ddp"
BUILT = ["built_in_init", "built_in_setup", "built_in_configure_model"]
MATCHED = ["matched_without_a_plan", "lazy_modules"]
FAILING = [
    "missing_on_rank_one",
    "truncated_on_rank_one",
    "another_model_on_rank_one",
    "copy_fails_on_rank_one",
    "last_copy_fails_on_rank_one",
    "fails_everywhere",
]


@pytest.mark.parametrize("name", BUILT)
def test_every_rank_starts_from_the_same_transferred_weights(results, name):
    zero, one = results[name]
    assert zero["wrong"] == one["wrong"] == []
    assert zero["before"] == one["before"]
    assert zero["after"] == one["after"] != zero["start"]  # a step was made, and DDP kept the ranks together


@pytest.mark.parametrize("name", BUILT)
def test_the_plan_is_made_once_and_reported_once(results, name):
    zero, one = results[name]
    assert (zero["planned"], one["planned"]) == (1, 0)
    assert zero["loaded"] == one["loaded"] > 0
    assert zero["reports"] == 1


@pytest.mark.parametrize("name", MATCHED)
def test_the_match_of_rank_zero_serves_all(results, name):
    zero, one = results[name]
    assert zero.get("wrong") == [], zero
    assert zero == one
    assert zero["missing"] == []


def test_what_rank_zero_decides_on_data_holds_on_all(results):
    zero, one = results["decided_on_data"]
    assert zero.get("wrong") == [], zero
    assert zero == one
    assert zero["proof"] == ["proven", "data"]


def test_trainers_of_one_device_wait_for_nobody(results):
    assert results["one_trainer_each"] == [{"equal": True}, {"equal": True}]


def test_validate_alone(results):
    zero, one = results["validate_alone"]
    assert zero["wrong"] == []
    assert zero == one


def test_a_restored_checkpoint_wins_on_every_rank(results):
    for rank in results["restored"]:
        assert rank.get("wrong") == [], rank
        assert rank["applied"] is False
        assert any("takes precedence" in note for note in rank["notes"])


@pytest.mark.parametrize("name", FAILING)
def test_a_failing_rank_stops_all_with_the_same_error_and_nothing_is_changed(results, name):
    zero, one = results[name]
    assert zero["kind"] == one["kind"], results[name]
    assert zero["kind"].endswith("Error")
    assert zero["message"] == one["message"]
    assert zero["unchanged"] is True
    assert one["unchanged"] is True


@pytest.mark.parametrize("name", FAILING[:-1])
def test_the_error_names_the_rank(results, name):
    assert "rank 1 of 2" in results[name][0]["message"]


def test_an_error_of_all_ranks_names_none(results):
    assert "rank" not in results["fails_everywhere"][0]["message"]
    assert "nowhere.ckpt" in results["fails_everywhere"][0]["message"]
