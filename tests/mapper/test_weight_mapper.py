"""WeightMapper does what its options say. Models are built so that the right answer is known."""

import copy
import io
import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from rich.console import Console
from torch import nn

from lit_wsl.errors import CheckpointError, LitWslError, MappingError
from lit_wsl.mapper import MappingResult, WeightMapper


class Old(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 32, 3)
        self.fc = nn.Linear(32, classes)

    def forward(self, x):
        x = self.conv2(self.bn1(self.conv1(x)).relu()).relu()
        return self.fc(x.mean((2, 3)))


class New(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 32, 3)
        )
        self.head = nn.ModuleDict({"classifier": nn.Linear(32, classes)})

    def forward(self, x):
        return self.head["classifier"](self.backbone(x).relu().mean((2, 3)))


TRUTH = {
    "conv1.weight": "backbone.0.weight",
    "bn1.weight": "backbone.1.weight",
    "bn1.bias": "backbone.1.bias",
    "conv2.weight": "backbone.3.weight",
    "conv2.bias": "backbone.3.bias",
    "fc.weight": "head.classifier.weight",
    "fc.bias": "head.classifier.bias",
}
STATISTICS = {f"bn1.{n}": f"backbone.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}


def test_all_three_ways_in_find_the_truth(tmp_path):
    old, new = Old(), New()
    torch.save({"state_dict": old.state_dict()}, tmp_path / "old.ckpt")
    ways = [
        WeightMapper(old, new),
        WeightMapper.from_state_dict(old.state_dict(), new),
        WeightMapper.from_state_dict(old.state_dict(), new, source_module=old),
        WeightMapper.from_checkpoint(tmp_path / "old.ckpt", new),
        WeightMapper(old, new, dummy_input=torch.zeros(1, 3, 8, 8)),
        WeightMapper(old, new, dummy_input=(torch.zeros(1, 3, 8, 8),)),
        WeightMapper(old, new, dummy_input={"x": torch.zeros(1, 3, 8, 8)}),
    ]
    for mapper in ways:
        assert dict(mapper.suggest_mapping()) == TRUTH


def test_mapped_weights_give_the_same_outputs():
    old, new = Old().eval(), New().eval()
    mapping = WeightMapper(old, new, buffer_matching_mode="lenient").suggest_mapping()
    new.load_state_dict({mapping[name]: tensor for name, tensor in old.state_dict().items()})
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(old(x), new(x))


def test_neither_model_changes_and_meta_models_do():
    old, new = Old(), New()
    before = copy.deepcopy((old.state_dict(), new.state_dict()))
    rng = torch.get_rng_state()
    WeightMapper(old, new, dummy_input=torch.zeros(1, 3, 8, 8)).suggest_mapping()
    for sd, was in zip((old.state_dict(), new.state_dict()), before):
        assert all(torch.equal(sd[k], was[k]) for k in was)
    assert old.training
    assert torch.equal(torch.get_rng_state(), rng)
    with torch.device("meta"):
        assert dict(WeightMapper(Old(), New()).suggest_mapping()) == TRUTH


def test_same_answer_whatever_the_hash_seed():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_weight_mapper import *;"
        "print(WeightMapper(Old(), New()).suggest_mapping().get_mapping_with_scores())"
    )
    here = WeightMapper(Old(), New()).suggest_mapping().get_mapping_with_scores()
    folder, env = os.path.dirname(__file__), {**os.environ, "PYTHONHASHSEED": "77"}
    there = subprocess.run([sys.executable, "-c", code, folder], env=env, capture_output=True, text=True)
    assert there.stdout == f"{here}\n", there.stderr


# -- one to one, group by group -------------------------------------------------------------------------------------


def test_one_to_one():
    old = nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)])
    new = nn.ModuleDict({f"layer_{i}": nn.Linear(8, 8) for i in range(7)})
    mapping = WeightMapper(old, new).suggest_mapping(threshold=0.0)
    assert len(set(mapping.values())) == len(mapping)
    filled = [t for entry in mapping.plan for t in entry.targets]
    assert len(set(filled)) == len(filled)


