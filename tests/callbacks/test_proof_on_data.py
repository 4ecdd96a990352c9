"""Proof on data in a Trainer: the run's own loss decides, and the run cannot tell."""

from __future__ import annotations

import copy
import itertools

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lit_wsl import WeightTransferCallback
from lit_wsl.callbacks.proof import Recorded, _logged_loss
from lit_wsl.callbacks.sample import NoSampleError


class Points(Dataset):
    """Three features, of which the class depends on the first two in unequal ways."""

    def __init__(self, count: int = 128) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 3, generator=generator)
        self.y = (torch.sin(2 * self.x[:, 0]) + self.x[:, 1] > 0).long()
        self.reads = 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.reads += 1
        return self.x[i] + 0.01 * torch.rand(3), self.y[i]


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(3, 12)
        self.gate, self.value = nn.Linear(12, 12), nn.Linear(12, 12)
        self.out = nn.Linear(12, 2)

    def forward(self, x):
        x = torch.tanh(self.inlet(x))
        return self.out(torch.sigmoid(self.gate(x)) * torch.relu(self.value(x)))


class New(nn.Module):
    """The same, with names that say nothing and the two branches in one."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Linear(12, 2)
        self.q = nn.Linear(12, 24)
        self.r = nn.Linear(3, 12)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        value, gate = self.q(torch.tanh(self.r(x))).chunk(2, -1)
        return self.p(self.drop(torch.sigmoid(gate) * torch.relu(value)))


class Lit(pl.LightningModule):
    def __init__(self, net: nn.Module, silent: bool = False) -> None:
        super().__init__()
        self.net, self.silent = net, silent
        self.steps = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.steps += 1
        self.log("train_loss", loss)
        self.logger.experiment.add_scalar("seen", 1.0)
        return None if self.silent else loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    net, data = Old(), Points()
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(net(data.x), data.y).backward()
        optimizer.step()
    return {f"net.{name}": value for name, value in net.state_dict().items()}


def truth(state):
    out = {"net.p": "net.out", "net.r": "net.inlet"}
    filled = {f"{new}.{s}": state[f"{old}.{s}"] for new, old in out.items() for s in ("weight", "bias")}
    parts = {s: torch.cat([state[f"net.value.{s}"], state[f"net.gate.{s}"]]) for s in ("weight", "bias")}
    return filled | {f"net.q.{s}": value for s, value in parts.items()}


def trainer(tmp_path, *callbacks, **options):
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        limit_train_batches=3,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=pl.loggers.CSVLogger(tmp_path),
        callbacks=list(callbacks),
        **options,
    )


def save(path, state, callbacks=None):
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.6", "callbacks": callbacks or {}}, path)
    return path


class Stepping(Lit):
    """No logger of its own in the step, so that it runs in a plain fit too."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return None if self.silent else loss


def model(cls=Stepping, **options):
    torch.manual_seed(1)
    return cls(New(), **options)


def holds(module, state):
    own = module.state_dict()
    return all(torch.equal(own[name], value) for name, value in truth(state).items())


@pytest.mark.parametrize("silent", [False, True])
def test_the_loss_decides_the_order_of_nameless_parts(tmp_path, trained, silent):
    new = model(silent=silent)
    callback = WeightTransferCallback(save(tmp_path / "old.ckpt", trained), verbose=False)
    data = DataLoader(Points(), 16)
    run = trainer(tmp_path, callback)
    run.validate(new, data, verbose=False)
    assert holds(new, trained)
    assert (callback.report.plan.proof, callback.report.plan.proof_by) == ("proven", "data")
    assert callback.report.plan.measured.transferred < 0.3 < callback.report.plan.measured.fresh


def test_without_proof_the_question_stays_open(tmp_path, trained):
    new = model()
    callback = WeightTransferCallback(save(tmp_path / "old.ckpt", trained), proof="off", min_coverage=0, verbose=False)
    trainer(tmp_path, callback).validate(new, DataLoader(Points(), 16), verbose=False)
    assert set(callback.report.ambiguous) == {"net.q.weight", "net.q.bias"}
    assert callback.report.plan.proof == "not tested"
    assert callback.report.plan.measured is None


def test_a_fit_with_proof_is_the_fit_with_the_same_weights_put_in_by_hand(tmp_path, trained):
    path = save(tmp_path / "old.ckpt", trained)

    def fit(by_hand):
        new = model()
        data = Points()
        callbacks = [] if by_hand else [WeightTransferCallback(path, verbose=False)]
        if by_hand:
            new.load_state_dict(truth(trained))
        torch.manual_seed(7)
        run = trainer(tmp_path / str(by_hand), *callbacks)
        run.fit(new, DataLoader(data, 16, shuffle=True))
        return new, run, data, torch.get_rng_state()

    (a, run_a, data_a, rng_a), (b, run_b, data_b, rng_b) = fit(False), fit(True)
    assert run_a.callbacks[0].report.plan.proof == "proven"
    for name, value in b.state_dict().items():
        assert torch.equal(a.state_dict()[name], value), name
    assert torch.equal(rng_a, rng_b)
    assert data_a.reads == data_b.reads
    assert run_a.logged_metrics == run_b.logged_metrics
    assert a.steps == b.steps == 0


class Passing(IterableDataset):
    """The points one by one, endlessly, from a generator that can't be wound back; without a length."""

    def __init__(self, points: Points) -> None:
        self.points = points
        self.rows = (points[i % len(points)] for i in itertools.count())

    def __iter__(self):
        return self.rows


