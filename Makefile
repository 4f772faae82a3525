# Everything starts here: `make demo` and `make test` do all the set-up themselves, in .venv.

PYTHON ?= python3
VENV ?= .venv
PEER_VENV ?= .venv-trl
MODEL ?=
ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4

.DEFAULT_GOAL := help
.PHONY: help demo test check static test-slow bench format audit clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## the main job end to end on a real language model (MODEL=tiny: in under a minute)
	$(BIN)/trimtab quickstart --overwrite $(if $(MODEL),--model $(MODEL)) $(ARGS)

test: check ## install everything, then `make check`

check: static ## format, lint, types and all tests that are not slow (PYTEST_ARGS="...")
	$(PYTEST) $(PYTEST_ARGS)

static: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test-slow: $(VENV)/.installed-dev ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

bench: $(VENV)/.installed $(PEER_VENV)/.installed ## speed and memory beside TRL (docs/performance.md; ARGS="--works dpo --pairs 1")
	$(BIN)/python -m benchmarks cpu --peer-python $(PEER_VENV)/bin/python $(if $(MODEL),--model $(MODEL)) $(ARGS)

format: $(VENV)/.installed-dev ## rewrite the code the way `make check` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

audit: $(VENV)/.installed-dev ## look the pinned versions up among the known vulnerabilities (needs the network)
	$(BIN)/pip-audit --skip-editable

clean: ## remove the virtual environment and every cache
	rm -rf $(VENV) $(PEER_VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are newer than pyproject.toml and constraints.txt exactly when the environment matches them.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing trimtab into $(VENV) (a few minutes the first time)."
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing trimtab and its development tools into $(VENV) (a few minutes the first time)."
	$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.installed $@

$(PEER_VENV)/.installed: $(BIN)/python benchmarks/requirements-trl.txt constraints.txt
	@echo "Installing TRL into $(PEER_VENV) (a few minutes the first time)."
	test -x $(PEER_VENV)/bin/python || $(BIN)/python -m venv $(PEER_VENV)
	$(PEER_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements-trl.txt
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "trimtab needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(or $(MAKECMDGOALS),demo)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
