# make demo: train and prove; make test: the whole suite. TORCH_INDEX=URL picks a PyTorch build (CPU-only, say).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
TORCH_INDEX ?=

.PHONY: demo test check bench bench-rivals clean

demo: $(VENV)/.train
	$(BIN)/distattn train configs/tiny.toml $(ARGS)

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/host_time.py

# DeepSpeed is optional: .venv/bin/pip install deepspeed
bench-rivals: $(VENV)/.dev
	$(BIN)/python benchmarks/rivals.py --out benchmarks/results/rivals.jsonl

# torch first: another package would draw a larger build of it
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("distattn needs Python 3.11 or later; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml
	$(PIP) -c constraints.txt -e '.[train]'
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
