"""A walk through the guides that this package's users grew up with, block by block, with their keyword names.

Part one: WeightMapper; part two: buffers; part three: permutation matching. A block that shows the inside of a class is
walked as what it promises: the data is there, and read-only.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lit_wsl.checkpoint import load_checkpoint_as_dict
from lit_wsl.errors import MappingError
from lit_wsl.mapper import WeightMapper
from lit_wsl.renamer import WeightRenamer


class OldModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x):
        return self.classifier(self.backbone(x).flatten(1))


class NewModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.feature_extractor = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x):
        return self.head(self.feature_extractor(x).flatten(1))


TRUTH = {
    "backbone.0.weight": "feature_extractor.0.weight",
    "backbone.0.bias": "feature_extractor.0.bias",
    "backbone.1.weight": "feature_extractor.1.weight",
    "backbone.1.bias": "feature_extractor.1.bias",
    "classifier.0.weight": "head.0.weight",
    "classifier.0.bias": "head.0.bias",
    "classifier.2.weight": "head.2.weight",
    "classifier.2.bias": "head.2.bias",
}


@pytest.fixture
def old_model():
    torch.manual_seed(0)
    return OldModel()


@pytest.fixture
def new_model():
    torch.manual_seed(1)
    return NewModel()


@pytest.fixture
def checkpoint(tmp_path, old_model):
    torch.save({"state_dict": old_model.state_dict(), "epoch": 3}, tmp_path / "old_model.pth")
    return tmp_path / "old_model.pth"


@pytest.fixture
def mapper(old_model, new_model):
    return WeightMapper(old_model, new_model)


# ---- part one: WeightMapper ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["lit_wsl.mapper", "lit_wsl.mapper.weight_mapper", "lit_wsl.models.weight_mapper"])
def test_import_paths(path):
    import importlib

    assert importlib.import_module(path).WeightMapper is WeightMapper


def test_basic_usage_checkpoint_to_adapted_weights(checkpoint, old_model, new_model, tmp_path, capsys):
    mapper = WeightMapper.from_checkpoint(checkpoint, new_model)
    mapping = mapper.suggest_mapping(threshold=0.6)
    mapper.print_analysis()
    assert "feature_extractor" in capsys.readouterr().out
    renamer = WeightRenamer(checkpoint)
    renamer.rename_keys(mapping)
    renamer.save(tmp_path / "adapted_weights.pth")
    adapted = load_checkpoint_as_dict(tmp_path / "adapted_weights.pth")["state_dict"]
    assert set(TRUTH.values()) <= set(adapted)
    new_model.load_state_dict({name: adapted[name] for name in TRUTH.values()}, strict=False)
    for source, target in TRUTH.items():
        assert torch.equal(old_model.state_dict()[source], new_model.state_dict()[target])


def test_dummy_input_of_all_three_constructors(checkpoint, old_model, new_model):
    dummy_input = torch.randn(1, 3, 8, 8)
    for mapper in (
        WeightMapper(old_model, new_model, dummy_input=dummy_input),
        WeightMapper.from_checkpoint(checkpoint, new_model, dummy_input=dummy_input),
        WeightMapper.from_state_dict(old_model.state_dict(), new_model, dummy_input=dummy_input),
    ):
        assert dict(mapper.suggest_mapping()) == TRUTH


def test_the_state_dict_out_of_a_loaded_checkpoint(checkpoint, new_model):
    loaded = load_checkpoint_as_dict(checkpoint)
    old_weights = loaded.get("state_dict", loaded)
    assert dict(WeightMapper.from_state_dict(old_weights, new_model).suggest_mapping(threshold=0.6)) == TRUTH


def test_two_models(mapper):
    assert dict(mapper.suggest_mapping(threshold=0.6)) == TRUTH
    assert mapper.get_mapping_dict() == TRUTH


def test_strategies_and_weights(mapper):
    assert dict(mapper.suggest_mapping(strategy="conservative")) == TRUTH
    assert all(score >= 0.75 for _, _, score in mapper.get_mapping_with_scores())
    assert dict(mapper.suggest_mapping(strategy="shape_only")) == TRUTH
    assert dict(mapper.suggest_mapping(weights={"shape": 0.5, "name": 0.4, "hierarchy": 0.1})) == TRUTH


def test_shape_only_scores_shapes_alone(mapper):
    mapper.suggest_mapping(strategy="shape_only")
    assert {score for _, _, score in mapper.get_mapping_with_scores()} == {1.0}


def test_export_report_by_its_keyword(mapper, tmp_path):
    mapper.suggest_mapping()
    mapper.export_mapping_report(output_path=tmp_path / "mapping_report.json")
    mapper.export_mapping_report(tmp_path / "again.json")
    report = json.loads((tmp_path / "mapping_report.json").read_text())
    assert report == json.loads((tmp_path / "again.json").read_text())
    assert {row["sources"][0]: row["targets"][0] for row in report["mappings"]} == TRUTH


def test_mappings_with_scores_sorted_by_the_reader(mapper):
    mapper.suggest_mapping()
    mappings = mapper.get_mapping_with_scores()
    mappings.sort(key=lambda x: x[2], reverse=True)
    assert [m[2] for m in mappings] == sorted((m[2] for m in mappings), reverse=True)
    assert [(s, t) for s, t, score in mappings if score < 0.7] == []


def test_signatures_by_keyword_and_by_position(checkpoint, old_model, new_model):
    pairs = [({"encoder"}, {"decoder"})]
    sample = torch.randn(1, 3, 8, 8)
    made = [
        WeightMapper(old_model, new_model, 0.0, sample, pairs),
        WeightMapper(
            source_module=old_model,
            target_module=new_model,
            shape_tolerance=0.0,
            dummy_input=sample,
            incompatible_pairs=pairs,
        ),
        WeightMapper.from_state_dict(old_model.state_dict(), new_model, 0.0, sample, pairs),
        WeightMapper.from_state_dict(
            source_state_dict=old_model.state_dict(),
            target_module=new_model,
            shape_tolerance=0.0,
            dummy_input=sample,
            incompatible_pairs=pairs,
        ),
        WeightMapper.from_checkpoint(checkpoint, new_model, 0.0),
        WeightMapper.from_checkpoint(checkpoint_path=checkpoint, target_module=new_model, shape_tolerance=0.0),
    ]
    for mapper in made:
        assert dict(mapper.suggest_mapping(0.6, "best_match", None)) == TRUTH


def test_unmatched_of_mapper_and_result(old_model, new_model):
    new_model.head[2] = nn.Linear(16, 7)
    mapper = WeightMapper(old_model, new_model)
    result = mapper.suggest_mapping()
    assert mapper.get_unmatched() == result.get_unmatched()
    assert result.get_unmatched() == {
        "source": ["classifier.2.weight", "classifier.2.bias"],
        "target": ["head.2.weight", "head.2.bias"],
    }


class Parts(nn.Module):
    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 4))


def test_without_pairs_nothing_is_forbidden():
    for mapper in (
        WeightMapper(Parts("backbone"), Parts("head")),
        WeightMapper(Parts("backbone"), Parts("head"), incompatible_pairs=[]),
    ):
        assert dict(mapper.suggest_mapping()) == {"backbone.weight": "head.weight", "backbone.bias": "head.bias"}


@pytest.mark.parametrize("names", [("yolo_backbone", "head"), ("head", "yolo_backbone")])
def test_a_pair_forbids_both_ways_by_chunks(names):
    pairs = [({"backbone", "encoder", "feature"}, {"head", "classifier", "decoder"})]
    mapper = WeightMapper(Parts(names[0]), Parts(names[1]), incompatible_pairs=pairs)
    assert not mapper.suggest_mapping()
    assert mapper.get_unmatched() == {
        "source": [f"{names[0]}.weight", f"{names[0]}.bias"],
        "target": [f"{names[1]}.weight", f"{names[1]}.bias"],
    }


def test_the_users_words_are_cut_as_names_are():
    """``mlp_head`` in a pair means what it means in a name: ``mlp`` and ``head``, in this order."""
    pairs = [({"encoder", "transformer"}, {"decoder", "mlp_head"})]
    mapper = WeightMapper(Parts("encoder"), Parts("mlp_head"), incompatible_pairs=pairs)
    assert not mapper.suggest_mapping()
    mapper = WeightMapper(Parts("encoder"), Parts("encoder_mlp"), incompatible_pairs=pairs)
    assert set(mapper.suggest_mapping().values()) == {"encoder_mlp.weight", "encoder_mlp.bias"}


def test_a_match_refused_by_a_pair_says_so():
    mapper = WeightMapper(Parts("backbone"), Parts("head"), incompatible_pairs=[({"backbone"}, {"head"})])
    plan = mapper.suggest_mapping().plan
    reasons = {left.reason for left in (*plan.unmatched_source, *plan.unmatched_target)}
    assert all("incompatible" in reason and "backbone" in reason and "head" in reason for reason in reasons), reasons


def test_manual_override_of_a_copy(mapper, checkpoint, tmp_path):
    result = mapper.suggest_mapping()
    for mapping in (mapper.get_mapping_dict(), result.get_mapping_dict(), dict(result), result.copy(), result | {}):
        assert type(mapping) is dict
        mapping["classifier.0.weight"] = "head.corrected.weight"
        renamer = WeightRenamer(checkpoint)
        renamer.rename_keys(mapping)
        assert "head.corrected.weight" in renamer.list_keys()
    assert dict(result) == TRUTH
    assert mapper.get_mapping_dict() == TRUTH
    assert result | {"a": "b"} == {**TRUTH, "a": "b"}
    assert {"a": "b"} | result == {"a": "b", **TRUTH}
    assert json.loads(json.dumps(result.get_mapping_dict())) == TRUTH


def test_views_print(mapper, capsys):
    result = mapper.suggest_mapping(threshold=0.6)
    mapper.visualize_mapping(result=result, show_unmatched=True, max_matches=30, max_unmatched=15)
    assert "backbone.0" in capsys.readouterr().out
    mapper.visualize_hierarchies(max_depth=5)
    mapper.visualize_hierarchies(show_matches=True, max_depth=5)
    assert "classifier" in capsys.readouterr().out
    mapper.visualize_score_breakdown("backbone.0.weight")
    shown = capsys.readouterr().out
    for part in ("shape", "name", "hierarchy", "token", "edit", "substring", "depth", "path"):
        assert part in shown
    mapper.print_analysis(top_n=10, show_unmatched=True)
    assert "100.0%" in capsys.readouterr().out


def test_what_the_guide_calls_attributes_is_data(mapper, old_model):
    mapper.suggest_mapping()
    assert set(mapper.source_params) == {name for name, _ in old_model.named_parameters()}
    info = mapper.source_params["backbone.0.weight"]
    assert (info.name, tuple(info.shape)) == ("backbone.0.weight", (8, 3, 3, 3))
    group = mapper.source_groups["backbone.0"]
    assert group.module_path == "backbone.0"
    assert set(group.params) == group.param_types == {"weight", "bias"}
    assert mapper.target_groups["head.2"].params["bias"].name == "head.2.bias"
    root = mapper.source_hierarchy
    assert (root.name, root.full_path, root.depth, root.parent) == ("", "", 0, None)
    conv = root.children["backbone"].children["0"]
    assert (conv.name, conv.full_path, conv.depth) == ("0", "backbone.0", 2)
    assert conv.parent is root.children["backbone"]
    assert conv.parameter_group == mapper.source_groups["backbone.0"]
    assert set(mapper.target_hierarchy.children) == {"feature_extractor", "head"}
    assert mapper.target_groups_by_types[frozenset({"weight", "bias"})] == [
        "feature_extractor.0",
        "feature_extractor.1",
        "head.0",
        "head.2",
    ]


@pytest.mark.parametrize(
    "name", ["source_params", "target_params", "source_groups", "target_groups", "target_groups_by_types"]
)
def test_attributes_are_read_only(mapper, name):
    value = getattr(mapper, name)
    with pytest.raises(TypeError):
        value["x"] = None
    with pytest.raises(AttributeError):
        setattr(mapper, name, {})


def test_groups_are_matched_as_a_whole(mapper):
    mapping = dict(mapper.suggest_mapping())
    for path, group in mapper.source_groups.items():
        targets = {mapping[info.name].rpartition(".")[0] for info in group.params.values()}
        assert len(targets) == 1, path


# ---- part two: buffers -----------------------------------------------------------------------------------------------


def with_buffers(conv, norm):
    return nn.ModuleDict({"conv": conv, "bn": norm})


class Statistics(nn.Module):
    """A norm whose statistics have a size of their own, as in the guide's first example."""

    def __init__(self, size, statistics):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.register_buffer("running_mean", torch.zeros(statistics))
        self.register_buffer("running_var", torch.ones(statistics))


