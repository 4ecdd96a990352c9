"""FSDP2 and tensor parallelism in two real processes: the same checkpoint lands identically, part by part."""

from __future__ import annotations

import pytest

SCENARIOS = "scenarios_sharded"
FITS = ["fsdp2", "fsdp2_meta", "tensor_parallel", "tensor_parallel_meta"]
FAILING = [
    "missing_on_rank_one",
    "older_file_on_rank_one",
    "copy_fails_on_rank_one",
    "last_copy_fails_on_rank_one",
    "copy_fails_on_rank_one_tensor_parallel",
    "sharded_source",
]


@pytest.mark.parametrize("name", FITS)
def test_a_model_sharded_in_configure_model_gets_every_weight(results, name):
    for rank in results[name]:
        assert rank.get("wrong") == [], rank
        assert rank["sharded"] > 0
        assert rank["held"] < 0.8 * rank["total"]  # it was sharded when it was filled
        assert rank["loaded"] == results[name][0]["loaded"] > 0


@pytest.mark.parametrize("name", FITS)
def test_the_report_is_written_once(results, name):
    assert results[name][0]["reports"] == 1


@pytest.mark.parametrize("name", ["validate_alone", "matched_without_a_plan"])
def test_other_ways_in(results, name):
    for rank in results[name]:
        assert rank.get("wrong") == [], rank


def test_a_sharded_model_is_not_tested_on_data_and_says_why(results):
    for rank in results["matched_without_a_plan"]:
        assert [n for n in rank["notes"] if "on data" in n] == [
            "not tested on data: a model spread over several processes is not run by one of them"
        ]


def test_a_restored_checkpoint_wins(results):
    for rank in results["restored"]:
        assert rank.get("wrong") == [], rank
        assert rank["moved"] > 0  # training had moved on from the transferred weights
        assert rank["applied"] is False


def test_the_function_fills_a_sharded_model_which_then_computes_the_same(results):
    for rank in results["function_alone"]:
        assert rank.get("wrong") == [], rank
        assert rank["difference"] < 1e-5


def test_the_execution_order_of_a_sharded_model_is_that_of_a_copy_without_memory(results):
    for rank in results["execution_order"]:
        assert rank.get("right") == [True, True, False], rank
        assert not any("no execution order" in note for notes in rank["notes"][:2] for note in notes)
        assert any("the sample call failed" in note and "on the meta device" in note for note in rank["notes"][2])


@pytest.mark.parametrize("name", FAILING)
def test_a_failing_rank_stops_all_with_the_same_error_and_nothing_is_changed(results, name):
    zero, one = results[name]
    assert zero.get("kind", "").endswith("Error"), results[name]
    assert (zero["kind"], zero["message"]) == (one["kind"], one["message"])
    assert zero["unchanged"] is True
    assert one["unchanged"] is True


def test_what_could_not_be_remembered_is_admitted(results):
    zero, one = results["last_copy_fails_and_the_disk_is_full"]
    assert (zero["kind"], zero["message"]) == (one["kind"], one["message"])
    assert "the model is NOT as it was" in zero["message"]
    assert "unchanged" not in zero["message"]
    assert zero["unchanged"] is False


def test_ranks_never_mix_two_files(results):
    message = results["older_file_on_rank_one"][0]["message"]
    assert "rank 1 of 2 reads other values of inp.weight (12, 6)" in message


def test_a_sharded_source_is_refused_with_the_remedy(results):
    assert "full_state_dict=True" in results["sharded_source"][0]["message"]


def test_a_model_wrapped_by_fsdp_one_is_refused_with_the_remedy(results):
    for rank in results["wrapped_by_fsdp_one"]:
        assert "FullyShardedDataParallel" in rank["message"]
        assert "fully_shard" in rank["message"]