def test_weight_and_bias_of_a_module_stay_together():
    names = [f"fc{i}" for i in range(6)]
    old = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})
    new = nn.ModuleDict({f"{name}_renamed": nn.Linear(8, 8) for name in names})
    mapping = WeightMapper(old, new).suggest_mapping()
    assert mapping
    for name in names:
        if f"{name}.weight" in mapping:
            assert mapping[f"{name}.bias"] == mapping[f"{name}.weight"].replace("weight", "bias")


# -- options ----------------------------------------------------------------------------------------------------------


def test_threshold_is_the_least_score_and_higher_ones_only_take_away():
    mapper = WeightMapper(Old(), New())
    all_of_them = mapper.suggest_mapping(threshold=0.0)
    scores = [score for _, _, score in mapper.get_mapping_with_scores()]
    assert len(scores) == len(TRUTH)
    middle = sorted(scores)[len(scores) // 2]
    some = mapper.suggest_mapping(threshold=middle)
    assert all(score >= middle for _, score in some.get_mapping_with_scores().values())
    assert set(some.items()) <= set(all_of_them.items())
    assert not mapper.suggest_mapping(threshold=1.0)


def test_conservative_asks_for_three_quarters():
    mapper = WeightMapper(Old(), New())
    careful = mapper.suggest_mapping(strategy="conservative")
    assert all(score >= 0.75 for _, score in careful.get_mapping_with_scores().values())
    assert set(careful.items()) <= set(mapper.suggest_mapping().items())


class Renamed(nn.Module):
    """The old model with names that say nothing."""

    def __init__(self):
        super().__init__()
        self.zz, self.yy, self.xx, self.ww = (
            nn.Conv2d(3, 64, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.Conv2d(64, 32, 3),
            nn.Linear(32, 10),
        )


def test_shape_only_ignores_names():
    one, two = nn.ModuleDict(), nn.ModuleDict()
    for i, width in enumerate((3, 5, 7)):
        one[f"encoder{i}"] = nn.Linear(width, width)
        two[f"qqq{9 - i}"] = nn.Linear(width, width)
    mapping = WeightMapper(one, two).suggest_mapping(strategy="shape_only")
    assert dict(mapping) == {f"encoder{i}.{p}": f"qqq{9 - i}.{p}" for i in range(3) for p in ("weight", "bias")}
    scores = WeightMapper(Old(), Renamed()).suggest_mapping(strategy="shape_only").get_mapping_with_scores()
    assert set(scores) == set(TRUTH)
    weights = WeightMapper(Old(), Renamed())
    weights.suggest_mapping(strategy="shape_only")
    assert weights.options.score_weights["name"] == 0.0


def test_custom_weights_change_the_scores():
    mapper = WeightMapper(Old(), New())
    by_shape = mapper.suggest_mapping(weights={"shape": 1.0})
    assert all(score == pytest.approx(1.0) for _, score in by_shape.get_mapping_with_scores().values())
    by_name = mapper.suggest_mapping(threshold=0.0, weights={"name": 2.0}).get_mapping_with_scores()
    assert all(score < 1.0 for _, score in by_name.values())


def test_incompatible_pairs_forbid_a_match_both_ways():
    one = nn.ModuleDict({"stem": nn.Linear(3, 4), "yolo_backbone": nn.Linear(4, 6), "out": nn.Linear(6, 2)})
    two = nn.ModuleDict({"stem": nn.Linear(3, 4), "resnet_backbone": nn.Linear(4, 6), "out": nn.Linear(6, 2)})
    assert len(WeightMapper(one, two).suggest_mapping()) == 6
    pair = ({"yolo"}, {"resnet"})
    for mapper in (
        WeightMapper(one, two, incompatible_pairs=[pair]),
        WeightMapper(one, two, incompatible_pairs=[pair[::-1]]),
        WeightMapper(two, one, incompatible_pairs=[pair]),
    ):
        assert not [name for name in mapper.suggest_mapping(threshold=0.0) if "backbone" in name]
    assert len(WeightMapper(one, two, incompatible_pairs=[({"yolo"}, {"vit"})]).suggest_mapping()) == 6


# -- buffers ----------------------------------------------------------------------------------------------------------


def test_the_three_buffer_modes_of_equal_modules():
    for mode, expected in (("exclude", TRUTH), ("lenient", TRUTH | STATISTICS), ("strict", TRUTH | STATISTICS)):
        for mapper in (
            WeightMapper(Old(), New(), buffer_matching_mode=mode),
            WeightMapper.from_state_dict(Old().state_dict(), New(), buffer_matching_mode=mode),
        ):
            assert dict(mapper.suggest_mapping()) == expected


class OtherStatistics(nn.BatchNorm2d):
    """A batch norm whose running statistics have another size than its weights."""

    def __init__(self, channels, size):
        super().__init__(channels)
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))


