# `make demo` and `make test` do everything on a bare Debian machine with Python 3.11 (venv), git,
# make and g++. `make check` is what a commit has to pass.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# torch and MindSpore do not fit into one environment.
MS_VENV := .venv-mindspore
MS_BIN := $(MS_VENV)/bin
MS_STAMP := $(MS_VENV)/.installed

.PHONY: demo test test-torch test-mindspore test-long test-faults faults check format setup clean

demo: $(STAMP)
	$(BIN)/ftlaunch --nodes 4

test: test-torch test-mindspore

test-torch: $(STAMP)
	$(BIN)/python -m pytest

test-mindspore: $(STAMP) $(MS_STAMP)
	$(MS_BIN)/python -m pytest

# All of what `make test` has a sample of.
test-long: $(STAMP) $(MS_STAMP)
	$(BIN)/python -m pytest -m long
	$(MS_BIN)/python -m pytest -m long

# The whole matrix of faults: more than an hour on two cores.
test-faults: $(STAMP)
	$(BIN)/python -m pytest -m faults

faults: test-faults

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(STAMP) $(MS_STAMP)

# torch comes first and pinned: pip then takes a CPU build where one is offered.
$(STAMP): pyproject.toml constraints/torch.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints/torch.txt torch
	$(BIN)/python -m pip install --quiet -c constraints/torch.txt -e '.[test]'
	touch $@

$(MS_STAMP): pyproject.toml constraints/mindspore.txt
	test -x $(MS_BIN)/python || $(PYTHON) -m venv $(MS_VENV)
	$(MS_BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(MS_BIN)/python -m pip install --quiet -c constraints/mindspore.txt -e '.[ascend]' pytest
	touch $@

clean:
	rm -rf $(VENV) $(MS_VENV) build dist *.egg-info
