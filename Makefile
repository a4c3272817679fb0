# A fresh machine needs Python >= 3.11 and make; everything else is installed into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test lint format clean

quickstart: $(VENV)/installed
	$(BIN)/hf-dissect compare recipes/quickstart.yaml --output-dir runs/quickstart --overwrite

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Installs again when a requirement changes; what is there already is kept. setuptools warns of every editable install
# that a folder of the same name may shadow it: here that folder is the installed one.
$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("hf_dissect needs Python 3.11 or newer, and \
	$(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12")'
	@echo "Installing torch, transformers and the rest into $(VENV); the first time takes a few minutes ..."
	@$(PYTHON) -m venv $(VENV)
	@PYTHONWARNINGS="ignore:Editable installation" \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
