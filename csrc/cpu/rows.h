// What the ops over rows share on torch's side: views of tensors, scratch memory and the split of rows over threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <new>
#include <optional>

#include "rmfast/token_wise.h"
#include "tensors.h"

namespace rmfast {
namespace {

inline Gain gain_of(const std::optional<torch::stable::Tensor>& t) {
  return t ? Gain{t->const_data_ptr(), dtype_of(*t)} : Gain{nullptr, DType::f32};
}

inline Matrix matrix(const torch::stable::Tensor& t) { return {t.const_data_ptr(), t.stride(0)}; }

struct Aligned {
  void* data;
  explicit Aligned(int64_t bytes) : data(::operator new(size_t(bytes), std::align_val_t(64))) {}
  ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
};

// Below about 2^15 elements (5 µs) a second thread costs more than it saves.
template <class F>
void over_rows(int64_t rows, int64_t elements, F run) {
  torch::stable::parallel_for(0, rows, 1 + (int64_t(1) << 15) / elements, run);
}

}  // namespace
}  // namespace rmfast
