# make quickstart   the whole workflow on this machine        make test   what continuous integration runs
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
.PHONY: help install quickstart status down test lint constraints

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Name of the workflow recipe that `make quickstart` runs.
RECIPE ?= quickstart
# Tests that need little of the other tests' servers: a process of their own runs them beside the rest.
BESIDE := tests/infra tests/model tests/objective tests/train

# DeepSpeed compiles nothing at installation, and the versions are those of constraints.txt.
export DS_BUILD_OPS := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Containers often set it; each of a training's dozen processes would then compile this project's modules again.
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo "make quickstart   install, start the local servers, run the workflow '$(RECIPE)', show what came out"
	@echo "make status       how the local servers are"
	@echo "make down         stop them; data stay in .local"
	@echo "make test         install, lint, types, import contracts, tests"
	@echo "make lint         the same without the tests"
	@echo "make install      only .venv, from constraints.txt"

# torch comes first and alone: a machine whose pip offers a CPU build then gets that one, and no other package picks it.
# Bytecode is made afterwards, on all cores; the errors are of templates that some packages hold among their modules.
install:
	@want="$$(cat pyproject.toml constraints.txt | cksum)"
	if [[ "$$(cat $(VENV)/installed 2>/dev/null)" == "$$want" ]] && $(BIN)/python -c '' 2>/dev/null; then exit 0; fi
	$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"Python {v}: 3.11 or newer is needed. Name one: make PYTHON=python3.11")'
	$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	echo "installing torch into $(VENV) (about a minute the first time)"
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	echo "installing everything else (about four minutes the first time)"
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[demo,dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	$(BIN)/python -m pip check
	echo "$$want" > $(VENV)/installed

quickstart: install
	@$(BIN)/python -m infra.local up
	$(BIN)/python -m infra.local submit -- python -m pipelines.workflow $(RECIPE)
	$(BIN)/python -m infra.local.report $(RECIPE)

status: install
	@$(BIN)/python -m infra.local status || true

down: install
	@$(BIN)/python -m infra.local down

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Two processes, since much of a test is one process starting after another; the second's output follows the first's.
test: lint
	@beside="$$(mktemp)"
	trap 'rm -f "$$beside"' EXIT
	$(BIN)/python -m pytest $(BESIDE) > "$$beside" 2>&1 &
	second=$$!
	$(BIN)/python -m pytest $(addprefix --ignore=,$(BESIDE)) &
	first=$$!
	trap 'kill $$first $$second 2> /dev/null || true' TERM INT HUP
	failed=0
	# Once more, for a signal ends a wait before the process.
	for process in $$first $$first $$second $$second; do wait $$process || failed=$$?; done
	cat "$$beside"
	exit $$failed

# After a change of the dependencies: install without constraints into a fresh .venv, test, then run this.
constraints:
	@{
		head -n 1 constraints.txt
		$(BIN)/python -m pip list --format=freeze --exclude-editable | sed 's/+.*$$//' | grep -viE '^(pip|setuptools|wheel)=='
	} > constraints.partial
	mv constraints.partial constraints.txt
