// Registers what the top-k encoder needs beside torch's matmul: the merge of a tile of products, rows spread over
// threads, and a transpose of 16-bit weights.

#include "rmfast/topk_encode.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>

#include "rows.h"
#include "tensors.h"

namespace rmfast {

namespace topk_encode {
#ifdef RMFAST_X86
extern const TopkMergeIsa avx512, avx2;
#endif
extern const TopkMergeIsa portable;
}  // namespace topk_encode

namespace {

using torch::stable::Tensor;

const TopkMergeIsa& isa() {
#ifdef RMFAST_X86
  static const TopkMergeIsa* const all[] = {&topk_encode::avx512, &topk_encode::avx2, &topk_encode::portable};
#else
  static const TopkMergeIsa* const all[] = {&topk_encode::portable};
#endif
  return required(choose_isa(all));
}

void merge(Tensor values, Tensor indices, const Tensor& products, const std::optional<Tensor>& bias, int64_t first,
           bool last) {
  TopkMerge s{};
  s.dtype = dtype_of(products);
  s.rows = products.size(0);
  s.columns = products.size(1);
  s.k = values.size(1);
  s.first = first;
  s.products = products.const_data_ptr();
  s.stride = products.stride(0);
  s.bias = bias ? bias->const_data_ptr() : nullptr;
  s.values = values.mutable_data_ptr();
  s.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  s.last = last;
  const TopkMergeIsa& kernels = isa();
  over_rows(s.rows, s.columns, [&](int64_t first_row, int64_t end) {
    Aligned scratch(kernels.scratch_bytes(s));
    kernels.run(s, first_row, end, scratch.data);
  });
}

// out (n, d) contiguous = x (d, n) transposed; torch takes many times as long where x is a slice of columns.
void transpose_16(Tensor out, const Tensor& x) {
  constexpr int64_t B = 64, C = 128;
  const int64_t d = x.size(0), n = x.size(1), stride = x.stride(0);
  const auto* from = static_cast<const uint16_t*>(x.const_data_ptr());
  auto* const to = static_cast<uint16_t*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, (n + C - 1) / C, 1, [&](int64_t first, int64_t last) {
    for (int64_t j = first * C; j < last * C; j += C)
      for (int64_t i = 0; i < d; i += B) {
        const int64_t rows = d - i < B ? d - i : B, columns = n - j < C ? n - j : C;
        uint64_t block[C][B / 4];  // four values a store; rows of out are powers of two apart, which caches hold few of
        for (int64_t r = 0; r < rows; r += 4) {
          const uint16_t* row[4];
          for (int64_t k = 0; k < 4; ++k) row[k] = from + (r + k < rows ? i + r + k : i) * stride + j;
          for (int64_t c = 0; c < columns; ++c)
            block[c][r / 4] = row[0][c] | uint64_t(row[1][c]) << 16 | uint64_t(row[2][c]) << 32 | uint64_t(row[3][c]) << 48;
        }
        for (int64_t c = 0; c < columns; ++c) memcpy(to + (j + c) * d + i, block[c], 2 * rows);
      }
  });
}

}  // namespace
}  // namespace rmfast

STABLE_TORCH_LIBRARY_IMPL(rmfast_native, CPU, m) {
  m.impl("topk_merge_", TORCH_BOX(&rmfast::merge));
  m.impl("transpose_16_", TORCH_BOX(&rmfast::transpose_16));
}
