// exp2, tanh and other functions of vectors. fp32: polynomials, within 1.5 ulp of the truth where it is a normal number. fp64: the C
// library's, lane by lane. NaN gives NaN.
#pragma once

#include "rmfast/vec.h"

namespace rmfast {
namespace {

typedef int32_t I32 __attribute__((vector_size(kVectorBytes)));

template <class A>
inline V<A> splat(A x) {
  return V<A>{} + x;
}

// The larger of both; b where either is NaN.
template <class A>
inline V<A> larger(V<A> a, V<A> b) {
  return a > b ? a : b;
}
#if defined(__AVX512F__)
template <>
inline V<float> larger<float>(V<float> a, V<float> b) {
  return (V<float>)_mm512_max_ps((__m512)a, (__m512)b);
}
#elif defined(__AVX2__)
template <>
inline V<float> larger<float>(V<float> a, V<float> b) {
  return (V<float>)_mm256_max_ps((__m256)a, (__m256)b);
}
#endif

// 2^r for r in [-0.5, 0.5], within 2e-9 of it before rounding: coefficients of r^6 down to r^0.
constexpr float kExp2[] = {1.535336188319500e-4f, 1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f,
                           2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f};

// exp2 of M vectors, a step of all after the other: one alone waits 40 cycles for itself. For x <= 127; exactly 1 at 0, and
// 0 below -126 (with AVX-512) or -126.5.
template <int M>
inline void exp2_each(V<float> (&x)[M]) {
  V<float> n[M], r[M], p[M];
#if defined(__AVX512F__)
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    n[m] = (V<float>)_mm512_roundscale_ps((__m512)x[m], 0);
    r[m] = x[m] - n[m];
  }
#else
  constexpr float kRound = 12582912.0f + 127;  // 1.5 · 2^23: adding it leaves round(x) + 127 in the low bits
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    const V<float> safe = larger<float>(splat(-127.0f), x[m]);
    n[m] = safe + kRound;
    r[m] = safe - (n[m] - kRound);
  }
#endif
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) p[m] = splat(kExp2[0]);
#pragma GCC unroll 6
  for (int i = 1; i < 7; ++i)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) p[m] = p[m] * r[m] + kExp2[i];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#if defined(__AVX512F__)
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x[m], _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    x[m] = (V<float>)_mm512_maskz_scalef_ps(normal, (__m512)p[m], (__m512)n[m]);
#else
    x[m] = p[m] * (V<float>)((I32)n[m] << 23);  // of 2^-127 the exponent is that of 0
#endif
  }
}

inline V<float> exp2(V<float> x) {
  V<float> one[1] = {x};
  exp2_each(one);
  return one[0];
}

inline V<double> exp2(V<double> x) {
  for (int i = 0; i < W<double>; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}
template <int M>
inline void exp2_each(V<double> (&x)[M]) {
  for (int m = 0; m < M; ++m) x[m] = exp2(x[m]);
}

// For x <= 88; below -87.3 the result is 0 (no subnormals), exactly 1 at 0.
inline V<float> exp(V<float> x) {
#if defined(__AVX512F__)
  const V<float> n = (V<float>)_mm512_roundscale_ps((__m512)(x * 1.4426950408889634f), 0);
#else
  constexpr float kRound = 12582912.0f;
  const V<float> safe = x < -87.3f ? splat(-87.3f) : x, shifted = safe * 1.4426950408889634f + kRound;
  const V<float> n = shifted - kRound;
#endif
  // ln 2 in two parts, the first so short that its product with n is exact.
  const V<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
  V<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
  return (V<float>)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  const V<float> scaled = (V<float>)((I32)p + ((I32)shifted << 23));
  return x >= -87.3f ? scaled : (x < -87.3f ? V<float>{} : x);
#endif
}

inline V<double> exp(V<double> x) {
  for (int i = 0; i < W<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

inline V<float> tanh(V<float> x) {
  const V<float> size = (V<float>)((I32)x & 0x7fffffff), z = x * x;
  V<float> p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const V<float> small = x + x * (z * p);
  const V<float> e = exp2((size < 20.0f ? size : splat(20.0f)) * 2.885390081777927f);  // e^{2|x|}
  const V<float> large = (V<float>)((I32)(1.0f - 2.0f / (e + 1.0f)) | ((I32)x & INT32_MIN));
  return size >= 0.625f ? large : small;
}

inline V<double> tanh(V<double> x) {
  for (int i = 0; i < W<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

// Transposes W rows of W: blocks of half the width change places, then their halves, ...
template <class A>
inline void transpose(V<A>* rows) {
#if defined(__clang__)
  A from[W<A>][W<A>];
  for (int i = 0; i < W<A>; ++i) store(from[i], rows[i]);
  for (int i = 0; i < W<A>; ++i)
    for (int j = 0; j < W<A>; ++j) rows[i][j] = from[j][i];
#else
  typedef decltype(rows[0] < rows[0]) Lanes;
#pragma GCC unroll 4
  for (int step = W<A> / 2; step; step /= 2) {
    Lanes low, high;
#pragma GCC unroll 16
    for (int i = 0; i < W<A>; ++i) {
      low[i] = i & step ? W<A> + i - step : i;
      high[i] = i & step ? W<A> + i : i + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W<A>; ++i) {
      if (i & step) continue;
      const V<A> a = rows[i], b = rows[i + step];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + step] = __builtin_shuffle(a, b, high);
    }
  }
#endif
}

}  // namespace
}  // namespace rmfast
