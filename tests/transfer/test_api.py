"""transfer_weights: outputs are equal after it, whatever the source is."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

import lit_wsl
from lit_wsl import TransferPlan, transfer_weights
from lit_wsl.checkpoint import save_safetensors
from lit_wsl.errors import CoverageError, LitWslError, PlanError
from lit_wsl.plan.operations import Operation
from lit_wsl.plan.plan import left_alone
from lit_wsl.structure import describe


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(width, 2 * width, 3), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x):
        return self.head(self.deep(self.stem(x)).mean((2, 3)))


def trained(seed=0):
    torch.manual_seed(seed)
    net = Net()
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.copy_(torch.rand(tensor.shape) if tensor.is_floating_point() else torch.tensor(7))
    return net.eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def sources(old, tmp_path):
    torch.save(old.state_dict(), tmp_path / "plain.pt")
    torch.save({"state_dict": old.state_dict(), "pytorch-lightning_version": "2.0.0"}, tmp_path / "lightning.ckpt")
    torch.save({"model": old.state_dict(), "epoch": 3}, tmp_path / "nested.pth")
    prefixed = {f"model.{n}": t for n, t in old.state_dict().items()}
    torch.save({"state_dict": prefixed}, tmp_path / "prefixed.ckpt")
    torch.save({f"module._orig_mod.{n}": t for n, t in old.state_dict().items()}, tmp_path / "compiled.pt")
    save_safetensors(old.state_dict(), tmp_path / "plain.safetensors")
    return {
        "plain": tmp_path / "plain.pt",
        "str": str(tmp_path / "plain.pt"),
        "lightning": tmp_path / "lightning.ckpt",
        "nested": tmp_path / "nested.pth",
        "prefixed": tmp_path / "prefixed.ckpt",
        "compiled": tmp_path / "compiled.pt",
        "safetensors": tmp_path / "plain.safetensors",
        "mapping": old.state_dict(),
        "module": old,
    }


@pytest.mark.parametrize(
    "kind",
    ["plain", "str", "lightning", "nested", "prefixed", "compiled", "safetensors", "mapping", "module"],
)
def test_outputs_are_equal_whatever_the_source(kind, tmp_path):
    old, new = trained(), Net().eval()
    report = transfer_weights(new, sources(old, tmp_path)[kind])
    assert torch.equal(old(X), new(X))
    assert report.missing == report.unused == report.ambiguous == ()
    assert report.coverage.target.share == report.coverage.source.share == 1.0
    assert set(report.loaded) == set(new.state_dict())


def test_a_wrapped_target_gets_a_bare_checkpoint():
    old = trained()
    new = nn.ModuleDict({"model": Net()}).eval()
    transfer_weights(new, old)
    assert torch.equal(old(X), new["model"](X))


def test_a_compiled_target_gets_the_weights_of_its_inner_model():
    old = trained()
    new = torch.compile(Net().eval())
    transfer_weights(new, old)
    assert torch.equal(old(X), new._orig_mod(X))


def test_a_sample_call_gives_the_order_and_leaves_no_trace():
    old, new = trained(), Net()
    modes = [m.training for m in new.modules()]
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    report = transfer_weights(new, old, example_args=(X,), min_coverage=1.0)
    assert not any("no execution order" in note for note in report.notes)
    assert report.plan.proof == "proven"  # the source is a module, so both could be run
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert [m.training for m in new.modules()] == modes
    assert new.stem[1].num_batches_tracked == 7
    assert torch.equal(old(X), new.eval()(X))


def test_a_sample_call_by_keyword():
    assert transfer_weights(Net(), trained().state_dict(), example_kwargs={"x": X}).notes == ()


def test_a_sample_call_that_fails_is_one_line_in_the_report():
    report = transfer_weights(Net(), trained().state_dict(), example_args=(torch.ones(3),))
    assert len(report.notes) == 1
    assert "the sample call failed" in report.notes[0]
    assert "\n" not in report.notes[0]
    assert report.coverage.target.share == 1.0


def test_excluded_buffers_stay_and_are_not_missing():
    old, new = trained(), Net()
    report = transfer_weights(new, old, buffers="exclude")
    assert new.stem[1].num_batches_tracked == 0
    assert not new.stem[1].running_mean.any()
    assert report.missing == report.unused == ()
    assert torch.equal(new.stem[1].weight, old.stem[1].weight)


def test_a_plan_is_replayed_from_an_object_and_a_file(tmp_path):
    old = trained()
    plan = transfer_weights(Net(), old).plan
    plan.save(tmp_path / "plan.json")
    for given in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json"), TransferPlan.load(tmp_path / "plan.json")):
        new = Net().eval()
        report = transfer_weights(new, old, plan=given)
        assert torch.equal(old(X), new(X))
        assert report.coverage.target.share == 1.0


def test_changed_values_are_noted():
    class Half(Operation):
        name, lossless = "half", False

        def shapes(self, inputs):
            return list(inputs)

        def apply(self, inputs, targets=()):
            return [t / 2 for t in inputs]

        def reverse(self):
            raise PlanError("no way back")

    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    plan = transfer_weights(nn.Linear(2, 2), old).plan
    entries = tuple(replace(e, operations=(Half(),)) if e.targets == ("weight",) else e for e in plan.entries)
    report = transfer_weights(new, old, plan=replace(plan, entries=entries))
    assert torch.equal(new.weight, old.weight / 2)
    assert [note for note in report.notes if "values were changed" in note] == [
        "values were changed, as asked for: weight --half--> weight"
    ]


def test_a_plan_without_an_entry_leaves_that_tensor_alone():
    old, new = trained(), Net()
    plan = transfer_weights(Net(), old).plan
    cut = replace(plan, entries=tuple(e for e in plan.entries if e.targets != ("head.weight",)))
    kept = new.head.weight.detach().clone()
    report = transfer_weights(new, old, plan=cut)
    assert report.missing == ("head.weight",)
    assert report.unused == ("head.weight",)
    assert torch.equal(new.head.weight, kept)
    assert torch.equal(new.head.bias, old.head.bias)


def test_the_source_module_tells_kinds_and_order_of_a_bare_checkpoint(tmp_path):
    old, new = trained(), Net().eval()
    torch.save({f"net.{n}": t for n, t in old.state_dict().items()}, tmp_path / "old.pt")
    report = transfer_weights(new, tmp_path / "old.pt", source_module=trained(1), example_args=(X,))
    assert torch.equal(old(X), new(X))  # the file's weights, not the module's
    assert report.coverage.source_buffers.of_tensors == 6


@pytest.mark.parametrize("levels", ["wrapped in the file", "wrapped in the module"])
def test_the_source_module_may_carry_or_lack_a_prefix(levels, tmp_path):
    old, new = trained(), Net().eval()
    state, module = old.state_dict(), trained(1)
    if levels == "wrapped in the file":
        state = {f"lit.net.{n}": t for n, t in state.items()}
    else:
        module = nn.ModuleDict({"lit": nn.ModuleDict({"net": module})})
    torch.save(state, tmp_path / "old.pt")
    transfer_weights(new, tmp_path / "old.pt", source_module=module, example_args=(X,))
    assert torch.equal(old(X), new(X))


def test_with_the_old_code_at_hand_a_swap_that_names_and_shapes_cannot_see_is_never_silent(tmp_path):
    """Two square layers under meaningless names, in another registration order: only running both tells."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    class Second(nn.Module):
        def __init__(self):
            super().__init__()
            self.u, self.w = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.u(torch.relu(self.w(x)))

    old, new, x = First(), Second(), torch.randn(3, 4)
    torch.save(old.state_dict(), tmp_path / "old.pt")
    try:
        report = transfer_weights(new, tmp_path / "old.pt", source_module=First(), example_args=(x,))
    except CoverageError:
        return
    if report.plan.proof == "proven":
        assert torch.equal(old(x), new(x))
    else:
        assert report.plan.proof == "refuted"
        assert any("refuted" in text for text in report.warnings)


