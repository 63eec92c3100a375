# Winnow's house-keeping. Every target prepares what it needs in .venv and is quick the second time.
# All paths are relative, so a checkout may lie in a folder whose name holds spaces.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready
PACKAGES := platform/winnow connectors/winnow_connectors jobs/winnow_jobs
PIP := $(PY) -m pip --disable-pip-version-check -qq

# The stamp holds the folder that the environment was made in: scripts inside it name that folder, so a checkout that
# was moved or copied is installed again.
ifneq ($(file < $(READY)),$(CURDIR))
$(READY): FORCE
endif

.PHONY: help
help: ## show this list
	@printf 'make TARGET, where TARGET is one of\n\n'
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | while IFS=$$'\t' read -r name text; do printf '  %-12s %s\n' "$$name" "$$text"; done

.PHONY: setup
setup: $(READY) ## make .venv with everything a developer needs (the first time: a download of several GB)
	@echo "setup: .venv is ready"

$(READY): pyproject.toml constraints.txt
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  version=$$("$(PYTHON)" -c 'import platform; print(platform.python_version())' 2>/dev/null) || version="not to be run"; \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "setup: $(PYTHON) is $$version; Winnow needs Python 3.11 or newer. Name one: make $(or $(firstword $(MAKECMDGOALS)),setup) PYTHON=python3.12" >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "setup: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	  echo "setup: making .venv with Python $$version"; \
	  "$(PYTHON)" -m venv --clear .venv; \
	fi
	@$(PY) -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))' || \
	  echo "setup: the first time downloads about 3 GB (PyTorch brings CUDA) and fills 7 GB: some minutes"
	@echo "setup: installing Winnow, editable, with the versions of constraints.txt"
	@rm -f $(READY)
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@printf '%s' "$$PWD" > $(READY)

.PHONY: format
format: $(READY) ## format the code and mend what ruff can mend
	@$(PY) -m ruff format --quiet
	@$(PY) -m ruff check --fix --quiet

.PHONY: check
check: $(READY) ## format, lint, strict types, import floors
	@echo "check: format (ruff)"
	@$(PY) -m ruff format --quiet --check || { echo "check: not formatted; make format does it" >&2; exit 1; }
	@echo "check: lint (ruff)"
	@$(PY) -m ruff check --quiet
	@echo "check: types (mypy --strict)"
	@$(PY) -m mypy --no-error-summary
	@echo "check: import floors (import-linter)"
	@log=$$($(PY) -c 'from importlinter.cli import lint_imports_command as lint; lint()' 2>&1) || { echo "$$log"; exit 1; }
	@echo "check: passed"

.PHONY: test
test: check ## check, then the whole suite, without the long ones below
	@echo "test: whole suite (it starts Ray, S3 and Label Studio servers)"
	@# Of a file all tests run in one process: they share its Ray and its servers. In order, the short ones are last.
	@$(PY) -m pytest -m "not chaos" --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

.PHONY: test-fast
test-fast: $(READY) ## the tests that start no Ray, no server, no browser
	@echo "test-fast: without Ray, servers and browsers"
	@$(PY) -m pytest -m "not ray and not s3 and not label_studio and not browser and not chaos"

.PHONY: test-chaos
test-chaos: $(READY) ## kill processes again and again at full size: 20,000 images each
	@echo "test-chaos: kill -9 at full size (long)"
	@$(PY) -m pytest -m chaos

.PHONY: bench
bench: $(READY) ## measure rates and memory, and print them; with PHOTOS=folder also predict and its accuracy (of labelled ones, policies and accept), with ALIKE=folder duplicates
	@echo "bench: measuring (some minutes); leave the machine alone meanwhile"
	@$(PY) bench/ingest.py
	@$(PY) bench/query.py
	@$(PY) bench/query.py --s3
	@$(PY) bench/decoding.py
	@$(PY) bench/similarity.py
	@$(PY) bench/selection.py
	@$(PY) bench/nodes.py
ifdef PHOTOS
	@$(PY) bench/predict.py "$(PHOTOS)"
	@$(PY) bench/predict.py "$(PHOTOS)" --s3
	@$(PY) bench/precision.py "$(PHOTOS)"
	@if [ -d "$(PHOTOS)/train" ] && [ -d "$(PHOTOS)/val" ] && [ -d "$(PHOTOS)/test" ]; then \
	  $(PY) bench/rounds.py "$(PHOTOS)"; \
	  $(PY) bench/accept.py "$(PHOTOS)"; \
	fi
endif
ifdef ALIKE
	@$(PY) bench/similarity.py --photos "$(ALIKE)"
endif

.PHONY: demo
demo: $(READY) ## the tour: photographs, then the whole loop (DEMO_HUMAN=1: you answer); on your own: IMAGES=/path/or/s3://…
	@.venv/bin/winnow demo $(if $(IMAGES),--images "$(IMAGES)")

.PHONY: clean
clean: ## remove .venv, caches and builds
	@echo "clean: removing .venv, build, dist, tool caches and __pycache__"
	@rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find connectors jobs platform tests -type d -name __pycache__ -prune -exec rm -rf {} +

.PHONY: FORCE
FORCE:
