// RMSNorm, rotary embedding and gated activation on the CPU, compiled once for each instruction set (RMFAST_ISA).
//
// All three read a row from memory once and write it once; what is read twice is then in L1. Gains, cosines and sines are
// converted to the accumulation type once for many rows or heads.

#include "rmfast/row_norm.h"
#include "rmfast/token_wise.h"
#include "rmfast/vmath.h"

#define RMFAST_STRING_(x) #x
#define RMFAST_STRING(x) RMFAST_STRING_(x)

namespace rmfast {
namespace {

// ------------------------------------------------------------------------------------------------------------ norm

// x and y are of T, the residual and the sum of S.
template <class A, class T, class S, bool Gemma>
void rms_norm(const RmsNorm& a, int64_t first, int64_t last, void* scratch) {
  const int64_t d = a.d;
  A* gain = static_cast<A*>(scratch);
  A* post_gain = gain + padded<A>(d);
  gains(a.weight, Gemma, d, gain);
  if (a.post) gains(a.post_weight, Gemma, d, post_gain);
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(a.x.data) + row * a.x.stride;
    T* y = static_cast<T*>(a.y) + row * d;
    const S* normed_of = reinterpret_cast<const S*>(x);
    V<A> squares = {};
    if (!a.residual.data || a.post) vectors<A>(d, RMFAST_VECTOR {
      const V<A> v = get<A>(x + i, n);
      squares += v * v;
    });
    if (a.residual.data) {
      const S* residual = static_cast<const S*>(a.residual.data) + row * a.residual.stride;
      S* total = static_cast<S*>(a.sum) + row * d;
      const A inverse = a.post ? inverse_rms(sum<A>(squares), d, a.eps) : A(1);
      squares = V<A>{};
      auto add = RMFAST_VECTOR {
        V<A> v = get<A>(x + i, n);
        if (a.post) v = Rounded<S>::of(normed<A, S, Gemma>(v, inverse, get<A>(post_gain + i, n)));
        v = Rounded<S>::of(v + get<A>(residual + i, n));
        if (sizeof(S) != sizeof(T)) v = v == v ? v : splat(A(__builtin_nan("")));  // of a payload that y can be rounded with
        put<A>(total + i, v, n);
        squares += v * v;
      };
      vectors<A>(d, add);
      normed_of = total;
    }
    const A inverse = inverse_rms(sum<A>(squares), d, a.eps);
    vectors<A>(d, RMFAST_VECTOR {
      put<A>(y + i, normed<A, S, Gemma>(get<A>(normed_of + i, n), inverse, get<A>(gain + i, n)), n);
    });
  }
}

template <class A, class T, class S = T>
void rms_norm_of(const RmsNorm& a, int64_t first, int64_t last, void* scratch) {
  a.gemma ? rms_norm<A, T, S, true>(a, first, last, scratch) : rms_norm<A, T, S, false>(a, first, last, scratch);
}

void run_rms_norm(const RmsNorm& a, int64_t first, int64_t last, void* scratch) {
  switch (a.dtype) {
    case DType::f64: return rms_norm_of<double, double>(a, first, last, scratch);
    case DType::bf16:
      return a.wide ? rms_norm_of<float, bf16, float>(a, first, last, scratch)
                    : rms_norm_of<float, bf16>(a, first, last, scratch);
    case DType::f16:
      return a.wide ? rms_norm_of<float, f16, float>(a, first, last, scratch)
                    : rms_norm_of<float, f16>(a, first, last, scratch);
    default: return rms_norm_of<float, float>(a, first, last, scratch);
  }
}

int64_t rms_norm_scratch(const RmsNorm& a) { return 2 * padded<double>(a.d) * int64_t(sizeof(double)); }

// ---------------------------------------------------------------------------------------------------------- rotary

template <class A, class T>
struct Table {
  A *cos, *sin, *gain[2];
  Table(const Rotary& a, void* scratch) {
    cos = static_cast<A*>(scratch);
    sin = cos + padded<A>(a.rotated);
    gain[0] = sin + padded<A>(a.rotated);
    gain[1] = gain[0] + padded<A>(a.head_dim);
  }
};

template <class A, class T, bool Norm>
inline void rotate(const Rotary& a, const T* x, const Table<A, T>& table, const A* gain, T* out) {
  const int64_t half = a.rotated / 2;
  A inverse = 1;
  if (Norm) {
    V<A> squares = {};
    vectors<A>(a.head_dim, RMFAST_VECTOR {
      const V<A> v = get<A>(x + i, n);
      squares += v * v;
    });
    inverse = inverse_rms(sum<A>(squares), a.head_dim, a.eps);
  }
  auto element = RMFAST_VECTOR {
    const V<A> v = get<A>(x + i, n);
    return Norm ? v * inverse * get<A>(gain + i, n) : v;
  };
  vectors<A>(half, RMFAST_VECTOR {
    const int64_t j = half + i;
    const V<A> low = element(i, n), high = element(j, n);
    put<A>(out + i, low * get<A>(table.cos + i, n) - high * get<A>(table.sin + i, n), n);
    put<A>(out + j, high * get<A>(table.cos + j, n) + low * get<A>(table.sin + j, n), n);
  });
  vectors<A>(a.head_dim - a.rotated, RMFAST_VECTOR { put<A>(out + a.rotated + i, element(a.rotated + i, n), n); });
}

template <class A, class T>
void rotary(const Rotary& a, int64_t first, int64_t last, void* scratch) {
  const Table<A, T> table(a, scratch);
  auto bytes = [](DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; };
  auto line = [&](const Matrix& m, DType dtype, int64_t row) {
    return static_cast<const char*>(m.data) + row * m.stride * bytes(dtype);
  };
  for (int part = 0; part < 2; ++part)
    if (a.parts[part].norm.data) gains(a.parts[part].norm, a.gemma, a.head_dim, table.gain[part]);
  for (int64_t row = first; row < last; ++row) {
    convert(a.cos_dtype, line(a.cos, a.cos_dtype, row), a.rotated, table.cos);
    convert(a.sin_dtype, line(a.sin, a.sin_dtype, row), a.rotated, table.sin);
    for (int part = 0; part < 2; ++part) {
      const Heads& h = a.parts[part];
      for (int64_t head = 0; head < h.heads; ++head) {
        const T* x = static_cast<const T*>(h.data) + row * h.stride_row + head * h.stride_head;
        T* out = static_cast<T*>(h.out) + (row * h.heads + head) * a.head_dim;
        h.norm.data ? rotate<A, T, true>(a, x, table, table.gain[part], out)
                    : rotate<A, T, false>(a, x, table, nullptr, out);
      }
    }
  }
}

void run_rotary(const Rotary& a, int64_t first, int64_t last, void* scratch) {
  switch (a.dtype) {
    case DType::f64: return rotary<double, double>(a, first, last, scratch);
    case DType::bf16: return rotary<float, bf16>(a, first, last, scratch);
    case DType::f16: return rotary<float, f16>(a, first, last, scratch);
    default: return rotary<float, float>(a, first, last, scratch);
  }
}

int64_t rotary_scratch(const Rotary& a) {
  return 2 * (padded<double>(a.rotated) + padded<double>(a.head_dim)) * int64_t(sizeof(double));
}

// ------------------------------------------------------------------------------------------------------ activation

// 1 / x for x in [1, 2^126]. A division of 16 floats takes 16 cycles, as long as all the rest of an activation.
template <class A>
inline V<A> reciprocal(V<A> x) {
  return A(1) / x;
}
#if defined(__AVX512F__)
template <>
inline V<float> reciprocal<float>(V<float> x) {
  const V<float> r = (V<float>)_mm512_rcp14_ps((__m512)x);
  return r + r * (1.0f - x * r);
}
#endif

inline V<float> minus_size(V<float> x) { return (V<float>)((I32)x | INT32_MIN); }
inline V<double> minus_size(V<double> x) { return x < 0.0 ? x : -x; }

// 1 / (1 + e^{-x}) by the e^{-|x|} that cannot overflow.
template <class A>
inline V<A> sigmoid(V<A> x) {
  const V<A> e = exp(minus_size(x));
  return (x < A(0) ? e : splat(A(1))) * reciprocal<A>(A(1) + e);
}

// Φ, the normal distribution. |x| < 1: 1/2 + x P(x²). Beyond: e^{-x²/2} t Q(t) with t = 1 / (1 + 0.3 |x|). Minimax
// polynomials, within 2e-8 of Φ and of 1 − Φ, relative, before rounding.
inline V<float> normal_cdf(V<float> x) {
  const V<float> z = x * x;
  V<float> p = splat(-7.65420863e-6f);
  p = p * z + 1.13486373e-4f;
  p = p * z - 1.18632994e-3f;
  p = p * z + 9.97332341e-3f;
  p = p * z - 6.64903599e-2f;
  p = p * z + 3.9894228e-1f;
  const V<float> small = p * x + 0.5f;
  const V<float> size = (V<float>)((I32)x & 0x7fffffff);
  const V<float> t = reciprocal<float>(0.3f * (size < 32.0f ? size : splat(32.0f)) + 1.0f);
  V<float> q = splat(2.82403507e-2f);
  q = q * t - 8.06114539e-2f;
  q = q * t + 4.63817438e-2f;
  q = q * t + 9.01850758e-3f;
  q = q * t + 6.17975904e-2f;
  q = q * t + 8.69007956e-2f;
  q = q * t + 1.0893955e-1f;
  q = q * t + 1.19682031e-1f;
  q = q * t + 1.19682687e-1f;
  q = q * t * exp(-0.5f * z);
  return size < 1.0f ? small : x > 0.0f ? 1.0f - q : q;
}

inline V<double> normal_cdf(V<double> x) {
  for (int i = 0; i < W<double>; ++i) x[i] = 0.5 * __builtin_erfc(-0.70710678118654752 * x[i]);
  return x;
}

template <class A, Activation Kind>
inline V<A> factor(V<A> x) {
  if (Kind == kGelu) return normal_cdf(x);
  // (1 + tanh(u)) / 2 = sigmoid(2u), u = √(2/π) (x + 0.044715 x³)
  if (Kind == kGeluTanh) return sigmoid<A>(x * (A(0.071354816272600243) * (x * x) + A(1.5957691216057308)));
  return sigmoid<A>(x);
}

template <class A, class T, Activation Kind>
void activate(const GatedActivation& a, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* gate = static_cast<const T*>(a.gate.data) + row * a.gate.stride;
    const T* up = static_cast<const T*>(a.up.data) + row * a.up.stride;
    T* out = static_cast<T*>(a.out) + row * a.d;
    vectors<A>(a.d, RMFAST_VECTOR {
      const V<A> g = get<A>(gate + i, n);
      put<A>(out + i, g * factor<A, Kind>(g) * get<A>(up + i, n), n);
    });
  }
}

template <class A, class T>
void activate_of(const GatedActivation& a, int64_t first, int64_t last) {
  switch (a.kind) {
    case kSilu: return activate<A, T, kSilu>(a, first, last);
    case kGelu: return activate<A, T, kGelu>(a, first, last);
    case kGeluTanh: return activate<A, T, kGeluTanh>(a, first, last);
  }
}

void run_gated_activation(const GatedActivation& a, int64_t first, int64_t last) {
  switch (a.dtype) {
    case DType::f64: return activate_of<double, double>(a, first, last);
    case DType::bf16: return activate_of<float, bf16>(a, first, last);
    case DType::f16: return activate_of<float, f16>(a, first, last);
    default: return activate_of<float, float>(a, first, last);
  }
}

}  // namespace

namespace token_wise {
extern const TokenWiseIsa RMFAST_ISA;
const TokenWiseIsa RMFAST_ISA = {RMFAST_STRING(RMFAST_ISA), cpu_supported,  rms_norm_scratch,    run_rms_norm,
                                 rotary_scratch,            run_rotary, run_gated_activation};
}  // namespace token_wise

}  // namespace rmfast
