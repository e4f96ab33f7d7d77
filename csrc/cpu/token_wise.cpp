// Registers the CPU token-wise ops with torch: unpacks tensors and spreads rows over threads.

#include "rmfast/token_wise.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "rows.h"
#include "tensors.h"

namespace rmfast {

namespace token_wise {
#ifdef RMFAST_X86
extern const TokenWiseIsa avx512, avx2;
#endif
extern const TokenWiseIsa portable;
}  // namespace token_wise

namespace {

using torch::stable::Tensor;

const TokenWiseIsa& isa() {
#ifdef RMFAST_X86
  static const TokenWiseIsa* const all[] = {&token_wise::avx512, &token_wise::avx2, &token_wise::portable};
#else
  static const TokenWiseIsa* const all[] = {&token_wise::portable};
#endif
  return required(choose_isa(all));
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const std::optional<Tensor>& weight,
                                    const std::optional<Tensor>& residual, const std::optional<Tensor>& post_weight,
                                    double eps, bool gemma) {
  const int64_t rows = x.size(0);
  RmsNorm a{};
  a.dtype = dtype_of(x);
  a.wide = residual && residual->scalar_type() != x.scalar_type();
  a.d = x.size(1);
  a.x = matrix(x);
  if (residual) a.residual = matrix(*residual);
  a.weight = gain_of(weight);
  a.post_weight = gain_of(post_weight);
  a.post = post_weight.has_value();
  a.gemma = gemma;
  a.eps = eps;
  Tensor y = empty(x.scalar_type(), {rows, a.d});
  Tensor sum = residual ? empty(residual->scalar_type(), {rows, a.d}) : empty(x.scalar_type(), {0});
  a.y = y.mutable_data_ptr();
  a.sum = residual ? sum.mutable_data_ptr() : nullptr;
  const TokenWiseIsa& run = isa();
  over_rows(rows, a.d, [&](int64_t first, int64_t last) {
    Aligned scratch(run.rms_norm_scratch(a));
    run.rms_norm(a, first, last, scratch.data);
  });
  return {y, sum};
}

std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                  const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps,
                                  bool gemma) {
  const int64_t rows = q.size(0);
  Rotary a{};
  a.dtype = dtype_of(q);
  a.cos_dtype = dtype_of(cos);
  a.sin_dtype = dtype_of(sin);
  a.head_dim = q.size(2);
  a.rotated = cos.size(1);
  a.cos = matrix(cos);
  a.sin = matrix(sin);
  a.gemma = gemma;
  a.eps = eps;
  auto part = [&](const Tensor& t, const std::optional<Tensor>& norm, Tensor& out) -> Heads {
    out = empty(t.scalar_type(), {rows, t.size(1), a.head_dim});
    return {t.const_data_ptr(), t.stride(0), t.stride(1), t.size(1), gain_of(norm), out.mutable_data_ptr()};
  };
  Tensor out_q, out_k;
  a.parts[0] = part(q, q_norm, out_q);
  a.parts[1] = part(k, k_norm, out_k);
  const TokenWiseIsa& run = isa();
  over_rows(rows, (q.size(1) + k.size(1)) * a.head_dim, [&](int64_t first, int64_t last) {
    Aligned scratch(run.rotary_scratch(a));
    run.rotary(a, first, last, scratch.data);
  });
  return {out_q, out_k};
}

Tensor gated_activation(const Tensor& gate, const Tensor& up, int64_t kind) {
  const int64_t rows = gate.size(0);
  GatedActivation a{};
  a.dtype = dtype_of(gate);
  a.d = gate.size(1);
  a.gate = matrix(gate);
  a.up = matrix(up);
  a.kind = Activation(kind);
  Tensor out = empty(gate.scalar_type(), {rows, a.d});
  a.out = out.mutable_data_ptr();
  const TokenWiseIsa& run = isa();
  over_rows(rows, 4 * a.d, [&](int64_t first, int64_t last) { run.gated_activation(a, first, last); });
  return out;
}

}  // namespace
}  // namespace rmfast

STABLE_TORCH_LIBRARY_IMPL(rmfast_native, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rmfast::rms_norm));
  m.impl("rotary", TORCH_BOX(&rmfast::rotary));
  m.impl("gated_activation", TORCH_BOX(&rmfast::gated_activation));
}
