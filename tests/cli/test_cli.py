"""The ``lit-wsl`` command: what it prints, what it writes, and its exit codes."""

import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from conversion_models import NewTransformer, OldTransformer, fit, tokens, transformer_plan
from safetensors import safe_open
from safetensors.torch import save_file

from lit_wsl.cli import COMMANDS, main
from lit_wsl.cli.parser import build_parser
from lit_wsl.transfer import TransferPlan

MODELS = str(Path(__file__).parents[1] / "helpers" / "conversion_models.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a short training, with a namespace among its hyper-parameters, and a plan."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    old = OldTransformer()
    old.save_hyperparameters({"width": 8, "args": Namespace(seed=3)})
    fit(old, tokens(), folder, 1).save_checkpoint(folder / "old.ckpt")
    transformer_plan(old, NewTransformer()).save(folder / "plan.json")
    return folder


def run(*arguments):
    return main([str(a) for a in arguments])


# ---------------------------------------------------------------- the command itself


@pytest.mark.parametrize("command", ["inspect", "map", "convert", "rename", "diff", "rebasin"])
def test_help_teaches_by_examples(command, capsys):
    assert run(command, "--help") == 0
    out = capsys.readouterr().out
    assert f"  lit-wsl {command} " in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("map old.ckpt --modl nets:New", "Did you mean '--model'?"),
        (
            "map old.ckpt --buffers lenent",
            "--buffers must be one of 'exclude', 'lenient', 'strict'; got 'lenent'. Did you",
        ),
        ("map old.ckpt --threshold high", "--threshold must be a number; got 'high'."),
        ("map old.ckpt --weights 0.5", "--weights must be given by keys: --weights.KEY VALUE; got '0.5'"),
        ("diff a.ckpt b.ckpt --limit many", "--limit must be a whole number; got 'many'"),
        ("rebasin a.ckpt b.ckpt --merge averag", "got 'averag'. Did you mean 'average'?"),
        ("rebasin a.ckpt b.ckpt --merge-weights 1 x", "--merge-weights must be a number; got 'x'"),
        ("mapp old.ckpt", "Did you mean 'map'?"),
        ("map", "required: checkpoint"),
        ("rebase old.ckpt", "lit-wsl rebase: the following arguments are required: --base, --onto, -o/--output"),
        ("", "name a command: inspect, map,"),
    ],
)
def test_wrong_usage_is_said_in_two_lines_with_what_was_meant(arguments, words, capsys):
    assert main(arguments.split()) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 2
    assert "typing" not in said


@pytest.mark.parametrize(
    "arguments", [[], ["inspekt"], ["inspect"], ["map", "x", "--threshold", "high"], ["inspect", "x", "--no-such"]]
)
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    assert run(*arguments) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("map nets:New --model old.ckpt", "old.ckpt is a file, not a name in Python code: write my.models:Net"),
        ("map old.ckpt --model nets.py", "say what is meant in it: nets.py:Net"),
        ("map old.ckpt --model net.py:New", "net.py does not exist in {here}. Did you mean nets.py?"),
        ("map old.ckpt --config cli.yaml", "cli.yaml does not exist in {here}"),
    ],
)
def test_a_path_where_a_name_belongs_is_told_from_a_name(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"a.weight": torch.ones(2)}, "old.ckpt")
    Path("nets.py").touch()
    assert main(arguments.split()) == 2
    assert words.format(here=tmp_path) in capsys.readouterr().err


