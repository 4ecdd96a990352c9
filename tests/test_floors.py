"""The floors of the house: which folder may import which, and no circle of modules."""

import ast
import re
from functools import cache
from pathlib import Path

import lit_wsl

ROOT = Path(lit_wsl.__file__).parent

# Each floor may import the floors named beside it, and its own. Everything may import errors and files.
FLOORS = {
    "errors": set(),
    "files": set(),
    "former_paths": set(),
    "structure": set(),
    "checkpoint": {"structure"},
    "plan": {"structure"},
    "matching": {"structure", "plan"},
    "report": {"structure", "plan", "matching"},
    "transfer": {"structure", "checkpoint", "plan", "matching", "report"},
    "convert": {"structure", "checkpoint", "plan", "transfer"},
    "mapper": {"structure", "checkpoint", "plan", "matching", "report"},
    "rebasin": {"structure", "checkpoint"},
    "renamer": {"checkpoint"},
    "callbacks": {"structure", "checkpoint", "plan", "matching", "report", "transfer", "convert", "rebasin"},
    "cli": {
        "structure",
        "checkpoint",
        "plan",
        "matching",
        "report",
        "transfer",
        "convert",
        "rebasin",
        "renamer",
        "callbacks",
    },
    "__main__": {"cli"},
}
GROUND = {"errors", "files"}
UPWARD = {("lit_wsl.plan.plan", "lit_wsl.convert.checkpoint:convert_checkpoint")}
"""The one arrow up is a name and no import: ``TransferPlan.convert_checkpoint`` looks it up when it is called."""


def modules():
    paths = sorted(ROOT.rglob("*.py"))
    return {".".join(p.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


@cache
def nodes(path):
    """The syntax tree of a module, parsed once for all tests."""
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path, names):
    """Modules of the package that a module imports, anywhere in it."""
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lit_wsl":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in names else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "lit_wsl")


def floor(name):
    return name.split(".")[1] if "." in name else ""


def test_arrows_point_down():
    names = modules()
    found, used = [], {name: set() for name in FLOORS}
    for name, path in names.items():
        if name == "lit_wsl":
            continue
        assert floor(name) in FLOORS, f"{name}: a floor that nobody listed"
        for other in imports(path, names):
            used[floor(name)].add(floor(other))
            if floor(other) not in FLOORS[floor(name)] | GROUND | {floor(name)}:
                found.append(f"{name} imports {other}")
    assert found == []
    assert all(below <= used[name] for name, below in FLOORS.items()), "an arrow that nobody needs any more"


def test_names_that_are_looked_up_point_down_but_for_one():
    found = set()
    for name, path in modules().items():
        for node in nodes(path):
            if isinstance(node, ast.Constant) and re.fullmatch(r"lit_wsl(\.\w+)+:\w+", str(node.value)):
                other = node.value.partition(":")[0]
                if floor(other) not in FLOORS[floor(name)] | GROUND | {floor(name)}:
                    found.add((name, node.value))
    assert found == UPWARD


def test_there_is_no_circle_of_modules():
    names = modules()
    arrows = {name: sorted(imports(path, names)) for name, path in names.items() if name != "lit_wsl"}
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done or name not in arrows:
            return
        for other in arrows[name]:
            if other != name:
                visit(other, [*path, name])
        done.add(name)

    for name in arrows:
        visit(name, [])


FACES = {  # what a user calls has an option for each thing that a user may want
    "lit_wsl.callbacks.rebasin.__init__",
    "lit_wsl.callbacks.weight_transfer.__init__",
    "lit_wsl.convert.checkpoint.convert_checkpoint",
    "lit_wsl.mapper.weight_mapper.from_state_dict",
    "lit_wsl.rebasin.matching.activations.activation_matching",
    "lit_wsl.rebasin.matching.activations.joint_matching",
    "lit_wsl.rebasin.matching.activations.best_matching",
    "lit_wsl.rebasin.matching.many.match_many",
    "lit_wsl.rebasin.matching.weights.weight_matching",
    "lit_wsl.rebasin.merging.merge.interpolation_curve",
    "lit_wsl.rebasin.merging.rebase.rebase",
    "lit_wsl.transfer.api.transfer_weights",
}


def test_no_function_takes_more_than_seven_parameters():
    found = set()
    for name, path in modules().items():
        for node in nodes(path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len([a for a in arguments if a.arg not in ("self", "cls")]) > 7:
                    found.add(f"{name}.{node.name}")
    assert found == FACES
