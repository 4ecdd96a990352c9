"""RebasinCallback in real fits: what it logs, writes and never breaks."""

from __future__ import annotations

import json
import math
import operator

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_wsl.callbacks import RebasinCallback
from lit_wsl.errors import RebasinError
from lit_wsl.rebasin import apply_permutation, infer_permutation_spec, midpoint_gap


def network(norm: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 12),
        nn.ReLU(),
        nn.Linear(12, 3),
    )


class Net(pl.LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = network()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Headless(Net):
    """No forward of its own."""

    forward = pl.LightningModule.forward

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def data(seed: int = 0) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(48, 1, 4, 4, generator=generator)
    labels = torch.randint(0, 3, (48,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=16)


def trainer(tmp_path, *callbacks, logger=False, **kwargs):
    return pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=logger,
        callbacks=list(callbacks),
        default_root_dir=tmp_path / "root",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **kwargs,
    )


def save(path, state, prefix=""):
    torch.save({"state_dict": {prefix + k: v.clone() for k, v in state.items()}}, path)
    return path


@pytest.fixture
def runs(tmp_path):
    """A pretrained model, and another run's fine-tuning of it."""
    model = Net(seed=0)
    base = save(tmp_path / "base.ckpt", model.state_dict())
    pl.seed_everything(1)
    trainer(tmp_path).fit(model, data(1))
    return base, save(tmp_path / "reference.ckpt", model.state_dict())


def read(tmp_path):
    return json.loads((tmp_path / "root" / "rebasin.json").read_text())


def test_fine_tunings_of_one_model_stay_in_place_and_the_fit_is_untouched(tmp_path, runs):
    base, reference = runs
    plain, watched = Net(), Net()
    pl.seed_everything(2)
    trainer(tmp_path).fit(plain, data(2))
    plain_state = torch.get_rng_state()
    pl.seed_everything(2)
    callback = RebasinCallback(base, reference, merge="average")
    trainer(tmp_path, callback).fit(watched, data(2))
    assert torch.equal(torch.get_rng_state(), plain_state)
    assert all(torch.equal(v, watched.state_dict()[k]) for k, v in plain.state_dict().items())
    report = read(tmp_path)
    assert report["perm_matching"] is True
    assert report["reason"] is None
    assert report["models"]["run"]["matching"]["weights"]["identity_share"] == 1.0
    after = report["models"]["run"]["after"]
    assert set(after["layers"]) >= {"net.0.weight", "net.6.bias"}
    assert after["overall"]["dot"] >= report["models"]["run"]["before"]["overall"]["dot"] - 1e-9
    assert -1 <= after["overall"]["cosine"] <= 1


def test_a_permuted_run_is_brought_back_and_merges_to_itself(tmp_path, runs):
    """The reference is this very run with its units in another order: aligned, both are the same model."""
    base, _ = runs
    pl.seed_everything(2)
    twin = Net()
    trainer(tmp_path).fit(twin, data(2))
    spec = infer_permutation_spec(twin, (torch.randn(2, 1, 4, 4),))
    shuffled = apply_permutation(spec, spec.random_permutations(3), twin.state_dict())
    reference = save(tmp_path / "shuffled.ckpt", shuffled)
    pl.seed_everything(2)
    model = Net()
    callback = RebasinCallback(base, reference, on="weights", merge="average", update_model="aligned")
    trainer(tmp_path, callback).fit(model, data(2))
    report = read(tmp_path)
    assert report["models"]["run"]["matching"]["weights"]["identity_share"] < 0.5
    assert report["models"]["run"]["before"]["overall"]["l2"] > 0.1
    assert report["models"]["run"]["after"]["overall"]["l2"] == pytest.approx(0, abs=1e-5)
    aligned = torch.load(tmp_path / "root" / report["files"]["aligned/run"], weights_only=True)
    for name, tensor in shuffled.items():
        torch.testing.assert_close(aligned["state_dict"][name], tensor)
        torch.testing.assert_close(model.state_dict()[name], tensor)  # told to
    x = torch.randn(5, 1, 4, 4)
    torch.testing.assert_close(model.eval()(x), twin.eval()(x), rtol=1e-4, atol=1e-5)


def test_merged_model_is_the_mean_with_statistics_estimated_anew(tmp_path, runs):
    base, reference = runs
    pl.seed_everything(2)
    model = Net()
    trainer(tmp_path, RebasinCallback(base, reference, merge="average")).fit(model, data(2))
    report = read(tmp_path)
    merged = torch.load(tmp_path / "root" / report["files"]["merged"], weights_only=True)["state_dict"]
    other = torch.load(reference, weights_only=True)["state_dict"]
    own = model.state_dict()
    for name in ("net.0.weight", "net.1.weight", "net.6.bias"):
        torch.testing.assert_close(merged[name], (own[name] + other[name]) / 2)
    inputs = torch.cat([x for x, _ in data(2)])
    seen = nn.functional.conv2d(inputs, merged["net.0.weight"], merged["net.0.bias"], padding=1)
    torch.testing.assert_close(merged["net.1.running_mean"], seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert any("3 training batches" in note for note in report["notes"])


def test_models_count_by_their_weights(tmp_path, runs):
    """The reference first, then this run."""
    base, reference = runs
    model = Net()
    callback = RebasinCallback(base, reference, merge="average", merge_weights=[1, 3])
    trainer(tmp_path, callback).fit(model, data(2))
    report = read(tmp_path)
    merged = torch.load(tmp_path / "root" / report["files"]["merged"], weights_only=True)["state_dict"]
    aligned = torch.load(tmp_path / "root" / report["files"]["aligned/run"], weights_only=True)["state_dict"]
    other = torch.load(reference, weights_only=True)["state_dict"]
    for name in ("net.0.weight", "net.6.bias"):
        torch.testing.assert_close(merged[name], (other[name] + 3 * aligned[name]) / 4)


def test_task_arithmetic_adds_task_vectors(tmp_path, runs):
    base, reference = runs
    model = Net()
    callback = RebasinCallback(base, reference, merge="task_arithmetic", merge_scale=1.0, update_model="merged")
    pl.seed_everything(2)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    run = Net()
    trainer(tmp_path).fit(run, data(2))
    pl.seed_everything(2)
    trainer(tmp_path, callback).fit(model, data(2))
    other = torch.load(reference, weights_only=True)["state_dict"]
    expected = other["net.4.weight"] + run.state_dict()["net.4.weight"] - start["net.4.weight"]
    torch.testing.assert_close(model.state_dict()["net.4.weight"], expected, rtol=1e-5, atol=1e-6)


def test_every_logger_gets_the_metrics(tmp_path, runs):
    base, reference = runs
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    trainer(tmp_path, RebasinCallback(base, reference, log_layers=True), logger=loggers).fit(Net(), data(2))
    text = (tmp_path / "csv" / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    columns = text[0].split(",")
    for column in ("rebasin/run/before/cosine", "rebasin/run/after/cosine", "rebasin/run/identity_share"):
        index = columns.index(column)
        values = [line.split(",")[index] for line in text[1:] if line.split(",")[index]]
        assert len(values) == 1
        assert math.isfinite(float(values[0]))
    assert any(c.startswith("rebasin/run/after/net.0.weight/") for c in columns)
    assert (tmp_path / "csv" / "lightning_logs" / "version_0" / "rebasin.json").exists()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(loggers[1].log_dir)
    events.Reload()
    assert "rebasin/run/after/cosine" in events.Tags()["scalars"]


def test_a_logger_that_fails_is_warned_about(tmp_path, runs):
    class Broken(CSVLogger):
        def log_metrics(self, metrics, step=None):
            if any(key.startswith("rebasin") for key in metrics):
                raise OSError("disk full")

    with pytest.warns(UserWarning, match="disk full"):
        trainer(tmp_path, RebasinCallback(*runs), logger=Broken(tmp_path / "csv")).fit(Net(), data(2))


def test_without_a_forward_of_its_own(tmp_path, runs):
    trainer(tmp_path, RebasinCallback(*runs)).fit(Headless(), data(2))
    report = read(tmp_path)
    assert report["perm_matching"] is True
    assert report["spec"]["coverage"] > 0.9


def test_averaged_weights_are_the_ones_used(tmp_path, runs):
    base, reference = runs
    model = Net()
    averaging = WeightAveraging(avg_fn=lambda averaged, now, n: averaged + 0.1 * (now - averaged))
    trainer(tmp_path, RebasinCallback(base, reference, on="weights"), averaging).fit(model, data(2))
    report = read(tmp_path)
    aligned = torch.load(tmp_path / "root" / report["files"]["aligned/run"], weights_only=True)["state_dict"]
    assert report["models"]["run"]["matching"]["weights"]["identity_share"] == 1.0
    assert all(torch.equal(aligned[k], v) for k, v in model.state_dict().items())


class Failing(Net):
    def forward(self, x):
        if not self.training:
            raise RuntimeError("this model runs in training only")
        return self.net(x)


def test_a_model_that_cannot_be_traced_is_compared_as_it_is(tmp_path, runs):
    with pytest.warns(UserWarning, match="not aligned"):
        trainer(tmp_path, RebasinCallback(*runs, merge="average")).fit(Failing(), data(2))
    report = read(tmp_path)
    assert report["perm_matching"] is False
    assert "training only" in report["reason"]
    assert report["models"]["run"]["after"] is None
    assert "cosine" in report["models"]["run"]["before"]["overall"]
    assert "merged" not in report["files"]


class Telling(Net):
    """Returns what goes on inside beside its answer, as language models do."""

    answer, beside = "logits", "hidden_states"

    def forward(self, x):
        hidden = self.net[:6](x)
        return {self.beside: hidden, self.answer: self.net[6:](hidden)}

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0])[self.answer], batch[1])


