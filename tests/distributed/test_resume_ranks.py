"""Training goes on across a refactor in two processes as if nothing had happened."""

from __future__ import annotations

import pytest

SCENARIOS = "scenarios_resume"
ALL = ["ddp", "fsdp2_from_a_file", "fsdp2_from_a_folder", "one_process_from_a_folder", "fsdp1", "fsdp1_flat"]


@pytest.mark.parametrize("name", [*ALL, "fsdp2_optimizer_only"])
def test_the_weights_are_bit_for_bit_those_of_the_uninterrupted_run(results, name):
    for rank in results[name]:
        assert rank.get("wrong") == [], rank


def test_tensor_parallel_to_rounding(results):
    for rank in results["tensor_parallel"]:
        assert rank["difference"] < 1e-5 < rank["afresh"] / 100, rank


@pytest.mark.parametrize("name", [*ALL, "tensor_parallel"])
def test_all_is_as_far_as_it_would_have_been(results, name):
    for rank in results[name]:
        reached = rank["reached"]
        assert reached.pop("seen") == 7  # the datamodule was given its state
        rank["uninterrupted"].pop("seen")
        assert reached == rank["uninterrupted"]
        assert reached["as sharded as the weights"] is True


def test_optimizer_alone_counts_steps_and_epochs_from_zero(results):
    for rank in results["fsdp2_optimizer_only"]:
        reached, uninterrupted = rank["reached"], rank["uninterrupted"]
        assert reached["steps"] == uninterrupted["steps"] == [10]  # the optimizer's own
        assert reached["rates"] == uninterrupted["rates"]
        assert (reached["step"], reached["epoch"], reached["counted"]) == (6, 3, [6])
        assert reached["seen"] == 0


def test_both_kinds_of_sharded_checkpoint(results):
    assert results["fsdp2_from_a_folder"][0]["a folder"] is True
    assert results["fsdp2_optimizer_only"][0]["a folder"] is False


def test_flattened_parameters_are_told_apart(results):
    assert [results[name][0]["flat"] for name in ("fsdp1", "fsdp1_flat")] == [0, 3]
    assert results["fsdp1"][0]["compared"] == results["fsdp1_flat"][0]["compared"] == 37


def test_a_failing_rank_stops_all_with_the_same_error(results):
    zero, one = results["fails_on_rank_one"]
    assert zero["raised"] == one["raised"] == ["TransferError", "OSError: the disk went away (on rank 1 of 2)"]


def test_a_copy_of_the_weights_is_refused(results):
    for rank in results["a_copy_of_the_weights"]:
        kind, message = rank["raised"]
        assert kind == "CheckpointError"
        assert "'current_model_state' is a copy of the weights" in message
        assert "resume='optimizer'" in message
