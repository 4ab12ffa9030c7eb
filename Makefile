# make run | make test do all the set-up themselves; the second time it takes a second.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
STEELYARD_DATA ?= $(abspath $(wildcard ../shared/data))
JOBS ?= 2
export STEELYARD_DATA

.PHONY: run test test-all lint format docs bench clean

run: $(VENV)/.ready
	$(BIN)/steelyard run

# as many workers as cores, each with one thread: threads that wait for each other in turns take many times as long
test test-all: export OMP_NUM_THREADS ?= 1

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow"

test-all: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

docs: $(VENV)/.ready-dev
	$(BIN)/python docs/generate.py

bench: $(VENV)/.ready-dev
	@set -e; for b in bench/*/run.py; do echo "== $$b"; $(BIN)/python $$b; done

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Steelyard needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "pip>=25.1"

# torch first and by its pinned version: a range would fetch the newest build with gigabytes of GPU packages
$(VENV)/.ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "setting up $(VENV) (once; about a minute)"
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e ".[all]"
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) install -c constraints.txt --group dev
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis docs/api