class Features(Telling):
    """Nothing says that the features may change."""

    beside = "features"

    def forward(self, x):
        first = self.net[:3](x)
        hidden = self.net[3:6](first)
        return {"first": first, self.beside: hidden, self.answer: self.net[6:](hidden)}


def only_logits(output):
    return output["logits"]


def test_hidden_states_beside_an_answer_may_be_permuted(tmp_path, runs):
    trainer(tmp_path, RebasinCallback(*runs)).fit(Telling(), data(2))
    report = read(tmp_path)
    assert report["perm_matching"] is True
    assert report["spec"]["coverage"] > 0.9
    assert any("hidden_states" in note for note in report["notes"])


def test_outputs_say_what_counts_and_without_them_nothing_is_aligned(tmp_path, runs, recwarn):
    base, reference = runs
    trainer(tmp_path, RebasinCallback(base, reference, merge="average")).fit(Features(), data(2))
    report = read(tmp_path)
    assert report["perm_matching"] is False
    assert "outputs=" in report["reason"]
    assert "merged" not in report["files"]
    assert len([w for w in recwarn if "not aligned" in str(w.message)]) == 1
    trainer(tmp_path, RebasinCallback(base, reference, outputs=only_logits)).fit(Features(), data(2))
    assert read(tmp_path)["perm_matching"] is True


