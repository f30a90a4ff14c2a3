# `make demo` and `make test` do everything on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUT ?= demo
EXTRAS ?= dev,app

.PHONY: help demo docs test stress oldest wheel bench lint clean
help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

$(VENV)/.installed: pyproject.toml
	@echo "calm: making the virtual environment in $(VENV) and installing (about 2 minutes, 7 GB) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "calm: Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	@$(BIN)/python -m pip install --quiet --no-deps quantus==0.6.0  # its OpenCV would stand beside ours
	@touch $@

demo: $(VENV)/.installed  ## draw birds, train CAM and CALM on them, benchmark both, write demo/report.html
	@$(BIN)/calm demo --out $(OUT)

test: lint  ## lint, every test, and the share of lines that they run
	@echo "calm: running the tests ..."
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal --cov --cov-report=
	@echo "calm: the tests run $$($(BIN)/coverage report --format=total) percent of the lines in src"

stress: $(VENV)/.installed  ## the fault and fuzz suites in full (tests marked stress; 20 minutes)
	@CALM_STRESS=full $(BIN)/python -m pytest -q -m stress

oldest:  ## every test with the oldest versions that pyproject.toml allows, in .venv-oldest (7 GB more)
	@PIP_CONSTRAINT=$(CURDIR)/constraints/oldest.txt $(MAKE) --no-print-directory VENV=.venv-oldest EXTRAS=dev \
		.venv-oldest/.installed
	@.venv-oldest/bin/python -m pytest -q -n 2 --dist worksteal -W default::DeprecationWarning -W default::FutureWarning

wheel: $(VENV)/.installed  ## build dist/*.whl, install it in a new environment and run it outside the repository
	@rm -rf dist build
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@$(PYTHON) -m venv build/wheel
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$(build/wheel/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth
	@build/wheel/bin/python -m pip install --quiet --no-deps dist/*.whl
	@.ci/try_installed build/wheel

docs: $(VENV)/.installed  ## build the documentation's site, build/site/index.html; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # --quiet would hide the warnings from --strict, too (findings/)

bench: $(VENV)/.installed  ## time it against other ways, into benchmarks/README.md; TOPIC=explain for one
	@$(BIN)/python benchmarks/run.py $(TOPIC)

lint: $(VENV)/.installed  ## ruff and mypy
	@echo "calm: ruff and mypy ..."
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "calm: run '$(BIN)/ruff format .'"; exit 1; }
	@$(BIN)/mypy

clean:  ## remove the environments, caches and the demo
	rm -rf $(VENV) .venv-oldest $(OUT) build dist .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis
