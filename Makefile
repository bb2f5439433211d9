# make install | train | test | lint | format
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
RANKS ?= 1

.PHONY: install train test test-fast lint format

install: $(STAMP)

# CPU wheels. CUDA users install with `pip install -e .` instead (see README).
$(STAMP): pyproject.toml requirements-cpu.txt packaging/fbgemm-gpu-cpu-shim/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --requirement requirements-cpu.txt
	$(BIN)/python -m pip check
	@touch $(STAMP)

train: install
	$(BIN)/torchrun --standalone --nproc_per_node=$(RANKS) examples/train_dlrm_hilomoe.py

test: install
	$(BIN)/python -m pytest

test-fast: install
	$(BIN)/python -m pytest -m "not slow and not multirank"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
