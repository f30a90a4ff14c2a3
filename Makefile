# `make demo` and `make test` do everything on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUT ?= demo

.PHONY: help demo test stress bench lint clean
help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

$(VENV)/.installed: pyproject.toml
	@echo "calm: making the virtual environment in $(VENV) and installing (about 2 minutes, 5.5 GB) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "calm: Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed  ## draw birds, train CAM and CALM on them, benchmark both, write demo/report.html
	@$(BIN)/calm demo --out $(OUT)

test: lint  ## lint, then every test
	@echo "calm: running the tests ..."
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal

stress: $(VENV)/.installed  ## the fault and fuzz suites in full (tests marked stress; 20 minutes)
	@CALM_STRESS=full $(BIN)/python -m pytest -q -m stress

bench: $(VENV)/.installed  ## time it against other ways, into benchmarks/README.md; TOPIC=explain for one
	@$(BIN)/python benchmarks/run.py $(TOPIC)

lint: $(VENV)/.installed  ## ruff and mypy
	@echo "calm: ruff and mypy ..."
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "calm: run '$(BIN)/ruff format .'"; exit 1; }
	@$(BIN)/mypy

clean:  ## remove the environment, caches and the demo
	rm -rf $(VENV) $(OUT) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