def test_both_ways_to_start_it_are_the_same_and_quick_to_help(tmp_path):
    script = Path(sys.executable).with_name("lit-wsl")
    outputs = [
        subprocess.run([*start, "--help"], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
        for start in ([str(script)], [sys.executable, "-m", "lit_wsl"])
    ]
    assert outputs[0] == outputs[1]
    check = "import sys; from lit_wsl.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_the_same_options_whether_the_others_are_there_or_not(command):
    def options(parser):
        sub = parser._subcommands_action._name_parser_map[command]
        return [(action.option_strings, action.dest, action.help) for action in sub._actions]

    assert options(build_parser([command, "x"])) == options(build_parser())


@pytest.mark.parametrize("command", COMMANDS)
def test_shells_complete_the_names_of_files(command):
    sub = build_parser()._subcommands_action._name_parser_map[command]
    files = [a.dest for a in sub._actions if "_files" in getattr(a, "complete", {}).values()]
    assert any(not action.option_strings and action.dest in files for action in sub._actions)
    assert {a.dest for a in sub._actions if a.metavar in ("FILE", "FOLDER")} <= set(files)


def test_without_jsonargparse_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "lit_wsl.cli.parser", raising=False)
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert run("inspect", "x") == 2
    assert "pip install 'jsonargparse" in capsys.readouterr().err


def test_errors_are_one_message_on_stderr_and_debug_shows_where(tmp_path, capsys):
    assert run("inspect", tmp_path / "missing.ckpt") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lit-wsl inspect: ")
    assert "does not exist" in captured.err
    assert "Traceback" not in captured.err
    with pytest.raises(Exception, match="does not exist"):
        run("inspect", tmp_path / "missing.ckpt", "--debug")


def test_a_reader_that_stops_early_is_no_error(trained):
    command = f"{sys.executable} -m lit_wsl inspect {trained / 'old.ckpt'} --all | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- inspect


def test_inspect_shows_families_and_what_was_not_run(trained, capsys):
    assert run("inspect", trained / "old.ckpt") == 0
    out = capsys.readouterr().out
    assert "h.{0..1}.c_attn.weight\t24x8\tfloat32\t2\t384" in out
    assert "argparse.Namespace (not imported, not run)" in out
    assert "optimizer: 1 parameter group, 29 states (step, exp_avg, exp_avg_sq, max_exp_avg_sq)" in out


def test_inspect_gives_json_and_picks_names(trained, capsys):
    assert run("inspect", trained / "old.ckpt", "--json", "--match", "wte") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["tensors"] == [{"name": "wte.weight", "shape": [11, 8], "dtype": "float32", "elements": 88}]
    assert data["format"] == "lightning"
    assert run("inspect", trained / "old.ckpt", "--match", "nothing") == 1


# ---------------------------------------------------------------- map


def test_map_writes_a_plan_a_page_and_a_report(trained, tmp_path, capsys):
    files = [tmp_path / name for name in ("plan.yaml", "report.html", "report.json")]
    code = run(
        *("map", trained / "old.ckpt", "--model", f"{MODELS}:OldTransformer", "--buffers", "exclude"),
        *("--plan", files[0], "--html", files[1], "--json", files[2]),
    )
    assert code == 0
    plan = TransferPlan.load(files[0])
    assert {e.sources for e in plan.entries} == {e.targets for e in plan.entries}
    assert plan.options["buffers"] == "exclude"
    assert "<html" in files[1].read_text()
    assert json.loads(files[2].read_text())["coverage"]["target"]["share"] == 1.0
    captured = capsys.readouterr()
    assert captured.out.startswith("checkpoint\t100.0% of ")
    assert "entry\t1.00\texact\th.{0..1}.c_attn.weight\th.{0..1}.c_attn.weight" in captured.out
    assert str(files[0]) in captured.err


def test_map_below_the_floor_is_exit_code_1_with_the_cause(trained, tmp_path, capsys):
    other = tmp_path / "other.py"
    other.write_text("from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self, n: int = 3):\n")
    with other.open("a") as file:
        file.write("        super().__init__(nn.Linear(n, 50), nn.Linear(50, 7))\n")
    assert run("map", trained / "old.ckpt", "--model", f"{other}:Net", "--plan", tmp_path / "p.json") == 1
    assert "below --min-coverage 50.0%" in capsys.readouterr().err
    assert TransferPlan.load(tmp_path / "p.json").target.parameter_elements == 3 * 50 + 50 + 350 + 7
    code = run(
        *("map", trained / "old.ckpt", "--model", f"{other}:Net", "--model-args.n", "5", "--min-coverage", "0"),
        *("--plan", tmp_path / "p.json"),
    )
    assert code == 0
    assert TransferPlan.load(tmp_path / "p.json").target.parameter_elements == 5 * 50 + 50 + 350 + 7


