// The reward head on the CPU, compiled once for each instruction set (RMFAST_ISA names it).
//
// A unit of work is a block of 32 rows. Few dots (K + J) are taken of rows as they lie at the speed of the read; more of
// them go through a register-blocked GEMM over an fp32 copy of 256 columns that stays in cache. Interventions are
// one more small GEMM on the dots: with D = [P; A] (J + K, d), the changes of z and s are D Pᵀ c.

#include <new>

#include "rmfast/gemm.h"
#include "rmfast/reward_head.h"
#include "rmfast/row_dots.h"
#include "rmfast/row_norm.h"

#define RMFAST_STRING_(x) #x
#define RMFAST_STRING(x) RMFAST_STRING_(x)

namespace rmfast {
namespace {

// The GEMM takes dots 48 at a time with AVX-512, 24 elsewhere: 16 dots cost it 2.6 and 0.9 times as much.
constexpr int64_t kFewDots = kVectorBytes == 64 ? 16 : 8;

// The constant of kernels/reward_head/reference.py: below this share of its terms a norm is recomputed explicitly.
constexpr double kCancellation = 0.05;

template <class A>
struct Scratch {
  A* data;
  explicit Scratch(int64_t n) : data(n ? static_cast<A*>(::operator new(sizeof(A) * (n + 16), std_align)) : nullptr) {
    if (n) memset(data, 0, sizeof(A) * n);
  }
  ~Scratch() { ::operator delete(data, std_align); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  static constexpr std::align_val_t std_align{64};
};

template <class T>
inline const T* row_pointer(const Rows& rows, int64_t n) {
  const int64_t r = rows.picked ? rows.picked[n] : n;
  if (r < rows.per_batch) return static_cast<const T*>(rows.data) + r * rows.stride_t;  // a division is 5 ns
  return static_cast<const T*>(rows.data) + (r / rows.per_batch) * rows.stride_b + (r % rows.per_batch) * rows.stride_t;
}

// The parts of the workspace. Gains a_k follow the directions, so that one (J + K, d) matrix holds all dots.
template <class A>
struct Plan {
  int64_t J, K, d, dots_n;
  bool few;
  A *dots, *ordered, *packed, *offset, *sums, *effect;  // ordered: dots as few_dots reads them; sums: of their elements
  int64_t size;

