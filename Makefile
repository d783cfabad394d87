# make train [ARGS="norm=bn dataset=cifar10"]   set up, then train (the embedded digits if ARGS says nothing else)
# make test                                    set up, then lint, types and tests
# make faults                                  set up, then the whole bench of faults, and its report in results/faults
# make lock                                    write requirements.lock: the newest versions allowed, with their hashes
# make test-lowest                             the tests with the oldest versions allowed, in an environment of their own
#
# LOCKED=1 installs what requirements.lock names, e.g. `make train LOCKED=1`.

PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
LOCKED ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
MARKER := $(VENV)/.installed$(if $(LOCKED),-locked)

.PHONY: train test types tests faults lock test-lowest

train: $(MARKER)-train
	$(BIN)/python train.py $(ARGS)

test: $(MARKER)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory --jobs=2 types tests

types:  # in what the tests leave while they wait
	nice $(BIN)/mypy

tests:
	$(BIN)/pytest -n 2 --dist worksteal

faults: $(MARKER)-dev
	FAULTS=full $(BIN)/pytest tests/faults -n 2 --dist worksteal

lock: $(VENV)/.installed-uv
	$(BIN)/uv pip compile pyproject.toml --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
		--no-header --quiet --output-file requirements.lock

test-lowest: $(VENV)/.installed-uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable ".[dev]"
	$(LOWEST)/bin/pytest -n 2 --dist worksteal

$(MARKER)-train: pyproject.toml $(if $(LOCKED),requirements.lock) | $(BIN)/python
	$(if $(LOCKED),$(PIP) --require-hashes --requirement requirements.lock)
	$(PIP) --editable .
	touch $@

$(MARKER)-dev: $(MARKER)-train
	$(PIP) --editable ".[dev]"
	touch $@

$(VENV)/.installed-uv: | $(BIN)/python
	$(PIP) "uv>=0.13,<0.14"
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "abn_exp needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.13 ...")'
	$(PYTHON) -m venv $(VENV) || { rm -f $(BIN)/python*; exit 1; }  # one without pip, where venv is a package apart
