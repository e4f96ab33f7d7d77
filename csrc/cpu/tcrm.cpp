// Registers the CPU TCRM loss with torch: unpacks tensors, spreads pairs over threads, adds up their terms.

#include "rmfast/tcrm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace rmfast {

namespace tcrm {
#ifdef RMFAST_X86
extern const TcrmIsa avx512, avx2;
#endif
extern const TcrmIsa portable;
}  // namespace tcrm

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const TcrmIsa& isa() {
#ifdef RMFAST_X86
  static const TcrmIsa* const all[] = {&tcrm::avx512, &tcrm::avx2, &tcrm::portable};
#else
  static const TcrmIsa* const all[] = {&tcrm::portable};
#endif
  return required(choose_isa(all));
}

template <class A>
void write(const double* terms, int64_t pairs, double smooth, double lookahead, Tensor& loss, Tensor& means) {
  double sums[3] = {};
  for (int64_t b = 0; b < pairs; ++b)
    for (int i = 0; i < 3; ++i) sums[i] += terms[3 * b + i];
  for (int i = 0; i < 3; ++i) static_cast<A*>(means.mutable_data_ptr())[i] = A(sums[i] /= double(pairs));
  *static_cast<A*>(loss.mutable_data_ptr()) = A(sums[0] + smooth * sums[1] + lookahead * sums[2]);
}

Tcrm arguments(const Tensor& chosen, const Tensor& rejected, const Tensor& bounds, const std::optional<Tensor>& margin,
               double smooth, double lookahead, bool mean) {
  Tcrm a{};
  a.dtype = dtype_of(chosen);
  a.pairs = bounds.size(1);
  a.margin = margin ? margin->const_data_ptr() : nullptr;
  a.smooth = smooth;
  a.lookahead = lookahead;
  a.mean = mean;
  const int64_t* at = static_cast<const int64_t*>(bounds.const_data_ptr());
  for (int s = 0; s < 2; ++s) {
    const Tensor& values = s ? rejected : chosen;
    a.sides[s] = {values.const_data_ptr(), values.size(0), at + 2 * s * a.pairs, at + (2 * s + 1) * a.pairs, nullptr};
  }
  return a;
}

// Below about 2^16 tokens (20 µs) a second thread costs more than it saves.
template <class F>
void over_pairs(const Tcrm& a, F run) {
  const int64_t grain = 1 + (int64_t(1) << 16) * a.pairs / (a.sides[0].tokens + a.sides[1].tokens);
  torch::stable::parallel_for(0, a.pairs, grain, [&](int64_t first, int64_t last) { run(a, first, last); });
}

std::tuple<Tensor, Tensor> forward(const Tensor& chosen, const Tensor& rejected, const Tensor& bounds,
                                   const std::optional<Tensor>& margin, double smooth, double lookahead, bool mean) {
  Tcrm a = arguments(chosen, rejected, bounds, margin, smooth, lookahead, mean);
  const bool wide = a.dtype == DType::f64;
  const ScalarType acc = wide ? ScalarType::Double : ScalarType::Float;
  Tensor loss = torch::stable::new_empty(chosen, {}, acc), terms = torch::stable::new_empty(chosen, {3}, acc);
  std::vector<double> by_pair(size_t(3 * a.pairs));
  a.terms = by_pair.data();
  over_pairs(a, isa().forward);
  (wide ? write<double> : write<float>)(a.terms, a.pairs, smooth, lookahead, loss, terms);
  return {loss, terms};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& chosen, const Tensor& rejected,
                                    const Tensor& bounds, const std::optional<Tensor>& margin, double smooth,
                                    double lookahead, bool mean) {
  Tcrm a = arguments(chosen, rejected, bounds, margin, smooth, lookahead, mean);
  a.grad = a.dtype == DType::f64 ? *static_cast<const double*>(grad.const_data_ptr())
                                 : double(*static_cast<const float*>(grad.const_data_ptr()));
  Tensor out[2] = {torch::stable::new_empty(chosen, {chosen.size(0)}),
                   torch::stable::new_empty(rejected, {rejected.size(0)})};
  for (int s = 0; s < 2; ++s) a.sides[s].grad = out[s].mutable_data_ptr();
  over_pairs(a, isa().backward);
  return {out[0], out[1]};
}

}  // namespace
}  // namespace rmfast

STABLE_TORCH_LIBRARY_IMPL(rmfast_native, CPU, m) {
  m.impl("tcrm", TORCH_BOX(&rmfast::forward));
  m.impl("tcrm_backward", TORCH_BOX(&rmfast::backward));
}
