"""Task vectors, merging, batch norm statistics, and the barrier between models."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from handmade_specs import ALL, tensors
from torch import nn

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin import (
    activation_matching,
    apply_permutation,
    apply_permutation_to_task_vectors,
    average,
    infer_permutation_spec,
    interpolate,
    reestimate_batchnorm,
    repair,
    task_arithmetic,
    task_vector,
    weight_matching,
    weight_matching_for_task_vectors,
)
from lit_wsl.rebasin.job import AlignOptions, align, names_of, under_names_of, write_results
from lit_wsl.rebasin.merging.merge import InterpolationBarrier, InterpolationCurve, interpolation_curve


def conv_net(seed=0, width=8):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(width, 4),
        )


def batches(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 1, 8, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator))
        for _ in range(count)
    ]


def test_task_vector_and_arithmetic_are_inverse():
    spec = ALL["attention"]
    base, tuned = tensors(spec, 0), tensors(spec, 1)
    vector = task_vector(tuned, base)
    again = task_arithmetic(base, [vector])
    assert all(torch.allclose(again[k], tuned[k], atol=1e-6) for k in tuned)
    assert all(torch.equal(task_arithmetic(base, [vector], 0.0)[k], base[k]) for k in base)


def test_task_vector_is_strict_about_what_is_missing():
    base, tuned = {"w": torch.zeros(2)}, {"w": torch.ones(2), "head": torch.ones(3)}
    with pytest.raises(RebasinError, match=r"'head'.*\(3,\)"):
        task_vector(tuned, base)
    with pytest.raises(RebasinError, match="'head'"):
        task_vector(base, tuned)
    assert list(task_vector(tuned, base, strict=False)) == ["w"]
    with pytest.raises(RebasinError, match="share no"):
        task_vector({"a": torch.ones(1)}, {"b": torch.ones(1)}, strict=False)


def test_half_precision_is_not_rounded_before_the_difference():
    base, tuned = {"w": torch.tensor([256.0]).bfloat16()}, {"w": torch.tensor([256.5])}
    assert task_vector(tuned, base)["w"].item() == 0.5


def test_average_and_interpolate():
    a, b = {"w": torch.tensor([1.0]), "n": torch.tensor(3)}, {"w": torch.tensor([3.0]), "n": torch.tensor(9)}
    assert average([a, b])["w"].item() == 2.0
    assert average([a, b])["n"].item() == 3
    assert average([a, b], [0.25, 0.75])["w"].item() == 2.5
    assert torch.equal(interpolate(a, b, 0.0)["w"], a["w"])
    assert torch.equal(interpolate(a, b, 1.0)["w"], b["w"])
    with pytest.raises(RebasinError, match="'v'"):
        average([a, {**b, "v": torch.ones(1)}])
    with pytest.raises(RebasinError, match=r"\(2,\)"):
        average([a, {**b, "w": torch.ones(2)}])


def test_reestimated_statistics_are_the_data_s_own_and_nothing_else_changes():
    model = conv_net().train()
    model[4].eval()
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    data = batches()
    assert reestimate_batchnorm(model, data) == 3
    assert torch.equal(torch.get_rng_state(), rng)  # dropout was off
    assert [m.training for m in model.modules()] == modes
    outputs = torch.stack([model[0](x).mean((0, 2, 3)) for x, _ in data])
    torch.testing.assert_close(model[1].running_mean, outputs.mean(0))
    after = model.state_dict()
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    assert sorted(changed) == sorted(k for k in before if "running" in k or "num_batches" in k)
    assert model[1].momentum == 0.1


def test_reestimated_statistics_do_not_depend_on_how_the_data_is_cut_into_batches():
    torch.manual_seed(3)
    images = (
        torch.randn(20, 1, 8, 8) * torch.linspace(0.5, 3, 20)[:, None, None, None]
        + torch.arange(20.0)[:, None, None, None]
    )  # sorted: no batch is like the others
    for sizes in ([20], [1, 19], [5, 5, 5, 5], [12, 7, 1]):
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
        outputs = model[0](images).movedim(1, 0).flatten(1)
        assert reestimate_batchnorm(model, [(part,) for part in images.split(sizes)]) == len(sizes)
        torch.testing.assert_close(model[1].running_mean, outputs.mean(1))
        torch.testing.assert_close(model[1].running_var, outputs.var(1))
        assert int(model[1].num_batches_tracked) == len(sizes)


def test_a_batch_norm_that_no_batch_reaches_keeps_its_statistics():
    model = conv_net()
    model.add_module("auxiliary", nn.BatchNorm1d(4))
    torch.nn.init.uniform_(model.auxiliary.running_var, 2, 3)
    before = copy.deepcopy(model.auxiliary.state_dict())
    reestimate_batchnorm(model, batches(), forward=lambda m, batch: m[:10](batch[0]))
    assert all(torch.equal(before[k], v) for k, v in model.auxiliary.state_dict().items())


def test_reestimation_without_batches_leaves_the_statistics():
    model = conv_net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RebasinError, match="no batch"):
        reestimate_batchnorm(model, [])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert reestimate_batchnorm(nn.Linear(2, 2), []) == 0


def plain_net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 12), nn.ReLU(), nn.Linear(12, 4)
        )


def hidden_statistics(model, data):
    x = torch.cat([images for images, _ in data])
    first = model[0](x)
    second = model[:4](x)
    return [first.mean((0, 2, 3)), first.std((0, 2, 3)), second.mean(0), second.std(0)]


def test_repaired_units_have_the_mean_statistics_of_the_end_points():
    first, second, merged = plain_net(0), plain_net(1), plain_net(2)
    data = batches()
    spec = infer_permutation_spec(merged, (data[0][0][:2],))
    states = [first.state_dict(), second.state_dict()]
    merged.load_state_dict(average(states, [0.25, 0.75]))
    last = merged[5].weight.clone()
    assert repair(merged, states, spec, data, [0.25, 0.75]) == 2
    with torch.no_grad():
        ends = [hidden_statistics(model, data) for model in (first, second)]
        found = hidden_statistics(merged, data)
    for a, b, now in zip(*ends, found):
        torch.testing.assert_close(now, 0.25 * a + 0.75 * b, rtol=1e-3, atol=1e-4)
    assert torch.equal(merged[5].weight, last)


def test_repairing_a_model_by_itself_changes_nothing():
    model = plain_net(0)
    data = batches()
    spec = infer_permutation_spec(model, (data[0][0][:2],))
    state = copy.deepcopy(model.state_dict())
    repair(model, [state, state], spec, data)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(RebasinError, match="no batch"):
        repair(model, [state, state], spec, [])


def test_barrier_is_zero_on_a_line_and_measures_the_bump():
    flat = InterpolationCurve((0.0, 0.5, 1.0), (1.0, 2.0, 3.0), (0.5, 0.4, 0.3))
    assert flat.loss_barrier == 0.0
    assert flat.accuracy_barrier == 0.0
    bump = InterpolationCurve((0.0, 0.25, 1.0), (1.0, 5.0, 3.0), (0.5, 0.1, 0.3))
    assert bump.loss_barrier == pytest.approx(5.0 - 1.5)
    assert bump.accuracy_barrier == pytest.approx(0.45 - 0.1)


def test_curve_ends_are_the_models_and_the_model_is_left_alone():
    a, b = conv_net(0).eval(), conv_net(1).eval()
    probe = conv_net(2)
    before = copy.deepcopy(probe.state_dict())
    data = batches()
    curve = interpolation_curve(probe, a.state_dict(), b.state_dict(), data, points=5)
    assert all(torch.equal(before[k], v) for k, v in probe.state_dict().items())
    for model, loss in ((a, curve.losses[0]), (b, curve.losses[-1])):
        with torch.no_grad():
            expected = torch.stack([nn.functional.cross_entropy(model(x), y) for x, y in data]).mean()
        assert loss == pytest.approx(float(expected), rel=1e-5)
    same = interpolation_curve(probe, a.state_dict(), a.state_dict(), data, points=3, repair=False)
    assert same.loss_barrier == pytest.approx(0.0, abs=1e-6)


def test_barrier_metric_counts_right_answers():
    metric = InterpolationBarrier(points=3)
    good, bad = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]])
    for point, logits in enumerate((good, bad, good)):
        metric.update(point, logits, torch.tensor([0]))
    values = metric.compute()
    assert float(values["accuracy_barrier"]) == 1.0
    assert float(values["loss_barrier"]) == pytest.approx(9.0, abs=1e-3)


@pytest.mark.parametrize("name", ["attention", "grouped_queries", "mlp"])
def test_task_vectors_are_aligned_to_the_first(name):
    spec = ALL[name]
    first = tensors(spec, 0)
    moved = [apply_permutation(spec, spec.random_permutations(s), first) for s in (1, 2)]
    found = weight_matching_for_task_vectors(spec, [first, *moved])
    assert found[0].identity_share == 1.0
    for vector in apply_permutation_to_task_vectors(spec, found, [first, *moved]):
        assert all(torch.equal(vector[k], first[k]) for k in first)
    with pytest.raises(RebasinError, match="2 task vectors but 3"):
        apply_permutation_to_task_vectors(spec, found, moved)
    for vector in apply_permutation_to_task_vectors([first, *moved], spec=spec):  # matched and applied in one call
        assert all(torch.equal(vector[k], first[k]) for k in first)
    with pytest.raises(TypeError, match="spec=spec"):
        apply_permutation_to_task_vectors([first, *moved])


def test_a_tensor_that_all_task_vectors_lack_has_no_say():
    spec = ALL["mlp"]
    first = tensors(spec, 0)
    second = apply_permutation(spec, spec.random_permutations(4), first)
    less = [{k: v for k, v in s.items() if k != "2.weight"} for s in (first, second)]
    found = weight_matching_for_task_vectors(spec, less)
    (back,) = apply_permutation_to_task_vectors(spec, found[1:], less[1:])
    assert all(torch.equal(back[k], less[0][k]) for k in back)


def test_activation_matching_recovers_a_planted_permutation():
    model = conv_net().eval()
    reestimate_batchnorm(model, batches())
    data = batches(4)
    spec = infer_permutation_spec(model, (data[0][0][:2],))
    a = model.state_dict()
    b = apply_permutation(spec, spec.random_permutations(5), a)
    rng = torch.get_rng_state()
    found = activation_matching(spec, model, a, b, data)
    assert torch.equal(torch.get_rng_state(), rng)
    back = apply_permutation(spec, found, b)
    assert all(torch.equal(back[k], a[k]) for k in a)
    assert found.objective == pytest.approx(sum(g.size for g in spec.groups.values()) * 2, rel=1e-3)  # conv and norm


def test_activation_matching_falls_back_to_weights_for_what_no_module_shows():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0).eval()
    head = nn.Sequential(nn.Linear(5, 16), model, nn.Linear(16, 3)).eval()
    x = [(torch.randn(8, 6, 5),) for _ in range(2)]
    spec = infer_permutation_spec(head, (x[0][0],))
    a = head.state_dict()
    b = apply_permutation(spec, spec.random_permutations(1), a)
    back = apply_permutation(spec, activation_matching(spec, head, a, b, x), b)
    assert all(torch.equal(back[k], a[k]) for k in a)


# ---- the whole job ---------------------------------------------------------------------------------------------------


def test_merging_uses_whole_weights_even_where_task_vectors_are_compared():
    """Task vectors of two fine-tunings are unlike each other; aligned by them, the models would not average."""
    spec = ALL["mlp"]
    base = tensors(spec, 0)
    tuned = [{k: v + 0.1 * tensors(spec, s)[k] for k, v in base.items()} for s in (1, 2)]
    report = align({"a": tuned[0], "b": tuned[1]}, base, spec, AlignOptions(merge="average"))
    model = report.models["b"]
    assert model.on_weights.identity_share == 1.0
    assert model.compared.identity_share < 1.0
    mean = average(tuned)
    assert all(torch.equal(report.merged[k], mean[k]) for k in mean)
    assert model.after.overall["cosine"] > model.before.overall["cosine"]
    data = report.to_dict()["models"]["b"]["matching"]
    assert data["weights"]["identity_share"] == 1.0
    assert data["task_vectors"]["identity_share"] < 1.0


def test_results_are_written_and_reproduce_the_alignment(tmp_path):
    spec = ALL["attention"]
    a = tensors(spec, 0)
    b = apply_permutation(spec, spec.random_permutations(1), a)
    report = write_results(align({"a": a, "b": b}, None, spec, AlignOptions(on="weights", merge="average")), tmp_path)
    assert sorted(report.files) == ["aligned/b", "merged", "report"]
    saved = torch.load(tmp_path / report.files["aligned/b"], weights_only=True)
    again = apply_permutation(spec, saved["permutations"], b)
    for name in a:
        assert torch.equal(saved["state_dict"][name], a[name])
        assert torch.equal(again[name], a[name])


def test_without_a_spec_the_reason_is_told_and_nothing_is_merged():
    a, b = tensors(ALL["mlp"], 0), tensors(ALL["mlp"], 1)
    report = align({"a": a, "b": b}, None, None, AlignOptions(on="weights", merge="average"), reason="no idea")
    assert report.perm_matching is False
    assert report.to_dict()["reason"] == "no idea"
    assert report.merged is None
    assert report.scalars()["rebasin/perm_matching"] == 0.0
    assert weight_matching(ALL["mlp"], a, b).objective > 0


def test_jobs_that_cannot_be_done_say_so():
    a = tensors(ALL["mlp"], 0)
    with pytest.raises(RebasinError, match="at least one other"):
        align({"a": a}, None, None, AlignOptions(on="weights"))
    with pytest.raises(RebasinError, match="pretrained"):
        align({"a": a, "b": a}, None, None)
    with pytest.raises(RebasinError, match="pretrained"):
        align({"a": a, "b": a}, None, None, AlignOptions(on="weights", merge="task_arithmetic"))


def test_names_are_fitted_by_one_prefix():
    own = {"net.0.weight": torch.zeros(2), "net.0.bias": torch.zeros(1)}
    state = {"0.weight": torch.zeros(2), "0.bias": torch.zeros(3)}
    assert list(under_names_of(own, state, "x.pt")) == ["net.0.weight", "net.0.bias"]
    assert list(under_names_of(own, {"module.net.0.bias": torch.zeros(1)}, "x.pt")) == ["net.0.bias"]
    with pytest.raises(RebasinError, match=r"x\.pt"):
        under_names_of(own, {"other": torch.zeros(1)}, "x.pt")


@pytest.mark.parametrize("names", [("lora_A.default.weight", "lora_B.default.weight"), ("lora_down", "lora_up")])
def test_factors_of_adapters_are_not_averaged(names):
    one, two = ({f"q.{name}": torch.randn(2, 2) for name in names} for _ in range(2))
    base = {name: torch.zeros(2, 2) for name in one}
    with pytest.raises(RebasinError, match="merge_and_unload"):
        average([one, two])
    with pytest.raises(RebasinError, match="low-rank"):
        task_arithmetic(base, [task_vector(one, base), task_vector(two, base)])
    shared = {**two, f"q.{names[0]}": one[f"q.{names[0]}"]}  # one factor in common: the mean is exact
    merged = average([one, shared])
    first, second = (f"q.{name}" for name in names)
    expected = (one[second] @ one[first] + shared[second] @ shared[first]) / 2
    torch.testing.assert_close(merged[second] @ merged[first], expected)


def test_factors_that_only_look_like_an_adapter_are_averaged_with_a_word():
    one, two = ({"q.weight": torch.ones(5, 6), "q.A": torch.randn(2, 6), "q.B": torch.randn(5, 2)} for _ in range(2))
    with pytest.warns(UserWarning, match="merge_and_unload"):
        average([one, two])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average([one, one])
        average([{**state, "q.weight": torch.ones(5, 5)} for state in (one, two)])


def test_checkpoints_get_different_names():
    assert names_of(["a/last.ckpt", "b/last.ckpt"]) == ["a_last", "b_last"]
    assert len(set(names_of(["a.ckpt", "a.ckpt", "a.pt"]))) == 3


def test_models_count_as_they_are_weighted():
    spec = ALL["mlp"]
    base = tensors(spec, 0)
    states = {name: {k: v + 0.01 * tensors(spec, s)[k] for k, v in base.items()} for s, name in enumerate("abc", 1)}
    options = AlignOptions(on="weights", merge="average", merge_weights=(1.0, 2.0, 5.0))
    merged = align(states, base, spec, options).merged
    expected = average(list(states.values()), [1 / 8, 2 / 8, 5 / 8])
    assert all(torch.equal(merged[k], expected[k]) for k in expected)
    summed = align(states, base, spec, AlignOptions(merge="task_arithmetic", merge_weights=(0, 1, 0))).merged
    assert all(torch.allclose(summed[k], states["b"][k], atol=1e-6) for k in summed)
    with pytest.raises(RebasinError, match="2 merge_weights for 3 models"):
        align(states, base, spec, AlignOptions(on="weights", merge="average", merge_weights=(1, 2)))
    with pytest.raises(RebasinError, match="none negative"):
        AlignOptions(merge_weights=(1, -1))


def test_a_report_of_many_models_prints_on_a_screen_without_weights():
    spec = ALL["mlp"]
    states = {f"run{seed}": tensors(spec, seed) for seed in range(4)}
    report = align(states, None, spec, AlignOptions(on="weights", merge="average"))
    for text in (str(report), repr(report), repr(report.models), repr(report.models["run1"])):
        assert "tensor(" not in text
        assert len(text.splitlines()) < 25
    assert "cosine" in str(report)
    assert all(name in str(report) for name in states)
