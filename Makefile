PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow check bench clean

demo: $(VENV)/.demo
	$(BIN)/trtq demo -o trtq-demo --overwrite

test: $(VENV)/.dev
	$(MAKE) check
	$(BIN)/python -m pytest -q -m "not gpu and not slow"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "slow and not gpu"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.demo
	$(BIN)/python benchmarks/digits.py

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install -q -e '.[cpu,eval]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install -q -e '.[cpu,eval,rtx,plugins,serve,dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist *.egg-info
