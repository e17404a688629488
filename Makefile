# Two commands are all a newcomer needs: `make demo` and `make test`. Each sets up what it needs.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := hypersd_bench metrics distill user_study reports tests benchmarks docs

.PHONY: help setup demo test lint docs bench canaries lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## make .venv with the locked packages and the command .venv/bin/hypersd-bench

demo: setup ## the whole story on the miniature: distil, benchmark, score, report
	@$(BIN)/hypersd-bench demo

test: lint ## lint, types, floors, then every test that runs on this machine, with coverage
	@for browser in chromium chromium-browser google-chrome; do command -v $$browser && break; done >/dev/null \
	    || echo "no Chromium here: the browser test of the study page will be skipped"
	$(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder -p no:benchmark --cov --cov-report=term

lint: setup
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: setup ## the documentation site, in build/docs; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

bench: setup ## every benchmark, and the page of ratios docs/results/speed.md; twenty minutes on two cores
	@mkdir -p build
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-json=build/benchmarks.json
	$(BIN)/python -m benchmarks.page build/benchmarks.json docs/results/speed.md

canaries: setup ## record anew what the metrics that come along give for the fixed images
	$(BIN)/python -m tests.record_canaries

lock: setup ## write requirements.lock anew from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra inception --extra data --extra postgres --extra ray --universal --python-version 3.11 --upgrade \
	    --no-emit-index-url --no-emit-find-links --no-header --no-annotate --output-file requirements.lock

clean: ## remove .venv, caches and build output; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .benchmarks \
	    .coverage htmlcov
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# A name like python3.12 may be there and not run (version managers), or lack venv (Debian): hence the trial.
$(STAMP): requirements.lock pyproject.toml
	@python=; for name in python3.13 python3.12 python3.11 python3 python; do \
	    if $$name -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; \
	    then python=$$name; break; fi; done; \
	if [ -z "$$python" ]; then \
	    echo "error: no Python 3.11, 3.12 or 3.13 with venv found; install one (Debian: apt install python3-venv)" >&2; \
	    exit 2; fi; \
	if ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
	    echo "[1/3] a new $(VENV) from $$($$python --version)"; $$python -m venv --clear $(VENV); \
	else echo "[1/3] $(VENV) is there"; fi
	@echo "[2/3] the locked packages: about 3 GB on a first time, with CUDA's libraries; some minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet uv || true
	@{ [ -x $(BIN)/uv ] && $(BIN)/uv pip install --python $(BIN)/python -r requirements.lock; } \
	    || $(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	@echo "[3/3] hypersd-bench itself"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --editable .
	@touch $(STAMP)
	@echo "ready: $(BIN)/hypersd-bench --help"