def test_map_takes_the_model_of_a_lightning_cli_config(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(MODELS).parent))
    config = tmp_path / "config.yaml"
    section = {"class_path": "conversion_models.NewTransformer", "init_args": {"fused": False}}
    config.write_text(yaml.safe_dump({"fit": {"model": section, "trainer": {"max_epochs": 3}}}))
    assert run("map", trained / "old.ckpt", "--config", config, "--plan", tmp_path / "plan.json") in (0, 1)
    assert TransferPlan.load(tmp_path / "plan.json").target.label == "NewTransformer"
    config.write_text(yaml.safe_dump({"model": {"fused": True}}))
    assert run("map", trained / "old.ckpt", "--config", config) == 2
    assert "give --model" in capsys.readouterr().err
    assert run("map", trained / "old.ckpt", "--config", config, "--model", "conversion_models.NewTransformer") in (0, 1)
    config.write_text(yaml.safe_dump({"model": {"fuse": True}}))
    assert run("map", trained / "old.ckpt", "--config", config, "--model", "conversion_models.NewTransformer") == 2
    assert "fuse" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the model"),
        (["--model", "no.such.module:Net"], "cannot be imported"),
        (["--model", f"{MODELS}:Nothing"], "has no 'Nothing'"),
        (["--model", f"{MODELS}:WIDTH"], "not a class or function"),
        (["--model", f"{MODELS}:tokens"], "not a torch.nn.Module"),
        (["--model", f"{MODELS}:NewTransformer", "--model-args.x", "1"], "unexpected keyword"),
        (["--model", "missing.py:Net"], "does not exist"),
        (["--model", f"{MODELS}:NewTransformer", "--threshold", "7"], "threshold must lie between 0 and 1"),
        (["--model", f"{MODELS}:NewTransformer", "--weights", '{"size": 1}'], "weights must give"),
    ],
)
def test_map_says_what_is_wrong_with_the_model(arguments, message, trained, capsys):
    assert run("map", trained / "old.ckpt", *arguments) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- convert


def test_convert_writes_a_checkpoint_that_training_goes_on_from(trained, tmp_path, capsys):
    assert run("convert", trained / "old.ckpt", "--plan", trained / "plan.json", "-o", tmp_path / "new.ckpt") == 0
    assert "1 optimizer with the states of 37 parameters" in capsys.readouterr().out
    new = NewTransformer()
    runner = fit_unsafe(new, tmp_path)
    assert runner.global_step == 8
    hyper = torch.load(tmp_path / "new.ckpt", weights_only=False)["hyper_parameters"]
    assert hyper["args"] == Namespace(seed=3)  # untouched, though never imported on the way


def test_map_then_convert_as_the_help_says(trained, tmp_path):
    old, plan, new = trained / "old.ckpt", tmp_path / "plan.json", tmp_path / "new.ckpt"
    assert run("map", old, "--model", f"{MODELS}:NewTransformer", "--plan", plan) == 0
    assert run("convert", old, "--plan", plan, "-o", new) == 0
    by_hand = tmp_path / "by_hand.ckpt"
    assert run("convert", old, "--plan", trained / "plan.json", "-o", by_hand) == 0
    assert run("diff", new, by_hand) == 0
    states = [torch.load(file, weights_only=False)["optimizer_states"][0]["state"] for file in (new, by_hand)]
    assert all(torch.equal(states[0][i]["exp_avg"], states[1][i]["exp_avg"]) for i in range(37))


