"""Import paths that users have in their notes, and files that older versions wrote, keep working."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_wsl import TransferPlan, transfer_weights
from lit_wsl.rebasin import apply_permutation

PUBLIC = {  # ``__all__`` of the packages and docs/api.md at 53d32d7, but for views that show nothing of their own now
    "lit_wsl": """
        LitWslError MappingResult RebasinCallback TransferPlan TransferReport WeightMapper WeightRenamer
        WeightTransferCallback __version__ load_checkpoint_as_dict transfer_weights
    """,
    "lit_wsl.callbacks": """
        RebasinCallback WeightTransferCallback
    """,
    "lit_wsl.callbacks.rebasin": """
        RebasinCallback
    """,
    "lit_wsl.callbacks.weight_transfer": """
        WeightTransferCallback
    """,
    "lit_wsl.checkpoint": """
        Checkpoint ForeignName ForeignObject atomic atomic_save atomic_write_bytes atomic_write_text
        load_checkpoint_as_dict open_checkpoint replace_at save_safetensors
    """,
    "lit_wsl.checkpoint.convert": """
        convert_checkpoint
    """,
    "lit_wsl.checkpoint.reader": """
        Checkpoint load_checkpoint_as_dict open_checkpoint
    """,
    "lit_wsl.errors": """
        CheckpointError CoverageError LitWslError MappingError PlanError RebasinError TransferError
    """,
    "lit_wsl.mapper": """
        MappingResult MatchingOptions WeightMapper build_plan
    """,
    "lit_wsl.mapper.options": """
        MatchingOptions
    """,
    "lit_wsl.mapper.result": """
        MappingResult
    """,
    "lit_wsl.mapper.scoring": """
        ScoreBreakdown score_pair
    """,
    "lit_wsl.mapper.weight_mapper": """
        WeightMapper
    """,
    "lit_wsl.models.checkpoint": """
        load_checkpoint_as_dict
    """,
    "lit_wsl.models.weight_mapper": """
        WeightMapper
    """,
    "lit_wsl.models.weight_renamer": """
        WeightRenamer
    """,
    "lit_wsl.rebasin": """
        AxisSpec AxisUse InterpolationBarrier InterpolationCurve MatchingResult PermutationGroup PermutationSpec
        PermutationSpecBuilder Permutations Verification activation_matching apply_permutation
        apply_permutation_to_task_vectors average best_matching compose_permutations infer_permutation_spec
        interpolate interpolation_curve invert_permutations joint_matching midpoint_gap permutation_spec
        reestimate_batchnorm register_permutation_spec registered_permutation_specs repair task_arithmetic
        task_vector verify_permutation_spec weight_matching weight_matching_for_task_vectors
    """,
    "lit_wsl.rebasin.apply": """
        apply_permutation
    """,
    "lit_wsl.rebasin.inference": """
        infer_permutation_spec
    """,
    "lit_wsl.rebasin.matching": """
        weight_matching
    """,
    "lit_wsl.rebasin.merging": """
        average interpolate linear_combination task_arithmetic
    """,
    "lit_wsl.rebasin.metrics": """
        InteractionOverlap LeftSubspaceOverlap MagnitudeRatio PairMoments RightSubspaceOverlap SignConflict
        Spectrum SpectrumOverlap StackEffectiveRank StackParticipationRatio StackSpectralGap StackStableRank
        VectorAngle VectorComparison VectorCosineSimilarity VectorDotProduct VectorL2Distance angle
        compare_vectors cosine_similarity dot_product effective_rank interaction_overlap l2_distance
        left_subspace_overlap magnitude_ratio matrix_metrics pair_moments participation_ratio
        right_subspace_overlap sign_conflict spectral_gap spectrum spectrum_overlap stable_rank
        stack_singular_values task_vector_metrics vector_metrics
    """,
    "lit_wsl.rebasin.spec": """
        PermutationSpec
    """,
    "lit_wsl.rebasin.task_vectors": """
        apply_permutation_to_task_vectors task_vector weight_matching_for_task_vectors
    """,
    "lit_wsl.rebasin.verify": """
        verify_permutation_spec
    """,
    "lit_wsl.renamer": """
        WeightRenamer
    """,
    "lit_wsl.report.breakdown": """
        BreakdownView score_table
    """,
    "lit_wsl.report.folding": """
        TreeLine tree_lines
    """,
    "lit_wsl.report.html": """
        save_html
    """,
    "lit_wsl.report.json_report": """
        report_dict
    """,
    "lit_wsl.report.runners_up": """
        candidates runner_up
    """,
    "lit_wsl.report.summary": """
        summary_lines
    """,
    "lit_wsl.report.tables": """
        MappingView stacked
    """,
    "lit_wsl.report.trees": """
        HierarchyView
    """,
    "lit_wsl.structure": """
        ModelDescription ModuleNode ParameterGroup ParameterInfo describe tokenize trace_execution_order
    """,
    "lit_wsl.structure.describe": """
        describe
    """,
    "lit_wsl.structure.families": """
        Family Slot fold fold_names ranges
    """,
    "lit_wsl.structure.info": """
        ModelDescription ModuleNode ParameterGroup ParameterInfo tokenize
    """,
    "lit_wsl.structure.tracing": """
        trace_execution_order
    """,
    "lit_wsl.transfer": """
        Ambiguity Candidate Cast Concat Count Coverage FanOut FoldBatchNorm ModuleCoverage NewInputChannels
        Operation PartialHead Permute PlanEntry Reshape ResizePositionEmbedding SideSummary Split Stack Tie
        TransferPlan Transpose Unmatched Unstack measure_coverage
    """,
    "lit_wsl.transfer.api": """
        transfer_weights
    """,
    "lit_wsl.transfer.coverage": """
        Count Coverage
    """,
    "lit_wsl.transfer.operations": """
        operation_from_dict run_operations run_shapes
    """,
    "lit_wsl.transfer.plan": """
        Ambiguity PlanEntry TransferPlan Unmatched
    """,
    "lit_wsl.transfer.report": """
        TransferReport
    """,
}
FILES = Path(__file__).parent / "written_at_53d32d7"


@pytest.mark.parametrize("path", PUBLIC)
def test_what_was_public_is_found_where_it_was(path: str) -> None:
    module = importlib.import_module(path)
    assert [name for name in PUBLIC[path].split() if not hasattr(module, name)] == []


@pytest.mark.parametrize(
    ("older", "newer", "name"),
    [
        ("lit_wsl.models.weight_renamer", "lit_wsl.renamer", "WeightRenamer"),
        ("lit_wsl.models.checkpoint", "lit_wsl.checkpoint", "load_checkpoint_as_dict"),
        ("lit_wsl.models.weight_mapper", "lit_wsl.mapper", "WeightMapper"),
        ("lit_wsl.mapper.weight_mapper", "lit_wsl.mapper", "WeightMapper"),
        ("lit_wsl.mapper.options", "lit_wsl.mapper", "MatchingOptions"),
        ("lit_wsl.rebasin.task_vectors", "lit_wsl.rebasin", "task_vector"),
        ("lit_wsl.rebasin.matching", "lit_wsl.rebasin", "weight_matching"),
        ("lit_wsl.rebasin.rebasing.rebase", "lit_wsl.rebasin", "RebaseResult"),
        ("lit_wsl.rebasin.rebasing.fitting", "lit_wsl.rebasin.merging.fitting", "procrustes"),
    ],
)
def test_older_paths_give_the_same_object(older: str, newer: str, name: str) -> None:
    assert getattr(importlib.import_module(older), name) is getattr(importlib.import_module(newer), name)


class Old(nn.Module):
    """What the files of :data:`FILES` were written about, by the code of commit 53d32d7."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.q, self.k, self.v, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.fc1(x)).relu()
        return self.out(self.q(x) * torch.sigmoid(self.k(x)) + self.v(x))


