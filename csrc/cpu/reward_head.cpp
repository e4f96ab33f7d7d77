// Registers the CPU reward head with torch: unpacks tensors, picks the instruction set, spreads blocks over threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <tuple>

#include "rmfast/interface.h"
#include "rows.h"
#include "tensors.h"

namespace rmfast {

#ifdef RMFAST_X86
extern const Isa avx512, avx2;
#endif
extern const Isa portable;

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Isa* found_isa() {
#ifdef RMFAST_X86
  static const Isa* const all[] = {&avx512, &avx2, &portable};
#else
  static const Isa* const all[] = {&portable};
#endif
  return choose_isa(all);
}

const Isa& isa() { return required(found_isa()); }

template <class Acc>
const RewardHeadKernels<Acc>& kernels() {
  if constexpr (sizeof(Acc) == 8)
    return isa().f64;
  else
    return isa().f32;
}

template <class T>
const T* data(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// A parameter in the accumulation dtype, contiguous: as it lies, or a copy. PyTorch's own cast takes 2 µs of a call's 10.
template <class Acc>
class Widened {
 public:
  explicit Widened(const std::optional<Tensor>& t) {
    constexpr DType own = sizeof(Acc) == 8 ? DType::f64 : DType::f32;
    if (t) dense_ = t->is_contiguous() ? *t : torch::stable::contiguous(*t);
    data_ = data<Acc>(dense_);
    if (!t || dtype_of(*t) == own) return;
    copy_.emplace(int64_t(sizeof(Acc)) * t->numel());
    kernels<Acc>().widen(dtype_of(*t), data_, t->numel(), static_cast<Acc*>(copy_->data));
    data_ = static_cast<const Acc*>(copy_->data);
  }
  operator const Acc*() const { return data_; }

 private:
  std::optional<Tensor> dense_;
  std::optional<Aligned> copy_;
  const Acc* data_;
};

Rows rows_of(const Tensor& hidden, const std::optional<Tensor>& picked) {
  Rows rows;
  rows.data = hidden.const_data_ptr();
  rows.dtype = dtype_of(hidden);
  const int64_t dims = hidden.dim(), batches = dims == 3 ? hidden.size(0) : 1;  // (n, d) or (B, T, d)
  rows.d = hidden.size(dims - 1);
  rows.per_batch = hidden.size(dims - 2);
  rows.stride_b = dims == 3 ? hidden.stride(0) : 0;
  rows.stride_t = hidden.stride(dims - 2);
  rows.picked = data<int64_t>(picked);
  rows.count = picked ? picked->size(0) : batches * rows.per_batch;
  if (dims == 3 && rows.stride_b == rows.per_batch * rows.stride_t) rows.per_batch *= batches;  // as good as one
  return rows;
}

template <class Acc>
Tensor forward(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, int64_t norm,
               const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps,
               const std::optional<Tensor>& rows, const std::optional<Tensor>& directions,
               const std::optional<Tensor>& strengths, const std::optional<Tensor>& targets,
               const std::optional<Tensor>& index) {
  const Widened<Acc> weights(weight), biases(bias), gains(norm_weight), norm_biases(norm_bias), removed(directions),
      shares(strengths), kept(targets);
  RewardHead<Acc> h;
  h.rows = rows_of(hidden, rows);
  h.K = weight.size(0);
  h.J = directions ? directions->size(0) : 0;
  h.I = strengths ? strengths->size(0) : 0;
  h.norm = Norm(norm);
  h.eps = eps;
  h.weight = weights;
  h.bias = biases;
  h.norm_weight = gains;
  h.norm_bias = norm_biases;
  h.directions = removed;
  h.strengths = shares;
  h.targets = kept;
  h.index = data<int64_t>(index);

  const RewardHeadKernels<Acc>& run = kernels<Acc>();
  const Aligned workspace(int64_t(sizeof(Acc)) * run.workspace_size(h));
  h.workspace = static_cast<Acc*>(workspace.data);
  constexpr ScalarType type = sizeof(Acc) == 8 ? ScalarType::Double : ScalarType::Float;
  Tensor out = h.J && !h.index ? empty(type, {h.rows.count, h.I, h.K}) : empty(type, {h.rows.count, h.K});
  h.out = static_cast<Acc*>(out.mutable_data_ptr());
  run.prepare(h);
  const int64_t blocks = (h.rows.count + kBlock - 1) / kBlock;
  // Below about 2^20 multiply-adds (10 to 30 µs) a second thread costs more than it saves.
  const int64_t grain = 1 + (int64_t(1) << 20) / (kBlock * h.rows.d * (1 + h.K + h.J));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) { run.forward(h, first, last); });
  return out;
}

