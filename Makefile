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
		tests/test_triton_losses.py tests/test_triton_neuron_stats.py tests/test_triton_patch_rows.py \
		tests/test_triton_topk_encode.py

# The oldest transformers that is supported, with the hub client it needs, laid over the pinned one.
OLD = build/transformers-5.17.0
test-models: build
	test -d $(OLD) || $(BIN)/pip install -q --no-deps --target $(OLD) \
		transformers==5.17.0 huggingface_hub==1.31.0 httpx==0.28.1 httpcore==1.0.9
	PYTHONPATH=$(OLD) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q \
		tests/test_model.py tests/test_inputs.py tests/test_scoring.py tests/test_engine.py tests/test_hooks.py \
		tests/test_attribution.py tests/test_lens.py

# reward-lens, two versions: our numbers against its own, and its own tests with rmfast.integrations.reward_lens on. Laid
# over the environment without what they need for other things, and their sources for the tests. Left out of these: what
# needs a download (GPT-2: rescue's real policy, length_bucket, policy_unit, blk005's explicit_position and prompt_boundary;
# micro's detector), files that are not in the sdist (science's and others' studies and experiments, golden.json) or other
# packages (rfc8785, scikit-learn: verifier, measure_labels, baselines and what imports them); a test that trl is not
# installed; one that asks a run under a hook (its own code's) and one without (ours) for the same bits; and three files of
# statistics that run no model and take minutes.
REWARD_LENS = build/reward-lens-
test-reward-lens: build $(REWARD_LENS)2.0.1/.ready $(REWARD_LENS)3.1.0/.ready
	PYTHONPATH=$(REWARD_LENS)2.0.1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q \
		tests/test_reward_lens.py tests/test_reward_lens_integration.py
	PYTHONPATH=$(REWARD_LENS)3.1.0 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q \
		tests/test_reward_lens_integration.py
	$(call its_own_tests,2.0.1,science_.*)
	$(call its_own_tests,3.1.0,science_.*|verifier_.*|composition_instrument|e1_preflight.*|experiments|measure_card|$\
		public_surface|operate_cli|baselines|controls|measure_hodge|measure_labels|policy_unit|$\
		repair_blk005_explicit_position|repair_blk005_prompt_boundary_coordinate|record_labels_typing|$\
		repair_blk030_richards|measure_rate_h4)

# 1: version; 2: which of its tests/test_*.py to leave out, a regular expression
its_own_tests = cd $(REWARD_LENS)$(1)/src && PYTHONPATH=$(CURDIR)/$(REWARD_LENS)$(1):$(CURDIR)/tests OMP_NUM_THREADS=1 \
	HF_HUB_OFFLINE=1 $(abspath $(BIN))/python -m pytest -q -p reward_lens_on -p no:cacheprovider -W ignore \
	--deselect tests/test_e_parity.py::test_golden_targets_match_the_design_headlines \
	--deselect tests/test_interventions_surgery.py::test_steer_strength_zero_is_bit_exact_noop \
	--deselect tests/test_interventions_rescue.py::TestAgainstTheRealPolicy \
	--deselect tests/test_loops.py::test_integration_framework_hooks_require_extra \
	--deselect tests/test_model_perf.py::test_length_bucket_preserves_order \
	--deselect tests/test_organisms_micro.py::test_micro_organism_calibration_recovers_planted_rule \
	--deselect tests/test_organisms_micro.py::test_micro_organism_scorecard_from_real_detector \
	$$(ls tests/test_*.py | grep -vE 'test_($(2))\.py')

$(REWARD_LENS)%/.ready:
	rm -rf $(@D) && mkdir -p $(@D)/src
	$(BIN)/pip install -q --no-deps --target $(@D) reward-lens==$* pydantic-settings==2.15.0 python-dotenv==1.2.4
	$(BIN)/pip download -q --no-deps --no-binary reward-lens -d $(@D) reward-lens==$*
	tar -xzf $(@D)/reward_lens-$*.tar.gz -C $(@D)/src --strip-components 1
	touch $@

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