class Holder(nn.Module):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class Fused(nn.Module):
    """A convolution with an affine norm in one module, without running statistics."""

    def __init__(self, channels=64):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, bias=False)
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.ones(channels))
        self.norm.bias = nn.Parameter(torch.zeros(channels))


def stem(**norm):
    return Holder(conv=nn.Conv2d(3, 64, 3, bias=False), **norm)


PAIRS = {
    "statistics of another size": (stem(norm=nn.BatchNorm2d(64)), stem(norm=OtherStatistics(64, 32))),
    "fused without statistics": (stem(norm=nn.BatchNorm2d(64)), Fused()),
    "group norm": (stem(norm=nn.BatchNorm2d(64)), stem(norm=nn.GroupNorm(8, 64))),
}


@pytest.mark.parametrize("from_module", [True, False], ids=["modules", "state dict"])
@pytest.mark.parametrize("case", PAIRS)
def test_strict_refuses_what_lenient_and_exclude_match(case, from_module):
    old, new = PAIRS[case]
    affine = {"norm.weight", "norm.bias"}
    for mode in ("strict", "lenient", "exclude"):
        make = WeightMapper if from_module else lambda m, *a, **k: WeightMapper.from_state_dict(m.state_dict(), *a, **k)
        mapping = make(old, new, buffer_matching_mode=mode).suggest_mapping()
        assert mapping["conv.weight"] == "conv.weight"
        if mode == "strict":
            assert not affine & set(mapping)
        else:
            assert {name: mapping[name] for name in affine} == {name: name for name in affine}
        assert not any(name.endswith(("running_mean", "running_var")) for name in mapping)


@pytest.mark.parametrize("mode", ["strict", "lenient", "exclude"])
def test_a_conv_of_other_channels_fails_in_every_mode(mode):
    old, new = stem(norm=nn.BatchNorm2d(64)), Holder(conv=nn.Conv2d(3, 32, 3, bias=False), norm=nn.BatchNorm2d(32))
    for tolerance in (0.0, 0.9):
        mapper = WeightMapper(old, new, buffer_matching_mode=mode, shape_tolerance=tolerance)
        mapping = mapper.suggest_mapping(threshold=0.0)
        moved = {name for entry in mapping.plan if entry.kind == "parameter" for name in entry.sources}
        assert not moved
        assert "conv.weight" in mapping.get_unmatched()["source"]


# -- results ----------------------------------------------------------------------------------------------------------


def test_getters_agree():
    old, new = Old(), New()
    old.extra, new.other = nn.Linear(7, 5), nn.Linear(6, 3)
    mapper = WeightMapper(old, new)
    result = mapper.suggest_mapping()
    assert mapper.get_mapping_dict() == dict(result)
    assert result.items() <= TRUTH.items()
    listed = mapper.get_mapping_with_scores()
    assert {s: (t, score) for s, t, score in listed} == result.get_mapping_with_scores()
    assert [score for *_, score in listed] == sorted((score for *_, score in listed), reverse=True)
    left = mapper.get_unmatched()
    assert left == result.get_unmatched()
    assert {"extra.weight", "extra.bias"} <= set(left["source"])
    assert {"other.weight", "other.bias"} <= set(left["target"])
    assert not set(left["source"]) & set(result)