Tensor reward_head(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, int64_t norm,
                   const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps,
                   const std::optional<Tensor>& rows, const std::optional<Tensor>& directions,
                   const std::optional<Tensor>& strengths, const std::optional<Tensor>& targets,
                   const std::optional<Tensor>& intervention_index) {
  auto run = hidden.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return run(hidden, weight, bias, norm, norm_weight, norm_bias, eps, rows, directions, strengths, targets,
             intervention_index);
}

template <class Acc>
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& hidden, const Tensor& weight, int64_t norm,
                                    const std::optional<Tensor>& norm_weight, double eps,
                                    const std::optional<Tensor>& rows, bool need_rows, bool need_dots) {
  RewardHeadBackward<Acc> h;
  h.rows = rows_of(hidden, rows);
  h.K = weight.size(0);
  h.norm = Norm(norm);
  h.eps = eps;
  h.grad = static_cast<const Acc*>(grad.const_data_ptr());
  h.weight = static_cast<const Acc*>(weight.const_data_ptr());
  h.norm_weight = data<Acc>(norm_weight);
  // At most 64 partial sums, cut by the number of rows alone: the same bits with any number of threads.
  h.chunk = h.rows.count / 64 < 64 ? 64 : (h.rows.count + 63) / 64;
  const int64_t chunks = (h.rows.count + h.chunk - 1) / h.chunk;

  const ScalarType type = hidden.scalar_type(), acc = weight.scalar_type();
  Tensor grad_rows = need_rows ? empty(type, {h.rows.count, h.rows.d}) : empty(type, {0});
  Tensor partial = need_dots ? empty(acc, {chunks, h.K, h.rows.d}) : empty(acc, {0});
  const Aligned workspace(int64_t(sizeof(Acc)) * h.K * (h.rows.d + 1));
  h.grad_rows = need_rows ? grad_rows.mutable_data_ptr() : nullptr;
  h.partial = need_dots ? static_cast<Acc*>(partial.mutable_data_ptr()) : nullptr;
  h.workspace = static_cast<Acc*>(workspace.data);

  const RewardHeadKernels<Acc>& run = kernels<Acc>();
  run.prepare_backward(h);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) { run.backward(h, first, last); });
  if (!need_dots) return {grad_rows, partial};
  const int64_t first_dim = 0;
  return {grad_rows, torch::stable::sum(partial, torch::headeronly::IntHeaderOnlyArrayRef(&first_dim, 1))};
}

std::tuple<Tensor, Tensor> reward_head_backward(const Tensor& grad, const Tensor& hidden, const Tensor& weight,
                                                int64_t norm, const std::optional<Tensor>& norm_weight, double eps,
                                                const std::optional<Tensor>& rows, bool need_rows, bool need_dots) {
  auto run = hidden.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  return run(grad, hidden, weight, norm, norm_weight, eps, rows, need_rows, need_dots);
}

}  // namespace
}  // namespace rmfast

// The instruction set that runs now, or null where RMFAST_CPU_ISA asks for one that cannot; read through ctypes.
extern "C" __attribute__((visibility("default"))) const char* rmfast_cpu_isa() {
  const rmfast::Isa* found = rmfast::found_isa();
  return found ? found->name : nullptr;
}

extern "C" __attribute__((visibility("default"))) int rmfast_interface() { return RMFAST_INTERFACE; }

extern "C" __attribute__((visibility("default"))) bool rmfast_cpu_is_amd() {
#ifdef RMFAST_X86
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

STABLE_TORCH_LIBRARY_IMPL(rmfast_native, CPU, m) {
  m.impl("reward_head", TORCH_BOX(&rmfast::reward_head));
  m.impl("reward_head_backward", TORCH_BOX(&rmfast::reward_head_backward));
}
