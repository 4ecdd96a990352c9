"""Callbacks, averages, lists of names and foreign objects: everything in a checkpoint beside weights and optimizers."""

import enum
import pathlib

import lightning.pytorch as pl
import numpy
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    StochasticWeightAveraging,
    WeightAveraging,
)
from resumed_runs import Case, New, Old, adamw, data, renamed, step_lr, trainer
from torch import nn
from torch.optim import lr_scheduler as lrs

from lit_wsl import WeightTransferCallback, transfer_weights
from lit_wsl.checkpoint.document import build_plain
from lit_wsl.checkpoint.reader import open_checkpoint
from lit_wsl.cli import main
from lit_wsl.convert.checkpoint import convert_checkpoint
from lit_wsl.convert.copies import drop_entries
from lit_wsl.errors import CheckpointError, CoverageError
from lit_wsl.plan import Permute, PlanEntry, Split, TransferPlan, Unmatched


class Average(pl.Callback):
    """An average of the state dict, kept in the callback's state, and what training ends with."""

    def __init__(self):
        self.kept = None

    def measure(self, module):
        return {name: value.detach().clone() for name, value in module.state_dict().items()}

    def on_train_batch_end(self, trainer, module, *_):
        now = self.measure(module)
        self.kept = now if self.kept is None else {n: 0.9 * self.kept[n] + 0.1 * value for n, value in now.items()}

    def state_dict(self):
        return {"inside": {"ema": self.kept, "decay": 0.9}}

    def load_state_dict(self, state):
        self.kept = state["inside"]["ema"]

    def on_train_end(self, trainer, module):
        module.load_state_dict(self.kept)


class AverageOnTop(Average):
    """In an entry of its own, under a prefix, with a counter beside it."""

    def state_dict(self):
        return {}

    def on_save_checkpoint(self, trainer, module, checkpoint):
        checkpoint["ema"] = {f"module.{n}": value for n, value in self.kept.items()} | {"count": torch.tensor(3)}

    def on_load_checkpoint(self, trainer, module, checkpoint):
        assert checkpoint["ema"].pop("count") == 3
        self.kept = {name.removeprefix("module."): value for name, value in checkpoint["ema"].items()}


class Listed(Average):
    """Tensors in the order of the parameters, as libraries of averages keep them."""

    def measure(self, module):
        return {number: parameter.detach().clone() for number, parameter in enumerate(module.parameters())}

    def state_dict(self):
        return {"shadow_params": list(self.kept.values()), "collected_params": None}

    def load_state_dict(self, state):
        self.kept = dict(enumerate(state["shadow_params"]))

    def on_train_end(self, trainer, module):
        with torch.no_grad():
            for number, parameter in enumerate(module.parameters()):
                parameter.copy_(self.kept[number])


class OfPart(Average):
    """The average of a submodule, under that module's own names."""

    def measure(self, module):
        return {name: value.detach().clone() for name, value in module.backbone.state_dict().items()}

    def on_train_end(self, trainer, module):
        module.backbone.load_state_dict(self.kept)


class Unfreezes(BackboneFinetuning):
    def __init__(self):
        super().__init__(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.5)


def trainable(module):
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2), None


def frozen_backbone(module):
    return [trainable(module)[0]], []


CALLBACKS = {
    "average": (lambda: [Average()], adamw(schedule=step_lr), (2, 4)),
    "average on top": (lambda: [AverageOnTop()], adamw(), (2, 4)),
    "listed": (lambda: [Listed()], adamw(), (2, 4)),
    "of a part": (lambda: [OfPart()], adamw(), (2, 4)),
    "WeightAveraging": (lambda: [WeightAveraging()], adamw(), (2, 4)),
    "finetuning": (lambda: [Unfreezes()], frozen_backbone, (2, 4)),
    "early stopping": (lambda: [EarlyStopping("loss", patience=9)], adamw(), (2, 3)),
    "swa": (
        lambda: [StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=2)],
        adamw(schedule=lambda o: lrs.LambdaLR(o, lambda e: 0.9**e)),
        (4, 6),
    ),
}


