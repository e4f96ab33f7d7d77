#!/usr/bin/env bash
# What needs a CUDA GPU, without a network: build, the tests of the ops, compute-sanitizer, benchmark rows. Each step has
# a limit; on an H100 with sixteen cores they should add up to less than ten minutes.
# Goes on after a failed step, so that one call tells all; exits 1 if any failed.
set -u
cd "$(dirname "$0")/.."
PY=${1:-python3}
failed=()
step() {
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" || failed+=("$name (exit $?)")
}

"$PY" - <<'PY' || exit 1
import sys, torch, triton
if not torch.cuda.is_available():
    sys.exit("gpu-check needs a CUDA GPU that torch can see")
name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
print(f"{name}, sm_{capability[0]}{capability[1]}, torch {torch.__version__}, triton {triton.__version__}")
PY
arch=$("$PY" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch}

step "build" 180 env RMFAST_BUILD_EXT=1 RMFAST_BUILD_CUDA=1 "$PY" setup.py -q build_ext --inplace
step "explain" 60 "$PY" -c 'import rmfast; print(rmfast.explain())'
step "tests of the ops on the GPU" 200 "$PY" -m pytest -q --maxfail=20 -p no:cacheprovider -k cuda \
  tests/ops/test_{reward_head,reward_head_gradients,cuda_reward_head,suffix_attention,token_wise,neuron_stats}.py \
  tests/ops/test_{patch_rows,tcrm,binned_mmd,topk_encode}.py \
  tests/training/test_linear_value_loss.py
# These run on the GPU by themselves where Triton is not in its interpreter; their names don't say so.
step "tests of the Triton kernels on the GPU" 120 "$PY" -m pytest -q --maxfail=20 -p no:cacheprovider \
  tests/ops/test_triton_{reward_head,token_wise,neuron_stats,topk_encode}.py
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
if [ -x "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    step "compute-sanitizer $tool" 60 "$sanitizer" --tool "$tool" --error-exitcode 9 "$PY" tests/ops/gpu_small.py
  done
else
  failed+=("compute-sanitizer (not found)")
fi
step "models on the GPU" 120 "$PY" -m pytest -q -p no:cacheprovider tests/engine/test_gpu_models.py
step "benchmarks" 200 "$PY" -m bench --device cuda --seconds 2 --without "max-autotune|chunked"

if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "gpu-check passed"
