// Registers the CPU neuron statistics with torch: unpacks tensors and spreads panels of neurons over threads.

#include "rmfast/neuron_stats.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "rows.h"
#include "tensors.h"

namespace rmfast {

namespace neuron_stats {
#ifdef RMFAST_X86
extern const NeuronStatsIsa avx512, avx2;
#endif
extern const NeuronStatsIsa portable;
}  // namespace neuron_stats

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const NeuronStatsIsa& isa() {
#ifdef RMFAST_X86
  static const NeuronStatsIsa* const all[] = {&neuron_stats::avx512, &neuron_stats::avx2, &neuron_stats::portable};
#else
  static const NeuronStatsIsa* const all[] = {&neuron_stats::portable};
#endif
  return required(choose_isa(all));
}

std::tuple<Tensor, Tensor> run(const Tensor& activations, const Tensor& ranks, const Tensor& squares) {
  NeuronStats s{};
  s.dtype = dtype_of(activations);
  s.texts = activations.size(0);
  s.neurons = activations.size(1);
  s.attributes = ranks.size(1);
  s.x = activations.const_data_ptr();
  s.stride_text = activations.stride(0);
  s.stride_neuron = activations.stride(1);
  s.ranks = static_cast<const int32_t*>(ranks.const_data_ptr());
  s.squares = static_cast<const double*>(squares.const_data_ptr());
  const ScalarType type = s.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  Tensor spearman = torch::stable::new_empty(activations, {s.neurons, s.attributes}, type);
  Tensor median = torch::stable::new_empty(activations, {s.neurons}, type);
  s.spearman = spearman.mutable_data_ptr();
  s.median = median.mutable_data_ptr();
  const NeuronStatsIsa& kernels = isa();
  // A panel of 512 texts takes 50 µs.
  torch::stable::parallel_for(0, (s.neurons + kNeurons - 1) / kNeurons, 1 + 256 / s.texts,
                              [&](int64_t first, int64_t last) {
                                Aligned scratch(kernels.scratch_bytes(s));
                                kernels.run(s, first, last, scratch.data);
                              });
  return {spearman, median};
}

}  // namespace
}  // namespace rmfast

STABLE_TORCH_LIBRARY_IMPL(rmfast_native, CPU, m) { m.impl("neuron_stats", TORCH_BOX(&rmfast::run)); }