def fit_unsafe(model, folder):
    from conversion_models import trainer

    runner = trainer(folder, 2)
    runner.fit(model, tokens(), ckpt_path=folder / "new.ckpt", weights_only=False)
    return runner


def test_convert_goes_back_and_diff_finds_no_difference(trained, tmp_path, capsys):
    old, new, back, plan = trained / "old.ckpt", tmp_path / "new.ckpt", tmp_path / "back.ckpt", trained / "plan.json"
    assert run("convert", old, "--plan", plan, "-o", new, "--model", f"{MODELS}:NewTransformer") == 0
    assert run("convert", new, "--plan", plan, "--reverse", "-o", back) == 2
    assert "--model" in capsys.readouterr().err
    assert run("convert", new, "--plan", plan, "--reverse", "-o", back, "--model", f"{MODELS}:OldTransformer") == 0
    assert run("diff", old, back) == 0
    assert run("diff", old, new) == 1
    assert run("diff", old, new, "--plan", plan) == 0
    assert "37 tensors are equal, 0 differ" in capsys.readouterr().out


def test_convert_to_safetensors_keeps_weights_and_metadata(trained, tmp_path):
    weights = {k: v.clone() for k, v in torch.load(trained / "old.ckpt", weights_only=False)["state_dict"].items()}
    save_file(weights, tmp_path / "old.safetensors", metadata={"licence": "mine", "format": "pt"})
    for source in (trained / "old.ckpt", tmp_path / "old.safetensors"):
        assert run("convert", source, "--plan", trained / "plan.json", "-o", tmp_path / "new.safetensors") == 0
        with safe_open(tmp_path / "new.safetensors", "pt") as file:
            assert torch.equal(file.get_tensor("layers.1.attention.k.bias"), weights["h.1.c_attn.bias"][8:16])
            assert set(file.keys()) == set(NewTransformer().state_dict())
            assert file.metadata().get("licence") == ("mine" if source.suffix == ".safetensors" else None)


def test_convert_weights_only_leaves_training_out(trained, tmp_path):
    out = tmp_path / "new.ckpt"
    assert run("convert", trained / "old.ckpt", "--plan", trained / "plan.json", "-o", out, "--weights-only") == 0
    content = torch.load(out, weights_only=False)
    assert {"state_dict", "hyper_parameters", "loops", "pytorch-lightning_version"} <= set(content)
    assert not {"optimizer_states", "lr_schedulers", "callbacks"} & set(content)


def test_convert_does_not_write_over_its_input_or_leave_half_a_file(trained, tmp_path, capsys):
    assert run("convert", trained / "old.ckpt", "--plan", trained / "plan.json", "-o", trained / "old.ckpt") == 2
    assert "is the checkpoint itself" in capsys.readouterr().err
    assert run("convert", trained / "plan.json", "--plan", trained / "plan.json", "-o", tmp_path / "x.ckpt") == 2
    (tmp_path / "bad.json").write_text("{}")
    assert run("convert", trained / "old.ckpt", "--plan", tmp_path / "bad.json", "-o", tmp_path / "x.ckpt") == 2
    assert not (tmp_path / "x.ckpt").exists()


# ---------------------------------------------------------------- rename


def names(file):
    return list(torch.load(file, weights_only=False)["state_dict"])


def test_rename_by_every_means(trained, tmp_path, capsys):
    out = tmp_path / "new.ckpt"
    (tmp_path / "names.json").write_text(json.dumps({"wte.weight": "tokens.weight"}))
    code = run(
        *("rename", trained / "old.ckpt", "-o", out, "--map", tmp_path / "names.json", "--map", "head.bias=head.b"),
        *("--prefix", "ln_f=norm", "--add-prefix", "net", "--regex", r"h\.(\d+)=layers.\1"),
    )
    assert code == 0
    assert {"net.tokens.weight", "net.head.b", "net.norm.weight", "net.layers.1.c_attn.bias"} <= set(names(out))
    assert "h.{0..1}.c_proj.weight\tnet.layers.{0..1}.c_proj.weight" in capsys.readouterr().out
    assert run("rename", out, "-o", tmp_path / "back.ckpt", "--remove-prefix", "net") == 0
    assert "norm.weight" in names(tmp_path / "back.ckpt")


