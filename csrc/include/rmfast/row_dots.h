// Dots of rows with a few vectors, and the rows' moments, at the speed at which the rows are read. For files compiled once
// for each instruction set.
#pragma once

#include "rmfast/vec.h"

namespace rmfast {
namespace {

template <class A, class T>
A row_sum(const T* x, int64_t d) {
  V<A> acc = {};
  int64_t i = 0;
  for (; i + W<A> <= d; i += W<A>) acc += load(x + i);
  if (i < d) acc += load_part<A>(x + i, d - i);
  return sum<A>(acc);
}

template <class A, class T>
A dot(const T* x, const A* y, int64_t d) {
  V<A> acc = {};
  int64_t i = 0;
  for (; i + W<A> <= d; i += W<A>) acc += load(x + i) * load(y + i);
  if (i < d) acc += load_part<A>(x + i, d - i) * load_part<A>(y + i, d - i);
  return sum<A>(acc);
}

// Squared norm and sum of a row, both of x − shift for a layer norm.
template <class A>
struct Moments {
  A square, sum;
};

// A layer norm is taken of x − shift in one pass, and the rest of the mean is taken off its sums. The shift is the
// mean of the first 64 elements: within √(d / 64) standard deviations of the row's own, so that at d = 8192 the
// variance loses at most 7 bits, where the plain Σx² − (Σx)²/d loses them all under a large mean.
template <class A, class T>
A shift_of(const T* x, int64_t d) {
  const int64_t n = d < 64 ? d : 64;
  return row_sum<A>(x, n) / A(n);
}

// Centres the dots and moments of x − shift; returns the row's mean.
template <class A>
A center(A shift, int64_t d, const A* sums, int64_t n, A* dots, Moments<A>* moments) {
  const A rest = moments->sum / A(d);
  for (int64_t i = 0; i < n; ++i) dots[i] -= rest * sums[i];
  moments->square -= rest * moments->sum;
  if (moments->square < 0) moments->square = 0;
  return shift + rest;
}

// Two vectors of a row. Those of bf16 are taken in pair order where Paired: first the even elements of the 2 W, then the
// odd ones, each a shift or a mask away from the 32-bit words, where widening in place costs a shuffle a vector more.
template <class A, class T, bool Paired>
struct Pair {
  V<A> v[2];
  explicit Pair(const T* p) : v{load(p), load(p + W<A>)} {}
};
template <>
struct Pair<float, bf16, true> {
  V<float> v[2];
  explicit Pair(const bf16* p) {
    U32 words;
    memcpy(&words, p, sizeof words);
    v[0] = (V<float>)(words << 16);
    v[1] = (V<float>)(words & 0xffff0000u);
  }
};
template <class T>
constexpr bool kPaired = false;
template <>
constexpr bool kPaired<bf16> = true;

// n vectors of d elements in pair order, but for the last d mod 2 W elements.
template <class A>
void pair_order(const A* from, int64_t n, int64_t d, A* to) {
  for (int64_t j = 0; j < n; ++j, from += d, to += d) {
    int64_t i = 0;
    for (; i + 2 * W<A> <= d; i += 2 * W<A>)
      for (int l = 0; l < W<A>; ++l) {
        to[i + l] = from[i + 2 * l];
        to[i + W<A> + l] = from[i + 2 * l + 1];
      }
    for (; i < d; ++i) to[i] = from[i];
  }
}

// Rows that run side by side, and interleaved chains of additions of each dot: of rows beside each other vectors y are
// read once, and chains hide the latency of an addition. 32 registers hold four rows, 16 only two rows of four dots. One
// stream is read from memory faster than two or four, which matters where one dot leaves the time.
template <int C>
constexpr int kRows = C == 1 ? 1 : kVectorBytes == 64 ? 4 : C == 4 ? 2 : 1;
template <int C>
constexpr int kChains = kRows<C> == 1 ? 4 : 1;

// The cache that following rows are fetched into, as __builtin_prefetch counts: the first where few vectors y leave room
// in it (one: 15%; two beside 16-bit rows: 3 to 8%).
template <class T, int C>
constexpr int kNearness = C == 1 || (C == 2 && sizeof(T) == 2 && kVectorBytes == 64) ? 3 : 2;

// Dots of R rows with C vectors y (in pair order for bf16 rows), and, with First, the rows' moments; R changes no bit.
// The rows that follow are fetched meanwhile (null: none), one after the other as memory likes it, since the hardware's
// own fetching stops at each page, which often is a row.
template <class A, class T, int C, bool Center, bool First, int R>
void row_dots(const T* const* x, const T* const* next, const A* shift, const A* y, int64_t d, A* out, int64_t ld,
              Moments<A>* moments) {
  constexpr int U = kChains<C>, kVectors = U < 2 ? 2 : U;
  constexpr int64_t S = kVectors * W<A>;
  V<A> acc[U][R][C] = {}, sq[U][R] = {}, total[U][R] = {};
  auto pair = [&](int64_t i, int chain) __attribute__((always_inline)) {
    V<A> v[2][R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Pair<A, T, kPaired<T>> of(x[r] + i);
      v[0][r] = of.v[0];
      v[1][r] = of.v[1];
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int u = (chain + half) % U;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        V<A>& of = v[half][r];
        if (Center) of -= shift[r];
        if (Center && First) total[u][r] += of;
        if (First) sq[u][r] += of * of;
      }
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const V<A> w = load(y + c * d + i + half * W<A>);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[u][r][c] += v[half][r] * w;
      }
    }
  };
  auto columns = [&](int64_t i) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v += 2) pair(i + v * W<A>, v);
  };
  int64_t i = 0;
  if (First && next) {
    const int64_t share = (d / S + R - 1) / R * S;  // of the columns, over which one of the next rows is fetched
#pragma GCC unroll 1
    for (int r = 0; r < R; ++r) {
      const char* ahead = reinterpret_cast<const char*>(next[r]);
      const int64_t end = (r + 1) * share < d ? (r + 1) * share : d;
      for (; i + S <= end; i += S, ahead += R * S * sizeof(T)) {
#pragma GCC unroll 8
        for (int64_t byte = 0; byte < int64_t(R * S * sizeof(T)); byte += 64)
          __builtin_prefetch(ahead + byte, 0, kNearness<T, C>);
        columns(i);
      }
    }
  }
  for (; i + S <= d; i += S) columns(i);
  for (; i + 2 * W<A> <= d; i += 2 * W<A>) pair(i, 0);
  for (; i < d; i += W<A>) {
    const int64_t n = d - i < W<A> ? d - i : W<A>;
    for (int r = 0; r < R; ++r) {
      V<A> v = load_part<A>(x[r] + i, n);
      if (Center) v = first_lanes<A>(v - shift[r], n);
      total[0][r] += v;
      sq[0][r] += v * v;
      for (int c = 0; c < C; ++c) acc[0][r][c] += v * load_part<A>(y + c * d + i, n);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int u = 1; u < U; ++u) {
      sq[0][r] += sq[u][r];
      total[0][r] += total[u][r];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[0][r][c] += acc[u][r][c];
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) out[r * ld + c] = sum<A>(acc[0][r][c]);
    if (First) moments[r] = {sum<A>(sq[0][r]), Center ? sum<A>(total[0][r]) : A(0)};
  }
}

