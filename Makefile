# make quickstart   the whole workflow on this machine        make test   what continuous integration runs
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
.PHONY: help install install-correspondence install-dev quickstart status down test test-quick test-slow coverage lint docs docs-check check-versions constraints

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Name of the workflow recipe that `make quickstart` runs.
RECIPE ?= quickstart
# Pages whose commands `make docs-check` runs; empty: all.
PAGES ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Containers often set it; each of a training's dozen processes would then compile this project's modules again.
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo "make quickstart   install, start the local servers, run the workflow '$(RECIPE)', show what came out"
	@echo "make status       how the local servers are"
	@echo "make down         stop them; data stay in .local"
	@echo "make test         install, lint, types, import contracts, tests"
	@echo "make test-quick   the tests that start no server and no worker"
	@echo "make test-slow    long repetitions of what make test shows by a small case; before a release"
	@echo "make coverage     the tests again, counting which branches they take, in all processes"
	@echo "make lint         lint, types and import contracts alone"
	@echo "make docs         docs/code.md, from the files' docstrings"
	@echo "make docs-check   run the commands that the pages show, at toy size; PAGES=docs/depth.md: only that page's"
	@echo "make check-versions   open exports in other releases of diffusers, PEFT and MLflow: by hand, not part of make test;"
	@echo "                  downloads packages, 3 GB in .versions, some minutes"
	@echo "make install      only .venv, from lock.txt"
	@echo "make install-correspondence   also what semantic correspondence needs, from lock-correspondence.txt"

# Compiles the packages' modules too, and does nothing when all is there.
install:
	@$(PYTHON) infra/install.py

install-correspondence:
	@$(PYTHON) infra/install.py --correspondence

install-dev:
	@$(PYTHON) infra/install.py --dev

quickstart: install
	@$(BIN)/python -m infra.local up
	$(BIN)/python -m infra.local submit --quiet -- python -m pipelines.workflow $(RECIPE)
	$(BIN)/python -m infra.local.report $(RECIPE)

status: install
	@$(BIN)/python -m infra.local status || true

down: install
	@$(BIN)/python -m infra.local down

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

test: install-dev
	@exec $(BIN)/python -m tests.lanes

test-quick: install-dev
	@$(BIN)/python -m pytest --rung=quick

test-slow: install-dev
	@$(BIN)/python -m pytest -m slow

coverage: install-dev
	@$(BIN)/python -m tests.lanes --coverage

docs: install-dev
	@$(BIN)/python -m infra.code_page

docs-check: install-dev
	@$(BIN)/python -m infra.docs_check $(PAGES)

check-versions: install-dev
	@$(BIN)/python -m tests.versions

# After a change of the dependencies: install them into .venv by hand, test, then run this. uv resolves for all platforms.
constraints:
	@$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m infra.lock