@pytest.mark.parametrize("broken", ["missing", "other architecture", "garbage"])
def test_any_failure_is_reported_and_the_run_ends_normally(tmp_path, runs, broken):
    base, reference = runs
    if broken == "missing":
        reference = tmp_path / "nowhere.ckpt"
    elif broken == "garbage":
        reference = tmp_path / "garbage.ckpt"
        reference.write_bytes(b"\x00" * 100)
    else:
        reference = save(tmp_path / "other.ckpt", nn.Linear(2, 2).state_dict())
    callback = RebasinCallback(base, reference)
    runner = trainer(tmp_path, callback)
    with pytest.warns(UserWarning, match="Rebasin failed"):
        runner.fit(Net(), data(2))
    assert runner.state.finished
    report = read(tmp_path)
    assert report["perm_matching"] is False
    assert reference.name in report["reason"]
    assert callback.report is None


def test_checkpoints_with_another_prefix_and_a_new_head(tmp_path, runs):
    base, reference = runs
    state = torch.load(base, weights_only=True)["state_dict"]
    bare = {k.removeprefix("net."): v for k, v in state.items()}
    bare["6.weight"] = torch.randn(10, 12)  # the pretrained head had other classes
    torch.save(bare, tmp_path / "bare.pt")
    trainer(tmp_path, RebasinCallback(tmp_path / "bare.pt", reference)).fit(Net(), data(2))
    report = read(tmp_path)
    assert report["perm_matching"] is True
    assert "net.6.weight" not in report["models"]["run"]["before"]["layers"]
    assert any("net.6.weight (3, 12)" in note for note in report["notes"])


def test_others_are_aligned_too(tmp_path, runs):
    base, reference = runs
    spec = infer_permutation_spec(Net(), (torch.randn(2, 1, 4, 4),))
    state = torch.load(reference, weights_only=True)["state_dict"]
    other = save(tmp_path / "third.ckpt", apply_permutation(spec, spec.random_permutations(1), state))
    trainer(tmp_path, RebasinCallback(base, reference, [other], on="weights")).fit(Net(), data(2))
    report = read(tmp_path)
    assert sorted(report["models"]) == ["run", "third"]
    assert report["models"]["third"]["after"]["overall"]["l2"] == pytest.approx(0, abs=1e-5)


def test_fast_dev_run_writes_nothing(tmp_path, runs):
    trainer(tmp_path, RebasinCallback(*runs), fast_dev_run=True).fit(Net(), data(2))
    assert not list(tmp_path.rglob("rebasin.json"))


