"""Optimizers are told by the parameters that they hold, schedulers by kind and by the optimizer that they drive."""

import pytest
import torch
from resumed_runs import Case, New, adamw, step_lr
from torch.optim import lr_scheduler as lrs

from lit_wsl.errors import CheckpointError


def by_rank(module, **of_vectors):
    vectors = [p for p in module.parameters() if p.ndim < 2]
    return [{"params": vectors, **of_vectors}, {"params": [p for p in module.parameters() if p.ndim > 1]}]


def by_rank_reversed(module, **of_vectors):
    return by_rank(module, **of_vectors)[::-1]


SCHEDULES = {
    "none": None,
    "step": step_lr,
    "lambda": lambda o: lrs.LambdaLR(o, [lambda e: 0.9**e] * len(o.param_groups)),
    "sequence": lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o, 0.5, 2), lrs.ExponentialLR(o, 0.5)], [1]),
    "chain": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.5, 2), lrs.ExponentialLR(o, 0.5)]),
    "one cycle": lambda o: lrs.OneCycleLR(o, 0.02, total_steps=10),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("way", ["split", "joined"])
def test_groups_that_are_split_or_joined_go_on_as_they_were(way, schedule, tmp_path):
    one, two = adamw(schedule=SCHEDULES[schedule]), adamw(by_rank, SCHEDULES[schedule])
    old, new = (one, two) if way == "split" else (two, one)
    case = Case(tmp_path, old)
    for model, _ in (case.converted(new), case.resumed(new)):
        assert not case.differs(model, exact=False)


def test_groups_in_another_order_keep_their_settings(tmp_path):
    old = adamw(lambda m: by_rank(m, weight_decay=0.0, lr=3e-2), step_lr)
    new = adamw(lambda m: by_rank_reversed(m, weight_decay=0.0, lr=3e-2), step_lr)
    case = Case(tmp_path, old)
    for model, _ in (case.converted(new), case.resumed(new)):
        assert not case.differs(model)


def two(module):
    first = torch.optim.AdamW(module.backbone.parameters(), lr=1e-2)
    second = torch.optim.AdamW(module.head.parameters(), lr=3e-2)
    return [first, second], [lrs.StepLR(first, 1, 0.5), lrs.StepLR(second, 1, 0.9)]


def two_reversed(module):
    optimizers, schedulers = two(module)
    return optimizers[::-1], schedulers[::-1]


def alike(module):
    optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in (module.backbone, module.head)]
    return optimizers, [step_lr(optimizer) for optimizer in optimizers]


def moved(configure):
    """The bias of the head has moved to the first optimizer."""

    def configured(module):
        optimizers, schedulers = configure(module)
        first, second = (optimizer.param_groups[0]["params"] for optimizer in optimizers)
        head_bias = second.pop()
        order = list(map(id, module.parameters()))
        first[:] = sorted([*first, head_bias], key=lambda parameter: order.index(id(parameter)))
        return optimizers, schedulers

    configured.several = True
    return configured


for configure in (two, two_reversed, alike):
    configure.several = True


def test_optimizers_and_schedulers_in_another_order(tmp_path):
    case = Case(tmp_path, two)
    for model, _ in (case.converted(two_reversed), case.resumed(two_reversed)):
        assert not case.differs(model)
    model, _ = case.converted(two, tell_optimizers=False)
    assert not case.differs(model)


def test_a_parameter_that_moved_takes_its_moments_along(tmp_path):
    case = Case(tmp_path, alike)
    for model, _ in (case.converted(moved(alike)), case.resumed(moved(alike))):
        assert not case.differs(model)
    case = Case(tmp_path, two)
    with pytest.raises(CheckpointError, match=r"joins parameters of the old groups .*lr is .*schedule='run'"):
        case.resumed(moved(two))