@pytest.mark.parametrize("kind", CALLBACKS)
def test_callbacks_go_on_wherever_they_are_listed(kind, tmp_path):
    callbacks, configure, epochs = CALLBACKS[kind]
    case = Case(tmp_path, configure, callbacks, epochs)
    for model, _ in (
        case.converted(configure, tell_optimizers=kind != "finetuning"),  # which makes groups when it is restored
        case.resumed(configure),
        case.resumed(configure, last=True),
    ):
        assert not case.differs(model)


def saved(tmp_path, **entries):
    """A file of an old model with more entries, and the plan to the new one."""
    torch.manual_seed(0)
    old = Old(adamw())
    content = {"state_dict": old.state_dict(), "pytorch-lightning_version": "2.6.0", "epoch": 1, **entries}
    torch.save(content, tmp_path / "old.ckpt")
    return old, transfer_weights(New(adamw()), tmp_path / "old.ckpt", min_coverage=1.0).plan


def test_names_of_parameters_are_given_the_new_ones(tmp_path):
    names = {"frozen": ["encoder.0.weight", "encoder.0.bias"], "rates": {"fc.weight": 0.1}, "watch": "model.fc.bias"}
    innocent = {"text": "fc", "list": ["weight", "bias"], "path": "a.b", "epoch": 3}
    _, plan = saved(tmp_path, callbacks={"Mine": names, "Other": innocent}, hyper_parameters={"skip": ["fc.bias"]})
    convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt", plan, target=New(adamw()))
    made = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert made["callbacks"]["Mine"] == {
        "frozen": ["trunk.stem.weight", "trunk.stem.bias"],
        "rates": {"classifier.weight": 0.1},
        "watch": "model.classifier.bias",
    }
    assert made["callbacks"]["Other"] == innocent
    assert made["hyper_parameters"] == {"skip": ["classifier.bias"]}


def test_a_name_that_splits_is_refused_unless_it_is_dropped(tmp_path):
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)
            self.out = nn.Linear(4, 4)

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
            self.proj = nn.Linear(4, 4)

    from conversion_models import make_plan

    old, new = Joined(), Parts()
    steps = [((f"out.{leaf}",), (f"proj.{leaf}",), ()) for leaf in ("weight", "bias")]
    parts = {leaf: tuple(f"{x}.{leaf}" for x in "qkv") for leaf in ("weight", "bias")}
    steps += [((f"qkv.{leaf}",), parts[leaf], (Split(0, (4, 4, 4)),)) for leaf in parts]
    plan = make_plan(old, new, steps)
    average = {name: value + 1 for name, value in old.state_dict().items()}
    content = {
        "state_dict": old.state_dict(),
        "callbacks": {"Mine": {"names": ["qkv.weight", "out.bias"]}, "Average": average},
        "hyper_parameters": {"names": ["qkv.weight"]},
    }
    torch.save(content, tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match=r"callbacks/Mine/names.*'qkv\.weight'.*drop=\['callbacks/Mine'\]"):
        convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt", plan, target=new)
    done = convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt", plan, target=new, drop=["callbacks/Mine"])
    made = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert list(made["callbacks"]) == ["Average"]
    q, k, v = (made["callbacks"]["Average"][f"{x}.weight"] for x in "qkv")
    assert torch.equal(torch.cat([q, k, v]), average["qkv.weight"])
    assert made["hyper_parameters"] == {"names": ["qkv.weight"]}  # nothing restores them: a note will do
    assert any("hyper_parameters/names" in note for note in done.notes)


