"""The package as it is installed, and the commands that install it."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(*extras: str) -> list[Requirement]:
    listed = list(PROJECT["dependencies"]) + [r for e in extras for r in PROJECT["optional-dependencies"][e]]
    return [Requirement(r) for r in listed if not r.startswith("lit_wsl")]


def test_every_requirement_has_one_pin_that_satisfies_it():
    pins = {normal(r.name): r for r in CONSTRAINTS if r.marker is None or r.marker.evaluate()}
    for requirement in requirements(*PROJECT["optional-dependencies"]):
        assert normal(requirement.name) in pins, f"{requirement.name} has no pin"
        (pin,) = pins[normal(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} excludes the pinned {pin.version}"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_no_package_is_pinned_twice_for_one_python(python):
    names = [normal(r.name) for r in CONSTRAINTS if r.marker is None or r.marker.evaluate({"python_version": python})]
    assert sorted(names) == sorted(set(names))


def test_torch_is_pinned_without_a_local_version_so_that_a_cpu_build_fits():
    (torch_pin,) = (str(r.specifier) for r in CONSTRAINTS if r.name == "torch")
    assert torch_pin == "==2.13.0"
    assert Requirement(f"torch{torch_pin}").specifier.contains("2.13.0+cpu")
    assert "TORCH := torch==$(if $(MINIMUM),2.10.0,2.13.0)\n" in (ROOT / "Makefile").read_text()


def test_every_lower_bound_is_tested_as_the_oldest_version():
    lines = (ROOT / "requirements" / "minimum.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    oldest = {normal(name): version for name, version in pairs}
    for requirement in requirements("cli", "plot", "test"):
        if requirement.marker is not None:  # the loggers, which need a newer Python
            continue
        bounds = [spec.version for spec in requirement.specifier if spec.operator in (">=", "==")]
        assert len(bounds) == 1, requirement
        pinned = oldest[normal(requirement.name)]
        assert Version(pinned) == Version(bounds[0]), f"{requirement.name}: {pinned} is tested, {bounds[0]} is allowed"


def test_torchvision_stays_out_of_the_test_environment():
    names = {normal(r.name) for r in requirements("cli", "plot", "test", "dev")}
    assert "torchvision" not in names


def imported(folder: str) -> dict[str, Path]:
    """Top-level modules that the files of a folder import anywhere, and one of those files."""
    found: dict[str, Path] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            found.update({name.partition(".")[0]: path for name in names})
    return found


def provided_by(packages: set[str]) -> set[str]:
    """Top-level modules of installed packages, by their files: Python 3.10 knows only those that list them."""
    installed = [d for d in distributions() if normal(d.metadata["Name"]) in packages]
    return {file.parts[0].partition(".")[0] for d in installed for file in d.files or ()}


@pytest.mark.parametrize(
    ("folder", "extras", "optional"),
    [
        (
            "lit_wsl",
            ("cli", "plot"),
            {"wandb", "mlflow", "comet_ml", "deepspeed", "numpy", "yaml", "typing_extensions"},
        ),
        (
            "tests",
            ("cli", "plot", "loggers", "test"),
            {"wandb", "mlflow", "selenium", "tomllib", "numpy", "yaml", "packaging", "typing_extensions"},
        ),
    ],
)
def test_everything_that_is_imported_is_declared(folder, extras, optional):
    """``optional`` holds what may be absent, and what torch, lightning or pytest bring along."""
    declared = {normal(r.name) for r in requirements(*extras)}
    own = {path.stem for path in (ROOT / folder).rglob("*.py")} | {path.stem for path in (ROOT / "docs").glob("*.py")}
    known = provided_by(declared) | own | optional | set(sys.stdlib_module_names) | {"lit_wsl", "benchmarks"}
    unknown = {name: str(path.relative_to(ROOT)) for name, path in imported(folder).items() if name not in known}
    assert unknown == {}


def test_the_public_names_are_there_and_typed():
    import lit_wsl

    assert (Path(lit_wsl.__file__).parent / "py.typed").exists()
    assert lit_wsl.__version__ == PROJECT["version"]
    for name in lit_wsl.__all__:
        assert getattr(lit_wsl, name) is not None


def test_the_command_points_at_a_function():
    module, _, function = PROJECT["scripts"]["lit-wsl"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_importing_the_package_starts_nothing_heavy():
    optional = ("matplotlib", "sklearn", "wandb", "mlflow", "comet_ml", "deepspeed", "transformers")
    code = f"import sys, lit_wsl; print([m for m in {optional} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=800)
    assert out.stdout.strip().endswith("[]"), out.stdout


def test_importing_the_package_takes_the_interpreters_time_only():
    code = (
        "import sys, typing, re, importlib.machinery, collections.abc; before = set(sys.modules); import lit_wsl; "
        "print([m for m in sys.modules if m not in before and not m.startswith('lit_wsl')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=800)
    assert out.stdout.strip() == "[]"


# ---- the commands, with a stub in place of Python's installer ---------------------------------

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile and a Python that notes how it was called instead of installing."""
    for name in ("Makefile", "pyproject.toml", "requirements/constraints.txt", ".ci/run"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    stub = tmp_path / "stub-python"
    stub.write_text(
        "#!/bin/sh\n"
        'echo "$*" >> "$NOTES"\n'
        'case "$*" in\n'
        '  *version_info*) [ "$STUB_TOO_OLD" != 1 ] ;;\n'
        '  --version) echo "Python 3.9.1" ;;\n'
        '  "-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;\n'
        '  "-m pip"*) [ "$STUB_PIP_FAILS" != 1 ] ;;\n'
        '  "-m pytest"*) [ "$STUB_TESTS_FAIL" != 1 ] ;;\n'
        "esac\n"
    )
    stub.chmod(0o755)
    return tmp_path


def make(checkout: Path, *args: str, command: tuple[str, ...] = ("make",), **env: str) -> tuple[int, str, list[str]]:
    notes = checkout / "notes"
    notes.write_text("")
    done = subprocess.run(
        [*command, *args],
        cwd=checkout,
        env={"PATH": os.environ["PATH"], "NOTES": str(notes), "PYTHON": str(checkout / "stub-python"), "CI": "true"}
        | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=800,
    )
    return done.returncode, done.stdout + done.stderr, notes.read_text().splitlines()


@needs_make
def test_make_test_sets_up_once_with_pins_and_then_only_tests(checkout):
    code, output, calls = make(checkout, "test")
    assert code == 0, output
    installs = [call for call in calls if "pip" in call]
    assert "torch==2.13.0" in installs[0]
    assert "--editable .[dev]" in installs[1]
    assert all("requirements/constraints.txt" in call for call in installs)
    assert "-m pytest -n 2" in calls[-1]

    code, output, calls = make(checkout, "test", "ARGS=-k plan")
    assert code == 0, output
    assert len(calls) == 1
    assert calls[0].endswith("-k plan")


@needs_make
def test_a_changed_pin_is_installed(checkout):
    make(checkout, "test")
    constraints = checkout / "requirements" / "constraints.txt"
    later = (checkout / ".venv" / ".ready").stat().st_mtime + 10
    os.utime(constraints, (later, later))
    _, _, calls = make(checkout, "test")
    assert any("--editable" in call for call in calls)


@needs_make
def test_a_failing_test_fails_the_command_and_the_ci_entry(checkout):
    assert make(checkout, "test", STUB_TESTS_FAIL="1")[0] != 0
    assert make(checkout, command=("bash", ".ci/run"), STUB_TESTS_FAIL="1")[0] != 0


@needs_make
def test_a_failed_installation_is_tried_again(checkout):
    code, _, calls = make(checkout, "test", STUB_PIP_FAILS="1")
    assert code != 0
    assert not any("pytest" in call for call in calls)
    code, _, calls = make(checkout, "test")
    assert code == 0
    assert any("--editable" in call for call in calls)


@needs_make
def test_an_old_python_is_named_with_the_remedy(checkout):
    code, output, calls = make(checkout, "demo", STUB_TOO_OLD="1")
    assert code != 0
    assert "3.10 or newer" in output
    assert "Python 3.9.1" in output
    assert "make PYTHON=" in output
    assert not any("pip" in call for call in calls)
