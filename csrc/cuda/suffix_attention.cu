// suffix_attention on CUDA, in two ops: which keys each query sees, the same in all layers, and the attention itself.
#include "suffix_arguments.h"

namespace rmfast {

cudaError_t attend(const cuda::SuffixAttention<cuda::bf16>& a, cudaStream_t stream) {
  return cuda::suffix_attention(a, stream);
}
cudaError_t attend(const cuda::SuffixAttention<cuda::f16>& a, cudaStream_t stream) {
  return cuda::suffix_attention(a, stream);
}

namespace {

constexpr int64_t kSeenWords = sizeof(cuda::SeenKeys) / 4;

// (queries, 8) int32, the records of cuda::SeenKeys.
Tensor suffix_seen_keys(const Tensor& ends, const Tensor& asks, const std::optional<Tensor>& start,
                        const std::optional<Tensor>& length, int64_t queries, int64_t keys, int64_t pool, bool causal,
                        int64_t window) {
  const int32_t device = ends.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  use_device(device);
  Tensor out = torch::stable::new_empty(ends, {queries, kSeenWords}, ScalarType::Int);
  if (queries == 0) return out;
  const cuda::Suffixes q{static_cast<const int64_t*>(ends.data_ptr()),
                         static_cast<const int64_t*>(asks.data_ptr()),
                         data<int64_t>(start),
                         data<int64_t>(length),
                         ends.size(0) - 1,
                         queries,
                         keys,
                         pool,
                         causal,
                         window};
  const cudaError_t error =
      cuda::seen_keys(q, static_cast<cuda::SeenKeys*>(out.data_ptr()), current_stream(device));
  STD_TORCH_CHECK(error == cudaSuccess, "suffix_attention: launching the kernel of seen keys failed: ",
                  cudaGetErrorString(error));
  return out;
}

Attended suffix_attention_seen(const Tensor& q, const Tensor& k, const Tensor& v,
                               const std::optional<Tensor>& prefix_k, const std::optional<Tensor>& prefix_v,
                               const Tensor& seen, double scale, double softcap, const std::optional<Tensor>& sinks,
                               const std::optional<Tensor>& alibi) {
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  use_device(device);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  if (q.size(0) == 0) return {out, lse};
  return by_dtype(q, [&](auto type) -> Attended {
    const auto a = suffix_arguments<decltype(type)>(q, k, v, prefix_k.has_value() ? *prefix_k : k,
                                                    prefix_v.has_value() ? *prefix_v : v, seen, scale, softcap, sinks,
                                                    alibi, out, lse);
    const cudaError_t error = attend(a, current_stream(device));
    STD_TORCH_CHECK(error == cudaSuccess, "suffix_attention: launching the kernel failed: ", cudaGetErrorString(error));
    return {out, lse};
  });
}

}  // namespace
}  // namespace rmfast

STABLE_TORCH_LIBRARY_IMPL(rmfast_native, CUDA, m) {
  m.impl("suffix_seen_keys", TORCH_BOX(&rmfast::suffix_seen_keys));
  m.impl("suffix_attention_seen", TORCH_BOX(&rmfast::suffix_attention_seen));
}