def test_a_slip_in_drop_is_noticed(tmp_path):
    _, plan = saved(tmp_path, callbacks={"EMA": {}})
    with pytest.raises(CheckpointError, match=r"no entry 'callback/EMA' to drop.*callbacks/EMA"):
        convert_checkpoint(
            tmp_path / "old.ckpt", tmp_path / "new.ckpt", plan, target=New(adamw()), drop=["callback/EMA"]
        )
    tree = {"callbacks": {"EMA{'a': [1]}": 1, "Timer": 2}}
    assert drop_entries(tree, ["callbacks/EMA{'a': [1]}"])[0] == {"callbacks": {"Timer": 2}}


class Mode(enum.Enum):
    FAST = 1


class Remembers(pl.Callback):
    """A callback whose state holds what torch would not load."""

    def __init__(self, **state):
        self.state, self.loaded = state, None

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.loaded = state


def test_plain_values_of_foreign_classes_are_built(tmp_path):
    state = {"rate": numpy.float64(0.1), "counts": numpy.arange(6).reshape(2, 3).T, "root": pathlib.Path("a/b")}
    case = Case(tmp_path, adamw(lr=numpy.float64(1e-2)), lambda: [Remembers(**state)])
    callback = Remembers(**state)
    model, _ = case.resumed(adamw(), callbacks=[callback])
    assert not case.differs(model)
    assert callback.loaded["rate"] == 0.1
    assert type(callback.loaded["rate"]) is float
    assert callback.loaded["root"] == pathlib.Path("a/b")
    assert numpy.array_equal(callback.loaded["counts"], state["counts"])


def test_a_foreign_object_is_refused_only_where_it_is_needed(tmp_path):
    case = Case(tmp_path, adamw(), lambda: [Remembers(mode=Mode.FAST)])
    with pytest.raises(CheckpointError, match=r"callbacks/Remembers/mode.*Mode.*drop=\['callbacks/Remembers'\]"):
        case.resumed(adamw())
    for options in ({"drop": ["callbacks/Remembers"]}, {"callbacks": []}, {"drop": ["callbacks/*"], "last": True}):
        model, _ = case.resumed(adamw(), **options)
        assert not case.differs(model)


def test_an_object_whose_name_is_plain_and_whose_parts_are_not_stays_a_record(tmp_path):
    class Sneaky:
        def __reduce__(self):
            return pathlib.PurePosixPath, (Mode.FAST,)

    torch.save({"state_dict": {"a.b": torch.ones(1)}, "x": Sneaky(), "y": [pathlib.PurePosixPath("z")]}, tmp_path / "a")
    content = open_checkpoint(tmp_path / "a").content
    assert build_plain(content["x"]) is content["x"]
    assert build_plain(content["y"]) == [pathlib.PurePosixPath("z")]


