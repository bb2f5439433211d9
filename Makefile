# make install | train | test | test-fast | test-faults | lint | format
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
RANKS ?= 2

.PHONY: install train test test-fast test-faults lint format

install: $(STAMP)
	$(BIN)/python -m pip check

# CPU wheels. CUDA users run `pip install -e .` instead (see README).
$(STAMP): pyproject.toml requirements-cpu.txt packaging/fbgemm-gpu-cpu-shim/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --requirement requirements-cpu.txt
	@touch $(STAMP)

train: $(STAMP)
	$(BIN)/torchrun --standalone --nproc_per_node=$(RANKS) examples/train_dlrm_hilomoe.py

test: $(STAMP)
	$(BIN)/python -m pytest -m "not (faults and slow)"

test-faults: $(STAMP)
	$(BIN)/python -m pytest -m faults tests/faults

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not multirank"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