class Batches:
    """A loader of somebody's own, all passes of which share one position."""

    def __init__(self, points: Points) -> None:
        self.batches = iter(DataLoader(Passing(points), 16))

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize("make", [lambda points: DataLoader(Passing(points), 16, num_workers=0), Batches])
def test_a_stream_is_proven_and_the_run_loses_none_of_it(tmp_path, trained, make):
    path = save(tmp_path / "old.ckpt", trained)

    def fit(by_hand):
        new, points = model(), Points()
        callback = WeightTransferCallback(path, verbose=False)
        if by_hand:
            new.load_state_dict(truth(trained))
        torch.manual_seed(7)
        run = trainer(tmp_path / str(by_hand), *([] if by_hand else [callback]))
        run.fit(new, make(points))
        return new, run, points, torch.get_rng_state(), callback

    a, b = fit(False), fit(True)
    assert (a[4].report.plan.proof, a[4].report.plan.proof_by) == ("proven", "data")
    for name, value in b[0].state_dict().items():
        assert torch.equal(a[0].state_dict()[name], value), name
    assert torch.equal(a[3], b[3])
    assert a[2].reads == b[2].reads
    assert a[1].logged_metrics == b[1].logged_metrics


def test_items_that_only_their_own_sampler_can_name_are_read_as_a_stream(tmp_path, trained):
    class Named(Points):
        def __getitem__(self, key):
            return super().__getitem__(int(key.removeprefix("item ")))

    points = Named()
    data = DataLoader(points, 16, sampler=[f"item {k}" for k in range(len(points))])
    callback = WeightTransferCallback(save(tmp_path / "old.ckpt", trained), verbose=False)
    new = model()
    trainer(tmp_path, callback).validate(new, data, verbose=False)
    assert holds(new, trained)
    assert callback.report.plan.proof == "proven"


def test_the_score_of_the_old_run_stands_beside_the_one_measured_now(tmp_path, trained):
    key = "ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min'}"
    score = {"monitor": "val_loss", "best_model_score": torch.tensor(0.125), "current_score": torch.tensor(0.25)}
    callback = WeightTransferCallback(save(tmp_path / "old.ckpt", trained, {key: score}), verbose=False)
    run = trainer(tmp_path, callback)
    run.validate(model(), DataLoader(Points(), 16), verbose=False)
    now = float(run.callback_metrics["val_loss"])
    assert f"val_loss 0.25 recorded by the old run, {now:.4g} measured now" in callback.report.notes


def test_what_cannot_be_tested_says_so_and_changes_nothing(tmp_path, trained):
    class Manual(Stepping):
        def __init__(self, net):
            super().__init__(net)
            self.automatic_optimization = False

    class Failing(Stepping):
        def training_step(self, batch, batch_idx):
            raise ValueError("not now")

        def validation_step(self, batch, batch_idx):
            raise ValueError("not now")

    path = save(tmp_path / "old.ckpt", trained)
    for cls, reason in ((Manual, "manual optimization"), (Failing, "not now")):
        new = model(cls)
        before = copy.deepcopy(new.state_dict())
        callback = WeightTransferCallback(path, min_coverage=0, verbose=False)
        run = trainer(tmp_path, callback)
        try:
            run.validate(new, DataLoader(Points(), 16), verbose=False)
        except ValueError:
            assert cls is Failing
        assert any("not tested on data" in note and reason in note for note in callback.report.notes)
        assert callback.report.plan.proof == "not tested"
        assert torch.equal(new.net.q.weight, before["net.q.weight"])


def test_an_untrained_checkpoint_is_no_judge(tmp_path):
    torch.manual_seed(5)
    state = {f"net.{name}": value for name, value in Old().state_dict().items()}
    new = model()
    before = new.net.q.weight.clone()
    callback = WeightTransferCallback(save(tmp_path / "old.ckpt", state), min_coverage=0, verbose=False)
    trainer(tmp_path, callback).validate(new, DataLoader(Points(), 16), verbose=False)
    assert callback.report.plan.proof == "not tested"
    assert torch.equal(new.net.q.weight, before)
    assert sum("not tested on data" in note for note in callback.report.notes) == 1


def test_a_checkpoint_that_knows_the_opposite_is_refuted_loudly(tmp_path, trained):
    class Flipped(Points):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x, 1 - y

    torch.manual_seed(3)
    callback = WeightTransferCallback(save(tmp_path / "old.ckpt", trained), min_coverage=0, verbose=False)
    new = Lit(Old())
    trainer(tmp_path, callback).validate(new, DataLoader(Flipped(), 16), verbose=False)
    assert callback.report.plan.proof == "refuted"
    assert callback.report.ambiguous
    assert any("REFUTED on data" in text for text in callback.report.warnings)


def test_what_the_checkpoint_monitors_is_the_loss_where_none_is_returned_or_called_so():
    logged = {"val_acc": torch.tensor(0.75), "epoch": 1}
    assert float(_logged_loss(logged, "validation_step", Recorded("val_acc", 0.8, "max"))) == -0.75
    assert float(_logged_loss(logged, "validation_step", Recorded("val_acc", 0.8, "min"))) == 0.75
    with pytest.raises(NoSampleError, match="returns no loss and logs none"):
        _logged_loss(logged, "validation_step", None)
