# A fresh machine needs Python >= 3.11 and make; everything else is installed into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test test-slow test-bridges docs peft-suite peft-capabilities lint format clean

quickstart: $(VENV)/installed
	$(BIN)/hf-dissect compare recipes/quickstart.yaml --output-dir runs/quickstart --overwrite

# One worker for each processor, each with one thread (tests/conftest.py), of which more than eight would mostly import.
# A file stays with its worker, as its tests share runs.
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile

test: $(VENV)/installed
	$(PYTEST) -m "not slow"

# What is marked slow: tests that start processes, each of which imports torch, or train for long.
test-slow: $(VENV)/installed
	$(PYTEST) -m slow

# The tests of docs/bridges.md with the packages of others, in an environment of their own on top of $(VENV): the index
# has torchvision for CUDA alone, with which transformers would prepare pictures in all other tests, too. For CPUs, its
# missing operators are replaced by tests/testing/peers.py.
BRIDGES := build/bridges
BRIDGE_NEEDS := ftfy regex wcwidth timm torchvision open_clip_torch sentence-transformers
BRIDGE_TESTS := tests/interop tests/models/open_clip tests/models/test_sentence_layout.py

$(BRIDGES)/installed: $(VENV)/installed
	$(BIN)/python -m venv --clear $(BRIDGES)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(BRIDGES)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	$(BRIDGES)/bin/python -m pip install --quiet --no-deps --constraint constraints.txt $(BRIDGE_NEEDS)
	touch $@

test-bridges: $(BRIDGES)/installed
	PYTHONPATH=$(CURDIR) $(BRIDGES)/bin/python -m pytest $(BRIDGE_TESTS)
	PYTHONPATH=$(CURDIR) $(BRIDGES)/bin/python -m pytest tests/test_documentation.py -k "bridges"

# The theme's advertisement of its successor is kept out of the output.
docs: $(VENV)/installed
	@PYTHONWARNINGS="ignore:Editable installation" \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# PEFT's own tests, run for MoLA by tests/mola/peft_suite.py; needs the network, for PEFT's source archive and for
# what the tests import. Their settings measure coverage and fail on the warnings of newer transformers: both are set
# aside. What else they would download is made by peft_suite_models.py. The tests with torch.compile need a compiler.
PEFT_SUITE := build/peft-suite
PEFT_TESTS := custom_models config vision_models feature_extraction_models seq_classifier token_classification_qa \
	encoder_decoder_models decoder_models quantization torch_compile
PEFT_NEEDS := diffusers==0.42.1 bitsandbytes==0.50.2 torchao==0.18.0

peft-suite: $(VENV)/installed
	rm -rf $(PEFT_SUITE)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PEFT_NEEDS)
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --dest $(PEFT_SUITE) \
		peft==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("peft"))')
	tar -xzf $(PEFT_SUITE)/peft-*.tar.gz -C $(PEFT_SUITE) --strip-components 1
	touch $(PEFT_SUITE)/tests/__init__.py
	cd $(PEFT_SUITE) && export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/tests/mola \
		PEFT_DEBUG_WITH_TORCH_COMPILE=1 && \
	$(abspath $(BIN))/python -m peft_suite_models && \
	$(abspath $(BIN))/python -m pytest -p peft_suite -o addopts= -o filterwarnings= -q -rfsx \
		$(PEFT_TESTS:%=tests/test_%.py)

# The table of docs/mola.md, by a script of PEFT that its source archive does not hold: fetched from its repository,
# unless it is given (make peft-capabilities PEFT_SCRIPT=path).
PEFT_SCRIPT :=
PEFT_URL := https://raw.githubusercontent.com/huggingface/peft/main/scripts/generate_method_capabilities.py

peft-capabilities: $(VENV)/installed
	mkdir -p build
	$(if $(PEFT_SCRIPT),cp $(PEFT_SCRIPT),curl --fail --silent --show-error $(PEFT_URL) --output) \
		build/generate_method_capabilities.py
	PYTHONPATH=tests/mola $(BIN)/python tests/mola/peft_capabilities.py build/generate_method_capabilities.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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
	rm -rf $(VENV) build dist site *.egg-info