// x: `count` rows, then those that follow, as far as they are known, and null. With First, the rows' shifts are taken here,
// each while the rows before it are at work: at once they would wait for memory.
template <class A, class T, int C, bool Center, bool First>
void block_dots(const T* const* x, int64_t count, A* shift, const A* y, int64_t d, A* out, int64_t ld,
                Moments<A>* moments) {
  constexpr int R = kRows<C>, kAhead = R < 2 ? 2 : R;  // one row ahead is less than what memory has on its way
  int64_t r = 0, shifted = 0;
  auto shift_to = [&](int64_t end) {
    for (; Center && First && shifted < end && shifted < count; ++shifted) shift[shifted] = shift_of<A>(x[shifted], d);
  };
  shift_to(R);
  for (; r + R <= count; r += R) {
    shift_to(r + 2 * R);
    row_dots<A, T, C, Center, First, R>(x + r, x[r + kAhead + R - 1] ? x + r + kAhead : nullptr, shift + r, y, d,
                                        out + r * ld, ld, moments + r);
  }
  for (; r < count; ++r)
    row_dots<A, T, C, Center, First, 1>(x + r, nullptr, shift + r, y, d, out + r * ld, ld, moments + r);
}

template <class A, class T, bool Center, bool First = true>
void few_dots(const T* const* x, int64_t count, A* shift, const A* y, int64_t n, int64_t d, A* out, int64_t ld,
              Moments<A>* moments) {
  const int64_t taken = n >= 4 ? 4 : n >= 2 ? 2 : 1;
  auto run = taken == 4   ? block_dots<A, T, 4, Center, First>
             : taken == 2 ? block_dots<A, T, 2, Center, First>
                          : block_dots<A, T, 1, Center, First>;
  run(x, count, shift, y, d, out, ld, moments);
  if (n > taken)
    few_dots<A, T, Center, false>(x, count, shift, y + taken * d, n - taken, d, out + taken, ld, moments);
}

}  // namespace
}  // namespace rmfast