def test_rename_looks_only_and_refuses_collisions(trained, tmp_path, capsys):
    assert run("rename", trained / "old.ckpt", "--prefix", "h=layers", "--dry-run") == 0
    assert run("rename", trained / "old.ckpt", "--prefix", "h=layers") == 2
    assert run("rename", trained / "old.ckpt", "--map", "head.bias=wte.weight", "-o", tmp_path / "x.ckpt") == 2
    assert "wte.weight" in capsys.readouterr().err
    assert run("rename", trained / "old.ckpt", "--regex", "(=x", "-o", tmp_path / "x.ckpt") == 2
    assert run("rename", trained / "old.ckpt", "--regex", "absent=x", "-o", tmp_path / "x.ckpt") == 1
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- diff


def test_diff_says_which_tensors_differ_and_by_how_much(tmp_path, capsys):
    base = {f"b.{i}.w": torch.ones(4) for i in range(3)} | {"same": torch.tensor([1.0, float("nan")])}
    changed = {k: v.clone() for k, v in base.items()} | {"only": torch.ones(1), "int": torch.arange(3)}
    changed["b.1.w"][0] = 3.0
    changed["b.2.w"] = torch.ones(2, 2)
    torch.save(base | {"int": torch.arange(3, dtype=torch.int32), "gone": torch.ones(1)}, tmp_path / "a.pt")
    torch.save(changed, tmp_path / "b.pt")
    assert run("diff", tmp_path / "a.pt", tmp_path / "b.pt", "--json") == 1
    data = json.loads(capsys.readouterr().out)
    found = {d["name"]: d for d in data["different"]}
    assert data["equal"] == 2
    assert {name: d["kind"] for name, d in found.items()} == {
        "b.1.w": "values",
        "b.2.w": "shape",
        "int": "dtype",
        "gone": "only in first",
        "only": "only in second",
    }
    assert (found["b.1.w"]["changed"], found["b.1.w"]["largest"], found["b.1.w"]["relative"]) == (1, 2.0, 1.0)
    assert run("diff", tmp_path / "a.pt", tmp_path / "b.pt") == 1
    out = capsys.readouterr().out
    assert "b.1.w\tvalues\t1\t1 of 4\t2\t1" in out
    assert "2 tensors are equal, 5 differ" in out


def test_diff_with_a_tolerance(tmp_path):
    torch.save({"w": torch.ones(4)}, tmp_path / "a.pt")
    torch.save({"w": torch.ones(4) + 1e-6}, tmp_path / "b.pt")
    assert run("diff", tmp_path / "a.pt", tmp_path / "b.pt") == 1
    assert run("diff", tmp_path / "a.pt", tmp_path / "b.pt", "--tolerance", "1e-5") == 0


# ---------------------------------------------------------------- rebasin


