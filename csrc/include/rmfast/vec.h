// One vector type for all instruction sets: GCC and Clang vector extensions as wide as the file is compiled for.
// Everything sits in an unnamed namespace, and no std template is used: a function shared between files built for
// different instruction sets could be linked in its widest form and crash a smaller machine.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace rmfast {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class A>
struct Vector {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using V = typename Vector<A>::type;
template <class A>
constexpr int W = kVectorBytes / int(sizeof(A));

typedef uint16_t U16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));

inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

inline float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {  // subnormal: mantissa · 2^-24, exact in fp32
    const float magnitude = float(mantissa) * 5.9604644775390625e-8f;
    memcpy(&bits, &magnitude, 4);
    bits |= sign;
  }
  float out;
  memcpy(&out, &bits, 4);
  return out;
#endif
}

template <class A>
inline A to_acc(A x) { return x; }
template <class A>
inline A to_acc(bf16 x) { return A(to_float(x)); }
template <class A>
inline A to_acc(f16 x) { return A(to_float(x)); }

inline V<float> load(const float* p) {
  V<float> out;
  memcpy(&out, p, sizeof out);
  return out;
}
inline V<double> load(const double* p) {
  V<double> out;
  memcpy(&out, p, sizeof out);
  return out;
}
inline V<float> load(const bf16* p) {
#if defined(__AVX512F__)
  // GCC 12 widens the two halves apart, here and below.
  return (V<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (V<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  U16 bits;
  memcpy(&bits, p, sizeof bits);
  return (V<float>)(__builtin_convertvector(bits, U32) << 16);
#endif
}
inline V<float> load(const f16* p) {
#if defined(__AVX512F__)
  return (V<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && defined(__AVX2__)
  return (V<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  V<float> out;
  for (int i = 0; i < W<float>; ++i) out[i] = to_float(p[i]);
  return out;
#endif
}

// The first n < W<A> elements of memory to a vector's worth of them, zeros behind, and back. Masked where the CPU can (all
// sizes with AVX-512, 4 and 8 bytes with AVX2): a memcpy of unknown length is a call, and a load that is wider than the
// stores before it waits for them in memory (rotary embeddings of 8 pairs took 9 times as long).
#if defined(__AVX2__) && !defined(__AVX512F__)
inline __m256i mask_of(int64_t n) {
  alignas(32) static const int32_t ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256((const __m256i*)(ones + 8 - n));
}
#endif
template <class A, class T>
inline void read_part(T* to, const T* from, int64_t n) {
#if defined(__AVX512F__)
  const uint32_t mask = (1u << n) - 1;
  if (sizeof(T) == 2) _mm256_storeu_si256((__m256i*)to, _mm256_maskz_loadu_epi16(__mmask16(mask), from));
  if (sizeof(T) == 4) _mm512_storeu_si512(to, _mm512_maskz_loadu_epi32(__mmask16(mask), from));
  if (sizeof(T) == 8) _mm512_storeu_si512(to, _mm512_maskz_loadu_epi64(__mmask8(mask), from));
#else
#if defined(__AVX2__)
  if (sizeof(T) >= 4) {
    const __m256i mask = mask_of(n * int64_t(sizeof(T)) / 4);
    return _mm256_storeu_si256((__m256i*)to, _mm256_maskload_epi32((const int*)from, mask));
  }
#endif
  memset(to, 0, sizeof(T) * W<A>);
  memcpy(to, from, n * sizeof(T));
#endif
}
template <class A, class T>
inline void write_part(T* to, const T* from, int64_t n) {
#if defined(__AVX512F__)
  const uint32_t mask = (1u << n) - 1;
  if (sizeof(T) == 2) _mm256_mask_storeu_epi16(to, __mmask16(mask), _mm256_loadu_si256((const __m256i*)from));
  if (sizeof(T) == 4) _mm512_mask_storeu_epi32(to, __mmask16(mask), _mm512_loadu_si512(from));
  if (sizeof(T) == 8) _mm512_mask_storeu_epi64(to, __mmask8(mask), _mm512_loadu_si512(from));
#else
#if defined(__AVX2__)
  if (sizeof(T) >= 4) {
    const __m256i mask = mask_of(n * int64_t(sizeof(T)) / 4);
    return _mm256_maskstore_epi32((int*)to, mask, _mm256_loadu_si256((const __m256i*)from));
  }
#endif
  memcpy(to, from, n * sizeof(T));
#endif
}

// The first n < W elements, zeros behind them; never reads past them.
template <class A, class T>
inline V<A> load_part(const T* p, int64_t n) {
  T part[W<A>];
  read_part<A>(part, p, n);
  return load(part);
}

template <class A>
inline void store(A* p, V<A> v) {
  memcpy(p, &v, sizeof v);
}
inline void store(bf16* p, V<float> v) {
  const U32 bits = (U32)v;
  U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = (v == v) ? rounded : (bits >> 16 | 0x40);  // a NaN's payload must not round to infinity
  const U16 out = __builtin_convertvector(rounded, U16);
  memcpy(p, &out, sizeof out);
}
inline f16 to_f16(float x) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(x, 0))};
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and above round to infinity
  if (bits < 0x38800000) {                                   // below 2^-14: let the fp32 adder round to 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return {uint16_t(sign | (bits - 0x3f000000))};
  }
  bits += 0xc8000fff + (bits >> 13 & 1);
  return {uint16_t(sign | bits >> 13)};
#endif
}
inline void store(f16* p, V<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0));
#else
  for (int i = 0; i < W<float>; ++i) p[i] = to_f16(v[i]);
