// What suffix_attention's two kernels are given of torch's tensors.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "rmfast/cuda/suffix_attention.cuh"
#include "stream.h"

namespace rmfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Attended = std::tuple<Tensor, Tensor>;  // out and lse

template <typename T>
const T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

// This library has its own CUDA runtime, which must agree with PyTorch on the device.
inline void use_device(int32_t device) {
  STD_TORCH_CHECK(cudaSetDevice(device) == cudaSuccess, "suffix_attention: cannot use CUDA device ", device);
}

template <typename E>
cuda::SuffixAttention<E> suffix_arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pool_k,
                                          const Tensor& pool_v, const Tensor& seen, double scale, double softcap,
                                          const std::optional<Tensor>& sinks, const std::optional<Tensor>& alibi,
                                          const Tensor& out, const Tensor& lse) {
  const auto rows = [](const Tensor& t) { return static_cast<const E*>(t.data_ptr()); };
  cuda::SuffixAttention<E> a{};
  a.q = rows(q), a.k = rows(k), a.v = rows(v), a.pool_k = rows(pool_k), a.pool_v = rows(pool_v);
  a.q_row = q.stride(0), a.q_head = q.stride(1);
  a.k_row = k.stride(0), a.k_head = k.stride(1);
  a.v_row = v.stride(0), a.v_head = v.stride(1);
  a.pool_k_row = pool_k.stride(0), a.pool_k_head = pool_k.stride(1);
  a.pool_v_row = pool_v.stride(0), a.pool_v_head = pool_v.stride(1);
  a.seen = static_cast<const cuda::SeenKeys*>(seen.data_ptr());
  a.queries = static_cast<int>(q.size(0));
  a.heads = static_cast<int>(q.size(1));
  a.kv_heads = static_cast<int>(k.size(1));
  a.group = a.heads / a.kv_heads;
  a.d = static_cast<int>(q.size(2));
  a.scale = static_cast<float>(softcap != 0 ? scale / softcap : scale * 1.4426950408889634);
  a.softcap = static_cast<float>(softcap * 1.4426950408889634);
  a.sinks = data<float>(sinks), a.alibi = data<float>(alibi);
  a.out = static_cast<E*>(out.data_ptr());
  a.lse = static_cast<float*>(lse.data_ptr());
  return a;
}

// Calls run(E{}) with the element type of q.
template <typename Run>
Attended by_dtype(const Tensor& q, const Run& run) {
  if (q.scalar_type() == ScalarType::BFloat16) return run(cuda::bf16{});
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Half, "suffix_attention: expected bfloat16 or float16 on CUDA");
  return run(cuda::f16{});
}

// The kernels of mma.sync, compiled once, in suffix_attention.cu.
cudaError_t attend(const cuda::SuffixAttention<cuda::bf16>& a, cudaStream_t stream);
cudaError_t attend(const cuda::SuffixAttention<cuda::f16>& a, cudaStream_t stream);

}  // namespace rmfast
