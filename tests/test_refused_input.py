"""Bad input: a clear LitWslError that names the culprit, and a model that nobody touched."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lit_wsl import (
    LitWslError,
    RebasinCallback,
    TransferPlan,
    WeightMapper,
    WeightTransferCallback,
    load_checkpoint_as_dict,
    transfer_weights,
)
from lit_wsl.errors import CheckpointError, CoverageError, MappingError, PlanError, TransferError
from lit_wsl.rebasin import (
    PermutationSpec,
    PermutationSpecBuilder,
    apply_permutation_to_task_vectors,
    average,
    infer_permutation_spec,
    match_many,
    reestimate_batchnorm,
    task_arithmetic,
    task_vector,
    weight_matching,
)


class Module(L.LightningModule):
    def __init__(self, width=6):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return self(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def by_function(model, checkpoint, **options):
    return transfer_weights(model, checkpoint, **options)


def by_callback(model, checkpoint, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callback = WeightTransferCallback(checkpoint, verbose=False, **options)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[callback], **quiet)
    trainer.fit(model, DataLoader(torch.ones(2, 3, 4, 4)))
    return callback.report


@pytest.fixture(params=[by_function, by_callback], autouse=True)
def transfer(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return request.param


def everything(model):
    """All that must not change, comparable."""
    return (
        {n: (t.clone(), t.dtype) for n, t in model.state_dict().items()},
        [id(p) for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        [m.training for m in model.modules()],
        torch.get_rng_state().tolist(),
    )


def assert_untouched(model, before):
    after = everything(model)
    assert list(before[0]) == list(after[0])
    for name, (value, dtype) in before[0].items():
        assert torch.equal(value, after[0][name][0]), name
        assert dtype == after[0][name][1]
    assert before[1:] == after[1:]


def refuses(transfer, checkpoint, error, *words, model=None, **options):
    """The transfer raises ``error`` with these words in it, and leaves the model alone."""
    model = Module() if model is None else model
    before = everything(model)
    with pytest.raises(error) as caught:
        transfer(model, checkpoint, **options)
    assert isinstance(caught.value, LitWslError)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert_untouched(model, before)


def test_no_such_file(transfer, tmp_path):
    refuses(transfer, tmp_path / "none.ckpt", CheckpointError, "none.ckpt")


def test_a_directory(transfer, tmp_path):
    (tmp_path / "folder").mkdir()
    refuses(transfer, tmp_path / "folder", CheckpointError, "folder")


def test_an_empty_file(transfer, tmp_path):
    (tmp_path / "empty.ckpt").touch()
    refuses(transfer, tmp_path / "empty.ckpt", CheckpointError, "empty.ckpt")


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_zip(transfer, tmp_path, share):
    torch.save({"state_dict": Module().state_dict()}, tmp_path / "cut.ckpt")
    content = (tmp_path / "cut.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: int(len(content) * share)])
    refuses(transfer, tmp_path / "cut.ckpt", CheckpointError, "cut.ckpt")


def test_a_text_file(transfer, tmp_path):
    (tmp_path / "notes.ckpt").write_text("the checkpoint is on the other disk\n" * 20)
    refuses(transfer, tmp_path / "notes.ckpt", CheckpointError, "notes.ckpt")


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"epoch": 3, "lr": [0.1]}, [1, 2]])
def test_a_checkpoint_without_tensors(transfer, tmp_path, content):
    torch.save(content, tmp_path / "none.ckpt")
    refuses(transfer, tmp_path / "none.ckpt", LitWslError, "none.ckpt")


def test_nan_and_infinity_are_loaded_with_a_warning(transfer, tmp_path):
    old = Module()
    with torch.no_grad():
        old.head.weight[0, :2] = math.nan
        old.body[0].bias[1] = math.inf
    torch.save(old.state_dict(), tmp_path / "nan.pt")
    report = transfer(Module(), tmp_path / "nan.pt")
    assert len([w for w in report.warnings if "not finite" in w]) == 2
    assert any("head.weight" in w and "(2, 6)" in w and "2 of 12" in w for w in report.warnings)
    assert any("body.0.bias" in w for w in report.warnings)
    assert "head.weight" in str(report)


def test_shapes_that_fit_nowhere(transfer, tmp_path):
    torch.save({n: torch.ones(*t.shape, 7) for n, t in Module().state_dict().items()}, tmp_path / "odd.pt")
    refuses(transfer, tmp_path / "odd.pt", CoverageError, "odd.pt", "min_coverage")


def test_a_checkpoint_of_another_model(transfer, tmp_path):
    torch.save(nn.TransformerEncoderLayer(12, 2, 48).state_dict(), tmp_path / "other.pt")
    refuses(transfer, tmp_path / "other.pt", CoverageError, "other.pt", "another model", "(12, 48)")


def test_a_checkpoint_of_another_width(transfer, tmp_path):
    torch.save(Module(width=24).state_dict(), tmp_path / "wide.pt")
    refuses(transfer, tmp_path / "wide.pt", CoverageError, "another width", "body.0.weight", "(24, 3, 3, 3)")


def test_a_checkpoint_of_buffers_only(transfer, tmp_path):
    torch.save({"steps": torch.tensor(3), "bn.num_batches_tracked": torch.tensor(9)}, tmp_path / "b.pt")
    refuses(transfer, tmp_path / "b.pt", CoverageError, "no trainable weights")


def test_a_plan_for_another_model(transfer, tmp_path):
    transfer_weights(wide := Module(24), Module(24)).plan.save("plan.json")
    torch.save(Module().state_dict(), tmp_path / "old.pt")
    refuses(
        transfer, tmp_path / "old.pt", PlanError, "body.0.weight", "(6, 3, 3, 3)", "(24, 3, 3, 3)", plan="plan.json"
    )
    refuses(transfer, tmp_path / "old.pt", PlanError, "(24, 3, 3, 3)", plan=TransferPlan.load("plan.json"), model=wide)


def test_a_plan_that_names_what_is_not_there(transfer, tmp_path):
    class Renamed(Module):
        def __init__(self):
            super().__init__()
            self.heads = self.head
            del self.head

    plan = transfer_weights(Module(), Module()).plan
    torch.save(Module().state_dict(), tmp_path / "old.pt")
    refuses(
        transfer, tmp_path / "old.pt", PlanError, "'head.weight'", "did you mean 'heads", plan=plan, model=Renamed()
    )


def test_no_plan_file_and_a_broken_plan_file(transfer, tmp_path):
    torch.save(Module().state_dict(), tmp_path / "old.pt")
    refuses(transfer, tmp_path / "old.pt", LitWslError, "none.json", plan=tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=re.escape(f"none.json does not exist in {Path.cwd()}")):
        TransferPlan.load("none.json")
    (tmp_path / "broken.json").write_text('{"entries": [')
    refuses(transfer, tmp_path / "old.pt", PlanError, "broken.json", plan=tmp_path / "broken.json")


def test_a_target_on_the_meta_device(tmp_path):
    with torch.device("meta"):
        model = Module()
    with pytest.raises(TransferError, match=r"meta device.*to_empty"):
        transfer_weights(model, Module())
    assert all(p.is_meta for p in model.parameters())


def test_a_model_without_tensors(tmp_path):
    with pytest.raises(MappingError, match="Identity"):
        transfer_weights(nn.Identity(), Module())


def test_a_source_of_another_kind(tmp_path):
    with pytest.raises(MappingError, match="int"):
        transfer_weights(Module(), 3)
    with pytest.raises(MappingError, match=r"give the path of its file, or source\['state_dict'\]"):
        transfer_weights(Module(), {"epoch": 1, "state_dict": Module().state_dict(), "hyper_parameters": {"a": 1}})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: transfer_weights(m, m, loss=lambda m, b: m(b).sum()), "needs both: loss=.* and batches="),
        (lambda m: transfer_weights(m, m, batches=[1]), "needs both"),
        (lambda m: transfer_weights(m, m, loss="mse", batches=[1]), "needs both"),
        (lambda m: transfer_weights(m, m).parameters("model"), "model must be a model"),
        (lambda m: load_checkpoint_as_dict(""), "path is empty"),
        (lambda m: TransferPlan.load(""), "plan is empty. Give the path of a plan"),
        (lambda m: WeightTransferCallback(None), "checkpoint must be a path, but it is None"),
        (lambda m: WeightTransferCallback("a.ckpt", proof_batches="all"), "proof_batches must be at least 1"),
        (lambda m: RebasinCallback("", reference="a.ckpt"), "pretrained is empty"),
        (lambda m: infer_permutation_spec(m, torch.ones(2, 3, 4, 4)), r"For a single argument: example_args=\(x,\)"),
        (lambda m: infer_permutation_spec("a.ckpt", ()), "model must be a model"),
        (lambda m: transfer_weights(m, Module), r"it is the class Module. Make one first: Module\(\)"),
        (lambda m: transfer_weights(m, {1: torch.ones(2)}), "source must map names to tensors, but it has the key 1"),
        (lambda m: transfer_weights(m, m, plan=WeightMapper(m, m).suggest_mapping()), "plan=result.plan"),
        (lambda m: WeightMapper(m, m).visualize_score_breakdown("head"), "It is a module; its tensors are head.weight"),
        (lambda m: WeightMapper(m, m).visualize_score_breakdown(0), "neither model has a tensor named 0"),
        (lambda m: WeightMapper(m, m).visualize_mapping(by="module"), "by must be one of 'group', 'tensor'"),
        (lambda m: WeightMapper(m, m).visualize_mapping(max_matches="all"), "max_matches must be a whole number"),
        (lambda m: weight_matching(m.state_dict(), m.state_dict(), {}), "spec must be a PermutationSpec, but it is a"),
        (lambda m: weight_matching(PermutationSpec({}, {}), m, m), r"reference must map .* model.state_dict\(\)"),
        (lambda m: task_vector(m, m.state_dict()), "finetuned must map names to tensors, but it is of the type Module"),
        (lambda m: task_vector(m.state_dict(), "a.ckpt"), r"the path 'a.ckpt'. .* load_checkpoint_as_dict\(path\)"),
        (lambda m: transfer_weights(m, m, source_prefix=3), "source_prefix must be a name, got 3"),
        (lambda m: transfer_weights(m, m, batches=5, loss=len), "batches must be a DataLoader or a list of batches"),
        (lambda m: transfer_weights(m, m, batches=torch.ones(2, 3), loss=len), r"a tensor .* batches=\[x\]"),
        (lambda m: reestimate_batchnorm(m, torch.ones(2, 3, 9, 9)), r"For a single batch: batches=\[x\]"),
        (lambda m: WeightMapper(m, m, buffer_mode="strict"), "buffer_mode"),
        (lambda m: WeightMapper.from_state_dict(m.state_dict(), m, skp=["a"]), "Did you mean 'skip'"),
        (
            lambda m: WeightMapper.from_state_dict({"epoch": 1, "state_dict": m.state_dict()}, m),
            r"whole checkpoint, .* source_state_dict\['state_dict'\]",
        ),
        (lambda m: WeightMapper(m, m).visualize_mapping("all"), "result must be what suggest_mapping returned"),
        (lambda m: WeightMapper(m, m).print_analysis(top_n="all"), "top_n must be a whole number"),
        (lambda m: match_many(PermutationSpec({}, {}), m.state_dict()), "state_dicts must be a list"),
        (lambda m: PermutationSpecBuilder("resnet18"), "source must map names to tensors, but it is the path"),
        (lambda m: average(m.state_dict()), "state_dicts must be a list of state dicts, but it is a state dict"),
        (lambda m: task_arithmetic(m.state_dict(), m.state_dict()), "task_vectors must be a list"),
        (lambda m: apply_permutation_to_task_vectors(m.state_dict(), spec=PermutationSpec({}, {})), "must be a list"),
        (lambda m: apply_permutation_to_task_vectors([m.state_dict()]), "give spec, permutations and task_vectors"),
    ],
)
def test_a_wrong_argument_is_told_at_once(call, words):
    model = Module()
    before = everything(model)
    with pytest.raises(MappingError, match=words):
        call(model)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "option",
    [
        {"buffers": "some"},
        {"strategy": "bold"},
        {"threshold": -1},
        {"weights": {"colour": 1}},
        {"incompatible_pairs": [({"a"},)]},
        {"min_coverage": 1.5},
        {"adapt": ["stretch"]},
        {"threshold": "best_match"},
        {"weights": [0.5, 0.5]},
        {"plan": ""},
        {"plan": {"a": "b"}},
        {"source_module": "old"},
    ],
)
def test_a_wrong_option(option, transfer, tmp_path):
    torch.save(Module().state_dict(), tmp_path / "old.pt")
    refuses(transfer, tmp_path / "old.pt", MappingError, next(iter(option)), **option)


def test_a_source_module_that_is_not_the_checkpoints(transfer, tmp_path):
    torch.save(Module().state_dict(), tmp_path / "old.pt")
    other = nn.ModuleDict({"other": nn.Linear(2, 2)})
    refuses(transfer, tmp_path / "old.pt", MappingError, "source_module", "'other.weight'", source_module=other)
    refuses(transfer, tmp_path / "old.pt", MappingError, "source_module", "(9, 3, 3, 3)", source_module=Module(9))


def test_a_missing_spec_is_a_missing_file():
    with pytest.raises(FileNotFoundError, match=r"^spec.json does not exist in") as raised:
        PermutationSpec.from_json("spec.json")
    assert isinstance(raised.value, LitWslError)


def test_a_missing_file_of_the_home_folder_is_a_missing_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"^~/old.ckpt does not exist"):
        transfer_weights(Module(), "~/old.ckpt")


def test_a_floor_that_is_met_lets_a_partial_transfer_pass(transfer, tmp_path):
    old = copy.deepcopy(Module())
    torch.save({n: t for n, t in old.state_dict().items() if n.startswith("body")}, tmp_path / "part.pt")
    report = transfer(Module(), tmp_path / "part.pt", min_coverage=1.0)  # all of the checkpoint found its place
    assert report.missing == ("head.weight", "head.bias")
