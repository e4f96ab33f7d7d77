// The TCRM loss on the CPU, compiled once for each instruction set (RMFAST_ISA).
//
// A response is read once, from its first token to its last, and its gradient written in the same pass.

#include "rmfast/tcrm.h"
#include "rmfast/vmath.h"

#define RMFAST_STRING_(x) #x
#define RMFAST_STRING(x) RMFAST_STRING_(x)

namespace rmfast {
namespace {

// Tokens whose squares are summed in the accumulation type before they are added in fp64.
constexpr int64_t kChunk = 1024;

struct Terms {
  double smooth = 0, lookahead = 0;
};

// Terms and gradient of tokens 0 .. last − 1 of a response whose last token is `last`.
template <class A, class T>
Terms body(const T* r, int64_t last, A weight_smooth, A weight_lookahead, A* grad) {
  Terms terms;
  const A end = to_acc<A>(r[last]);
  for (int64_t i0 = 0; i0 < last; i0 += kChunk) {
    const int64_t stop = i0 + kChunk < last ? i0 + kChunk : last;
    V<A> smooth = {}, lookahead = {};
    int64_t i = i0;
    for (; i + W<A> <= stop; i += W<A>) {
      const V<A> x = load(r + i), step = x - load(r + i + 1), ahead = x - end;
      smooth += step * step;
      lookahead += ahead * ahead;
      store(grad + i, weight_smooth * step + weight_lookahead * ahead);
    }
    if (i < stop) {
      const int64_t n = stop - i;
      const V<A> x = load_part<A>(r + i, n), step = x - load_part<A>(r + i + 1, n), ahead = first_lanes<A>(x - end, n);
      smooth += step * step;
      lookahead += ahead * ahead;
      store_part<A>(grad + i, V<A>(weight_smooth * step + weight_lookahead * ahead), n);
    }
    terms.smooth += double(sum<A>(smooth));
    terms.lookahead += double(sum<A>(lookahead));
  }
  return terms;
}

template <class A, class T>
void run(const Tcrm& a, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    double* terms = a.terms + 3 * b;
    terms[1] = terms[2] = 0;
    double ends[2];
    for (int s = 0; s < 2; ++s) {
      const Responses& side = a.sides[s];
      const T* values = static_cast<const T*>(side.values);
      A* grad = static_cast<A*>(side.grad);
      const int64_t begin = side.first[b], k = side.end[b] - begin - 1;
      for (int64_t i = b ? side.end[b - 1] : 0; i < begin; ++i) grad[i] = 0;
      if (b + 1 == a.pairs)
        for (int64_t i = side.end[b]; i < side.tokens; ++i) grad[i] = 0;
      const double each = a.mean && k > 0 ? 1 / double(k) : 1, scale = 2 * each / double(a.pairs);
      const Terms got = body<A, T>(values + begin, k, A(a.smooth * scale), A(a.lookahead * scale), grad + begin);
      terms[1] += each * got.smooth;
      terms[2] += each * got.lookahead;
      ends[s] = double(to_acc<A>(values[begin + k]));
    }
    const double gap = ends[0] - ends[1] - (a.margin ? double(static_cast<const A*>(a.margin)[b]) : 0);
    // −log σ(gap) = max(−gap, 0) + log(1 + e^{−|gap|}); a NaN passes through the exponential.
    terms[0] = (gap < 0 ? -gap : 0) + __builtin_log1p(__builtin_exp(-__builtin_fabs(gap)));
    const double slope = 1 / (1 + __builtin_exp(gap)) / double(a.pairs);
    static_cast<A*>(a.sides[0].grad)[a.sides[0].end[b] - 1] = A(-slope);
    static_cast<A*>(a.sides[1].grad)[a.sides[1].end[b] - 1] = A(slope);
  }
}

void run_any(const Tcrm& a, int64_t first, int64_t last) {
  switch (a.dtype) {
    case DType::f64: return run<double, double>(a, first, last);
    case DType::bf16: return run<float, bf16>(a, first, last);
    case DType::f16: return run<float, f16>(a, first, last);
    default: return run<float, float>(a, first, last);
  }
}

}  // namespace

namespace tcrm {
extern const TcrmIsa RMFAST_ISA;
const TcrmIsa RMFAST_ISA = {RMFAST_STRING(RMFAST_ISA), cpu_supported, run_any};
}  // namespace tcrm

}  // namespace rmfast