def test_old_files_go_on(tmp_path):
    case = Case(tmp_path, adamw())
    content = torch.load(case.path, weights_only=True)
    _ = case.end
    torch.save({k: v for k, v in content.items() if k != "pytorch-lightning_version"}, case.path)
    model, _ = case.resumed(adamw())
    assert not case.differs(model)
    old = {k: content[k] for k in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step")}
    state = {"wait_count": 0, "stopped_epoch": 0, "best_score": torch.tensor(-9.0), "patience": 9}
    torch.save({**old, "pytorch-lightning_version": "1.4.0", "callbacks": {EarlyStopping: state}}, case.path)
    callback = EarlyStopping("loss", patience=9)
    case.resumed(adamw(), callbacks=[callback], epochs=2)
    assert callback.best_score == -9
    torch.save({k: old[k] for k in ("state_dict", "optimizer_states", "lr_schedulers")}, case.path)
    _, notes = case.resumed(adamw(), epochs=1)
    assert any("does not tell how far" in note for note in notes)


class Headed(New):
    """With a part that the old model does not have."""

    def __init__(self, configure):
        super().__init__(configure)
        self.scale = nn.Linear(3, 3)
        self.register_buffer("calls", torch.tensor(5.0))

    def forward(self, x):
        return super().forward(x) + 0 * self.scale(x[:, :3]).sum()


def test_both_ways_agree_on_tensors_without_a_source(tmp_path):
    case = Case(tmp_path, adamw())
    torch.manual_seed(7)
    converted_from, resumed_into = Headed(adamw()), Headed(adamw())
    resumed_into.load_state_dict(converted_from.state_dict())
    case.plan = transfer_weights(Headed(adamw()), case.path).plan
    done = convert_checkpoint(case.path, tmp_path / "new.ckpt", case.plan, target=converted_from)
    assert any("3 tensors of the new model have no source" in note for note in done.notes)

    converted = Headed(adamw())
    trainer(tmp_path, 4).fit(converted, data(), ckpt_path=tmp_path / "new.ckpt", weights_only=True)
    resumed, _ = case.resumed(None, model=resumed_into)
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in converted.state_dict().items())
    assert done.coverage.target.tensors == 6
    with pytest.raises(CoverageError, match=r"min_coverage=0\.99 asks for more"):
        plan = case.plan
        entries = tuple(entry for entry in plan.entries if "fc" not in entry.sources[0])
        convert_checkpoint(
            case.path,
            tmp_path / "less.ckpt",
            type(plan)(entries, plan.source, plan.target),
            target=converted_from,
            min_coverage=0.99,
        )
    assert not (tmp_path / "less.ckpt").exists()


class Boom(BaseException):
    """Something goes wrong."""


def raises(*_, **__):
    raise Boom


PLACES = {
    "an optimizer takes its states": lambda run: patched(run, "optimizer"),
    "a scheduler takes its state": lambda run: patched(run, "scheduler"),
    "another callback starts": lambda run: type("Late", (pl.Callback,), {"on_fit_start": raises})(),
    "another callback is restored": lambda run: type("Late", (pl.Callback,), {"on_load_checkpoint": raises})(),
}


def patched(run, what):
    """A callback that makes the loading of a state fail, after it was loaded."""

    class Breaks(pl.Callback):
        def on_fit_start(self, trainer, module):
            made = trainer.optimizers[0] if what == "optimizer" else trainer.lr_scheduler_configs[0].scheduler
            load = made.load_state_dict

            def broken(state):
                load(state)
                raise Boom

            made.load_state_dict = broken

    return Breaks()


@pytest.mark.parametrize("place", PLACES)
def test_until_the_last_step_the_way_back_is_open(place, tmp_path):
    case = Case(tmp_path, adamw(schedule=step_lr))
    model = New(adamw(schedule=step_lr))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(Boom):
        case.resumed(None, model=model, callbacks=[PLACES[place](case)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert case.transfer.report is None  # as before
    runner = case.runner
    for optimizer in runner.optimizers:
        assert not optimizer.state
        assert optimizer.param_groups[0]["lr"] == 1e-2
    for config in runner.lr_scheduler_configs:
        assert config.scheduler.last_epoch == 0
    connector = runner._checkpoint_connector
    assert not connector._loaded_checkpoint
    assert "restore_training_state" not in vars(connector)
    assert "setup_optimizers" not in vars(runner.strategy)


def test_hooks_of_the_module_see_the_checkpoint_and_may_change_it(tmp_path):
    class Hooked(New):
        def on_load_checkpoint(self, checkpoint):
            assert set(checkpoint["state_dict"]) == set(self.state_dict())
            checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = 0.5

    case = Case(tmp_path, adamw())
    case.resumed(None, model=Hooked(adamw()), epochs=2)
    assert case.runner.optimizers[0].param_groups[0]["lr"] == 0.5


def test_class_weights_of_a_loss_are_no_parameter(tmp_path):
    class Weighted(Old):
        """Its buffer stands beside a bias of the same shape, and the new model has none."""

        def __init__(self, configure):
            super().__init__(configure)
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(3))

    case = Case(tmp_path, adamw(), old=Weighted)
    model, notes = case.resumed(adamw())
    assert any("taking criterion.weight for buffers" in note for note in notes)
    end = case.make_control()
    trainer(tmp_path, 4).fit(end, data(), ckpt_path=case.path, weights_only=False)
    expected = {name: value for name, value in end.state_dict().items() if "criterion" not in name}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in renamed(expected).items())


