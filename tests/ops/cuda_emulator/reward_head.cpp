// reward_head's CUDA kernels on the CPU, for ctypes. Types: 0 fp64, 1 fp32, 2 bf16, 3 fp16.
#include "rmfast/cuda/reward_head.cuh"

#include <cstdlib>

using namespace rmfast::cuda;

namespace {

template <typename T>
int run(const void* const* t, const int64_t* n, int norm, double eps, int processors) {
  using A = acc_t<T>;
  const auto acc = [&](int i) { return static_cast<const A*>(t[i]); };
  const auto index = [&](int i) { return static_cast<const int64_t*>(t[i]); };
  Problem<T> p{static_cast<const T*>(t[0]), n[0], n[1], n[2], n[3], n[4], acc(1), acc(2), norm, acc(3), acc(4), eps,
               index(5), acc(6), acc(7), acc(8), index(9), n[5], n[6], n[7], n[8], static_cast<A*>(const_cast<void*>(t[10]))};
  Plan made = plan(p, processors);
  if (n[9] && p.J && n[9] < made.chunk_rows) {  // smaller chunks, to run more than one; they fit the same workspace
    made.chunk_rows = n[9];
    made.chunks = ceil_div(p.M, n[9]);
    made.counters = made.bytes;
    made.bytes += made.chunks * 4;
  }
  void* workspace = std::aligned_alloc(256, ceil_div(made.bytes, 256) * 256);
  std::memset(workspace, 0xff, made.bytes);
  const Status status = reward_head<T>(p, made, workspace, processors, nullptr);
  std::free(workspace);
  return status.error;
}

}  // namespace

extern "C" int emulate(int type, const void* const* tensors, const int64_t* sizes, int norm, double eps,
                       int processors) {
  switch (type) {
    case 0:
      return run<double>(tensors, sizes, norm, eps, processors);
    case 1:
      return run<float>(tensors, sizes, norm, eps, processors);
    case 2:
      return run<bf16>(tensors, sizes, norm, eps, processors);
    default:
      return run<f16>(tensors, sizes, norm, eps, processors);
  }
}