class New(nn.Module):
    """The same, with the projections fused."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"inp": nn.Linear(4, 8), "norm": nn.BatchNorm1d(8), "qkv": nn.Linear(8, 24)})
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.body["qkv"](self.body["norm"](self.body["inp"](x)).relu()).chunk(3, -1)
        return self.head(q * torch.sigmoid(k) + v)


def unpickled(name: str) -> object:
    return pickle.loads((FILES / f"{name}.pkl").read_bytes())


@pytest.fixture
def models() -> tuple[Old, New, torch.Tensor]:
    torch.manual_seed(0)
    old, new, x = Old(), New(), torch.randn(16, 4)
    old(x)  # running statistics of its own
    return old.eval(), new.eval(), x


@pytest.mark.parametrize("written", ["plan.json", "plan.pkl", "report.pkl", "result.pkl"])
def test_a_plan_of_then_does_today_what_it_did(written: str, models: tuple[Old, New, torch.Tensor]) -> None:
    old, new, x = models
    if written == "plan.json":
        plan = TransferPlan.load(FILES / written)
    else:
        found = unpickled(written.removesuffix(".pkl"))
        plan = found if isinstance(found, TransferPlan) else found.plan
    report = transfer_weights(new, old.state_dict(), plan=plan)
    assert report.coverage.target.share == 1.0
    torch.testing.assert_close(new(x), old(x))


def test_what_was_pickled_shows_itself() -> None:
    report, result = unpickled("report"), unpickled("result")
    assert report.coverage.target.share == 1.0
    assert set(report.loaded) == set(New().state_dict())
    assert "100" in str(report)
    assert result["fc1.weight"] == "body.inp.weight"
    assert TransferPlan.load(FILES / "plan.json").entries == unpickled("plan").entries


def test_a_spec_of_then_permutes_today(models: tuple[Old, New, torch.Tensor]) -> None:
    old, _, x = models
    spec = unpickled("spec")
    moved = Old().eval()
    moved.load_state_dict(apply_permutation(spec, spec.random_permutations(seed=1), old.state_dict()))
    assert not torch.equal(moved.fc1.weight, old.fc1.weight)
    torch.testing.assert_close(moved(x), old(x))


def test_an_older_module_does_not_hide_the_names_of_the_package_above_it():
    importlib.import_module("lit_wsl.transfer.plan")
    assert importlib.import_module("lit_wsl.transfer").PlanEntry is importlib.import_module("lit_wsl.plan").PlanEntry


def test_a_function_keeps_its_name_from_a_module_that_was_called_so():
    from lit_wsl import structure

    former = importlib.import_module("lit_wsl.structure.describe")
    assert structure.describe is former.describe