def test_a_model_of_the_same_names_and_another_function_is_never_filled_silently():
    class Other(Net):
        def forward(self, x):
            return 2 * super().forward(x)

    report = transfer_weights(Other().eval(), trained(), example_args=(X,), min_coverage=0)
    assert report.plan.proof == "refuted"
    assert any("refuted" in text for text in report.warnings)


def test_ema_weights_can_be_asked_for(tmp_path):
    old, average = trained(0), trained(1)
    torch.save({"model": old.state_dict(), "model_ema": average.state_dict()}, tmp_path / "both.pth")
    for which, expected in (("model", old), ("ema", average)):
        new = Net().eval()
        transfer_weights(new, tmp_path / "both.pth", checkpoint_weights=which)
        assert torch.equal(new(X), expected(X))


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.mid = nn.Linear(6, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.mid(self.embed(x)))

    old, new = Tied(), Tied()
    transfer_weights(new, old)
    assert new.head.weight is new.embed.weight
    x = torch.arange(11)
    assert torch.equal(old(x), new(x))


def test_parametrized_modules_are_filled_through_their_originals():
    def build():
        return nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)),
            nn.utils.parametrizations.spectral_norm(nn.Linear(5, 6)),
        ).eval()

    old, new = build(), build()
    transfer_weights(new, old)
    x = torch.randn(3, 4)
    assert torch.equal(old(x), new(x))


