"""What a job needs of a model: whole checkpoints in its names and shapes, and a spec with its proof."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin import PermutationSpecBuilder
from lit_wsl.rebasin.job_model import find_spec, read_run


class Tied(nn.Module):
    def __init__(self, vocabulary: int = 9) -> None:
        super().__init__()
        self.emb, self.up = nn.Embedding(vocabulary, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, vocabulary, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("place", torch.arange(4))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.up(self.emb(tokens)).relu())


@pytest.mark.parametrize("gone", ["head.weight", "emb.weight", "place"])
def test_tied_names_are_completed_and_buffers_may_be_absent(gone):
    model = Tied()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != gone}
    found = read_run(model, state, "old.ckpt")
    assert set(found) == set(model.state_dict()) - ({gone} & {"place"})
    assert torch.equal(found["head.weight"], model.emb.weight)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_adapters_that_are_not_folded_in_are_refused(prefix):
    model = Tied()
    adapter = {"up.lora_A.default.weight": torch.ones(2, 6), "up.lora_B.default.weight": torch.ones(6, 2)}
    state = {f"{prefix}{name}": tensor for name, tensor in {**model.state_dict(), **adapter}.items()}
    with pytest.raises(RebasinError, match=r"tuned.ckpt holds 2 factors.*'.*up.lora_A.*\(2, 6\).*merge_and_unload"):
        read_run(model, state, "tuned.ckpt")


def test_absent_and_wrongly_shaped_are_two_messages():
    model = Tied()
    with pytest.raises(RebasinError, match=r"old.ckpt lacks 2 parameters.*'up.weight' of shape \(6, 6\)"):
        read_run(model, {n: t for n, t in model.state_dict().items() if not n.startswith("up")}, "old.ckpt")
    with pytest.raises(RebasinError, match=r"'emb.weight' has shape \(11, 6\), in the model \(9, 6\)"):
        read_run(model, Tied(11).state_dict(), "old.ckpt")
    assert "emb.weight" not in read_run(model, Tied(11).state_dict(), "base.ckpt", complete=False)


class Picky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) * scale[:, :2]


def test_the_reason_is_that_of_the_call_that_got_furthest():
    x = torch.randn(4, 3)
    calls = [((x,), {}), ((x, torch.ones(4)), {}), ((torch.ones(4, 5), torch.ones(4, 2)), {})]
    call, spec, reason, _ = find_spec(Picky(), calls, None)
    assert (call, spec) == (None, None)
    assert "too many indices" in reason
    found = find_spec(Picky(), [*calls, ((x, torch.ones(4, 2)), {})], None)
    assert found[1].proof is not None
    assert found[2] is None
    assert any("probability of at most" in remark for remark in found[3])


def test_a_given_spec_is_proven_too():
    model, x, scale = Picky(), torch.randn(4, 3), torch.ones(4, 2)
    builder = PermutationSpecBuilder(model).linear("a", "P", None).linear("b", None, "P")
    right = builder.build()
    _, spec, reason, remarks = find_spec(model, [((x,), {}), ((x, scale), {})], None, given=right)
    assert (spec, reason) == (right, None)
    assert spec.proof.risk < 1e-6
    wrong = PermutationSpecBuilder(model).linear("a", "P", "inputs").linear("b", None, "P").build()
    _, spec, reason, remarks = find_spec(model, [((x, scale), {})], None, given=wrong)
    assert set(spec.groups) == {"P"}
    assert any("break the function" in remark for remark in remarks)
    worst = PermutationSpecBuilder(model).linear("a", None, "inputs").build()
    assert "break the function" in find_spec(model, [((x, scale), {})], None, given=worst)[2]
    _, spec, _, remarks = find_spec(model, [], None, given=right)
    assert spec.proof is None
    assert any("not proven" in remark for remark in remarks)
