// suffix_attention by wgmma and TMA, for compute capability 9.0. It has not run on a GPU yet: nothing chooses it but the
// check that compares it with the truth (tests/gpu).
#include "rmfast/cuda/suffix_attention_sm90.cuh"

#include "suffix_arguments.h"

namespace rmfast {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function: linked plainly, this library would not load where there is no driver.
Encode tensor_map_encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  STD_TORCH_CHECK(found != nullptr, "suffix_attention: this driver has no cuTensorMapEncodeTiled");
  return found;
}

template <typename E, int D>
cudaError_t run(cuda::SuffixAttention<E> a, const Tensor& k, const Tensor& v, const Tensor& pool_k,
                const Tensor& pool_v, cudaStream_t stream) {
  using Tile = cuda::HopperTile<D>;
  cuda::Maps maps{};
  const Encode encoder = tensor_map_encoder();
  const auto encode = [&](CUtensorMap& map, const E* data, const Tensor& t, int64_t row, int64_t head) {
    const bool made = cuda::encode<E, D>(map, encoder, data, t.size(0), a.kv_heads, a.d, row, head);
    STD_TORCH_CHECK(made, "suffix_attention: cuTensorMapEncodeTiled refuses these strides");
  };
  encode(maps.k, a.k, k, a.k_row, a.k_head);
  encode(maps.v, a.v, v, a.v_row, a.v_head);
  encode(maps.pool_k, a.pool_k, pool_k, a.pool_k_row, a.pool_k_head);
  encode(maps.pool_v, a.pool_v, pool_v, a.pool_v_row, a.pool_v_head);

  const int64_t tiles = (int64_t{a.queries} * a.group + Tile::kRows - 1) / Tile::kRows;
  // PyTorch's allocator keeps freed memory for its stream: the kernels may still read it when this returns.
  Tensor redo = torch::stable::new_empty(k, {k.size(1), tiles}, ScalarType::Int);
  const dim3 blocks(static_cast<unsigned>(tiles), static_cast<unsigned>(a.kv_heads));
  auto* kernel = cuda::suffix_attention_sm90_kernel<E, D, false>;
  if (a.softcap != 0) kernel = cuda::suffix_attention_sm90_kernel<E, D, true>;
  const cudaError_t error = cuda::launch(kernel, blocks, Tile::kThreads, Tile::kShared, stream, a, maps,
                                         static_cast<int*>(redo.data_ptr()));
  if (error != cudaSuccess) return error;
  a.redo = static_cast<const int*>(redo.data_ptr());
  return attend(a, stream);
}

Attended suffix_attention_wgmma(const Tensor& q, const Tensor& k, const Tensor& v,
                                const std::optional<Tensor>& prefix_k, const std::optional<Tensor>& prefix_v,
                                const Tensor& seen, double scale, double softcap, const std::optional<Tensor>& sinks,
                                const std::optional<Tensor>& alibi) {
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  use_device(device);
  int major = 0, minor = 0;
  STD_TORCH_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
                      major == 9 && minor == 0,
                  "suffix_attention: wgmma needs compute capability 9.0, CUDA device ", device, " has ", major, ".",
                  minor);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  if (q.size(0) == 0) return {out, lse};
  // An empty pool has no tensor map, and nobody reads it.
  const bool pool = prefix_k.has_value() && prefix_v.has_value() && prefix_k->size(0) > 0;
  const Tensor &pool_k = pool ? *prefix_k : k, &pool_v = pool ? *prefix_v : v;
  return by_dtype(q, [&](auto type) -> Attended {
    using E = decltype(type);
    const auto a = suffix_arguments<E>(q, k, v, pool_k, pool_v, seen, scale, softcap, sinks, alibi, out, lse);
    const cudaStream_t stream = current_stream(device);
    const cudaError_t error = a.d <= 64    ? run<E, 64>(a, k, v, pool_k, pool_v, stream)
                              : a.d <= 128 ? run<E, 128>(a, k, v, pool_k, pool_v, stream)
                                           : run<E, 256>(a, k, v, pool_k, pool_v, stream);
    STD_TORCH_CHECK(error == cudaSuccess, "suffix_attention: launching the kernel of wgmma failed: ",
                    cudaGetErrorString(error));
    return {out, lse};
  });
}

}  // namespace
}  // namespace rmfast

STABLE_TORCH_LIBRARY_IMPL(rmfast_native, CUDA, m) {
  m.impl("suffix_attention_wgmma", TORCH_BOX(&rmfast::suffix_attention_wgmma));
}