def test_settings_that_contradict_each_other_are_not_joined(tmp_path):
    case = Case(tmp_path, adamw(lambda m: by_rank(m, weight_decay=0.0), weight_decay=0.1))
    for attempt in (case.converted, case.resumed):
        with pytest.raises(CheckpointError, match=r"weight_decay is 0\.1 and 0\.0.*optimizer_settings='run'"):
            attempt(adamw(weight_decay=0.1))
    _, notes = case.resumed(adamw(weight_decay=0.05), optimizer_settings="run")
    assert case.runner.optimizers[0].param_groups[0]["weight_decay"] == 0.05
    assert any("weight_decay is 0.1 in the checkpoint and 0.05 in the run; the run's counts" in n for n in notes)


@pytest.mark.parametrize("whose", ["checkpoint", "run"])
def test_a_setting_that_differs_is_named_and_the_user_says_which_counts(whose, tmp_path):
    case = Case(tmp_path, adamw(weight_decay=0.1, schedule=lambda o: lrs.CosineAnnealingLR(o, 10)))
    new = adamw(weight_decay=0.2, schedule=lambda o: lrs.CosineAnnealingLR(o, 20))
    model, notes = case.resumed(new, optimizer_settings=whose)
    assert case.runner.optimizers[0].param_groups[0]["weight_decay"] == {"checkpoint": 0.1, "run": 0.2}[whose]
    assert case.runner.lr_scheduler_configs[0].scheduler.T_max == {"checkpoint": 10, "run": 20}[whose]
    assert case.runner.lr_scheduler_configs[0].scheduler.last_epoch == 4
    for text in ("weight_decay is 0.1 in the checkpoint and 0.2 in the run", "T_max is 10 in the checkpoint and 20"):
        (note,) = [note for note in notes if text in note]
        assert f"the {whose}'s counts" in note
    assert (not case.differs(model)) == (whose == "checkpoint")


KINDS = {
    "exponential": (lambda o: lrs.ExponentialLR(o, 0.7), "ExponentialLR"),
    "sequence": (SCHEDULES["sequence"], "SequentialLR"),
    "none": (None, "1 learning rate schedulers, the run 0"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_scheduler_of_another_kind_is_refused_by_name(kind, tmp_path):
    schedule, message = KINDS[kind]
    case = Case(tmp_path, adamw(schedule=step_lr))
    model = New(adamw(schedule=schedule))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"{message}.*schedule='run'"):
        case.resumed(None, model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert case.transfer.report is None  # as before


def test_other_schedulers_inside_a_sequence_are_another_kind(tmp_path):
    case = Case(tmp_path, adamw(schedule=SCHEDULES["sequence"]))
    other = adamw(schedule=lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.5), lrs.ExponentialLR(o, 0.5)], [1]))
    with pytest.raises(CheckpointError, match="other schedulers inside"):
        case.resumed(other)


@pytest.mark.parametrize("mode", ["optimizer", "all"])
def test_the_old_moments_go_on_under_a_new_schedule(mode, tmp_path):
    case = Case(tmp_path, adamw(schedule=lambda o: lrs.CosineAnnealingLR(o, 2)))  # it ends at a rate of zero
    fresh = adamw(schedule=lambda o: lrs.OneCycleLR(o, 0.02, total_steps=100))
    model, notes = case.resumed(fresh, resume=mode, schedule="run", epochs=3 if mode == "all" else 1)
    (scheduler,) = [config.scheduler for config in case.runner.lr_scheduler_configs]
    assert scheduler.last_epoch == 1  # one epoch
    assert case.runner.optimizers[0].state[model.classifier.weight]["step"] == 12
    assert case.runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(scheduler.get_last_lr()[0])
    assert scheduler.get_last_lr()[0] > 0
    assert any("lr is 0.01 in the checkpoint" in note and "the run's counts" in note for note in notes)


def test_a_step_that_the_states_do_not_suffice_for_is_refused(tmp_path):
    case = Case(tmp_path, adamw())
    with pytest.raises(CheckpointError, match=r"keeps .*max_exp_avg_sq"):
        case.resumed(adamw(amsgrad=True), optimizer_settings="run")

    class Sign(torch.optim.Optimizer):
        def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
            super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

        @torch.no_grad()
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))

    with pytest.raises(CheckpointError, match=r"Sign keeps \['exp_avg'\]"):
        case.resumed(lambda module: ([Sign(module.parameters())], []))


