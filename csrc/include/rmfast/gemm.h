// C (m, n) = A (m, k) · B (k, n) for a skinny B, blocked for registers. Each element of C is the sum over k in blocks
// of kDepth, in order, whatever m is and wherever its row stands: a row's result does not depend on its neighbours.
#pragma once

#include "rmfast/vec.h"

namespace rmfast {
namespace {

// 8 × 3 accumulators of 32 registers with AVX-512, 4 × 3 of 16 elsewhere; the rest hold B and a broadcast of A.
constexpr int kTileRows = kVectorBytes == 64 ? 8 : 4;
template <class A>
constexpr int kTileCols = 3 * W<A>;
constexpr int64_t kDepth = 256;

// b: panels of kTileCols columns, (n / kTileCols, k, kTileCols), zero-padded.
template <class A>
int64_t packed_size(int64_t k, int64_t n) {
  return (n + kTileCols<A> - 1) / kTileCols<A> * kTileCols<A> * k;
}

// Packs B given by its columns: column j is from[j * ld .. + k].
template <class A>
void pack_columns(const A* from, int64_t ld, int64_t k, int64_t n, A* to) {
  for (int64_t j0 = 0; j0 < n; j0 += kTileCols<A>, to += k * kTileCols<A>)
    for (int64_t i = 0; i < k; ++i)
      for (int j = 0; j < kTileCols<A>; ++j) to[i * kTileCols<A> + j] = j0 + j < n ? from[(j0 + j) * ld + i] : A(0);
}

template <class A, int M>
inline void tile(const A* a, int64_t lda, int64_t k, const A* b, int64_t ldb, A* c, int64_t ldc) {
  V<A> acc[M][3] = {};
  for (int64_t i = 0; i < k; ++i) {
    const A* row = b + i * ldb;
    const V<A> b0 = load(row), b1 = load(row + W<A>), b2 = load(row + 2 * W<A>);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const A x = a[m * lda + i];
      acc[m][0] += x * b0;
      acc[m][1] += x * b1;
      acc[m][2] += x * b2;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v) store(c + m * ldc + v * W<A>, load(c + m * ldc + v * W<A>) + acc[m][v]);
}

// c (m, ldc) += a (m, k) · packed b; ldc a multiple of kTileCols that covers n.
template <class A>
void gemm_packed(const A* a, int64_t lda, int64_t m, int64_t k, const A* b, int64_t b_depth, int64_t n, A* c,
                 int64_t ldc) {
  for (int64_t j = 0; j < n; j += kTileCols<A>, b += b_depth * kTileCols<A>)
    for (int64_t i0 = 0; i0 < k; i0 += kDepth) {
      const int64_t depth = k - i0 < kDepth ? k - i0 : kDepth;
      const A* panel = b + i0 * kTileCols<A>;
      int64_t r = 0;
      for (; r + kTileRows <= m; r += kTileRows)
        tile<A, kTileRows>(a + r * lda + i0, lda, depth, panel, kTileCols<A>, c + r * ldc + j, ldc);
      for (; r < m; ++r) tile<A, 1>(a + r * lda + i0, lda, depth, panel, kTileCols<A>, c + r * ldc + j, ldc);
    }
}

template <class A>
inline int64_t padded_cols(int64_t n) {
  return (n + kTileCols<A> - 1) / kTileCols<A> * kTileCols<A>;
}

}  // namespace
}  // namespace rmfast
