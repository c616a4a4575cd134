PYTHON ?= python3
# Two processes with one thread each; what shares a file shares its models. tests/conftest.py has the order.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=20
# With COVERAGE_FLOOR=88 the tests fail where they run less than 88 % of the lines.
ifdef COVERAGE_FLOOR
COVERAGE = --cov --cov-report=term:skip-covered --cov-fail-under=$(COVERAGE_FLOOR)
endif
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow coverage check docs browser bench clean

demo: $(VENV)/.demo
	$(BIN)/trtq demo -o trtq-demo --overwrite

test: $(VENV)/.dev browser
	$(MAKE) check
	$(PYTEST) $(COVERAGE) -m "not gpu and not slow"

test-slow: $(VENV)/.dev browser
	$(PYTEST) -m "slow and not gpu"

coverage:
	$(MAKE) test COVERAGE_FLOOR=88

# For the tests of the server's page; without a browser these are skipped, and say so.
browser: $(VENV)/.dev
	.ci/browser $(BIN)/python

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) docs

# Builds site/ without network access; a warning is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

bench: $(VENV)/.demo
	$(BIN)/python benchmarks/digits.py

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install -q -e '.[cpu,eval]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install -q -e '.[cpu,eval,rtx,plugins,serve,docs,dev]'
	touch $@ $(VENV)/.demo $(VENV)/.docs

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install -q -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