  explicit Plan(const RewardHead<A>& h) : J(h.J), K(h.K), d(h.rows.d), dots_n(h.J + h.K) {
    few = dots_n <= kFewDots;
    A* at = h.workspace;
    auto take = [&](int64_t n) {
      A* out = at;
      at += (n + 15) / 16 * 16;
      return out;
    };
    dots = take(dots_n * d);
    ordered = few && h.rows.dtype == DType::bf16 ? take(dots_n * d) : dots;
    offset = take(K);
    sums = take(dots_n);
    effect = take(J ? packed_size<A>(J, dots_n) : 0);
    packed = take(few ? 0 : packed_size<A>(d, dots_n));
    size = (at - h.workspace) + 16;
  }
};

template <class A>
int64_t workspace_size(const RewardHead<A>& h) {
  return Plan<A>(h).size;
}

template <class A>
void fold_gain(const A* weight, const A* gain, Norm norm, int64_t K, int64_t d, A* out) {
  if (norm == kNone) gain = nullptr;
  for (int64_t k = 0; k < K; ++k)
    for (int64_t i = 0; i < d; ++i)
      out[k * d + i] = weight[k * d + i] * (!gain ? A(1) : norm == kGemmaRms ? A(1) + gain[i] : gain[i]);
}

template <class A>
void prepare(const RewardHead<A>& h) {
  const Plan<A> p(h);
  const int64_t d = p.d, J = p.J;
  if (J) memcpy(p.dots, h.directions, sizeof(A) * J * d);
  fold_gain(h.weight, h.norm_weight, h.norm, h.K, d, p.dots + J * d);
  for (int64_t k = 0; k < h.K; ++k) {
    p.offset[k] = h.bias ? h.bias[k] : A(0);
    if (h.norm == kLayer && h.norm_bias) p.offset[k] += dot(h.weight + k * d, h.norm_bias, d);
  }
  for (int64_t n = 0; n < p.dots_n; ++n) p.sums[n] = row_sum<A>(p.dots + n * d, d);
  if (J) {
    Scratch<A> effect(p.dots_n * J);
    for (int64_t j = 0; j < J; ++j) {
      for (int64_t n = 0; n < p.dots_n; ++n)
        effect.data[n * J + j] = n < j ? effect.data[j * J + n] : dot(p.dots + n * d, p.dots + j * d, d);
    }
    pack_columns(effect.data, J, J, p.dots_n, p.effect);
  }
  if (p.ordered != p.dots) pair_order(p.dots, p.dots_n, d, p.ordered);
  if (!p.few) pack_columns(p.dots, d, d, p.dots_n, p.packed);
}

// Dots and moments through the GEMM; x is converted 256 columns at a time. The next 256 are fetched meanwhile: 32 short
// pieces of rows are no pattern that the hardware sees, and without it their misses take a fifth of the time.
template <class A, class T>
void many_dots(const T* const* x, int64_t count, const A* shift, const Plan<A>& p, A* copy, A* out, int64_t ld,
               Moments<A>* moments) {
  memset(out, 0, sizeof(A) * count * ld);
  V<A> sq[kBlock] = {}, total[kBlock] = {};
  for (int64_t i0 = 0; i0 < p.d; i0 += kDepth) {
    const int64_t depth = p.d - i0 < kDepth ? p.d - i0 : kDepth;
    for (int64_t r = 0; r < count; ++r) {
      A* to = copy + r * kDepth;
      V<A> acc = sq[r], plain = total[r];
      int64_t i = 0;
      for (; i + W<A> <= depth; i += W<A>) {
        const V<A> v = load(x[r] + i0 + i) - shift[r];
        acc += v * v;
        plain += v;
        store(to + i, v);
      }
      if (i < depth) {
        const V<A> v = first_lanes<A>(load_part<A>(x[r] + i0 + i, depth - i) - shift[r], depth - i);
        acc += v * v;
        plain += v;
        store(to + i, v);
      }
      sq[r] = acc;
      total[r] = plain;
      const T* ahead = i0 + kDepth < p.d ? x[r] + i0 + kDepth : x[r + kBlock];
      const int64_t bytes = (p.d < kDepth ? p.d : kDepth) * sizeof(T);
      if (ahead)
        for (int64_t line = 0; line < bytes; line += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(ahead) + line, 0, 2);
    }
    gemm_packed(copy, kDepth, count, depth, p.packed + i0 * kTileCols<A>, p.d, p.dots_n, out, ld);
  }
  for (int64_t r = 0; r < count; ++r) moments[r] = {sum<A>(sq[r]), sum<A>(total[r])};
}

// One row under one intervention without the algebra, in double: for rows that a direction removes almost whole.
template <class A, class T>
void explicit_rewards(const RewardHead<A>& h, const A* gains, const A* offset, const T* x, const A* strengths,
                      const A* targets, double* row, A* out) {
  const int64_t d = h.rows.d;
  for (int64_t i = 0; i < d; ++i) row[i] = to_acc<double>(x[i]);
  Scratch<double> c(h.J), wide(d);
  for (int64_t j = 0; j < h.J; ++j) {
    for (int64_t i = 0; i < d; ++i) wide.data[i] = h.directions[j * d + i];
    c.data[j] = strengths[j] * (dot(row, wide.data, d) - (targets ? targets[j] : A(0)));
  }
  for (int64_t j = 0; j < h.J; ++j)
    for (int64_t i = 0; i < d; ++i) row[i] -= c.data[j] * h.directions[j * d + i];
  if (h.norm == kLayer) {
    const double mean = row_sum<double>(row, d) / d;
    for (int64_t i = 0; i < d; ++i) row[i] -= mean;
  }
  const double scale = h.norm == kNone ? 1 : 1 / __builtin_sqrt(dot(row, row, d) / d + h.eps);
  for (int64_t k = 0; k < h.K; ++k) {
    for (int64_t i = 0; i < d; ++i) wide.data[i] = gains[k * d + i];
    out[k] = A(dot(row, wide.data, d) * scale + offset[k]);
  }
}

template <class A>
struct Buffers {
  int64_t ld, axis;
  Scratch<A> copy, dots, mean, c, effect;
  Scratch<Moments<A>> moments;
  Scratch<double> row;
  Buffers(const RewardHead<A>& h, const Plan<A>& p)
      : ld(padded_cols<A>(p.dots_n)),
        axis(h.index ? 1 : h.I),
        copy(p.few ? 0 : kBlock * kDepth),
        dots(kBlock * ld),
        mean(kBlock),
        c(p.J ? kBlock * axis * p.J : 0),
        effect(p.J ? kBlock * axis * ld : 0),
        moments(kBlock),
        row(p.J ? p.d : 0) {}
};

template <class A, class T>
void intervene(const RewardHead<A>& h, const Plan<A>& p, Buffers<A>& b, const T* const* x, int64_t first,
               int64_t count) {
  const int64_t J = p.J, K = p.K, axis = b.axis;
  auto which = [&](int64_t r, int64_t i) { return h.index ? h.index[first + r] : i; };
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < axis; ++i) {
      const int64_t at = which(r, i);
      A* c = b.c.data + (r * axis + i) * J;
      const A *z = b.dots.data + r * b.ld, mean = b.mean.data[r];
      const A *alpha = h.strengths + at * J, *target = h.targets ? h.targets + at * J : nullptr;
      if (at < 0)
        memset(c, 0, sizeof(A) * J);
      else if (target)
        for (int64_t j = 0; j < J; ++j) c[j] = alpha[j] * (z[j] + mean * p.sums[j] - target[j]);
      else
        for (int64_t j = 0; j < J; ++j) c[j] = alpha[j] * (z[j] + mean * p.sums[j]);
    }
  memset(b.effect.data, 0, sizeof(A) * count * axis * b.ld);
  gemm_packed(b.c.data, J, count * axis, J, p.effect, J, p.dots_n, b.effect.data, b.ld);
  for (int64_t r = 0; r < count; ++r) {
    const A *z = b.dots.data + r * b.ld, *s = z + J, square = b.moments.data[r].square;
    for (int64_t i = 0; i < axis; ++i) {
      const A *c = b.c.data + (r * axis + i) * J, *change = b.effect.data + (r * axis + i) * b.ld;
      const A linear = 2 * dot(c, z, J), quadratic = dot(c, change, J);
      A norm2 = square - linear + quadratic, mean = 0;
      if (h.norm == kLayer) {
        mean = -dot(c, p.sums, J) / A(p.d);
        norm2 -= p.d * mean * mean;
      }
      A* out = h.out + ((first + r) * axis + i) * K;
      if (norm2 < A(kCancellation) * (square + (linear < 0 ? -linear : linear) + quadratic)) {
        const int64_t at = which(r, i);  // not −1: without an intervention norm2 is square
        explicit_rewards(h, p.dots + J * p.d, p.offset, x[r], h.strengths + at * J,
                         h.targets ? h.targets + at * J : nullptr, b.row.data, out);
        continue;
      }
      const A scale = h.norm == kNone ? A(1) : A(1) / A(__builtin_sqrt(norm2 / A(p.d) + A(h.eps)));
      for (int64_t k = 0; k < K; ++k) {
        A value = s[k] - change[J + k];
        if (h.norm == kLayer) value -= mean * p.sums[J + k];
        out[k] = value * scale + p.offset[k];
      }
    }
  }
}

template <class A, class T>
void forward_rows(const RewardHead<A>& h, int64_t first_block, int64_t last_block) {
  const Plan<A> p(h);
  Buffers<A> b(h, p);
  const T* x[2 * kBlock];  // those of this block, then of the next
  const int64_t known = last_block * kBlock < h.rows.count ? last_block * kBlock : h.rows.count;
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t first = block * kBlock;
    const int64_t count = h.rows.count - first < kBlock ? h.rows.count - first : kBlock;
    for (int64_t r = 0; r < 2 * kBlock; ++r)
      x[r] = first + r < known ? row_pointer<T>(h.rows, first + r) : nullptr;
    if (!p.few) {
      for (int64_t r = 0; r < count; ++r) b.mean.data[r] = h.norm == kLayer ? shift_of<A>(x[r], p.d) : A(0);
      many_dots(x, count, b.mean.data, p, b.copy.data, b.dots.data, b.ld, b.moments.data);
    } else {
      auto dots = h.norm == kLayer ? few_dots<A, T, true> : few_dots<A, T, false>;
      dots(x, count, b.mean.data, p.ordered, p.dots_n, p.d, b.dots.data, b.ld, b.moments.data);
    }
    if (h.norm == kLayer)
      for (int64_t r = 0; r < count; ++r)
        b.mean.data[r] = center(b.mean.data[r], p.d, p.sums, p.dots_n, b.dots.data + r * b.ld, b.moments.data + r);
    if (p.J) {
      intervene(h, p, b, x, first, count);
      continue;
    }
    for (int64_t r = 0; r < count; ++r) {
      const A scale =
          h.norm == kNone ? A(1) : A(1) / A(__builtin_sqrt(b.moments.data[r].square / A(p.d) + A(h.eps)));
      for (int64_t k = 0; k < p.K; ++k)
        h.out[(first + r) * p.K + k] = b.dots.data[r * b.ld + k] * scale + p.offset[k];
    }
  }
}

// A NaN without a payload, which rounding to bf16 (`put_vector`) could carry into the exponent; any other value as it is.
template <class A>
inline A plain(A x) {
  return x == x ? x : A(__builtin_nan(""));
}

// What the gradient of one row needs beside the row and its direction Σ_k g_k a_k = by · toward.
template <class A>
struct RowGradient {
  A weight, along, shift, mean, scale;
};

template <class A, class T>
inline void put_pair(T* p, V<A> first, V<A> second) {
  put_vector<A>(p, first);
  put_vector<A>(p + W<A>, second);
}
template <>
inline void put_pair<float, bf16>(bf16* p, V<float> first, V<float> second) {
  const U32 words = rounded_bits(first) >> 16 | (rounded_bits(second) & 0xffff0000u);
  memcpy(p, &words, sizeof words);
}

// The gradient of one row: weight · toward − (x − mean) along − shift; toward in pair order.
template <class A, class T, bool Center>
void write_gradient(const T* x, const A* toward, const RowGradient<A>& row, int64_t d, T* out) {
  const A weight = row.weight, along = row.along, shift = row.shift, mean = row.mean;
  auto gradient = [=](V<A> v, V<A> of) __attribute__((always_inline)) {
    if (Center) v -= mean;
    v = of * weight - v * along;
    return Center ? v - shift : v;
  };
  int64_t i = 0;
  for (; i + 2 * W<A> <= d; i += 2 * W<A>) {
    const Pair<A, T, kPaired<T>> v(x + i);
    put_pair<A>(out + i, gradient(v.v[0], load(toward + i)), gradient(v.v[1], load(toward + i + W<A>)));
  }
  for (; i < d; i += W<A>) {
    const int64_t n = d - i < W<A> ? d - i : W<A>;
    put<A>(out + i, gradient(get<A>(x + i, n), get<A>(toward + i, n)), n);
  }
}

// out += Σ_r (x_r − mean_r) weight_r: R rows for one read and write of out.
template <class A, class T, int R, bool Center>
void add_scaled(const T* const* x, const A* mean, const A* weight, int64_t d, A* out) {
  const T* from[R];
  A by[R], less[R];  // of their own: out may not be taken to change them
  for (int r = 0; r < R; ++r) {
    from[r] = x[r];
    by[r] = weight[r];
    less[r] = Center ? mean[r] : A(0);
  }
  vectors<A>(d, RMFAST_VECTOR {
    V<A> acc = get<A>(out + i, n);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V<A> v = get<A>(from[r] + i, n);
      acc += (Center ? v - less[r] : v) * by[r];
    }
    put<A>(out + i, acc, n);
  });
}