def test_packed_integer_weights_are_left_alone():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.randint(0, 255, (16, 4), dtype=torch.uint8), requires_grad=False)
            self.norm, self.lin = nn.LayerNorm(9), nn.Linear(9, 9)

    old, new = Packed(), Packed()
    kept = new.codes.clone()
    report = transfer_weights(new, old)
    assert torch.equal(new.codes, kept)
    assert torch.equal(new.lin.weight, old.lin.weight)
    assert report.missing == ("codes",)
    assert any("left alone" in note and "codes" in note for note in report.notes)
    assert [left_alone(i) for i in describe(new).parameters] == [True, False, False, False, False]


def test_counters_that_somebody_halved_do_not_cost_the_transfer():
    old, new = trained(), Net().eval()
    halved = {name: tensor.half() for name, tensor in old.state_dict().items()}
    report = transfer_weights(new, halved)
    assert torch.equal(new.head.weight, old.head.weight.half().float())
    assert report.missing == ("stem.1.num_batches_tracked", "deep.1.num_batches_tracked")
    assert [u.name for u in report.plan.unmatched_target] == list(report.missing)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_stays_one(dtype):
    old, new = trained(), Net().to(dtype)
    report = transfer_weights(new, old)
    assert new.head.weight.dtype == dtype
    assert torch.equal(new.head.weight, old.head.weight.to(dtype))
    assert any("float32" in note and "cast" in note for note in report.notes)


def test_lazy_modules_are_materialised_by_the_sample_only_if_the_transfer_happens():
    old = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).eval()

    def lazy():
        return nn.Sequential(nn.LazyLinear(7), nn.LazyBatchNorm1d(), nn.LazyLinear(3))

    new, x = lazy(), torch.randn(4, 6)
    transfer_weights(new, old, example_args=(x,))
    assert new.training
    assert torch.equal(new.eval()(x), old(x))
    for source, kwargs in ((old, {}), (Net(), {"example_args": (x,)}), (old, {"example_args": (torch.tensor(1),)})):
        new = lazy()
        with pytest.raises(LitWslError):
            transfer_weights(new, source, **kwargs)
        assert all(nn.parameter.is_lazy(p) for p in new.parameters())


def test_the_floor_is_the_larger_share_of_the_two_sides():
    small = nn.ModuleDict({"stem": trained().stem})
    assert transfer_weights(Net(), small, min_coverage=1.0).coverage.source.share == 1.0
    with pytest.raises(CoverageError, match=r"min_coverage=0\.9"):
        transfer_weights(Net(width=12), trained(), min_coverage=0.9)
    new = Net(width=12)
    before = copy.deepcopy(new.state_dict())
    with pytest.raises(CoverageError):
        transfer_weights(new, trained(), min_coverage=0.9)
    assert all(torch.equal(before[n], t) for n, t in new.state_dict().items())


def test_gradients_and_flags_are_untouched():
    new = Net()
    new(X).sum().backward()
    new.head.requires_grad_(False)
    grads = [None if p.grad is None else p.grad.clone() for p in new.parameters()]
    flags = [p.requires_grad for p in new.parameters()]
    transfer_weights(new, trained(), example_args=(X,))
    assert [p.requires_grad for p in new.parameters()] == flags
    for p, g in zip(new.parameters(), grads, strict=True):
        assert torch.equal(p.grad, g)


def test_what_the_models_own_state_dict_leaves_out_is_named():
    class Adapted(Net):
        def state_dict(self, *args, **kwargs):
            whole = super().state_dict(*args, **kwargs)
            return {name: tensor for name, tensor in whole.items() if not name.startswith("stem")}

    new = Adapted()
    before = copy.deepcopy(new.stem)
    report = transfer_weights(new, trained(), min_coverage=0.0)
    (note,) = (note for note in report.notes if "state_dict()" in note)
    assert all(f"stem.{name}" in note for name, _ in before.named_parameters())
    assert "head" not in note
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), new.stem.parameters(), strict=True))
    assert not any("state_dict()" in note for note in transfer_weights(Net(), trained()).notes)


def test_the_public_names_are_there_and_lazily_so():
    for name in ("transfer_weights", "TransferPlan", "TransferReport", "WeightTransferCallback", "LitWslError"):
        assert name in dir(lit_wsl)
        assert getattr(lit_wsl, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = lit_wsl.nonsense
