import torch
from torch import nn

from lit_wsl.mapper import MappingResult
from lit_wsl.plan.coverage import measure_coverage
from lit_wsl.plan.entries import Ambiguity, Candidate, PlanEntry, SideSummary, Unmatched
from lit_wsl.plan.operations import Concat, Transpose
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure import describe


def result():
    source = describe({"q": torch.zeros(2, 2), "k": torch.zeros(2, 2), "w": torch.zeros(3, 2), "left": torch.zeros(7)})
    target = describe({"qk": torch.zeros(4, 2), "fc": torch.zeros(2, 3), "x": torch.zeros(5)})
    plan = TransferPlan(
        entries=(
            PlanEntry(("q", "k"), ("qk",), (Concat(0, (2, 2)),), ((2, 2), (2, 2)), ((4, 2),), score=0.9),
            PlanEntry(("w",), ("fc",), (Transpose(),), ((3, 2),), ((2, 3),), score=0.7),
        ),
        source=SideSummary.of(source),
        target=SideSummary.of(target),
        ambiguous=(Ambiguity(("x",), (Candidate(("left",), 0.5),), (5,), "nothing decides"),),
        unmatched_source=(Unmatched("left", (7,), "parameter", "no place"),),
    )
    return MappingResult(plan, measure_coverage(plan, source, target))


def test_only_steps_of_one_name_to_one_name_are_in_the_mapping():
    assert dict(result()) == {"w": "fc"}
    assert len(result()) == 1
    assert result().composite == ((("q", "k"), ("qk",)),)
    assert result().get_mapping_with_scores() == {"w": ("fc", 0.7)}


def test_ambiguous_targets_count_as_unmatched():
    assert result().get_unmatched() == {"source": ["left"], "target": ["x"]}


def test_coverage_counts_all_steps():
    assert result().coverage.target.elements == 8 + 6
    assert "1 one-to-one, 1 composite" in repr(result())


def test_it_is_a_mapping():
    assert isinstance(result(), MappingResult)
    assert {**result()} == {"w": "fc"}
    assert "q" not in result()
    assert result().get("q") is None
    assert nn.Module not in result()
