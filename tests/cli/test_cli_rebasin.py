"""``lit-wsl rebasin``: what it refuses, what it falls back to, statistics of a merged model."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lit_wsl.cli import main
from lit_wsl.rebasin import best_matching, infer_permutation_spec

CODE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def net(norm=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.ReLU(), nn.ReLU(), nn.Linear(8, 3))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
    def forward(self, x):
        hidden = self.a(x).relu()
        return {"features": hidden, "logits": self.b(hidden)}

class Broken(Two):
    def forward(self, x):
        raise RuntimeError("no way in")

def batch():
    return torch.ones(2, 4)

def logits(output):
    return output["logits"]

def images():
    return torch.randn(64, 4, generator=torch.Generator().manual_seed(1)) + 2

def loader():
    return DataLoader(TensorDataset(images(), torch.zeros(64)), batch_size=16)
"""


@pytest.fixture
def work(tmp_path):
    """A file of models, and two checkpoints of each."""
    (tmp_path / "nets.py").write_text(CODE)
    scope: dict = {}
    exec(CODE, scope)
    for name, model in (("net", scope["net"]()), ("two", scope["Two"]())):
        for seed in (0, 1):
            torch.manual_seed(seed)
            state = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
            state = {k: v.abs() if k.endswith("running_var") else v for k, v in state.items()}
            torch.save(state, tmp_path / f"{name}{seed}.pt")
    return tmp_path, scope


def run(folder, checkpoints, model, *more):
    files = [str(folder / f"{checkpoints}{seed}.pt") for seed in (0, 1)]
    options = ["--model", f"{folder}/nets.py:{model}", "--sample", f"{folder}/nets.py:batch", *map(str, more)]
    return main(["rebasin", *files, *options])


def test_stale_statistics_are_refused_before_anything_is_written(work, capsys):
    folder, _ = work
    assert run(folder, "net", "net", "--merge", "average", "-o", folder / "out") == 2
    assert "--data" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_statistics_of_the_merged_model_come_from_data(work):
    folder, scope = work
    data = ("--merge", "average", "--data", f"{folder}/nets.py:loader", "-o", folder / "out")
    assert run(folder, "net", "net", *data) == 0
    merged = torch.load(folder / "out" / "rebasin_merged.ckpt", weights_only=True)["state_dict"]
    seen = nn.functional.linear(scope["images"](), merged["0.weight"], merged["0.bias"])
    torch.testing.assert_close(merged["1.running_mean"], seen.mean(0), rtol=1e-4, atol=1e-5)
    report = json.loads((folder / "out" / "rebasin.json").read_text())
    assert any("4 training batches" in note for note in report["notes"])


def test_models_count_by_their_weights(work, capsys):
    folder, _ = work
    assert run(folder, "two", "Two", "--outputs", f"{folder}/nets.py:logits", "--merge", "average", "-o",
               folder / "out", "--merge-weights", 1, 3) == 0  # fmt: skip
    merged = torch.load(folder / "out" / "rebasin_merged.ckpt", weights_only=True)["state_dict"]
    (aligned,) = (folder / "out").glob("*aligned*")
    aligned = torch.load(aligned, weights_only=True)["state_dict"]
    first = torch.load(folder / "two0.pt", weights_only=True)
    for name, tensor in first.items():
        torch.testing.assert_close(merged[name], (tensor + 3 * aligned[name]) / 4)
    assert run(folder, "two", "Two", "--merge", "average", "-o", folder / "other", "--merge-weights", 1, 2, 3) == 2
    assert "merge_weights" in capsys.readouterr().err


def test_the_mean_of_statistics_only_when_told(work, capsys):
    folder, _ = work
    assert run(folder, "net", "net", "--merge", "average", "--repair-batches", "0", "-o", folder / "out") == 0
    assert (folder / "out" / "rebasin_merged.ckpt").exists()
    assert "statistics" in capsys.readouterr().err


def test_without_symmetries_models_are_compared_as_they_are(work, capsys):
    folder, _ = work
    assert run(folder, "two", "Two", "-o", folder / "out") == 1  # all of what it returns must stay
    report = json.loads((folder / "out" / "rebasin.json").read_text())
    assert report["perm_matching"] is False
    assert "outputs" in report["reason"]
    assert report["models"]["two1"]["after"] is None
    assert "cosine" in report["models"]["two1"]["before"]["overall"]
    assert capsys.readouterr().err.count("not aligned") == 1


def test_outputs_say_what_counts(work):
    folder, _ = work
    assert run(folder, "two", "Two", "--outputs", f"{folder}/nets.py:logits", "-o", folder / "out") == 0
    assert json.loads((folder / "out" / "rebasin.json").read_text())["spec"]["groups"] == 1


def test_a_model_that_cannot_run_is_compared_as_it_is(work):
    folder, _ = work
    assert run(folder, "two", "Broken", "-o", folder / "out") == 1
    assert "no way in" in json.loads((folder / "out" / "rebasin.json").read_text())["reason"]


