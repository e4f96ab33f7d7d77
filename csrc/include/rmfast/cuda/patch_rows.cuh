// Rows copied from two sources, and their RMS norm, on CUDA: one launch, a few warps to a row, which stays in registers.
#pragma once

#include "gpu.cuh"

namespace rmfast::cuda {

// All pointers are device pointers; x, y and weight are contiguous, the other rows have a contiguous last dimension.
// W, the type of the gain, is T or acc_t<T>.
template <typename T, typename W>
struct PatchRows {
  using A = acc_t<T>;
  const T *base, *values;
  int64_t base_count, value_count;
  int64_t base_stride, value_stride;  // in elements
  const int64_t *base_rows, *value_rows;  // (n,): row i is values[value_rows[i]], or base[base_rows[i]] for a -1
  int64_t n;
  int d;
  const W* weight;
  bool gemma;
  A eps;
  T *x, *y;
};

constexpr int kPatchVectors = 4;  // 16-byte vectors of a row that a thread holds
constexpr int kPatchWarps = 16;   // most warps to a row
constexpr int kPatchBlock = 4;    // least warps to a block

// Warps to a row: a function of d and T, so that the order of a row's additions is one.
template <typename T>
constexpr int patch_warps(int d) {
  int warps = 1;
  while (warps < kPatchWarps && int64_t{warps} * kWarp * kPatchVectors * (16 / sizeof(T)) < d) warps *= 2;
  return warps;
}

// The elements of one vector, rounded to T.
template <typename T>
__device__ __forceinline__ Vec16 pack(const acc_t<T> (&x)[16 / sizeof(T)]) {
  Vec16 out;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out.w[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < 16 / static_cast<int>(sizeof(T)); ++i) {
      __builtin_memcpy(&out.w[i * sizeof(T) / 4], &x[i], sizeof(T));
    }
  }
  return out;
}

// The first `count` elements of a vector, one by one.
template <typename T>
__device__ __forceinline__ void store_some(T* p, const Vec16& v, int count) {
#pragma unroll
  for (int i = 0; i < 16 / static_cast<int>(sizeof(T)); ++i) {
    if (i < count) {
      if constexpr (sizeof(T) == 2) {
        p[i].bits = static_cast<uint16_t>(v.w[i / 2] >> (16 * (i % 2)));
      } else {
        __builtin_memcpy(p + i, &v.w[i * sizeof(T) / 4], sizeof(T));
      }
    }
  }
}

