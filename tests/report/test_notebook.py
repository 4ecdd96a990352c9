"""Everything that a user holds in a notebook shows itself there, and is one line in a list."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from lit_wsl import WeightMapper, transfer_weights
from lit_wsl.rebasin import infer_permutation_spec
from lit_wsl.rebasin.job import AlignOptions, align


@pytest.fixture(scope="module")
def shown():
    torch.manual_seed(0)
    old, new = (nn.Sequential(*(nn.Linear(6, 6) for _ in range(40)), nn.ReLU(), nn.Linear(6, 2)) for _ in range(2))
    mapper = WeightMapper(old, new)
    report = transfer_weights(new, old)
    small = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    spec = infer_permutation_spec(small, (torch.randn(3, 4),))
    states = {name: {n: t + 0.1 * torch.randn_like(t) for n, t in small.state_dict().items()} for name in "ab"}
    aligned = align(states, None, spec, AlignOptions(on="weights"), parameters=list(small.state_dict()))
    return {
        "TransferReport": report,
        "TransferPlan": report.plan,
        "MappingResult": mapper.suggest_mapping(),
        "WeightMapper": mapper,
        "PermutationSpec": spec,
        "RebasinReport": aligned,
    }


KINDS = ["TransferReport", "TransferPlan", "MappingResult", "WeightMapper", "PermutationSpec", "RebasinReport"]


@pytest.mark.parametrize("kind", KINDS)
def test_html_is_short_and_repr_is_one_line(shown, kind):
    value = shown[kind]
    page = value._repr_html_()
    assert page.startswith("<pre")
    assert page.count("\n") < 50
    assert "\n" not in repr(value)
    assert len(repr(value)) < 200
    assert kind in repr(value)
    assert "tensor(" not in repr(value) + str(value)
    assert value._repr_mimebundle_() == {"text/plain": repr(value), "text/html": page}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_shown_twice_in_a_notebook(shown, kind, monkeypatch):
    outside = shown[kind]._repr_html_(), str(shown[kind])
    displayed = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda segments, text: displayed.append(text))
    assert (shown[kind]._repr_html_(), str(shown[kind])) == outside
    assert not displayed


@pytest.mark.parametrize("kind", KINDS[:4])
def test_names_are_text_and_not_markup(kind):
    evil = "<script>alert(1)</script>"
    old = {f"{evil}.weight": torch.ones(2, 3), f"{evil}.bias": torch.ones(2)}
    new = nn.ModuleDict({evil: nn.Linear(3, 2)})
    mapper = WeightMapper.from_state_dict(old, new)
    report = transfer_weights(new, old)
    values = dict(zip(KINDS, (report, report.plan, mapper.suggest_mapping(), mapper)))
    page = values[kind]._repr_html_()
    assert "<script" not in page


@pytest.mark.parametrize("kind", ["TransferReport", "MappingResult", "WeightMapper"])
def test_rich_prints_them_too(shown, kind):
    console = Console(file=io.StringIO(), width=80)
    console.print(shown[kind])
    assert "of 1,694 elements" in console.file.getvalue()
