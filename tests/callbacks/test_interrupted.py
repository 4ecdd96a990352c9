"""Whatever is raised wherever a transfer or a resume has got to: the state before, or an error that tells."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
from lives import InInit, Old, data, same, weights
from resumed_runs import Case, New, adamw, step_lr

import lit_wsl
from lit_wsl import WeightTransferCallback
from lit_wsl.errors import TransferError

PACKAGE = Path(lit_wsl.__file__).parent
FLOORS = tuple(str(PACKAGE / floor) for floor in ("callbacks", "transfer", "convert"))
LIGHTNINGS = ("load_state_dict", "on_load_checkpoint")  # what writes training state
RUNS = 30


class Boom(BaseException):
    """What a signal's handler may raise at any moment."""


class Interrupt:
    """A profiler that raises as the n-th function of ours, or the n-th that restores a state, returns.

    It counts from the first write of a weight up to the moment when everything is restored.
    """

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count, self.begun, self.over, self.fired = at, 0, False, False, False

    def __call__(self, frame, event, arg):
        code = frame.f_code
        self.over |= code.co_name == "_resumed"
        self.begun |= code.co_name == "copy_into"
        ours = code.co_filename.startswith(FLOORS) and not code.co_name.startswith("<")
        if event == "return" and self.begun and not self.over and (ours or code.co_name in LIGHTNINGS):
            self.count += 1
            if self.count - 1 == self.at:
                self.over = self.fired = True
                raise Boom(code.co_name)


def profiled(interrupt, run):
    sys.setprofile(interrupt)
    try:
        run()
    except BaseException as error:
        return error
    finally:
        sys.setprofile(None)
    return None


def test_a_resume_that_is_broken_off_anywhere_leaves_everything_as_it_was(tmp_path):
    case = Case(tmp_path, adamw(schedule=step_lr))

    def run(interrupt):
        model = New(adamw(schedule=step_lr))
        before = weights(model)
        raised = profiled(interrupt, lambda: case.resumed(None, model=model, epochs=3))
        return before, weights(model), raised

    run(Interrupt())  # imports and caches
    whole = Interrupt()
    assert run(whole)[2] is None
    assert whole.count > 300
    for at in range(0, whole.count, whole.count // RUNS):
        interrupt = Interrupt(at)
        before, after, raised = run(interrupt)
        if not interrupt.fired:  # a few calls come and go with the clock, as a progress bar's
            assert at > 0.95 * whole.count
            assert raised is None
            continue
        assert isinstance(raised, Boom)
        assert same(before, after), raised
        assert case.transfer.report is None, raised
        runner = case.runner
        for optimizer in runner.optimizers:
            assert not optimizer.state, raised
            assert optimizer.param_groups[0]["lr"] == 1e-2, raised
        for config in runner.lr_scheduler_configs:
            assert config.scheduler.last_epoch == 0, raised
        assert not runner._checkpoint_connector._loaded_checkpoint, raised
        assert "restore_training_state" not in vars(runner._checkpoint_connector), raised


@pytest.mark.parametrize("resume", ["weights", "all"])
def test_a_warning_that_is_made_an_error_comes_after_the_last_write(resume, tmp_path, trainer_kwargs):
    runner = L.Trainer(**trainer_kwargs)
    runner.fit(Old(), data())
    runner.save_checkpoint(tmp_path / "old.ckpt")
    model = InInit()
    model.load_state_dict({name: value.clone() for name, value in InInit().state_dict().items()})  # unknown origin
    before = weights(model)
    callback = WeightTransferCallback(tmp_path / "old.ckpt", resume=resume, verbose=False)
    with warnings.catch_warnings(), pytest.raises(Warning if resume == "all" else TransferError) as caught:
        warnings.filterwarnings("error", message="Weight transfer")
        L.Trainer(**{**trainer_kwargs, "max_epochs": 3}, callbacks=[callback]).fit(model, data())
    if resume == "all":
        assert same(weights(model), before)
    else:
        assert "holds the new weights, all of them" in str(caught.value)
        assert set(caught.value.not_restored) >= set(before)
