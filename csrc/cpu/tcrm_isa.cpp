// The TCRM loss on the CPU, compiled once for each instruction set (RMFAST_ISA).

#include "rmfast/tcrm.h"
#include "rmfast/vmath.h"

#define RMFAST_STRING_(x) #x
#define RMFAST_STRING(x) RMFAST_STRING_(x)

namespace rmfast {
namespace {

// Tokens whose squares are summed in the accumulation type before they are added in fp64.
constexpr int64_t kChunk = 1024;

// Sums that one vector of tokens after another is added to: with one of them a sum waits for the last addition.
constexpr int kSums = 4;

// Calls f(i, n, u, r_i − r_{i+1}, r_i − end) for the vectors of tokens first .. last − 1 of a response, 0 behind n tokens;
// u counts vectors modulo kSums.
template <class A, class T, class F>
inline void tokens(const T* r, int64_t first, int64_t last, A end, F f) {
  int64_t i = first;
  auto whole = [&](int u) __attribute__((always_inline)) {
    const V<A> x = load(r + i);
    f(i, int64_t(W<A>), u, x - load(r + i + 1), x - end);
    i += W<A>;
  };
  while (i + kSums * W<A> <= last)
#pragma GCC unroll 4
    for (int u = 0; u < kSums; ++u) whole(u);
  while (i + W<A> <= last) whole(0);
  if (i < last) {
    const int64_t n = last - i;
    const V<A> x = load_part<A>(r + i, n);
    f(i, n, 0, x - load_part<A>(r + i + 1, n), first_lanes<A>(x - end, n));
  }
}
#define RMFAST_TOKENS [&](int64_t i, int64_t n, int u, V<A> step, V<A> ahead) __attribute__((always_inline))

template <class A, class T>
double gap(const Tcrm& a, int64_t b) {
  double ends[2];
  for (int s = 0; s < 2; ++s) ends[s] = double(to_acc<A>(static_cast<const T*>(a.sides[s].values)[a.sides[s].end[b] - 1]));
  return ends[0] - ends[1] - (a.margin ? double(static_cast<const A*>(a.margin)[b]) : 0);
}

// What a term of response b is multiplied by: 1 over its tokens but the last, or 1.
inline double weight(const Tcrm& a, const Responses& side, int64_t b) {
  const int64_t k = side.end[b] - side.first[b] - 1;
  return a.mean && k > 0 ? 1 / double(k) : 1;
}

template <class A, class T>
void forward(const Tcrm& a, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    double* terms = a.terms + 3 * b;
    const double difference = gap<A, T>(a, b);
    // −log σ(gap) = max(−gap, 0) + log(1 + e^{−|gap|}); a NaN passes through the exponential.
    terms[0] = (difference < 0 ? -difference : 0) + __builtin_log1p(__builtin_exp(-__builtin_fabs(difference)));
    terms[1] = terms[2] = 0;
    for (const Responses& side : a.sides) {
      const T* r = static_cast<const T*>(side.values) + side.first[b];
      const int64_t k = side.end[b] - side.first[b] - 1;
      for (int64_t i0 = 0; i0 < k; i0 += kChunk) {
        V<A> smooth[kSums] = {}, lookahead[kSums] = {};
        tokens<A>(r, i0, i0 + kChunk < k ? i0 + kChunk : k, to_acc<A>(r[k]), RMFAST_TOKENS {
          smooth[u] += step * step;
          lookahead[u] += ahead * ahead;
        });
        terms[1] += weight(a, side, b) * double(sum<A>(smooth[0] + smooth[1] + (smooth[2] + smooth[3])));
        terms[2] += weight(a, side, b) * double(sum<A>(lookahead[0] + lookahead[1] + (lookahead[2] + lookahead[3])));
      }
    }
  }
}

template <class A, class T>
void backward(const Tcrm& a, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    const double scale = a.grad / double(a.pairs), slope = scale / (1 + __builtin_exp(gap<A, T>(a, b)));
    for (int s = 0; s < 2; ++s) {
      const Responses& side = a.sides[s];
      const int64_t begin = side.first[b], k = side.end[b] - begin - 1, before = b ? side.end[b - 1] : 0;
      const T* r = static_cast<const T*>(side.values) + begin;
      T* grad = static_cast<T*>(side.grad) + begin;
      const A smooth = A(2 * scale * weight(a, side, b) * a.smooth);
      const A lookahead = A(2 * scale * weight(a, side, b) * a.lookahead);
      memset(grad - (begin - before), 0, (begin - before) * sizeof(T));
      tokens<A>(r, 0, k, to_acc<A>(r[k]), RMFAST_TOKENS {
        const V<A> out = smooth * step + lookahead * ahead;
        if (n == W<A>)
          store(grad + i, out);
        else
          store_part<A>(grad + i, out, n);
      });
      store_part<A>(grad + k, splat(A(s ? slope : -slope)), 1);
      if (b + 1 == a.pairs) memset(grad + k + 1, 0, (side.tokens - side.end[b]) * sizeof(T));
    }
  }
}

void any_forward(const Tcrm& a, int64_t first, int64_t last) {
  switch (a.dtype) {
    case DType::f64: return forward<double, double>(a, first, last);
    case DType::bf16: return forward<float, bf16>(a, first, last);
    case DType::f16: return forward<float, f16>(a, first, last);
    default: return forward<float, float>(a, first, last);
  }
}

void any_backward(const Tcrm& a, int64_t first, int64_t last) {
  switch (a.dtype) {
    case DType::f64: return backward<double, double>(a, first, last);
    case DType::bf16: return backward<float, bf16>(a, first, last);
    case DType::f16: return backward<float, f16>(a, first, last);
    default: return backward<float, float>(a, first, last);
  }
}

}  // namespace

namespace tcrm {
extern const TcrmIsa RMFAST_ISA;
const TcrmIsa RMFAST_ISA = {RMFAST_STRING(RMFAST_ISA), cpu_supported, any_forward, any_backward};
}  // namespace tcrm

}  // namespace rmfast