@pytest.mark.parametrize(("mode", "matched"), [("strict", False), ("lenient", True), ("exclude", True)])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Statistics(64, 64), Statistics(64, 32)),  # other channel counts in buffers
        (nn.BatchNorm2d(64), nn.BatchNorm2d(64, track_running_stats=False)),  # fused operations
        (nn.BatchNorm2d(64), nn.GroupNorm(8, 64)),  # another kind of normalization
    ],
)
def test_examples_of_the_buffer_guide(mode, matched, source, target):
    source = with_buffers(nn.Conv2d(32, 64, 3), source)
    target = with_buffers(nn.Conv2d(32, 64, 3), target)
    result = WeightMapper(source_module=source, target_module=target, buffer_matching_mode=mode).suggest_mapping()
    assert ("bn.weight" in result) is matched
    assert "conv.weight" in result


def test_the_default_mode_is_exclude(old_model, new_model):
    mapper = WeightMapper(source_module=old_model, target_module=new_model)
    result = mapper.suggest_mapping(threshold=0.7)
    assert not [name for name in result if "running" in name or "num_batches" in name]
    assert mapper.get_unmatched() == {"source": [], "target": []}  # what is excluded is not unmatched


@pytest.mark.parametrize("mode", ["strict", "lenient", "exclude"])
def test_trainable_parameters_never_match_across_shapes(mode):
    source = with_buffers(nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64))
    target = with_buffers(nn.Conv2d(32, 128, 3), nn.BatchNorm2d(128))
    assert not WeightMapper(source, target, buffer_matching_mode=mode).suggest_mapping()


