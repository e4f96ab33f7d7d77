// Rows of any length as vectors, and the arithmetic of an RMS norm, rounded where transformers rounds: what the ops that
// norm rows share. For files compiled once for each instruction set.
#pragma once

#include "rmfast/token_wise.h"
#include "rmfast/vec.h"

namespace rmfast {
namespace {

// f(i, n) for the vectors of a row: n is W but for the last of them.
template <class A, class F>
inline void vectors(int64_t d, F f) {
  int64_t i = 0;
  for (; i + W<A> <= d; i += W<A>) f(i, int64_t(W<A>));
  if (i < d) f(i, d - i);
}
#define RMFAST_VECTOR [&](int64_t i, int64_t n) __attribute__((always_inline))

template <class A, class T>
inline V<A> get(const T* p, int64_t n) {
  return n == W<A> ? load(p) : load_part<A>(p, n);
}

// The nearest bf16, ties to even, in the upper half of each lane. No lane is tested for a NaN, whose payload could carry
// into its exponent: those that come here were read from 16 bits or replaced by `convert`, so that their lower half is 0.
inline U32 rounded_bits(V<float> v) {
  const U32 bits = (U32)v;
  return bits + 0x7fff + ((bits >> 16) & 1);
}

template <class A, class T>
inline void put_vector(T* p, V<A> v) {
  store(p, v);
}
template <>
inline void put_vector<float, bf16>(bf16* p, V<float> v) {
  const U16 out = __builtin_convertvector(rounded_bits(v) >> 16, U16);
  memcpy(p, &out, sizeof out);
}

template <class A, class T>
inline void put(T* p, V<A> v, int64_t n) {
  if (n == W<A>) return put_vector<A>(p, v);
  T part[W<A>];
  put_vector<A>(part, v);
  write_part<A>(p, part, n);
}

// v as it would be read back after a store to T.
template <class T>
struct Rounded {
  template <class Vec>
  static Vec of(Vec v) {
    T out[sizeof(Vec) / 4];
    store(out, v);
    return load(out);
  }
};
template <>
struct Rounded<float> {
  static V<float> of(V<float> v) { return v; }
};
template <>
struct Rounded<double> {
  static V<double> of(V<double> v) { return v; }
};
template <>
struct Rounded<bf16> {
  static V<float> of(V<float> v) { return (V<float>)(rounded_bits(v) & 0xffff0000); }
};

template <class A>
inline A widened(bf16 x) { return A(to_float(x)); }
template <class A>
inline A widened(f16 x) { return A(to_float(x)); }
template <class A, class T>
inline A widened(T x) { return A(x); }

template <class A, class T>
void convert(const void* from, int64_t n, A* to) {
  const T* p = static_cast<const T*>(from);
  for (int64_t i = 0; i < n; ++i) {
    const A x = widened<A>(p[i]);
    to[i] = x == x ? x : A(__builtin_nan(""));
  }
}

template <class A>
void convert(DType dtype, const void* from, int64_t n, A* to) {
  switch (dtype) {
    case DType::f64: return convert<A, double>(from, n, to);
    case DType::f32: return convert<A, float>(from, n, to);
    case DType::bf16: return convert<A, bf16>(from, n, to);
    default: return convert<A, f16>(from, n, to);
  }
}

// The factor of each element of a normed row.
template <class A>
void gains(const Gain& gain, bool gemma, int64_t d, A* to) {
  if (!gain.data) {
    for (int64_t i = 0; i < d; ++i) to[i] = 1;
    return;
  }
  convert(gain.dtype, gain.data, d, to);
  if (gemma)
    for (int64_t i = 0; i < d; ++i) to[i] += 1;
}

template <class A>
inline A inverse_rms(A squares, int64_t d, double eps) {
  const A mean = squares / A(d) + A(eps);
  return A(1) / (sizeof(A) == 8 ? A(__builtin_sqrt(double(mean))) : A(__builtin_sqrtf(float(mean))));
}

// One element of a normed row, rounded as transformers does: Llama's before and after the gain, Gemma's after it.
template <class A, class T, bool Gemma>
inline V<A> normed(V<A> x, A inverse, V<A> gain) {
  x *= inverse;
  return Gemma ? x * gain : Rounded<T>::of(x) * gain;
}

template <class A>
int64_t padded(int64_t n) {
  return (n + 15) / 16 * 16;
}

}  // namespace
}  // namespace rmfast
