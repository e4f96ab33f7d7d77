// Registers the CPU sum of MMD² over bins with torch: cuts the pairs of rows into tiles, spreads them over threads.

#include "rmfast/binned_mmd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace rmfast {

namespace binned_mmd {
#ifdef RMFAST_X86
extern const BinnedIsa avx512, avx2;
#endif
extern const BinnedIsa portable;
}  // namespace binned_mmd

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const BinnedIsa& isa() {
#ifdef RMFAST_X86
  static const BinnedIsa* const all[] = {&binned_mmd::avx512, &binned_mmd::avx2, &binned_mmd::portable};
#else
  static const BinnedIsa* const all[] = {&binned_mmd::portable};
#endif
  return required(choose_isa(all));
}

Binned binned(const Tensor& ranges, const Tensor& alpha, const Tensor& same, const Tensor& rates) {
  const int64_t rows = alpha.size(0);
  const int64_t* at = static_cast<const int64_t*>(ranges.const_data_ptr());
  return {dtype_of(alpha),         rows, at, at + rows, at + 2 * rows, at + 3 * rows, alpha.const_data_ptr(),
          same.const_data_ptr(), rates.const_data_ptr(), rates.size(0)};
}

Tensor scalar(const Tensor& like, double value) {
  Tensor out = torch::stable::new_empty(like, {}, ScalarType::Double);
  *static_cast<double*>(out.mutable_data_ptr()) = value;
  return out;
}

std::vector<Tile> tiles(const Binned& bins) {
  std::vector<Tile> out;
  for (int64_t first = 0; first < bins.rows; first = bins.group_end[first]) {
    const int64_t end = bins.group_end[first];
    for (int64_t i = first; i < end; i += kTile)
      for (int64_t j = i; j < end; j += kTile) out.push_back({i, std::min(i + kTile, end), j, std::min(j + kTile, end)});
  }
  return out;
}

std::tuple<Tensor, Tensor> line(const Tensor& x, const Tensor& ranges, const Tensor& alpha, const Tensor& same,
                                const Tensor& rates, bool need_grad) {
  BinnedLine a{};
  a.bins = binned(ranges, alpha, same, rates);
  a.x = x.const_data_ptr();
  const std::vector<Tile> all = tiles(a.bins);
  a.tiles = all.data();
  a.tile_count = int64_t(all.size());
  a.slots = std::min<int64_t>(a.tile_count, 16);
  const int64_t rows = a.bins.rows;
  std::vector<double> value(size_t(a.slots)), grads(size_t(need_grad ? a.slots * rows : 0));
  a.value = value.data();
  a.grad = need_grad ? grads.data() : nullptr;
  const BinnedIsa& run = isa();
  torch::stable::parallel_for(0, a.slots, 1, [&](int64_t first, int64_t last) { run.line(a, first, last); });

  double sum = 0;
  for (double part : value) sum += part;
  Tensor grad = torch::stable::new_empty(x, {need_grad ? rows : 0});
  auto add = [&](auto* out) {
    for (int64_t i = 0; need_grad && i < rows; ++i) {
      double total = 0;
      for (int64_t s = 0; s < a.slots; ++s) total += grads[size_t(s * rows + i)];
      out[i] = -4 * total / double(a.bins.count);
    }
  };
  if (a.bins.dtype == DType::f64)
    add(static_cast<double*>(grad.mutable_data_ptr()));
  else
    add(static_cast<float*>(grad.mutable_data_ptr()));
  return {scalar(x, 2 * sum / double(a.bins.count)), grad};
}

Tensor weigh(Tensor dots, const Tensor& squares, const Tensor& ranges, const Tensor& alpha, const Tensor& same,
             const Tensor& rates, int64_t row, int64_t column) {
  BinnedTile a{};
  a.bins = binned(ranges, alpha, same, rates);
  a.dots = dots.mutable_data_ptr();
  a.squares = squares.const_data_ptr();
  a.row = row;
  a.column = column;
  a.height = dots.size(0);
  a.width = dots.size(1);
  std::vector<double> value(size_t(a.height));
  a.value = value.data();
  const BinnedIsa& run = isa();
  // Below about 2^14 pairs (10 µs) a second thread costs more than it saves.
  const int64_t grain = 1 + (int64_t(1) << 14) / a.width;
  torch::stable::parallel_for(0, a.height, grain, [&](int64_t first, int64_t last) { run.weigh(a, first, last); });
  double sum = 0;
  for (double part : value) sum += part;
  return scalar(dots, sum);
}

}  // namespace
}  // namespace rmfast

STABLE_TORCH_LIBRARY_IMPL(rmfast_native, CPU, m) {
  m.impl("binned_mmd_line", TORCH_BOX(&rmfast::line));
  m.impl("binned_mmd_weigh", TORCH_BOX(&rmfast::weigh));
}