template <class A>
void prepare_backward(const RewardHeadBackward<A>& h) {
  const int64_t d = h.rows.d;
  const bool ordered = h.rows.dtype == DType::bf16;
  Scratch<A> folded(ordered ? h.K * d : 0);
  A* const gains = ordered ? folded.data : h.workspace;
  fold_gain(h.weight, h.norm_weight, h.norm, h.K, d, gains);
  for (int64_t i = 0; i < h.K * d; ++i) gains[i] = plain(gains[i]);
  for (int64_t k = 0; k < h.K; ++k) h.workspace[h.K * d + k] = row_sum<A>(gains + k * d, d);
  if (ordered) pair_order(gains, h.K, d, h.workspace);
}

// From a row's projection on `toward` and its moments, both of x − shift.
template <class A, bool Center>
RowGradient<A> row_gradient(const RewardHeadBackward<A>& h, A by, A toward_sum, A shift, A projection, Moments<A> moments) {
  if (h.norm == kNone) return {by, 0, 0, 0, 1};
  const A d = A(h.rows.d), mean = Center ? center(shift, h.rows.d, &toward_sum, 1, &projection, &moments) : A(0);
  const A scale = A(1) / A(__builtin_sqrt(moments.square / d + A(h.eps)));
  return {plain(by * scale), plain(by * projection * scale * scale * scale / d),
          plain(Center ? by * toward_sum * scale / d : A(0)), mean, scale};
}

