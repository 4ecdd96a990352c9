"""Two real processes for all files that ask for them: starting them takes longer than what they do."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import Results, run_files


@pytest.fixture(scope="session")
def two_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """What two processes did, for each file of scenarios that a collected module of tests names."""
    modules = (getattr(item, "module", None) for item in request.session.items)
    files = dict.fromkeys(m.SCENARIOS for m in modules if hasattr(m, "SCENARIOS"))
    here = Path(__file__).parent
    return run_files({here / f"{name}.py": [] for name in files}, tmp_path_factory.mktemp("together"))


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, two_ranks: dict[str, Results]) -> Results:
    """The part of :func:`two_ranks` that a module of tests judges."""
    return two_ranks[request.module.SCENARIOS]
