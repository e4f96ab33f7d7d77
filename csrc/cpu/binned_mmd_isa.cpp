// The sum of MMD² over bins on the CPU, compiled once for each instruction set (RMFAST_ISA).
//
// Each pair of rows is visited once: its kernel weighs in the value, in the row's gradient (summed in registers) and in
// the column's (in L1). Sums over a tile are in the accumulation type, sums of tiles in fp64.

#include "rmfast/binned_mmd.h"
#include "rmfast/vmath.h"

#define RMFAST_STRING_(x) #x
#define RMFAST_STRING(x) RMFAST_STRING_(x)

namespace rmfast {
namespace {

constexpr double kLog2E = 1.4426950408889634;

// The mean's sum of kernels of a vector of squared distances; `slope` is that of rate times kernel.
template <class A>
struct Kernels {
  const A* rates;
  int64_t count;

  inline V<A> operator()(V<A> squares, V<A>* slope) const {
    V<A> sum = {}, weighted = {};
    for (int64_t h = 0; h < count; ++h) {
      const V<A> e = exp2(squares * (rates[h] * A(-kLog2E)));
      sum += e;
      weighted += rates[h] * e;
    }
    *slope = weighted;
    return sum;
  }
};

template <class A>
inline V<A> counted() {
  V<A> out;
  for (int i = 0; i < W<A>; ++i) out[i] = A(i);
  return out;
}

// The columns of a tile, padded with rows that weigh nothing.
template <class A>
struct Columns {
  alignas(64) A x[kTile], alpha[kTile], grad[kTile];
  int64_t n;