// A chunk's rows in order, four at a time: the gradient of each, and the chunk's own partial sum of V.
template <class A, class T, bool Center>
void backward_rows(const RewardHeadBackward<A>& h, int64_t first_chunk, int64_t last_chunk) {
  constexpr int R = 4;
  const int64_t d = h.rows.d, K = h.K;
  const A *gains = h.workspace, *gain_sums = h.workspace + K * d;
  Scratch<A> direction(K > 1 ? d : 0);
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    A* partial = h.partial ? h.partial + chunk * K * d : nullptr;
    if (partial) memset(partial, 0, sizeof(A) * K * d);
    const int64_t last = (chunk + 1) * h.chunk < h.rows.count ? (chunk + 1) * h.chunk : h.rows.count;
    for (int64_t n = chunk * h.chunk; n < last; n += R) {
      const int64_t count = last - n < R ? last - n : R;
      const T* x[2 * R];  // those at hand, then those that follow
      for (int64_t r = 0; r < 2 * R; ++r) x[r] = n + r < last ? row_pointer<T>(h.rows, n + r) : nullptr;
      A shift[R], projection[R], toward_sum[R], mean[R], scale[R];
      Moments<A> moments[R];
      for (int64_t r = 0; r < count; ++r) shift[r] = Center && K > 1 ? shift_of<A>(x[r], d) : A(0);
      if (K == 1) block_dots<A, T, 1, Center, true>(x, count, shift, gains, d, projection, 1, moments);
      for (int64_t r = 0; r < count; ++r) {
        // One head needs no copy of its direction: g_0 is put beside it.
        const A *g = h.grad + (n + r) * K, *toward = gains;
        A by = plain(g[0]);
        toward_sum[r] = gain_sums[0];
        if (K > 1) {
          A* sum = direction.data;
          memset(sum, 0, sizeof(A) * d);
          toward_sum[r] = 0;
          for (int64_t k = 0; k < K; ++k) {
            const A *gain = gains + k * d, share = plain(g[k]);
            add_scaled<A, A, 1, false>(&gain, nullptr, &share, d, sum);
            toward_sum[r] += g[k] * gain_sums[k];
          }
          by = 1;
          toward = sum;
          row_dots<A, T, 1, Center, true, 1>(x + r, nullptr, shift + r, toward, d, projection + r, 1, moments + r);
        }
        const RowGradient<A> row =
            row_gradient<A, Center>(h, by, toward_sum[r], shift[r], projection[r], moments[r]);
        mean[r] = row.mean;
        scale[r] = row.scale;
        if (h.grad_rows)
          write_gradient<A, T, Center>(x[r], toward, row, d, static_cast<T*>(h.grad_rows) + (n + r) * d);
      }
      if (!partial) continue;
      for (int64_t k = 0; k < K; ++k) {
        A weight[R];
        for (int64_t r = 0; r < count; ++r) weight[r] = h.grad[(n + r) * K + k] * scale[r];
        if (count == R)
          add_scaled<A, T, R, Center>(x, mean, weight, d, partial + k * d);
        else
          for (int64_t r = 0; r < count; ++r)
            add_scaled<A, T, 1, Center>(x + r, mean + r, weight + r, d, partial + k * d);
      }
    }
  }
}

