# make quickstart   pre-train a small BERT on the English that ships with Python
# make test         run the tests
# make lint         check style and types
# make docs         build the documentation in site/, and fail on any warning
# make bench-check  measure the training steps that benchmarks/peers/ratios*.json have again, beside torch
# Each sets up .venv by itself. Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: quickstart test lint docs bench-check clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.run
	$(BIN)/python experiments/quickstart/corpus.py runs/quickstart/corpus.txt
	$(BIN)/jaxptm train configs/pretrain/quickstart.yaml
	$(BIN)/jaxptm predict fill-mask runs/quickstart/model < experiments/quickstart/sentences.txt
	@echo "The model is in runs/quickstart/model, its curves in runs/quickstart/curves.png, all figures in runs/quickstart/results.json"

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench-check: $(VENV)/.test
	$(BIN)/python benchmarks/peers/compare.py --check benchmarks/peers/ratios*.json

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp a set of dependencies: nothing is installed again until pyproject.toml changes.
$(VENV)/.run: pyproject.toml | $(BIN)/python
	@echo "Installing jaxptm into $(VENV) (some minutes the first time)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "Installing jaxptm and its test requirements into $(VENV) (some minutes the first time)"
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.run

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[test,dev]'
	@touch $@ $(VENV)/.test $(VENV)/.run

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "$(PYTHON) is not installed. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$$($(PYTHON) --version) is too old: jaxptm needs 3.11 or newer. Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
