// One step of the online softmax of 16 rows by some keys, in the registers of mma's accumulators: lane l holds columns
// l % 4 · 2 and the next of each 8, of rows l / 4 (half 0) and l / 4 + 8 (half 1).
#pragma once

#include "suffix_keys.cuh"

namespace rmfast::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// By series below 0.625, where 1 − 2 / (e^2x + 1) would cancel.
__device__ __forceinline__ float tanh_(float x) {
  const float size = fabsf(x), square = x * x;
  const float large = 1.f - 2.f / (exp2_(fminf(size, 20.f) * (2 * kLog2E)) + 1.f);
  float p = fma_(square, -5.70498872745e-3f, 2.06390887954e-2f);
  p = fma_(square, p, -5.37397155531e-2f);
  p = fma_(square, p, 1.33314422036e-1f);
  p = fma_(square, p, -3.33332819422e-1f);
  return size < 0.625f ? fma_(x * square, p, x) : copysignf(large, x);
}

// What a row of SeenKeys says of one part of the keys: 0 the pool, 1 the suffixes' own rows.
__device__ __forceinline__ const int* bounds_of(const SeenKeys& seen, int part) {
  return reinterpret_cast<const int*>(&seen) + 2 * part;
}
__device__ __forceinline__ int self_of(const SeenKeys& seen, int part) { return part ? seen.own_self : seen.pool_self; }

struct Logits {
  float scale, softcap;  // in base 2; with a softcap, scale gives units of it. softcap for kCapped alone
  bool biased;           // by SeenKeys::slope times the distance
};

// Products s of keys from row `at` of `part` become weights; out, most and sum are scaled to the new maximum, and the
// weights are added to sum, this lane's columns alone. whole: all rows see all of the keys.
template <int kKeys, int D, bool kCapped>
__device__ __forceinline__ void weigh_keys(float (&s)[kKeys / 8][4], float (&out)[D / 8][4], float (&most)[2],
                                           float (&sum)[2], const SeenKeys* seen, const Logits& logits, int part, int at,
                                           bool whole) {
  const int lane = threadIdx.x % kWarp, column = at + lane % 4 * 2;
  if constexpr (kCapped) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = logits.softcap * tanh_(s[n][e] * logits.scale);
    }
  } else {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      // Never fused with the maximum's subtraction: that would leave the rounding of a large logit in an exponent.
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = mul_(s[n][e], logits.scale);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const SeenKeys& row = seen[half * 8 + lane / 4];
    if (logits.biased) {
      // Counted from the query, where it is 0: softmax is the same, and near keys' logits stay small.
      const int self = self_of(row, part);
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[n][half * 2 + e];
          x = fma_(row.slope, static_cast<float>(column + n * 8 + e - self), x);
        }
      }
    }
    if (!whole) {
      const int low = bounds_of(row, part)[0] - column, high = bounds_of(row, part)[1] - column;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (n * 8 + e < low || n * 8 + e >= high) s[n][half * 2 + e] = -INFINITY;
        }
      }
    }
    float top = most[half];
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
    top = fmaxf(top, shuffle_xor(top, 1));
    top = fmaxf(top, shuffle_xor(top, 2));
    const float from = top == -INFINITY ? 0.f : top, less = exp2_(most[half] - from);
    float added = 0;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[n][half * 2 + e];
        x = exp2_(x - from);
        added += x;
      }
    }
    most[half] = top;
    sum[half] = fma_(sum[half], less, added);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) out[n][half * 2] *= less, out[n][half * 2 + 1] *= less;
  }
}

// Weights of 16 keys as mma's A operand.
template <typename E, int kKeys>
__device__ __forceinline__ void pack_weights(uint32_t (&w)[4], const float (&s)[kKeys / 8][4], int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = pack2<E>(s[2 * step + i / 2][i % 2 * 2], s[2 * step + i / 2][i % 2 * 2 + 1]);
}

}  // namespace rmfast::cuda