def test_match_quality_and_unmatched_as_the_guide_reads_them(old_model, new_model):
    result = WeightMapper(old_model, new_model, buffer_matching_mode="lenient").suggest_mapping()
    scored = result.get_mapping_with_scores()
    assert set(scored) == set(result)
    buffers = {src: pair for src, pair in scored.items() if "running" in src or "num_batches" in src}
    assert {src: target for src, (target, _) in buffers.items()} == {
        f"backbone.1.{leaf}": f"feature_extractor.1.{leaf}"
        for leaf in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert result.get_unmatched()["source"][:10] == []


def test_an_unknown_mode_is_refused(old_model, new_model):
    with pytest.raises(MappingError, match="Did you mean 'lenient'"):
        WeightMapper(old_model, new_model, buffer_matching_mode="leniant")


# ---- part three: permutation matching --------------------------------------------------------------------------------


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def test_the_first_task_vector_is_the_reference_and_the_others_are_aligned(mlp):
    from lit_wsl.rebasin import apply_permutation, apply_permutation_to_task_vectors, infer_permutation_spec

    spec = infer_permutation_spec(mlp, (torch.randn(4, 6),))
    first = {name: torch.randn_like(tensor) for name, tensor in mlp.state_dict().items()}
    second = apply_permutation(spec, spec.random_permutations(seed=1), first)
    aligned = apply_permutation_to_task_vectors([first, second], spec=spec)
    assert len(aligned) == 2
    for vector in aligned:
        for name, tensor in first.items():
            assert torch.allclose(vector[name], tensor), name


def test_task_vectors_are_differences_from_the_pretrained_model(mlp):
    from lit_wsl.rebasin import task_vector

    pretrained = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    tuned = {name: tensor + 1.0 for name, tensor in pretrained.items()}
    for tensor in task_vector(tuned, pretrained).values():
        assert torch.allclose(tensor, torch.ones_like(tensor))


@pytest.mark.parametrize("name", ["ResNet20", "ResNet50", "VGG16", "ViT-B-32", "ViT-B-16", "ViT-L-14"])
def test_architectures_of_the_guide_are_known_by_their_names(name):
    from lit_wsl.errors import RebasinError
    from lit_wsl.rebasin import permutation_spec

    with pytest.raises(RebasinError) as error:  # a state dict of something else: known, and refused
        permutation_spec(name, {"weight": torch.ones(2, 2)})
    assert "No permutation spec is registered" not in str(error.value)


def test_an_unknown_architecture_names_the_known_ones():
    from lit_wsl.errors import RebasinError
    from lit_wsl.rebasin import permutation_spec

    with pytest.raises(RebasinError, match="resnet20"):
        permutation_spec("NoSuchNet", {"weight": torch.ones(2, 2)})


def test_a_spec_of_ones_own(mlp):
    from lit_wsl.rebasin import PermutationSpecBuilder, permutation_spec, register_permutation_spec

    @register_permutation_spec("guide_mlp")
    def guide_mlp(state_dict):
        return PermutationSpecBuilder(state_dict).linear("0", "hidden", None).linear("2", None, "hidden").build()

    assert permutation_spec("guide-mlp", mlp.state_dict()).groups["hidden"].size == 16


def test_perm_matching_is_an_option_and_a_field_of_the_results(mlp, tmp_path):
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.loggers import CSVLogger

    from lit_wsl import RebasinCallback

    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return self(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for name in ("pretrained", "reference"):
        torch.save({"state_dict": Net().state_dict()}, tmp_path / f"{name}.ckpt")
    for wanted in (True, False):
        callback = RebasinCallback(
            tmp_path / "pretrained.ckpt",
            reference=tmp_path / "reference.ckpt",
            perm_matching=wanted,
            perm_matching_max_iter=20,
        )
        assert callback.options.max_iter == 20
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=CSVLogger(tmp_path, name="", version=str(wanted)),
            callbacks=[callback],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Net(), torch.utils.data.DataLoader(torch.randn(8, 6), batch_size=4))
        results = json.loads((tmp_path / str(wanted) / "rebasin.json").read_text())
        assert results["perm_matching"] is wanted
