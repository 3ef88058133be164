# make demo: train and compare with plain transformers; make test: a newcomer's suite; make test-all: the whole suite. TORCH_INDEX=URL picks a PyTorch build (CPU-only, say).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
TORCH_INDEX ?=
# DeepSpeed compiles nothing when it is installed
export DS_BUILD_OPS := 0

.PHONY: demo test test-all check docs bench bench-rivals bench-adapters bench-disaggregation bench-gpu check-cluster lint-kernels tritons fla clean

demo: $(VENV)/.train
	$(BIN)/distattn train configs/tiny.toml $(ARGS)

# most tests once, of long products of cases a sample: under 10 minutes on 2 cores
test: check
	$(BIN)/python -m pytest -n 4 --dist worksteal -m "not full"

# everything; QUARTER=0 to 3: of what `make test` leaves out, one quarter of the cases of long products and half of the other tests
test-all: check
	$(BIN)/python -m pytest -n 5 --dist worksteal --durations=30 $(if $(QUARTER),--quarter=$(QUARTER))

# strict: a link that leads nowhere is an error
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo build/docs/index.html

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/host_time.py
	$(BIN)/python benchmarks/glue.py

bench-rivals: $(VENV)/.dev
	$(BIN)/python benchmarks/rivals.py --out benchmarks/results/rivals.jsonl

bench-adapters: $(VENV)/.dev
	$(BIN)/python benchmarks/adapter_overhead.py --out benchmarks/results/adapters.jsonl

# simulated; LENGTHS=FILE.json, a list of document lengths. mtkahypar is optional: .venv/bin/pip install mtkahypar
bench-disaggregation: $(VENV)/.dev
	$(BIN)/python benchmarks/disaggregation.py --lengths $(LENGTHS) --servers 8 16 64 --heads 32:8 64:16 --hypergraph $(ARGS)

# with the Python of a machine that has a GPU, torch and Triton; under 10 minutes. ARGS: of benchmarks/gpu.py, --minutes
bench-gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/first_hour.py gpu $(ARGS)

# on 2 to 8 GPUs of one machine; under 10 minutes. ARGS: of benchmarks/check_cluster.py, --minutes
check-cluster:
	PYTHONPATH=. $(PYTHON) benchmarks/first_hour.py cluster $(ARGS)

# machine code of the Triton kernels against benchmarks/budgets, with what layer calls launch: those of all strategies with this Triton, those of
# a ring with the Tritons of torch 2.11 to 2.13. Only what has changed is compiled. ARGS=--update where it changed for the better
lint-kernels: tritons
	$(BIN)/python benchmarks/compile_lint.py --production $(ARGS)
	for version in 3.6.0 3.7.0 3.7.1; do \
	  PYTHONPATH=$(VENV)/triton-$$version $(BIN)/python benchmarks/compile_lint.py --production ring $(ARGS) || exit 1; \
	done

# beside the environment, for the lint and the PTX interpreter only: the Triton that torch 2.11, 2.12 and 2.13 bring on GPU machines
tritons: $(VENV)/.dev
	for version in 3.6.0 3.7.0 3.7.1; do \
	  test -d $(VENV)/triton-$$version || $(PIP) --no-deps --target $(VENV)/triton-$$version triton==$$version || exit 1; \
	done

# beside the environment, for its tests only: with fla-core installed, transformers' recurrent layers fail on CPUs
fla: $(VENV)/.dev
	test -d $(VENV)/fla-core || $(PIP) --no-deps --target $(VENV)/fla-core fla-core==0.6.0

# torch first: another package would draw a larger build of it
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("distattn needs Python 3.11 or later; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml
	$(PIP) -c constraints.txt -e '.[train]'
	touch $@

# CUDA builds of torch bring their own Triton
$(VENV)/.dev: $(VENV)/.train
	$(PIP) -c constraints.txt -e '.[dev]'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) triton==3.9.0
	touch $@

$(VENV)/.docs: $(VENV)/.train
	$(PIP) -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV)