def test_methods_before_suggest_mapping_use_its_defaults():
    assert WeightMapper(Old(), New()).get_mapping_dict() == TRUTH
    assert WeightMapper(Old(), New()).result == WeightMapper(Old(), New()).suggest_mapping()


def test_result_renames_the_keys_of_a_state_dict():
    result = WeightMapper(Old(), New()).suggest_mapping()
    assert isinstance(result, MappingResult)
    assert {result.get(k, k) for k in Old().state_dict()} >= set(TRUTH.values())
    assert result.coverage.target.share == 1.0
    assert result.coverage.source_buffers.tensors == 0


# -- input that is not right -------------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(MappingError, match=r"source_module is missing.*from_checkpoint"):
        WeightMapper(target_module=New())
    with pytest.raises(MappingError, match="target_module is missing"):
        WeightMapper(Old())
    with pytest.raises(MappingError, match=r"'exclude', 'lenient', 'strict'.*'loose'"):
        WeightMapper(Old(), New(), buffer_matching_mode="loose")
    with pytest.raises(MappingError, match="best_guess"):
        WeightMapper(Old(), New()).suggest_mapping(strategy="best_guess")
    with pytest.raises(MappingError, match="threshold"):
        WeightMapper(Old(), New()).suggest_mapping(threshold=2)
    with pytest.raises(MappingError, match="colour"):
        WeightMapper(Old(), New()).suggest_mapping(weights={"colour": 1})
    with pytest.raises(MappingError, match="Did you mean 'hierarchy'"):
        WeightMapper(Old(), New()).suggest_mapping(weights={"hierachy": 1})
    with pytest.raises(MappingError):
        WeightMapper.from_state_dict({}, New())
    with pytest.raises(MappingError, match=r"conv1\.weight"):
        WeightMapper.from_state_dict(Old().state_dict(), New(), source_module=New())
    with pytest.raises(MappingError, match=r"'fc\.weight'"):
        WeightMapper.from_state_dict(Old(3).state_dict(), New(), source_module=Old(10))
    with pytest.raises(CheckpointError, match=r"nothing\.ckpt"):
        WeightMapper.from_checkpoint(tmp_path / "nothing.ckpt", New())
    with pytest.raises(LitWslError, match=r"conv1\.weight"):
        WeightMapper(Old(), New()).visualize_score_breakdown("conv1.wieght")


def test_a_failing_sample_call_is_told_and_matching_goes_on():
    with pytest.warns(UserWarning, match="without execution order") as seen:
        mapper = WeightMapper(Old(), New(), dummy_input=torch.zeros(1, 5))
    assert len(seen) == 2
    assert dict(mapper.suggest_mapping()) == TRUTH
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not WeightMapper(Old(), New(), dummy_input=torch.zeros(1, 3, 8, 8))._notes


def test_export_is_json_that_lists_every_mapping(tmp_path):
    mapper = WeightMapper(Old(), New())
    data = json.loads(mapper.export_mapping_report(tmp_path / "r.json").read_text())
    assert {m["sources"][0]: m["targets"][0] for m in data["mappings"]} == TRUTH


def test_the_score_of_a_candidate_is_that_of_its_breakdown():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.u, self.v = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.w = nn.Linear(6, 3, bias=False)

    old = {"gamma.weight": torch.ones(3, 6), "beta.weight": torch.ones(6, 6), "alpha.weight": torch.zeros(6, 6)}
    mapper = WeightMapper.from_state_dict(old, Twins())
    (first, *_) = mapper.suggest_mapping().plan.ambiguous
    best = max(candidate.score for candidate in first.candidates)
    console = Console(file=io.StringIO(), width=80)
    mapper.visualize_score_breakdown(first.targets[0], console=console)
    (total,) = re.findall(r"│ score +(\d\.\d\d)", console.file.getvalue())
    assert float(total) == pytest.approx(best, abs=0.006)
