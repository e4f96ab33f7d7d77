// What every op's torch side shares: dtypes, and the table of the instruction set in use.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "rmfast/isa.h"
#include "rmfast/reward_head.h"

namespace rmfast {
namespace {

inline DType dtype_of(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: return DType::f32;
  }
}

// Asks for pages of 2 MiB where memory is large and so comes anew from the system at every call: faulting in 4 KiB at a
// time takes 2 µs each on a virtual machine, ten times what a gradient's rows take.
inline void on_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t first = (uintptr_t(data) + kPage - 1) / kPage * kPage, last = (uintptr_t(data) + bytes) / kPage * kPage;
  if (bytes >= int64_t(8 * kPage)) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// New memory; by the dispatcher, as new_empty takes it, it would cost 1 µs of a small call's 5.
inline torch::stable::Tensor empty(torch::headeronly::ScalarType type, std::initializer_list<int64_t> sizes) {
  int64_t strides[8], stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes.begin()[i] ? sizes.begin()[i] : 1;
  }
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, dtype,
                                                  aoti_torch_device_type_cpu(), 0, &out));
  torch::stable::Tensor made(out);
  on_huge_pages(made.mutable_data_ptr(), stride * int64_t(made.element_size()));
  return made;
}

template <class Table>
const Table& required(const Table* found) {
  STD_TORCH_CHECK(found, "RMFAST_CPU_ISA=", std::getenv("RMFAST_CPU_ISA"),
                  " is not an instruction set of this build and CPU; expected avx512, avx2 or portable");
  return *found;
}

}  // namespace
}  // namespace rmfast
