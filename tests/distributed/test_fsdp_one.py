"""FSDPStrategy and DeepSpeed: the transfer comes before the wrapping, and is refused where it cannot."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from lit_wsl.errors import TransferError
from lit_wsl.transfer.ranks import refuse_wrapped

SCENARIOS = "scenarios_fsdp_one"
WORKING = ["built_in_init", "built_in_configure_model", "wrapped_by_a_policy"]
REFUSED = ["wrapped_in_configure_model", "made_on_meta"]


@pytest.mark.parametrize("name", WORKING)
def test_the_model_is_filled_when_it_is_wrapped(results, name):
    for rank in results[name]:
        assert rank.get("wrong") == [], rank
        assert rank["loaded"] > 0


@pytest.mark.parametrize("name", WORKING)
def test_the_wrapped_model_trains_as_one_process_would(results, name):
    for rank in results[name]:
        assert rank["names"] is True
        assert rank["difference"] < 1e-5 < rank["moved"] / 100, rank


def test_the_wrapping_is_real(results):
    assert results["built_in_init"][0]["wrapped"] == 1
    assert results["wrapped_by_a_policy"][0]["wrapped"] == results["wrapped_by_a_policy"][0]["flat"] == 3


@pytest.mark.parametrize("name", REFUSED)
def test_flattened_parameters_are_refused_on_all_ranks_with_the_remedy(results, name):
    zero, one = results[name]
    kind, message = zero["raised"]
    assert zero == one
    assert kind == "TransferError"
    assert "FullyShardedDataParallel" in message
    assert "on a real device" in message


@pytest.mark.parametrize("name", ["a_late_refusal", "a_late_refusal_by_parts"])
def test_a_refusal_after_the_wrapping_leaves_the_model_as_it_was(results, name):
    for rank in results[name]:
        assert "another kind" in rank["message"], rank
        assert "NOT as it was" not in rank["message"]
        assert rank["filled"] > 0
        assert rank["compared"] > 10
        assert rank["wrong"] == []
        assert rank["report"]
        assert not rank["remembers"]


def test_another_callbacks_failure_after_the_wrapping_leaves_no_report_and_says_that_the_model_is_not_as_it_was(
    results,
):
    for rank in results["a_callback_fails"]:
        assert rank["report"] is True, rank
        assert rank["said"] is True, rank


def test_partitioned_parameters_of_deepspeed_are_refused():
    net = nn.Linear(2, 2)
    net.weight.ds_id = 0
    with pytest.raises(TransferError, match=r"stage 3.* weight .*__init__"):
        refuse_wrapped(net)


def test_a_deepspeed_engine_that_is_set_up_is_refused():
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    with pytest.raises(TransferError, match="optimizer"):
        refuse_wrapped(nn.Linear(2, 2), types.SimpleNamespace(model=engine))


def test_what_others_wrap_is_let_through():
    net = nn.Linear(2, 2)
    refuse_wrapped(net)
    refuse_wrapped(net, types.SimpleNamespace(model=net))
    refuse_wrapped(torch.compile(net), types.SimpleNamespace(model=None))