def test_options_are_checked_when_it_is_made():
    with pytest.raises(RebasinError, match="on='both'"):
        RebasinCallback("a", "b", on="both")
    with pytest.raises(RebasinError, match="merge='sum'"):
        RebasinCallback("a", "b", merge="sum")
    with pytest.raises(RebasinError, match="pretrained"):
        RebasinCallback(None, "b")
    with pytest.raises(RebasinError, match=r"outputs='nowhere\.at_all'"):
        RebasinCallback("a", "b", outputs="nowhere.at_all")
    with pytest.raises(RebasinError, match="update_model"):
        RebasinCallback("a", "b", update_model="merged")
    with pytest.raises(RebasinError, match="restarts=-1"):
        RebasinCallback("a", "b", restarts=-1)
    with pytest.raises(RebasinError, match="repair_batches=-3"):
        RebasinCallback("a", "b", repair_batches=-3)
    with pytest.raises(RebasinError, match=r"merge_weights.*merge='average'"):
        RebasinCallback("a", "b", merge_weights=[1, 2])


def test_from_yaml(tmp_path, runs):
    from lightning.pytorch.cli import LightningArgumentParser

    parser = LightningArgumentParser()
    parser.add_class_arguments(RebasinCallback, "rebasin")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"rebasin:\n  pretrained: {runs[0]}\n  reference: {runs[1]}\n  others: [a.ckpt, b.ckpt]\n"
        '  "on": weights\n  max_iter: 7\n  merge: average\n  outputs: operator.itemgetter\n'
    )
    made = parser.instantiate_classes(parser.parse_path(config))
    assert made.rebasin.outputs is operator.itemgetter
    assert made.rebasin.options.max_iter == 7
    assert [str(p) for p in made.rebasin.others] == ["a.ckpt", "b.ckpt"]


@pytest.mark.parametrize("line", ["", "  pretrained: null\n"])
def test_yaml_may_leave_the_pretrained_checkpoint_out(tmp_path, runs, line):
    from lightning.pytorch.cli import LightningArgumentParser

    parser = LightningArgumentParser()
    parser.add_class_arguments(RebasinCallback, "rebasin")
    config = tmp_path / "config.yaml"
    config.write_text(f'rebasin:\n{line}  reference: {runs[1]}\n  "on": weights\n')
    made = parser.instantiate_classes(parser.parse_path(config)).rebasin
    trainer(tmp_path, made).fit(Net(), data(2))
    assert made.report is not None
    assert made.report.to_dict()["perm_matching"] is True
    config.write_text(f'rebasin:\n{line}  "on": weights\n')
    with pytest.raises(RebasinError, match="reference"):
        parser.instantiate_classes(parser.parse_path(config))


def test_matching_on_data_merges_at_least_as_well(tmp_path):
    """Runs from different seeds: matched on data they leave the smaller gap, and the report says how it was found."""
    other = Net(seed=5)
    pl.seed_everything(7)
    trainer(tmp_path / "other").fit(other, data(1))
    reference = save(tmp_path / "other.ckpt", other.state_dict())
    gaps = {}
    for matching in ("weights", "best"):
        run = Net(seed=6)
        pl.seed_everything(2)
        callback = RebasinCallback(None, reference, on="weights", matching=matching, restarts=0)
        trainer(tmp_path, callback).fit(run, data(2))
        found = callback.report.models["run"]
        spec = callback.report.spec
        aligned = apply_permutation(spec, found.on_weights, run.state_dict())
        gaps[matching] = midpoint_gap(Net(), spec, other.state_dict(), aligned, list(data(2)))
        assert read(tmp_path)["models"]["run"]["matching"]["weights"]["start"] == found.on_weights.start
        kept = {n: t for n, t in run.state_dict().items() if "num_batches" not in n}
        assert all(torch.equal(found.state_dict[n], aligned[n]) for n in kept)
    assert gaps["best"] <= gaps["weights"]


def test_matching_on_data_without_data_is_done_on_weights_and_said(tmp_path, runs):
    base, reference = runs
    callback = RebasinCallback(base, reference, matching="best", repair_batches=0)
    with pytest.warns(UserWarning, match="matched on weights alone, not on data: there is no training batch"):
        trainer(tmp_path, callback).fit(Net(), data(2))
    assert read(tmp_path)["perm_matching"] is True
    assert any("matched on weights alone" in note for note in read(tmp_path)["notes"])
    with pytest.raises(RebasinError, match="matching='luck'"):
        RebasinCallback(base, reference, matching="luck")
