// suffix_attention's CUDA kernels on the CPU, for ctypes. Types: 2 bf16, 3 fp16.
#include "rmfast/cuda/suffix_attention.cuh"

using namespace rmfast::cuda;

namespace {

template <typename E>
int run(const void* const* t, const int64_t* n, float scale, float softcap, void* out, void* lse) {
  const auto rows = [&](int i) { return static_cast<const E*>(t[i]); };
  const auto floats = [&](int i) { return static_cast<const float*>(t[i]); };
  const SuffixAttention<E> a{rows(0), rows(1), rows(2), rows(3), rows(4), n[0], n[1], n[2], n[3], n[4], n[5], n[6],
                             n[7], n[8], n[9], static_cast<const SeenKeys*>(t[5]), int(n[10]), int(n[11]), int(n[12]),
                             int(n[11] / n[12]), int(n[13]), scale, softcap, floats(6), floats(7),
                             static_cast<E*>(out), static_cast<float*>(lse), nullptr};
  return suffix_attention(a, nullptr);
}

}  // namespace

extern "C" int emulate_seen(const int64_t* ends, const int64_t* asks, const int64_t* start, const int64_t* length,
                            const int64_t* n, bool causal, void* out) {
  const Suffixes q{ends, asks, start, length, n[0], n[1], n[2], n[3], causal, n[4]};
  return seen_keys(q, static_cast<SeenKeys*>(out), nullptr);
}

extern "C" int emulate(int type, const void* const* tensors, const int64_t* sizes, float scale, float softcap,
                       void* out, void* lse) {
  return type == 2 ? run<bf16>(tensors, sizes, scale, softcap, out, lse)
                   : run<f16>(tensors, sizes, scale, softcap, out, lse);
}