// A block holds blockDim.x / (warps · 32) rows. kAligned: every row that is read or written, and the gain, starts at a
// multiple of 16 bytes.
template <typename T, typename W, bool kAligned>
__global__ __launch_bounds__(kPatchWarps* kWarp) void patch_rows_kernel(const PatchRows<T, W> q, int warps) {
  using A = acc_t<T>;
  constexpr int kVec = 16 / sizeof(T), kGains = 16 / sizeof(W);
  const int d = q.d, threads = warps * kWarp, span = threads * kVec * kPatchVectors;
  const int thread = static_cast<int>(threadIdx.x) % threads;
  const int64_t m = int64_t{blockIdx.x} * (blockDim.x / threads) + static_cast<int>(threadIdx.x) / threads;
  // Past the last row: the last again, not stored.
  const bool live = m < q.n;
  const int64_t i_b = q.base_rows[live ? m : q.n - 1], i_v = q.value_rows[live ? m : q.n - 1];
  const bool inside = i_b >= 0 && i_b < q.base_count && i_v >= -1 && i_v < q.value_count;
  const T* from = i_v < 0 ? q.base + i_b * q.base_stride : q.values + i_v * q.value_stride;
  T* x = q.x + m * d;
  T* y = q.y + m * d;

  Vec16 h[kPatchVectors];
  const auto read = [&](int first) {
#pragma unroll
    for (int u = 0; u < kPatchVectors; ++u) {
      const int e = first + (u * threads + thread) * kVec;
      if (!inside) {
        h[u] = Vec16{{~0u, ~0u, ~0u, ~0u}};  // NaN in every type
      } else if (kAligned) {
        h[u] = e < d ? load_cached(from + e) : Vec16{};
      } else {
        h[u] = load_any(from, e, d);
      }
    }
  };
  const auto write = [&](T* to, int e, const Vec16& v) {
    if (!live || e >= d) return;
    if (kAligned) {
      store16(to + e, v);
    } else {
      store_some(to + e, v, d - e);
    }
  };

  A square = 0;
  for (int first = 0; first < d; first += span) {
    read(first);
#pragma unroll
    for (int u = 0; u < kPatchVectors; ++u) {
      write(x, first + (u * threads + thread) * kVec, h[u]);
      A v[kVec];
      unpack<T>(h[u], v);
#pragma unroll
      for (int i = 0; i < kVec; ++i) square = fma_(v[i], v[i], square);
    }
  }
  square = warp_sum(square);
  if (warps > 1) {
    A* part = reinterpret_cast<A*>(dynamic_shared()) + static_cast<int>(threadIdx.x) / threads * warps;
    if (thread % kWarp == 0) part[thread / kWarp] = square;
    __syncthreads();
    square = part[0];
    for (int i = 1; i < warps; ++i) square += part[i];
  }
  const A inverse = inverse_root(square / static_cast<A>(d) + q.eps);

  for (int first = 0; first < d; first += span) {
    if (d > span) read(first);  // from the cache: a row of more than 512 threads' registers
#pragma unroll
    for (int u = 0; u < kPatchVectors; ++u) {
      const int e = first + (u * threads + thread) * kVec;
      if (e >= d) continue;
      A v[kVec], gain[kVec];
      unpack<T>(h[u], v);
#pragma unroll
      for (int i = 0; i < kVec; i += kGains) {
        if (kAligned) {
          A some[kGains];
          unpack<W>(load_cached(q.weight + e + i), some);
#pragma unroll
          for (int k = 0; k < kGains; ++k) gain[i + k] = some[k];
        } else {
#pragma unroll
          for (int k = 0; k < kGains; ++k) gain[i + k] = e + i + k < d ? to_acc(q.weight[e + i + k]) : A(0);
        }
      }
#pragma unroll
      for (int i = 0; i < kVec; ++i) v[i] *= inverse;
      // Rounded as transformers does: Llama's before and after the gain, Gemma's after it.
      if (!q.gemma) unpack<T>(pack<T>(v), v);
#pragma unroll
      for (int i = 0; i < kVec; ++i) v[i] *= q.gemma ? 1 + gain[i] : gain[i];
      write(y, e, pack<T>(v));
    }
  }
}

// Writes all of x and y; 0 < n < 2^31.
template <typename T, typename W>
cudaError_t patch_rows(const PatchRows<T, W>& q, cudaStream_t stream) {
  const auto multiple = [](const void* p, int64_t stride, int64_t rows) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && (rows <= 1 || stride * sizeof(T) % 16 == 0);
  };
  const bool aligned = q.d % (16 / sizeof(T)) == 0 && reinterpret_cast<uintptr_t>(q.weight) % 16 == 0 &&
                       multiple(q.base, q.base_stride, q.base_count) &&
                       multiple(q.values, q.value_stride, q.value_count) && multiple(q.x, q.d, q.n) &&
                       multiple(q.y, q.d, q.n);
  const int warps = patch_warps<T>(q.d), rows = warps < kPatchBlock ? kPatchBlock / warps : 1;
  const dim3 blocks(static_cast<unsigned>((q.n + rows - 1) / rows));
  const size_t shared = warps > 1 ? rows * warps * sizeof(acc_t<T>) : 0;
  return aligned ? launch(patch_rows_kernel<T, W, true>, blocks, rows * warps * kWarp, shared, stream, q, warps)
                 : launch(patch_rows_kernel<T, W, false>, blocks, rows * warps * kWarp, shared, stream, q, warps);
}

}  // namespace rmfast::cuda
