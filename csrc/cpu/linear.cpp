// Registers the linear layer on 16-bit weights and splits its product over threads.

#include "rmfast/linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "rows.h"
#include "tensors.h"

namespace rmfast {

namespace linear {
#ifdef RMFAST_X86
extern const LinearIsa avx512, avx2;
#endif
extern const LinearIsa portable;
}  // namespace linear

namespace {

using torch::stable::Tensor;

const LinearIsa& isa() {
#ifdef RMFAST_X86
  static const LinearIsa* const all[] = {&linear::avx512, &linear::avx2, &linear::portable};
#else
  static const LinearIsa* const all[] = {&linear::portable};
#endif
  return required(choose_isa(all));
}

void into(Tensor y, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool across) {
  Linear s{};
  s.dtype = dtype_of(weight);
  s.rows = x.size(0);
  s.inner = x.size(1);
  s.outer = weight.size(across ? 1 : 0);
  s.x = static_cast<const float*>(x.const_data_ptr());
  s.stride_x = x.stride(0);
  s.weight = weight.const_data_ptr();
  s.stride_weight = weight.stride(0);
  s.across = across;
  s.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  s.y = static_cast<float*>(y.mutable_data_ptr());
  if (!s.rows || !s.outer) return;
  if (!s.inner) {  // sums of nothing
    for (int64_t i = 0; i < s.rows * s.outer; ++i) s.y[i] = s.bias ? s.bias[i % s.outer] : 0;
    return;
  }
  const LinearIsa& kernels = isa();
  // Panels over threads first, since each packs its own; then rows. Two pieces for each thread, against threads that
  // are held up; below 2^20 multiplications (10 µs) a second thread costs more than it saves.
  const int64_t panels = (s.outer + kernels.columns - 1) / kernels.columns, tiles = (s.rows + kernels.rows - 1) / kernels.rows;
  const int64_t work = 1 + s.rows * s.inner * s.outer / (int64_t(1) << 20);
  const int64_t pieces = std::min<int64_t>(torch::stable::get_num_threads(), work);
  const int64_t across_panels = std::min(pieces, panels), over_rows = std::min((pieces + across_panels - 1) / across_panels, tiles);
  torch::stable::parallel_for(0, across_panels * over_rows, 1, [&](int64_t first, int64_t last) {
    const Aligned scratch(kernels.scratch_bytes(s));
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t c = piece % across_panels, r = piece / across_panels;
      const int64_t row = tiles * r / over_rows * kernels.rows, row_end = tiles * (r + 1) / over_rows * kernels.rows;
      kernels.run(s, row, std::min(row_end, s.rows), panels * c / across_panels, panels * (c + 1) / across_panels, scratch.data);
    }
  });
}

Tensor run(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool across) {
  Tensor y = empty(torch::headeronly::ScalarType::Float, {x.size(0), weight.size(across ? 1 : 0)});
  into(y, x, weight, bias, across);
  return y;
}

}  // namespace
}  // namespace rmfast

STABLE_TORCH_LIBRARY_IMPL(rmfast_native, CPU, m) {
  m.impl("linear", TORCH_BOX(&rmfast::run));
  m.impl("linear_", TORCH_BOX(&rmfast::into));
}
