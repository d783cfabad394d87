# make train [ARGS="norm=bn dataset=cifar10"]   set up, then train (the embedded digits if ARGS says nothing else)
# make test                                    set up, then lint, types and tests
# make faults                                  set up, then the whole bench of faults, and its report in results/faults

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: train test faults setup

train: setup
	$(BIN)/python train.py $(ARGS)

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

faults: setup
	FAULTS=full $(BIN)/pytest tests/faults -n 2 --dist worksteal

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "abn_exp needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
