# Two commands on a fresh machine: `make demo` and `make test`. Both set up what is missing. Python 3.11+, make and git.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help setup demo test check bench lock clean

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# faiss-cpu and faiss-gpu own one module: the GPU build is taken only where a CUDA device answers.
ACCELERATOR := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo gpu || echo cpu)

help: ## what each target does
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.done ## make the environment in .venv (a few minutes)

# torch first and alone: everything after it finds the version it wants. The locked packages need no resolution, and
# five of them declare pins older than this stack, so they go in without their dependencies.
$(VENV)/.done: requirements.lock requirements-torch.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) was found; set PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-torch.lock
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements.lock
	if [ "$(ACCELERATOR)" = gpu ]; then \
	  $(BIN)/python -m pip uninstall --quiet --yes faiss-cpu; \
	  $(BIN)/python -m pip install --quiet 'faiss-gpu-cu12>=1.15,<2'; fi
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

demo: setup ## run the main job: train small experts, merge them, compare, report
	$(BIN)/bd-merge run configs/demo.yaml $(ARGS)

test: setup ## the whole test suite, on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: setup ## formatting, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup ## the benchmarks that fit a laptop; results go to infra/bench/results
	$(BIN)/python -m infra.bench.bench_demo times --save
	$(BIN)/python -m infra.bench.bench_demo accuracy --seeds 0 1 2 --save
	$(BIN)/python -m infra.bench.bench_merged --quick

lock: setup ## write requirements.lock from the environment, without addresses
	$(BIN)/python -m pip freeze --exclude-editable | grep -v -i -E '^(torch|pip|setuptools|wheel)==' \
	  | sed 's/^triton==.*/&; platform_system == "Linux" and platform_machine == "x86_64"/' > requirements.lock

clean: ## remove the environment and caches, never a store
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
