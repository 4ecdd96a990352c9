# Everything a fresh machine with Python 3.10+ and make needs. Each command makes its own virtual environment with the
# pinned versions of requirements/constraints.txt the first time, and is quick the second time.
#
#   make demo    the main job on real images, in under a minute
#   make test    the tests                  (make test ARGS="-k plan -x" passes options on to pytest)
#   make lint    ruff and mypy
#   make help    all commands
#
#   make test PYTHON=python3.12     another Python, in an environment of its own (.venv-python3.12)
#   make test MINIMUM=1             the oldest versions that pyproject.toml allows (requirements/minimum.txt)
#   make matrix                     both, for every Python from 3.10 to 3.13 that is installed

PYTHON ?= python3
MINIMUM ?=
WORKERS ?= 2
ARGS ?=

# Another Python on the command line, or other versions, never touch the default environment.
VENV := .venv$(if $(findstring command,$(origin PYTHON)),-$(notdir $(PYTHON)))$(if $(MINIMUM),-minimum)
CONSTRAINTS := requirements/$(if $(MINIMUM),minimum,constraints).txt
PIP := -m pip --disable-pip-version-check install --quiet --quiet --constraint $(CONSTRAINTS)
TORCH := torch==$(if $(MINIMUM),2.10.0,2.13.0)
# A worker per core, each with one thread: threads of several workers would fight for the same cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test matrix lint format gauntlet refactors written calibrate ablation harvest rebasin-bench proof-bench scale sharded-memory docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

demo: $(VENV)/.ready  ## train, refactor, transfer, compare: the main job on real images
	@$(VENV)/bin/python examples/demo_digits.py $(ARGS)

test: $(VENV)/.ready  ## the tests
	$(ONE_THREAD) $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

matrix:  ## the tests with every installed Python from 3.10 to 3.13, and with the oldest allowed dependencies
	@export PYENV_VERSION=$$(pyenv versions --bare 2>/dev/null | grep -E '^3[.]1[0-3][.]' | paste -sd: -); \
	for python in python3.10 python3.11 python3.12 python3.13; do \
	  if $$python -c '' 2>/dev/null; then \
	    echo "== $$python"; $(MAKE) --no-print-directory test PYTHON=$$python || exit 1; \
	  else echo "== $$python is not installed: not tested"; fi; \
	done; \
	echo "== oldest dependencies, python3.10"; $(MAKE) --no-print-directory test PYTHON=python3.10 MINIMUM=1

lint: $(VENV)/.ready  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.ready  ## format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

gauntlet: .venv-bench/.ready  ## map pairs of public implementations with known truth, beside the peers
	.venv-bench/bin/python -m benchmarks.gauntlet $(ARGS)

refactors: .venv/.ready  ## map random refactors with known truth (ARGS="--split third --pairs 750"; of validate, read only counts)
	$(ONE_THREAD) .venv/bin/python -m benchmarks.refactors $(ARGS)

written: .venv/.ready  ## map renamings that were written by hand to break it (ARGS="words --kinds")
	$(ONE_THREAD) .venv/bin/python -m benchmarks.written $(ARGS)

calibrate: .venv/.ready  ## count what each kind of evidence is worth, into lit_wsl/matching/risks.json
	$(ONE_THREAD) .venv/bin/python -m benchmarks.refactors.calibrate $(ARGS)

ablation: .venv-bench/.ready  ## switch every rule of the matching off in turn (ARGS="--gauntlet 'timm'")
	$(ONE_THREAD) .venv-bench/bin/python -m benchmarks.ablation $(ARGS)

harvest: .venv-bench/.ready  ## the words of public libraries for the random refactors
	.venv-bench/bin/python -m benchmarks.refactors.harvest $(ARGS)
	.venv-bench/bin/python -m benchmarks.refactors.contrasts

rebasin-bench: .venv-bench/.ready  ## align models of torchvision, timm and transformers
	.venv-bench/bin/python -m benchmarks.rebasin --save $(ARGS)

proof-bench: .venv-bench/.ready  ## what names leave open and data decide, on models that are trained for it
	$(ONE_THREAD) .venv-bench/bin/python -m benchmarks.proof $(ARGS)

scale: $(VENV)/.ready  ## map up to 120,000 tensors on the meta device
	$(VENV)/bin/python -m benchmarks.scale $(ARGS)

sharded-memory: $(VENV)/.ready  ## peak memory of a sharded transfer, against plain load_state_dict
	$(VENV)/bin/python -m benchmarks.sharded_memory $(ARGS)

docs: .venv-docs/.ready  ## build the documentation into site/
	.venv-docs/bin/python docs/measured.py
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --quiet $(ARGS)
	@echo "site/index.html"

clean:  ## remove the virtual environments and everything built
	rm -rf .venv .venv-* build dist site demo-output lightning_logs *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# ---- virtual environments: a stamp, newer than the files that decide what is in them ------------------------------

# $(call venv,folder,extra): torch first, on its own, so that an index's newer build of it is never taken by the rest.
define venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
  echo "lit_wsl needs Python 3.10 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
  echo "Name another one, e.g.: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
@echo "Setting up $(1) with pinned versions (once; the download of torch can take minutes) ..."
@test -x $(1)/bin/python && $(1)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(1)
@$(1)/bin/python $(PIP) $(TORCH)
@$(1)/bin/python $(PIP) --editable '.[$(2)]'
@touch $@
endef

# torchvision from the package index is a CUDA build, which breaks imports beside a CPU build of torch: it stays out of
# .venv and lives in .venv-bench, behind benchmarks/torchvision_guard.py.
$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	$(call venv,$(VENV),$(if $(filter .venv,$(VENV)),dev,test))

.venv-bench/.ready: pyproject.toml $(CONSTRAINTS)
	$(call venv,.venv-bench,rebasin-bench)

.venv-docs/.ready: pyproject.toml $(CONSTRAINTS)
	$(call venv,.venv-docs,docs)
