// patch_rows's CUDA kernel on the CPU, for ctypes. Types: 0 fp64, 1 fp32, 2 bf16, 3 fp16.
#include "rmfast/cuda/patch_rows.cuh"

using namespace rmfast::cuda;

namespace {

template <typename T, typename W>
int run(const void* const* t, const int64_t* n, double eps, bool gemma) {
  const auto index = [&](int i) { return static_cast<const int64_t*>(t[i]); };
  const auto out = [&](int i) { return static_cast<T*>(const_cast<void*>(t[i])); };
  const PatchRows<T, W> q{static_cast<const T*>(t[0]), static_cast<const T*>(t[1]), n[0], n[1], n[2], n[3], index(2),
                          index(3), n[4], static_cast<int>(n[5]), static_cast<const W*>(t[4]), gemma,
                          static_cast<acc_t<T>>(eps), out(5), out(6)};
  return patch_rows(q, nullptr);
}

template <typename T>
int run(const void* const* t, const int64_t* n, double eps, bool gemma, bool same) {
  return same ? run<T, T>(t, n, eps, gemma) : run<T, acc_t<T>>(t, n, eps, gemma);
}

}  // namespace

// `same`: the gain has the rows' type, else that of the sums.
extern "C" int emulate(int type, const void* const* tensors, const int64_t* sizes, double eps, bool gemma, bool same) {
  switch (type) {
    case 0:
      return run<double>(tensors, sizes, eps, gemma, same);
    case 1:
      return run<float>(tensors, sizes, eps, gemma, same);
    case 2:
      return run<bf16>(tensors, sizes, eps, gemma, same);
    default:
      return run<f16>(tensors, sizes, eps, gemma, same);
  }
}
