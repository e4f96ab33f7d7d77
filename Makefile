# `make demo` and `make test` set everything up in .venv, from a fresh clone on.
#   PYTHON=python3.12   the interpreter that .venv is made with
#   TORCH=...           what pip installs for torch, for example TORCH="torch==2.11.0 --index-url URL"
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test test-interpreter test-models test-reward-lens bench lint format build gpu-check clean

demo: build
	$(BIN)/python examples/demo.py

# Each test process has one thread; two of them share the two cores better than one with two.
test: build test-interpreter
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q tests

# Triton reads TRITON_INTERPRET when a kernel is decorated: a process of its own.
test-interpreter: build
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q \
		tests/test_triton_reward_head.py tests/test_triton_suffix_attention.py tests/test_triton_token_wise.py \
		tests/test_triton_losses.py tests/test_triton_neuron_stats.py tests/test_triton_patch_rows.py

# The oldest transformers that is supported, with the hub client it needs, laid over the pinned one.
OLD = build/transformers-5.17.0
test-models: build
	test -d $(OLD) || $(BIN)/pip install -q --no-deps --target $(OLD) \
		transformers==5.17.0 huggingface_hub==1.31.0 httpx==0.28.1 httpcore==1.0.9
	PYTHONPATH=$(OLD) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q \
		tests/test_model.py tests/test_inputs.py tests/test_scoring.py tests/test_engine.py tests/test_hooks.py \
		tests/test_attribution.py

# reward-lens beside our own: its grids must agree. Laid over the environment without what it needs for other things.
REWARD_LENS = build/reward-lens-2.0.1
test-reward-lens: build
	test -d $(REWARD_LENS) || $(BIN)/pip install -q --no-deps --target $(REWARD_LENS) reward-lens==2.0.1
	PYTHONPATH=$(REWARD_LENS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_reward_lens.py

bench: build
	$(BIN)/python -m bench $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# ninja rebuilds what changed.
build: $(READY)
	$(BIN)/python setup.py -q build_ext --inplace

$(READY): constraints.txt pyproject.toml setup.py Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt setuptools ninja pybind11
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -c constraints.txt $(TRITON)
	RMFAST_BUILD_EXT=0 $(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[dev,demo]"
	touch $@

# On a machine with a CUDA GPU: build with nvcc, the ops' tests and models on it, compute-sanitizer, benchmarks. Runs in the
# Python that holds torch there (PYTHON), and needs no network. Rows go to bench/data/.
gpu-check:
	bash tests/gpu_check.sh $(PYTHON)

clean:
	rm -rf build $(VENV) rmfast/*.so
