"""Which outputs of a model count, by default and by name."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.job_model import MainOutputs, resolve_outputs

LOGITS, HIDDEN, BOXES = torch.ones(2, 3), torch.ones(2, 5, 4), torch.ones(2, 7, 4)


@dataclass
class Answer:
    loss: Tensor
    logits: Tensor
    encoder_last_hidden_state: Tensor
    attentions: tuple[Tensor, ...]


@pytest.mark.parametrize(
    ("output", "counting", "ignored"),
    [
        (LOGITS, [LOGITS], set()),
        ((LOGITS, HIDDEN), [LOGITS, HIDDEN], set()),  # without names nothing is known to be internal
        (
            Answer(torch.tensor(1.0), LOGITS, HIDDEN, (HIDDEN, HIDDEN)),
            [LOGITS],
            {"encoder_last_hidden_state", "attentions"},
        ),
        (OrderedDict(logits=LOGITS, pred_boxes=BOXES, hidden_states=(HIDDEN,)), [LOGITS, BOXES], {"hidden_states"}),
        ({"last_hidden_state": HIDDEN}, [HIDDEN], set()),  # a bare encoder answers with it
        (namedtuple("Pair", "logits hidden_states")(LOGITS, HIDDEN), [LOGITS], {"hidden_states"}),
        ({"tokens": torch.ones(2, dtype=torch.long), "logits": LOGITS}, [LOGITS], set()),
    ],
)
def test_answers_count_and_hidden_states_beside_them_do_not(output, counting, ignored):
    pick = MainOutputs()
    assert [t is wanted for t, wanted in zip(pick(output), counting, strict=True)] == [True] * len(counting)
    assert pick.ignored == ignored


def test_import_paths():
    assert resolve_outputs("operator:itemgetter") is resolve_outputs("operator.itemgetter")
    assert resolve_outputs(None) is None
    for wrong in ("operator.nothing", "no_such_module.f", "math.pi", "nodots", 3):
        with pytest.raises(RebasinError, match="outputs="):
            resolve_outputs(wrong)