def test_a_spec_from_a_file_needs_no_sample(work):
    folder, scope = work
    spec = infer_permutation_spec(scope["Two"](), (torch.ones(2, 4),), outputs=lambda output: output["logits"])
    spec.to_json(folder / "spec.json")
    files = [str(folder / f"two{seed}.pt") for seed in (0, 1)]
    model = ("--model", f"{folder}/nets.py:Two", "--spec", str(folder / "spec.json"))
    assert main(["rebasin", *files, *model, "-o", str(folder / "out")]) == 0


def test_matching_on_data_is_judged_by_it(work, capsys):
    folder, scope = work
    assert run(folder, "net", "net", "--matching", "best") == 2
    assert "--data" in capsys.readouterr().err
    data = ("--matching", "best", "--data", f"{folder}/nets.py:loader")
    assert run(folder, "net", "net", *data, "--json") == 0
    best = json.loads(capsys.readouterr().out)["models"]["net1"]["matching"]["weights"]
    states = [torch.load(folder / f"net{seed}.pt") for seed in (0, 1)]
    spec = infer_permutation_spec(scope["net"](), (scope["batch"](),))
    batches = [batch for batch, _ in scope["loader"]()]
    wanted = best_matching(spec, scope["net"](), *states, batches, forward=lambda model, x: model(x))
    assert (best["start"], best["objective"]) == (wanted.start, pytest.approx(wanted.objective))


# ---- rebase ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def releases(work):
    """The old base, a fine-tuning of it, and a new release: the old one in another order, in another spelling."""
    from lit_wsl.rebasin import apply_permutation

    folder, scope = work
    model = scope["Two"]().eval()
    spec = infer_permutation_spec(model, (scope["batch"](),), outputs=scope["logits"])
    old = {n: t.clone() for n, t in model.state_dict().items()}
    tuned = {n: t + 0.1 * torch.randn_like(t) for n, t in old.items()}
    order = spec.random_permutations(1)
    new, wanted = (apply_permutation(spec, order, state) for state in (old, tuned))
    torch.save({"state_dict": old}, folder / "old.ckpt")
    torch.save({"state_dict": tuned}, folder / "tuned.ckpt")
    torch.save({"state_dict": {f"net.{n}": t for n, t in new.items()}}, folder / "new.ckpt")
    torch.save({n.replace("a.", "first_layer."): t for n, t in new.items()}, folder / "respelled.pt")
    return folder, wanted


def carry(folder, onto, *more):
    options = ["--base", f"{folder}/old.ckpt", "--onto", f"{folder}/{onto}", "--model", f"{folder}/nets.py:Two"]
    options += ["--outputs", f"{folder}/nets.py:logits"]
    return main(["rebase", f"{folder}/tuned.ckpt", *options, *map(str, more)])


@pytest.mark.parametrize("onto", ["new.ckpt", "respelled.pt"])
def test_a_fine_tuning_is_carried_to_the_new_release(releases, capsys, onto):
    folder, wanted = releases
    out = folder / "rebased.ckpt"
    assert carry(folder, onto, "--sample", f"{folder}/nets.py:batch", "-o", out) == 0
    text = capsys.readouterr()
    assert "permute" in text.out
    assert "quality unknown" in text.err
    state = torch.load(out, weights_only=True)["state_dict"]
    for name, tensor in wanted.items():
        torch.testing.assert_close(state[name], tensor)


def test_data_is_the_sample_too_and_measures_what_arrives(releases, capsys):
    folder, wanted = releases
    out = folder / "rebased.safetensors"
    more = ("--data", f"{folder}/nets.py:loader", "--json")
    assert carry(folder, "new.ckpt", *more, "-o", out) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["method"] == "permute"
    assert facts["missed"] < 1e-6
    assert facts["warnings"] == []
    from safetensors.torch import load_file

    for name, tensor in load_file(out).items():
        torch.testing.assert_close(tensor, wanted[name])


def test_a_head_that_no_base_has_is_carried(releases, capsys):
    folder, wanted = releases
    for name in ("old.ckpt", "new.ckpt"):
        state = torch.load(folder / name, weights_only=True)["state_dict"]
        torch.save({n: t for n, t in state.items() if "b." not in n}, folder / name)
    out = folder / "rebased.ckpt"
    assert carry(folder, "new.ckpt", "--sample", f"{folder}/nets.py:batch", "-o", out) == 0
    assert "b.weight" in capsys.readouterr().out
    state = torch.load(out, weights_only=True)["state_dict"]
    torch.testing.assert_close(state["b.weight"], wanted["b.weight"])


def test_nothing_is_written_where_nothing_can_be_permuted(releases, capsys):
    folder, _ = releases
    out = folder / "rebased.ckpt"
    options = ["--base", f"{folder}/old.ckpt", "--onto", f"{folder}/new.ckpt", "--model", f"{folder}/nets.py:Broken"]
    sample = ["--sample", f"{folder}/nets.py:batch"]
    assert main(["rebase", f"{folder}/tuned.ckpt", *options, *sample, "-o", str(out)]) == 1
    assert "no way in" in capsys.readouterr().err
    assert not out.exists()