#endif
}

template <class A, class T>
inline void store_part(T* p, V<A> v, int64_t n) {
  T part[W<A>];
  store(part, v);
  write_part<A>(p, part, n);
}

// Whether the CPU has all that -march=x86-64-v4 or -v3 lets the compiler use.
inline bool cpu_supported() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
#else
  return true;
#endif
}

template <class A>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  typedef int32_t type;
};
template <>
struct IntegerOf<double> {
  typedef int64_t type;
};
template <class A>
using Integer = typename IntegerOf<A>::type;

// A bit for each lane of a comparison's result.
template <class K>
inline uint32_t lanes_of(V<K> mask) {
#if defined(__AVX512F__)
  return sizeof(K) == 4 ? _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask)
                        : _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  return sizeof(K) == 4 ? _mm256_movemask_ps((__m256)mask) : _mm256_movemask_pd((__m256d)mask);
#elif defined(__SSE2__)
  return sizeof(K) == 4 ? _mm_movemask_ps((__m128)mask) : _mm_movemask_pd((__m128d)mask);
#else
  uint32_t bits = 0;
  for (int l = 0; l < W<K>; ++l) bits |= uint32_t(mask[l] & 1) << l;
  return bits;
#endif
}

// Lanes added in one fixed tree: the upper half to the lower, down to one.
template <class A>
inline A sum(V<A> v) {
#if defined(__AVX2__)
  // Halves of registers: a permutation of all lanes at each step costs three times as much.
#if defined(__AVX512F__)
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
  const __m256 half = (__m256)v;
#endif
  __m128 lanes = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  lanes = _mm_add_ps(lanes, _mm_movehl_ps(lanes, lanes));
  return _mm_cvtss_f32(_mm_add_ss(lanes, _mm_movehdup_ps(lanes)));
#elif defined(__clang__)
  A lanes[W<A>];
  memcpy(lanes, &v, sizeof v);
  for (int step = W<A> / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
#else
  // In registers: GCC makes a chain of stores and loads of the above, 60 ns of a 120 ns row.
  typedef typename Vector<Integer<A>>::type Index;
#pragma GCC unroll 2
  for (int step = W<A> / 2; step; step /= 2) {
    Index from;
    for (int i = 0; i < W<A>; ++i) from[i] = (i + step) % W<A>;
    v += __builtin_shuffle(v, from);
  }
  return v[0];
#endif
}
#if defined(__AVX2__)
template <>
inline double sum<double>(V<double> v) {
#if defined(__AVX512F__)
  const __m256d half = _mm256_add_pd(_mm512_castpd512_pd256((__m512d)v), _mm512_extractf64x4_pd((__m512d)v, 1));
#else
  const __m256d half = (__m256d)v;
#endif
  const __m128d lanes = _mm_add_pd(_mm256_castpd256_pd128(half), _mm256_extractf128_pd(half, 1));
  return _mm_cvtsd_f64(_mm_add_sd(lanes, _mm_unpackhi_pd(lanes, lanes)));
}
#endif

template <class A>
inline V<A> first_lanes(V<A> v, int64_t n) {
  for (int64_t i = n; i < W<A>; ++i) v[i] = 0;
  return v;
}

}  // namespace
}  // namespace rmfast
