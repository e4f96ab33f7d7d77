// Registers the CPU patch_rows with torch: unpacks tensors and spreads rows over threads.

#include "rmfast/patch_rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "rows.h"
#include "tensors.h"

namespace rmfast {

namespace patch_rows_isa {
#ifdef RMFAST_X86
extern const PatchRowsIsa avx512, avx2;
#endif
extern const PatchRowsIsa portable;
}  // namespace patch_rows_isa

namespace {

using torch::stable::Tensor;

const PatchRowsIsa& isa() {
#ifdef RMFAST_X86
  static const PatchRowsIsa* const all[] = {&patch_rows_isa::avx512, &patch_rows_isa::avx2, &patch_rows_isa::portable};
#else
  static const PatchRowsIsa* const all[] = {&patch_rows_isa::portable};
#endif
  return required(choose_isa(all));
}

std::tuple<Tensor, Tensor> patch_rows(const Tensor& base, const Tensor& values, const Tensor& base_rows,
                                      const Tensor& value_rows, const Tensor& weight, double eps, bool gemma) {
  const int64_t rows = base_rows.size(0);
  PatchRows a{};
  a.dtype = dtype_of(base);
  a.d = base.size(1);
  a.base = matrix(base);
  a.values = matrix(values);
  a.base_rows = static_cast<const int64_t*>(base_rows.const_data_ptr());
  a.value_rows = static_cast<const int64_t*>(value_rows.const_data_ptr());
  a.weight = gain_of(weight);
  a.gemma = gemma;
  a.eps = eps;
  Tensor x = empty(base.scalar_type(), {rows, a.d}), y = empty(base.scalar_type(), {rows, a.d});
  a.x = x.mutable_data_ptr();
  a.y = y.mutable_data_ptr();
  const PatchRowsIsa& run = isa();
  over_rows(rows, a.d, [&](int64_t first, int64_t last) {
    Aligned scratch(run.scratch_bytes(a));
    run.run(a, first, last, scratch.data);
  });
  return {x, y};
}

}  // namespace
}  // namespace rmfast

STABLE_TORCH_LIBRARY_IMPL(rmfast_native, CPU, m) { m.impl("patch_rows", TORCH_BOX(&rmfast::patch_rows)); }
