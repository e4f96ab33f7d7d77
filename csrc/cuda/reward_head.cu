// The op `rmfast_native::reward_head` on CUDA: PyTorch's stable ABI around the kernels of rmfast/cuda.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "rmfast/cuda/reward_head.cuh"
#include "stream.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename A>
const A* data(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const A*>(t->data_ptr()) : nullptr;
}

template <typename T>
Tensor run(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, int64_t norm,
           const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps,
           const std::optional<Tensor>& rows, const std::optional<Tensor>& directions,
           const std::optional<Tensor>& strengths, const std::optional<Tensor>& targets,
           const std::optional<Tensor>& index) {
  using A = rmfast::cuda::acc_t<T>;
  const int32_t device = hidden.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  // This library has its own CUDA runtime, which must agree on the device.
  STD_TORCH_CHECK(cudaSetDevice(device) == cudaSuccess, "reward_head: cannot use CUDA device ", device);

  rmfast::cuda::Problem<T> p{};
  p.hidden = static_cast<const T*>(hidden.data_ptr());
  p.batches = hidden.size(0), p.tokens = hidden.size(1), p.d = hidden.size(2);
  p.stride_b = hidden.stride(0), p.stride_t = hidden.stride(1);
  p.weight = static_cast<const A*>(weight.data_ptr());
  p.bias = data<A>(bias);
  p.norm = static_cast<int>(norm);
  p.norm_weight = data<A>(norm_weight);
  p.norm_bias = data<A>(norm_bias);
  p.eps = eps;
  p.rows = data<int64_t>(rows);
  p.directions = data<A>(directions);
  p.strengths = data<A>(strengths);
  p.targets = data<A>(targets);
  p.index = data<int64_t>(index);
  p.M = rows.has_value() ? rows->size(0) : p.batches * p.tokens;
  p.K = weight.size(0);
  p.J = directions.has_value() ? directions->size(0) : 0;
  p.I = strengths.has_value() ? strengths->size(0) : 0;
  STD_TORCH_CHECK(p.d < (int64_t{1} << 30), "reward_head: expected rows below 2^30 elements on CUDA, got ", p.d);
  STD_TORCH_CHECK(p.J <= rmfast::cuda::most_directions<T>(), "reward_head: expected at most ",
                  rmfast::cuda::most_directions<T>(), " directions on CUDA, got ", p.J);

  const bool axis = p.J > 0 && !p.index;
  const int64_t shape[] = {p.M, axis ? p.I : p.K, p.K};
  Tensor out = torch::stable::new_empty(weight, {shape, axis ? size_t{3} : size_t{2}});
  p.out = static_cast<A*>(out.data_ptr());
  if (p.M == 0) return out;

  int processors = 0;
  STD_TORCH_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess,
                  "reward_head: cannot read the number of multiprocessors of CUDA device ", device);
  const rmfast::cuda::Plan plan = rmfast::cuda::plan(p, processors);
  // PyTorch's allocator keeps freed memory for its stream: the kernels may still read it when this returns.
  Tensor workspace = torch::stable::new_empty(weight, {plan.bytes}, ScalarType::Byte);
  const rmfast::cuda::Status status =
      rmfast::cuda::reward_head(p, plan, workspace.data_ptr(), processors, rmfast::current_stream(device));
  STD_TORCH_CHECK(status.error == cudaSuccess, "reward_head: launching the kernel '", status.kernel,
                  "' failed: ", cudaGetErrorString(status.error));
  return out;
}

Tensor reward_head(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, int64_t norm,
                   const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps,
                   const std::optional<Tensor>& rows, const std::optional<Tensor>& directions,
                   const std::optional<Tensor>& strengths, const std::optional<Tensor>& targets,
                   const std::optional<Tensor>& intervention_index) {
  const auto call = [&](auto type) {
    return run<decltype(type)>(hidden, weight, bias, norm, norm_weight, norm_bias, eps, rows, directions, strengths,
                               targets, intervention_index);
  };
  switch (hidden.scalar_type()) {
    case ScalarType::Double:
      return call(double{});
    case ScalarType::Float:
      return call(float{});
    case ScalarType::BFloat16:
      return call(rmfast::cuda::bf16{});
    case ScalarType::Half:
      return call(rmfast::cuda::f16{});
    default:
      STD_TORCH_CHECK(false, "reward_head: expected hidden to be float64, float32, bfloat16 or float16");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rmfast_native, CUDA, m) { m.impl("reward_head", TORCH_BOX(&reward_head)); }