  Columns(const A* x_, const A* alpha_, const Tile& tile) : n(tile.column_end - tile.column) {
    for (int64_t j = 0; j < kTile; ++j) {
      x[j] = j < n ? x_[tile.column + j] : A(0);
      alpha[j] = j < n ? alpha_[tile.column + j] : A(0);
      grad[j] = 0;
    }
  }
};

// M rows from i on against a tile's columns, or on the diagonal one row against those behind it.
template <class A, int M, bool Grad, bool Diagonal>
inline void line_rows(const BinnedLine& a, const Kernels<A>& kernels, int64_t i, int64_t column, Columns<A>& columns,
                      double* value, double* grad) {
  A x[M], same[M], cross[M], end[M];
  for (int m = 0; m < M; ++m) {
    const int64_t stop = a.bins.bin_end[i + m] - column;
    x[m] = static_cast<const A*>(a.x)[i + m];
    same[m] = static_cast<const A*>(a.bins.same)[i + m];
    cross[m] = A(-2) * static_cast<const A*>(a.bins.alpha)[i + m];
    end[m] = A(stop < columns.n ? stop : columns.n);
  }
  V<A> total = {}, sums[M] = {};
  const V<A> first = counted<A>();
  for (int64_t j = Diagonal ? (i + 1 - column) / W<A> * W<A> : 0; j < columns.n; j += W<A>) {
    const V<A> xj = load(columns.x + j), alpha = load(columns.alpha + j), index = first + A(j);
    V<A> back = load(columns.grad + j);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const V<A> gap = x[m] - xj;
      V<A> slope, weight = index < end[m] ? splat(same[m]) : cross[m] * alpha;
      if (Diagonal) weight = index > A(i - column) ? weight : V<A>{};
      total += weight * kernels(gap * gap, &slope);
      if (Grad) {
        const V<A> push = weight * slope * gap;
        sums[m] += push;
        back += push;
      }
    }
    if (Grad) store(columns.grad + j, back);
  }
  *value += double(sum<A>(total));
  if (Grad)
    for (int m = 0; m < M; ++m) grad[i + m] += double(sum<A>(sums[m]));
}

template <class A, bool Grad>
void line_tile(const BinnedLine& a, const Kernels<A>& kernels, const Tile& tile, double* value, double* grad) {
  Columns<A> columns(static_cast<const A*>(a.x), static_cast<const A*>(a.bins.alpha), tile);
  int64_t i = tile.row;
  if (tile.row == tile.column) {
    for (; i < tile.row_end; ++i) line_rows<A, 1, Grad, true>(a, kernels, i, tile.column, columns, value, grad);
  } else {
    for (; i + 4 <= tile.row_end; i += 4)
      line_rows<A, 4, Grad, false>(a, kernels, i, tile.column, columns, value, grad);
    for (; i < tile.row_end; ++i) line_rows<A, 1, Grad, false>(a, kernels, i, tile.column, columns, value, grad);
  }
  if (Grad)
    for (int64_t j = 0; j < columns.n; ++j) grad[tile.column + j] -= double(columns.grad[j]);
}

template <class A>
void line(const BinnedLine& a, int64_t first, int64_t last) {
  const Kernels<A> kernels{static_cast<const A*>(a.bins.rates), a.bins.count};
  for (int64_t s = first; s < last; ++s) {
    double* grad = a.grad ? a.grad + s * a.bins.rows : nullptr;
    a.value[s] = 0;
    if (grad) memset(grad, 0, a.bins.rows * sizeof(double));
    for (int64_t t = s; t < a.tile_count; t += a.slots)
      grad ? line_tile<A, true>(a, kernels, a.tiles[t], a.value + s, grad)
           : line_tile<A, false>(a, kernels, a.tiles[t], a.value + s, grad);
  }
}

template <class A>
void weigh(const BinnedTile& a, int64_t first, int64_t last) {
  const Kernels<A> kernels{static_cast<const A*>(a.bins.rates), a.bins.count};
  const A *squares = static_cast<const A*>(a.squares), *alpha = static_cast<const A*>(a.bins.alpha);
  const V<A> count = counted<A>();
  // A place in the tile of a row among all, at most its width.
  auto place = [&](int64_t row) {
    const int64_t at = row - a.column;
    return A(at < 0 ? 0 : at < a.width ? at : a.width);
  };
  for (int64_t r = first; r < last; ++r) {
    const int64_t i = a.row + r;
    A* dots = static_cast<A*>(a.dots) + r * a.width;
    const A same = static_cast<const A*>(a.bins.same)[i], cross = A(-2) * alpha[i], square = squares[i], self = A(i - a.column);
    const A bin_first = place(a.bins.bin_first[i]), bin_end = place(a.bins.bin_end[i]);
    const A group_first = place(a.bins.group_first[i]), group_end = place(a.bins.group_end[i]);
    V<A> total = {};
    auto part = [&](int64_t j, V<A> dot, V<A> other, V<A> other_alpha) {
      const V<A> index = count + A(j), distance = square + other - A(2) * dot;
      V<A> weight = cross * other_alpha;
      weight = index < group_first ? V<A>{} : index < group_end ? weight : V<A>{};
      weight = index < bin_first ? weight : index < bin_end ? splat(same) : weight;
      weight = index == self ? V<A>{} : weight;
      V<A> slope;
      total += weight * kernels(distance < A(0) ? V<A>{} : distance, &slope);
      return weight * slope / A(a.bins.count);
    };
    int64_t j = 0;
    for (; j + W<A> <= a.width; j += W<A>)
      store(dots + j, part(j, load(dots + j), load(squares + a.column + j), load(alpha + a.column + j)));
    if (j < a.width) {
      const int64_t n = a.width - j;
      store_part<A>(dots + j, part(j, load_part<A>(dots + j, n), load_part<A>(squares + a.column + j, n),
                                   load_part<A>(alpha + a.column + j, n)), n);
    }
    a.value[r] = double(sum<A>(total)) / double(a.bins.count);
  }
}

void any_line(const BinnedLine& a, int64_t first, int64_t last) {
  a.bins.dtype == DType::f64 ? line<double>(a, first, last) : line<float>(a, first, last);
}

void any_weigh(const BinnedTile& a, int64_t first, int64_t last) {
  a.bins.dtype == DType::f64 ? weigh<double>(a, first, last) : weigh<float>(a, first, last);
}

}  // namespace

namespace binned_mmd {
extern const BinnedIsa RMFAST_ISA;
const BinnedIsa RMFAST_ISA = {RMFAST_STRING(RMFAST_ISA), cpu_supported, any_line, any_weigh};
}  // namespace binned_mmd

}  // namespace rmfast
