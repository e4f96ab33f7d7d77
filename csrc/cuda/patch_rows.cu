// The op `rmfast_native::patch_rows` on CUDA: PyTorch's stable ABI around the kernel of rmfast/cuda.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "rmfast/interface.h"
#include "rmfast/cuda/patch_rows.cuh"
#include "stream.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Pair = std::tuple<Tensor, Tensor>;

template <typename T, typename W>
Pair run(const Tensor& base, const Tensor& values, const Tensor& base_rows, const Tensor& value_rows,
         const Tensor& weight, double eps, bool gemma) {
  const int32_t device = base.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  // This library has its own CUDA runtime, which must agree on the device.
  STD_TORCH_CHECK(cudaSetDevice(device) == cudaSuccess, "patch_rows: cannot use CUDA device ", device);
  const int64_t n = base_rows.size(0), d = base.size(1);
  STD_TORCH_CHECK(d < (int64_t{1} << 30), "patch_rows: expected rows below 2^30 elements on CUDA, got ", d);
  STD_TORCH_CHECK(n < (int64_t{1} << 31), "patch_rows: expected fewer than 2^31 rows on CUDA, got ", n);
  Tensor x = torch::stable::new_empty(base, {n, d}), y = torch::stable::new_empty(base, {n, d});
  if (n == 0) return {x, y};
  const rmfast::cuda::PatchRows<T, W> q{static_cast<const T*>(base.data_ptr()),
                                        static_cast<const T*>(values.data_ptr()),
                                        base.size(0),
                                        values.size(0),
                                        base.stride(0),
                                        values.stride(0),
                                        static_cast<const int64_t*>(base_rows.data_ptr()),
                                        static_cast<const int64_t*>(value_rows.data_ptr()),
                                        n,
                                        static_cast<int>(d),
                                        static_cast<const W*>(weight.data_ptr()),
                                        gemma,
                                        static_cast<rmfast::cuda::acc_t<T>>(eps),
                                        static_cast<T*>(x.data_ptr()),
                                        static_cast<T*>(y.data_ptr())};
  const cudaError_t error = rmfast::cuda::patch_rows(q, rmfast::current_stream(device));
  STD_TORCH_CHECK(error == cudaSuccess, "patch_rows: launching the kernel failed: ", cudaGetErrorString(error));
  return {x, y};
}

// Gains are read in the rows' type or in that of the sums; any other dtype is cast to the latter.
Pair patch_rows(const Tensor& base, const Tensor& values, const Tensor& base_rows, const Tensor& value_rows,
                const Tensor& weight, double eps, bool gemma) {
  const auto call = [&](auto type) {
    using T = decltype(type);
    using A = rmfast::cuda::acc_t<T>;
    if (weight.scalar_type() == base.scalar_type())
      return run<T, T>(base, values, base_rows, value_rows, weight, eps, gemma);
    const Tensor gains = torch::stable::to(weight, sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float);
    return run<T, A>(base, values, base_rows, value_rows, gains, eps, gemma);
  };
  switch (base.scalar_type()) {
    case ScalarType::Double:
      return call(double{});
    case ScalarType::Float:
      return call(float{});
    case ScalarType::BFloat16:
      return call(rmfast::cuda::bf16{});
    case ScalarType::Half:
      return call(rmfast::cuda::f16{});
    default:
      STD_TORCH_CHECK(false, "patch_rows: expected base to be float64, float32, bfloat16 or float16");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rmfast_native, CUDA, m) { m.impl("patch_rows", TORCH_BOX(&patch_rows)); }

extern "C" __attribute__((visibility("default"))) int rmfast_interface() { return RMFAST_INTERFACE; }