def test_what_nothing_trains_is_noted_and_what_is_new_starts_fresh(tmp_path):
    case = Case(tmp_path, adamw())

    def head_only(module):
        module.backbone.requires_grad_(False)
        return adamw(lambda m: m.head.parameters())(module)

    _, notes = case.resumed(head_only)
    assert any("4 parameters that no optimizer of the new run holds" in note for note in notes)
    assert len(case.runner.optimizers[0].state) == 2
    frozen = Case(tmp_path, head_only)
    model, notes = frozen.resumed(adamw())
    assert any("no optimizer of the checkpoint holds (frozen?): trunk.stem.weight" in note for note in notes)
    assert frozen.runner.optimizers[0].state[model.classifier.weight]["step"] == 16
    assert frozen.runner.optimizers[0].state[model.trunk["stem"].weight]["step"] == 8


def test_names_that_the_user_gives_reach_the_callback(tmp_path):
    def reversed_order(module):
        return adamw(lambda m: list(m.parameters())[::-1])(module)

    case = Case(tmp_path, reversed_order)
    names = list(torch.load(case.path, weights_only=True)["state_dict"])[::-1]
    model, _ = case.resumed(reversed_order, parameter_names=[names])
    assert not case.differs(model)


def lambda_lr(function):
    return adamw(schedule=lambda o: lrs.LambdaLR(o, function))


def multiplicative(function):
    return adamw(schedule=lambda o: lrs.MultiplicativeLR(o, function))


def power(epoch):
    return 0.9**epoch


@pytest.mark.parametrize(
    ("old", "new", "kind"), [(lambda_lr, multiplicative, "LambdaLR"), (multiplicative, lambda_lr, "MultiplicativeLR")]
)
def test_kinds_of_schedulers_with_the_same_attributes_are_told_apart_by_their_rates(old, new, kind, tmp_path):
    case = Case(tmp_path, old(power), epochs=(3, 4))
    with pytest.raises(CheckpointError, match=f"another kind .* those of a {kind}.*schedule='run'"):
        case.resumed(new(power))
    model, notes = case.resumed(old(power))
    assert not case.differs(model)
    assert not [note for note in notes if "function" in note]


def test_another_function_of_a_scheduler_is_named_and_the_same_rates_are_no_other_kind(tmp_path):
    case = Case(tmp_path, lambda_lr(power))
    assert [n for n in case.resumed(lambda_lr(lambda e: 0.5**e))[1] if "0.0081 in the checkpoint and 0.0025" in n]
    model, notes = case.resumed(multiplicative(lambda e: 0.9))
    assert not case.differs(model, exact=False)
    assert not [note for note in notes if "function" in note]


def with_optimizer(kind, **settings):
    return lambda module: ([kind(module.parameters(), lr=1e-2, **settings)], [])


def test_a_setting_that_the_run_does_not_know_is_named(tmp_path):
    """RAdam's settings are some of Adam's, and its states have the same names."""
    case = Case(tmp_path, with_optimizer(torch.optim.Adam))
    assert [n for n in case.resumed(with_optimizer(torch.optim.RAdam))[1] if "amsgrad" in n and "another kind" in n]
    assert not [n for n in case.resumed(with_optimizer(torch.optim.Adam))[1] if "another kind" in n]


def test_one_state_for_all_parameters_is_refused_with_the_remedy(tmp_path):
    case = Case(tmp_path, with_optimizer(torch.optim.LBFGS, max_iter=2))
    with pytest.raises(CheckpointError, match=r"one state for all its parameters together .*prev_flat_grad.*'weights'"):
        case.resumed(with_optimizer(torch.optim.LBFGS, max_iter=2))
    with pytest.raises(CheckpointError, match="--weights-only"):
        case.converted(with_optimizer(torch.optim.LBFGS, max_iter=2))
