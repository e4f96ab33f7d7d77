// Up to 8 dots per pass over h: a warp per row, limited by memory.
#pragma once

#include "reward_head_problem.cuh"

namespace rmfast::cuda {

constexpr int kFewWarps = 4;  // per block

// Blocks that a multiprocessor should hold: 16 warps of 128 registers, or 12 of 168 where the sums of 8 dots need them.
constexpr int few_blocks(int dots) { return dots == 8 ? 3 : 4; }

template <typename T>
struct Few {
  using A = acc_t<T>;
  Rows<T> rows;
  int64_t first_row, M;  // of this launch
  int64_t K, dots;
  int d, chunks, norm;
  A eps, inverse_d;
  const A* vectors;
  const A* residual;
  const A* offset;
  A* out;     // (M, K), from the first row of all
  A* values;  // (rows of this launch, stride): dots, squared norm, mean; null where `out` is written
  int64_t values_stride;
};

// Adds vector v of each of kRows rows to its sums. Lane l holds elements (v · 32 + l) · kVec on, whatever the alignment.
template <typename T, int kDots, int kRows, bool kCentred, bool kTail>
__device__ __forceinline__ void add_vector(const Vec16 (&h)[kRows], const acc_t<T>* vectors, int left,
                                           const acc_t<T> (&pivot)[kRows], acc_t<T> (&dot)[kRows][kDots],
                                           acc_t<T> (&sum)[kRows], acc_t<T> (&square)[kRows]) {
  using A = acc_t<T>;
  constexpr int kVec = 16 / sizeof(T), kQuad = 16 / sizeof(A);
#pragma unroll
  for (int part = 0; part < kVec / kQuad; ++part) {
    A x[kRows][kQuad];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      A all[kVec];
      unpack<T>(h[r], all);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        x[r][i] = kCentred ? all[part * kQuad + i] - pivot[r] : all[part * kQuad + i];
        if (kTail && part * kQuad + i >= left) x[r][i] = 0;
        if (kCentred) sum[r] += x[r][i];
        square[r] = fma_(x[r][i], x[r][i], square[r]);
      }
    }
#pragma unroll
    for (int n = 0; n < kDots; ++n) {
      A a[kQuad];
      unpack<A>(load_cached(vectors + (n * (kVec / kQuad) + part) * kWarp * kQuad), a);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) dot[r][n] = fma_(x[r][i], a[i], dot[r][n]);
      }
    }
  }
}

// kRows rows share each load of the dot vectors; kUnroll vectors of each are in flight at once. Neither changes the
// order of a row's additions, so the launcher may choose them by the number of rows.
// kCentred: also for a layer norm. Without, a third fewer instructions, and the same bits for all other norms.
template <typename T, int kDots, int kRows, int kUnroll, bool kAligned, bool kCentred>
__global__ __launch_bounds__(kFewWarps* kWarp, few_blocks(kDots)) void few_kernel(const Few<T> q) {
  using A = acc_t<T>;
  constexpr int kVec = 16 / sizeof(T), kChunk = few_chunk<T>();
  const int lane = threadIdx.x % kWarp;
  const int d = q.d, full = d / kChunk;
  const int64_t n0 = int64_t{blockIdx.y} * kDots;
  const A* vectors = q.vectors + n0 * q.chunks * kChunk + lane * (16 / sizeof(A));
  const int64_t warps = int64_t{gridDim.x} * kFewWarps;
  const auto load = [&](const T* row, int v) {
    const int e = v * kChunk + lane * kVec;
    return kAligned ? load_streaming(row + e) : load_any(row, e, d);
  };

  for (int64_t m0 = (int64_t{blockIdx.x} * kFewWarps + threadIdx.x / kWarp) * kRows; m0 < q.M; m0 += warps * kRows) {
    const T* row[kRows];
    A dot[kRows][kDots] = {}, sum[kRows] = {}, square[kRows] = {}, pivot[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      // Past the last row: the last again, not stored.
      row[r] = q.rows.at(q.first_row + (m0 + r < q.M ? m0 + r : q.M - 1)).data;
      if (kCentred && q.norm == kLayer) {
        // The mean of the row's first vectors: n of d elements are off the row's mean by at most sqrt(d / n) of its
        // deviation, so shifted by it the variance loses a factor of 1 + d / n at worst.
        const int e = lane * kVec;
        A x[kVec], first = 0;
        unpack<T>(load_any(row[r], e, d), x);
#pragma unroll
        for (int i = 0; i < kVec; ++i) first += x[i];
        pivot[r] = warp_sum(first) * (d < kChunk ? q.inverse_d : A(1) / kChunk);
      }
    }
    int v = 0;
    for (; v + kUnroll <= full; v += kUnroll) {
      Vec16 h[kUnroll][kRows];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) h[u][r] = load(row[r], v + u);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        add_vector<T, kDots, kRows, kCentred, false>(h[u], vectors + int64_t{v + u} * (kDots * kChunk), 0, pivot, dot, sum, square);
      }
    }
    for (; v < q.chunks; ++v) {
      Vec16 h[kRows];
      const int e = v * kChunk + lane * kVec;
#pragma unroll
      for (int r = 0; r < kRows; ++r) h[r] = load_any(row[r], e, d);
      add_vector<T, kDots, kRows, kCentred, true>(h, vectors + int64_t{v} * (kDots * kChunk), d - e, pivot, dot, sum, square);
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const A off = kCentred ? warp_sum(sum[r]) * q.inverse_d : A(0);
      A total = warp_sum(square[r]), mine = 0;
      // Lane n finishes dot n.
#pragma unroll
      for (int n = 0; n < kDots; ++n) {
        const A all = warp_sum(dot[r][n]);
        if (lane == n) mine = all;
      }
      const int64_t m = m0 + r, n = n0 + lane;
      if (m >= q.M) continue;
      if (kCentred && q.norm == kLayer) {
        total = fma_(-off * static_cast<A>(d), off, total);
        if (lane < kDots) mine = fma_(-q.residual[n], off, mine);
      }
      if (!q.rows.at(q.first_row + m).ok) mine = static_cast<A>(NAN);
      if (q.values) {
        A* values = q.values + m * q.values_stride;
        if (lane < kDots && n < q.dots) values[n] = mine;
        if (n0 == 0 && lane == 0) {
          values[q.dots] = total;
          values[q.dots + 1] = q.norm == kLayer ? pivot[r] + off : A(0);
        }
      } else if (lane < kDots && n < q.K) {
        const A scale = q.norm == kNone ? A(1) : inverse_root(fma_(total, q.inverse_d, q.eps));
        q.out[(q.first_row + m) * q.K + n] = fma_(mine, scale, q.offset[n]);
      }
    }
  }
}

}  // namespace rmfast::cuda
