// Registers what the top-k encoder needs beside torch's matmul: the merge of a tile of products, rows spread over
// threads, and a transpose of 16-bit weights.

#include "rmfast/topk_encode.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

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

// to (8, 8) = from (8, 8) transposed; strides in elements.
inline void transpose_block(const uint16_t* from, int64_t stride, uint16_t* to, int64_t stride_to) {
#if defined(__SSE2__)
  __m128i row[8], pair[8], four[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm_loadu_si128((const __m128i*)(from + i * stride));
  for (int i = 0; i < 4; ++i) {  // columns 0 to 3 and 4 to 7 of rows 2 i and 2 i + 1
    pair[i] = _mm_unpacklo_epi16(row[2 * i], row[2 * i + 1]);
    pair[4 + i] = _mm_unpackhi_epi16(row[2 * i], row[2 * i + 1]);
  }
  for (int i = 0; i < 8; i += 2) {  // two columns each of four rows
    four[i] = _mm_unpacklo_epi32(pair[i], pair[i + 1]);
    four[i + 1] = _mm_unpackhi_epi32(pair[i], pair[i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m128i above = four[i / 2 * 4 + i % 2], below = four[i / 2 * 4 + i % 2 + 2];
    _mm_storeu_si128((__m128i*)(to + 2 * i * stride_to), _mm_unpacklo_epi64(above, below));
    _mm_storeu_si128((__m128i*)(to + (2 * i + 1) * stride_to), _mm_unpackhi_epi64(above, below));
  }
#else
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) to[j * stride_to + i] = from[i * stride + j];
#endif
}

// out (n, d) contiguous = x (d, n) transposed. Reads long runs of a few rows: torch, where x is a slice of columns, takes
// ten times as long, and blocks of 128 columns three times.
void transpose_16(Tensor out, const Tensor& x) {
  constexpr int64_t B = 64, C = 1024;
  const int64_t d = x.size(0), n = x.size(1), stride = x.stride(0);
  const auto* from = static_cast<const uint16_t*>(x.const_data_ptr());
  auto* const to = static_cast<uint16_t*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, (d + B - 1) / B, 1, [&](int64_t first, int64_t last) {
    // Rows of out are often powers of two apart, which a cache holds few of.
    const Aligned scratch(B * C * sizeof(uint16_t));
    auto* const block = static_cast<uint16_t*>(scratch.data);  // (C, B)
    for (int64_t i = first * B; i < last * B; i += B)
      for (int64_t j = 0; j < n; j += C) {
        const int64_t rows = d - i < B ? d - i : B, columns = n - j < C ? n - j : C;
        const uint16_t* corner = from + i * stride + j;
        for (int64_t r = 0; r < rows; r += 8)
          for (int64_t c = 0; c < columns; c += 8) {
            if (r + 8 <= rows && c + 8 <= columns) {
              transpose_block(corner + r * stride + c, stride, block + c * B + r, B);
              continue;
            }
            for (int64_t k = r; k < r + 8 && k < rows; ++k)
              for (int64_t l = c; l < c + 8 && l < columns; ++l) block[l * B + k] = corner[k * stride + l];
          }
        for (int64_t c = 0; c < columns; ++c) memcpy(to + (j + c) * d + i, block + c * B, 2 * rows);
      }
  });
}

}  // namespace
}  // namespace rmfast

STABLE_TORCH_LIBRARY_IMPL(rmfast_native, CPU, m) {
  m.impl("topk_merge_", TORCH_BOX(&rmfast::merge));
  m.impl("transpose_16_", TORCH_BOX(&rmfast::transpose_16));
}
