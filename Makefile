# `make demo` and `make test` do everything on a bare Debian machine with Python 3.11 (venv), git,
# make and g++. `make check` is what a commit has to pass.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test faults check format setup clean

demo: $(STAMP)
	$(BIN)/ftlaunch --nodes 4

test: $(STAMP)
	$(BIN)/python -m pytest

faults: $(STAMP)
	$(BIN)/python -m pytest -m faults

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(STAMP)

# torch comes first and pinned: pip then takes a CPU build where one is offered.
$(STAMP): pyproject.toml constraints/torch.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints/torch.txt torch
	$(BIN)/python -m pip install --quiet -c constraints/torch.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