def test_rebasin_finds_a_planted_order(tmp_path, capsys):
    file = tmp_path / "net.py"
    file.write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))\n"
        "def batch():\n    return torch.ones(2, 4)\n"
    )
    torch.manual_seed(0)
    first = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).state_dict()
    order = torch.randperm(16)
    second = {"0.weight": first["0.weight"][order], "0.bias": first["0.bias"][order]}
    second |= {"2.weight": first["2.weight"][:, order], "2.bias": first["2.bias"]}
    torch.save(first, tmp_path / "a.pt")
    torch.save(second, tmp_path / "b.pt")
    model = ("--model", f"{file}:net", "--sample", f"{file}:batch")
    assert run("rebasin", tmp_path / "a.pt", tmp_path / "b.pt", *model, "-o", tmp_path / "out") == 0
    aligned = torch.load(tmp_path / "out" / "rebasin_aligned_b.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(aligned[name], first[name]) for name in first)
    assert "may be permuted: 1 (" in capsys.readouterr().out
    assert run("rebasin", tmp_path / "a.pt", *model) == 2
    assert run("rebasin", tmp_path / "a.pt", tmp_path / "b.pt", "--model", f"{file}:net") == 2
    assert "--sample" in capsys.readouterr().err


def test_version_is_said_once(capsys):
    assert run("--version") == 0
    assert re.fullmatch(r"lit-wsl \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize("command", ["inspect", "map", "convert", "rename", "diff", "rebasin"])
def test_help_names_no_python_types(command, capsys):
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert "type:" not in text
    assert "Literal" not in text
    assert "null" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_json_goes_to_a_file_or_to_the_standard_output(trained, tmp_path, capsys):
    model = ("--model", f"{MODELS}:NewTransformer")
    old = trained / "old.ckpt"
    new = ("-o", tmp_path / "new.ckpt")
    for words in (
        ("inspect", old),
        ("diff", old, old),
        ("rename", old, "--add-prefix", "model", *new),
        ("convert", old, *model, *new),
    ):
        assert run(*words, "--json", "-") == 0
        printed = json.loads(capsys.readouterr().out)
        assert run(*words, "--json", tmp_path / "out.json") == 0
        assert capsys.readouterr().out == ""
        assert json.loads((tmp_path / "out.json").read_text()) == printed
        assert printed
    assert run("map", trained / "old.ckpt", *model, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["format"] == "lit_wsl.report"


def test_list_options_are_plain_names(tmp_path, capsys):
    (tmp_path / "heads.py").write_text(
        "from torch import nn\n"
        "def net(classes=3):\n"
        "    return nn.Sequential(nn.Linear(50, 40), nn.Linear(40, classes))\n"
        "def parts(name='new_encoder'):\n"
        "    return nn.ModuleDict({name: nn.Linear(4, 4)})\n"
    )
    torch.save(torch.nn.Sequential(torch.nn.Linear(50, 40), torch.nn.Linear(40, 5)).state_dict(), tmp_path / "a.pt")
    model = ("--model", f"{tmp_path}/heads.py:net")
    for words in (("partial_head",), ("partial_head", "new_input_channels"), ('["partial_head"]',)):
        assert run("map", tmp_path / "a.pt", *model, "--json", "-", "--adapt", *words) == 0
        assert json.loads(capsys.readouterr().out)["coverage"]["target"]["share"] == 1.0
    assert run("map", tmp_path / "a.pt", *model, "--adapt", "partial_hed") == 2
    assert "Did you mean 'partial_head'?" in capsys.readouterr().err
    torch.save({"old_encoder.weight": torch.ones(4, 4), "old_encoder.bias": torch.ones(4)}, tmp_path / "b.pt")
    model = ("--model", f"{tmp_path}/heads.py:parts")
    assert run("map", tmp_path / "b.pt", *model) == 0
    assert run("map", tmp_path / "b.pt", *model, "--incompatible-pairs", "new,stem:old") == 1
    assert "incompatible_pairs keeps" in capsys.readouterr().out
    assert run("map", tmp_path / "b.pt", *model, "--incompatible-pairs", "new") == 2


def test_a_plan_is_written_as_json_or_yaml_only(trained, tmp_path, capsys):
    for name in ("plan.txt", "plan", "old.ckpt"):
        assert run("map", trained / "old.ckpt", "--model", f"{MODELS}:NewTransformer", "--plan", tmp_path / name) == 2
        assert ".json or a .yaml" in capsys.readouterr().err
        assert not (tmp_path / name).exists()


def test_no_report_is_written_over_a_checkpoint(trained, tmp_path, capsys):
    a, b = (shutil.copy(trained / "old.ckpt", tmp_path / name) for name in ("a.ckpt", "b.ckpt"))
    before = a.read_bytes()
    for words in (
        ("inspect", b, "--json", a),
        ("diff", b, b, "--json", a),
        ("rebasin", "--json", a, b, b),  # --json alone prints, but takes what comes next for its file
        ("map", b, "--model", f"{MODELS}:NewTransformer", "--html", a),
    ):
        assert run(*words) == 2
        assert "a.ckpt: it is written to a ." in capsys.readouterr().err
        assert a.read_bytes() == before


def test_convert_matches_and_converts_in_one_step(trained, tmp_path, capsys):
    model = ("--model", f"{MODELS}:NewTransformer")
    assert run("map", trained / "old.ckpt", *model, "--plan", tmp_path / "plan.json") == 0
    assert (
        run("convert", trained / "old.ckpt", *model, "--plan", tmp_path / "plan.json", "-o", tmp_path / "a.ckpt") == 0
    )
    assert run("convert", trained / "old.ckpt", *model, "-o", tmp_path / "b.ckpt") == 0
    assert run("diff", tmp_path / "a.ckpt", tmp_path / "b.ckpt") == 0
    assert run("convert", trained / "old.ckpt", "-o", tmp_path / "c.ckpt") == 2
    assert "--plan plan.json" in capsys.readouterr().err
    lstm = ("--model", "torch.nn:LSTM", "--model-args.input_size", "5", "--model-args.hidden_size", "7")
    assert run("convert", trained / "old.ckpt", *lstm, "-o", tmp_path / "c.ckpt") == 1
    assert not (tmp_path / "c.ckpt").exists()


def test_names_in_a_file_cannot_control_the_terminal(tmp_path, capsys):
    evil = "a\x1b[2J\x1b]0;owned\x07\n\tb"
    torch.save({f"{evil}.weight": torch.ones(3), "c": torch.ones(2)}, tmp_path / "evil.pt")
    torch.save({f"{evil}.weight": torch.zeros(3), "d": torch.ones(2)}, tmp_path / "other.pt")
    run("inspect", tmp_path / "evil.pt")
    run("diff", tmp_path / "evil.pt", tmp_path / "other.pt")
    run("rename", tmp_path / "evil.pt", "--add-prefix", "x", "--dry-run")
    run(
        "map",
        tmp_path / "evil.pt",
        "--model",
        "torch.nn:LSTM",
        "--model-args.input_size",
        "5",
        "--model-args.hidden_size",
        "7",
    )
    run("inspect", tmp_path / f"{evil}.pt")
    shown = capsys.readouterr()
    assert r"a\x1b[2J" in shown.out
    for text in shown:
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_diff_is_readable_at_80_columns(trained, tmp_path, capsys, monkeypatch):
    from lit_wsl.cli import inspecting

    monkeypatch.setattr(inspecting, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"model.decoder.layers.{i}.self_attention.query_projection.weight" for i in range(3)]
    torch.save({n: torch.ones(64, 64) for n in names}, tmp_path / "a.pt")
    torch.save({n: torch.ones(64, 64) + (i == 2) for i, n in enumerate(names)}, tmp_path / "b.pt")
    assert run("diff", tmp_path / "a.pt", tmp_path / "b.pt") == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[:2] == [names[2], "    values: 4,096 of 4,096 elements, largest 1, relative 1"]


def test_diff_of_renamed_files_names_the_plan(trained, tmp_path, capsys):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"b": torch.ones(2)}, tmp_path / "b.pt")
    assert run("diff", tmp_path / "a.pt", tmp_path / "b.pt") == 1
    assert "--plan plan.json compares across a refactoring" in capsys.readouterr().err


def test_long_values_hang_below_themselves_on_a_terminal(capsys, monkeypatch):
    from lit_wsl.cli import console

    monkeypatch.setattr(console, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    console.fields([("file", "old.ckpt"), ("weights", "word " * 40)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "file     old.ckpt"
    assert max(map(len, lines)) <= 80
    assert all(line.startswith(" " * 9) for line in lines[2:])