template <class A, class T>
void backward_of(const RewardHeadBackward<A>& h, int64_t first, int64_t last) {
  return h.norm == kLayer ? backward_rows<A, T, true>(h, first, last) : backward_rows<A, T, false>(h, first, last);
}

void forward(const RewardHead<double>& h, int64_t first, int64_t last) { forward_rows<double, double>(h, first, last); }
void forward(const RewardHead<float>& h, int64_t first, int64_t last) {
  switch (h.rows.dtype) {
    case DType::bf16: return forward_rows<float, bf16>(h, first, last);
    case DType::f16: return forward_rows<float, f16>(h, first, last);
    default: return forward_rows<float, float>(h, first, last);
  }
}
void backward(const RewardHeadBackward<double>& h, int64_t first, int64_t last) {
  backward_of<double, double>(h, first, last);
}
void backward(const RewardHeadBackward<float>& h, int64_t first, int64_t last) {
  switch (h.rows.dtype) {
    case DType::bf16: return backward_of<float, bf16>(h, first, last);
    case DType::f16: return backward_of<float, f16>(h, first, last);
    default: return backward_of<float, float>(h, first, last);
  }
}

template <class A>
constexpr RewardHeadKernels<A> kernels() {
  return {convert<A>, workspace_size<A>, prepare<A>, forward, prepare_backward<A>, backward};
}

}  // namespace

extern const Isa RMFAST_ISA;
const Isa RMFAST_ISA = {RMFAST_STRING(RMFAST_ISA), cpu_supported, kernels<float>(), kernels<double>()};

}  // namespace rmfast
