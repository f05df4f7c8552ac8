# make sample | test | check | digits | bench | gpu; each sets up .venv first, once
PYTHON ?= python3
BIN := .venv/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup sample test check digits evaluate bench gpu wheel

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"fastdiff needs Python 3.11 or newer, {v} is $(PYTHON); try make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt --editable '.[dev]'
	@touch $@

sample: setup
	$(BIN)/fastdiff sample --out samples.png --force

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

# the bundled model: train it, then measure it; the results go to runs/digits and benchmarks/results
digits: setup
	$(BIN)/fastdiff train --recipe fastdiff/assets/digits/recipe.json --out runs/digits
	$(MAKE) evaluate MODEL=runs/digits/model

MODEL ?= digits
evaluate: setup
	$(BIN)/fastdiff evaluate $(MODEL)

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-disable-gc -q

# needs no install: torch, numpy, pytest and an NVIDIA GPU; COMMIT and DIRTY say what is measured where there is no git
COMMIT ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
DIRTY ?= $(shell test -z "$$(git status --porcelain 2>/dev/null)" && echo clean || echo dirty)
gpu:
	PYTHONPATH=.:kernels $(PYTHON) -m pytest -m gpu tests
	PYTHONPATH=.:kernels $(PYTHON) -m pytest benchmarks --device cuda --commit $(COMMIT) --state $(DIRTY)

wheel: setup
	$(BIN)/python .ci/wheel.py