def test_tensors_kept_by_name_are_not_given_to_weights_of_another_layout(tmp_path):
    from conversion_models import make_plan

    old, new = nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 4))
    plan = make_plan(old, new, [(("0.weight",), ("0.weight",), ()), (("0.bias",), ("0.bias",), ())])
    turned = [PlanEntry(e.sources, e.targets, (Permute((0, 1)),) if "w" in e.targets[0] else ()) for e in plan]
    content = {"state_dict": old.state_dict(), "mine": {"0.weight": {"importance": torch.ones(4, 3)}, "0.bias": {}}}
    torch.save(content, tmp_path / "old.ckpt")
    convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt", plan, target=new)
    with pytest.raises(CheckpointError, match=r"'mine' keeps tensors for '0\.weight'.*drop=\['mine'\]"):
        convert_checkpoint(
            tmp_path / "old.ckpt",
            tmp_path / "b.ckpt",
            TransferPlan(tuple(turned), plan.source, plan.target),
            target=new,
        )


def test_the_command_says_how_much_is_missing_and_leaves_entries_out(tmp_path, capsys):
    _, plan = saved(tmp_path, callbacks={"EMA": {"x": 1}, "Timer": {}})
    plan.save(tmp_path / "plan.json")
    line = [
        "convert",
        str(tmp_path / "old.ckpt"),
        "--plan",
        str(tmp_path / "plan.json"),
        "-o",
        str(tmp_path / "n.ckpt"),
    ]
    assert main([*line, "--drop", "callbacks/EMA"]) == 0
    assert list(torch.load(tmp_path / "n.ckpt", weights_only=True)["callbacks"]) == ["Timer"]
    assert "6 of 6 tensors, 100.0%" in capsys.readouterr().out
    little = TransferPlan(
        plan.entries[-1:],
        plan.source,
        plan.target,
        unmatched_target=[
            Unmatched(name, shape, "parameter", "")
            for e in plan.entries[:-1]
            for name, shape in zip(e.targets, e.target_shapes)
        ],
    )
    little.save(tmp_path / "plan.json")
    (tmp_path / "n.ckpt").unlink()
    assert main([*line, "--weights-only"]) == 1
    assert not (tmp_path / "n.ckpt").exists()
    assert "of the model's were filled (1 of 6)" in capsys.readouterr().err
    assert main([*line, "--weights-only", "--min-coverage", "0"]) == 0
    assert "1 of 6 tensors, 3.7% of 271 elements" in capsys.readouterr().out


def test_names_that_cannot_be_told_are_noted(tmp_path):
    entries = {"inside": ["0.weight", "2.bias"], "modules": ["encoder.0", "encoder.2"], "mixed": ["fc.bias", "x"]}
    flat = torch.zeros(8 * 12 + 12 + 12 * 10 + 10 + 10 * 3 + 3)
    _, plan = saved(tmp_path, callbacks={"Mine": entries, "Vector": {"all": flat}})
    done = convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt", plan, target=New(adamw()))
    assert torch.load(tmp_path / "new.ckpt", weights_only=True)["callbacks"]["Mine"] == entries
    for place in ("Mine/inside", "Mine/modules", "Mine/mixed", "Vector/all"):
        assert any(f"callbacks/{place}" in note for note in done.notes), place


def test_one_run_goes_on_with_one_training(tmp_path):
    case = Case(tmp_path, adamw())
    other = WeightTransferCallback(case.path, plan=case.plan, resume="all", again=True, verbose=False)
    with pytest.raises(CheckpointError, match="one training only"):
        case.resumed(adamw(), callbacks=[other])
