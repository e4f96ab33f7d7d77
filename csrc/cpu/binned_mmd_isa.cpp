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

constexpr int kLineRows = 4;  // that are taken together: one alone takes 25% longer

// The sums of kernels over rates of M vectors of squared distances; `slope` is that of rate times kernel, and for a single
// rate the kernel itself: the rate is then a factor of all gradients.
template <class A, bool Single>
struct Kernels {
  const A* rates;
  int64_t count;

  template <int M>
  inline void operator()(const V<A> (&squares)[M], V<A> (&sum)[M], V<A> (&slope)[M]) const {
    for (int64_t h = 0; h < (Single ? 1 : count); ++h) {
      V<A> e[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) e[m] = squares[m] * (rates[h] * A(-kLog2E));
      exp2_each(e);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        sum[m] = h ? sum[m] + e[m] : e[m];
        slope[m] = Single ? e[m] : h ? slope[m] + rates[h] * e[m] : rates[h] * e[m];
      }
    }
  }
};

template <class A>
inline V<A> counted() {
  V<A> out;
  for (int i = 0; i < W<A>; ++i) out[i] = A(i);
  return out;
}

// The columns of a tile, padded with rows that weigh nothing, and their weights beside a row of one bin.
template <class A>
struct Columns {
  alignas(64) A x[kTile], alpha[kTile], weight[kTile], grad[kTile];
  int64_t n;

  Columns(const A* x_, const A* alpha_, const Tile& tile) : n(tile.column_end - tile.column) {
    for (int64_t j = 0; j < kTile; ++j) {
      x[j] = j < n ? x_[tile.column + j] : A(0);
      alpha[j] = j < n ? alpha_[tile.column + j] : A(0);
      grad[j] = 0;
    }
  }

  // For rows with these coefficients, whose bin ends at this column.
  void weigh(A same, A cross, int64_t end) {
    int64_t j = 0;
    for (; j < (end < n ? end : n); ++j) weight[j] = same;
    for (; j < kTile; ++j) weight[j] = cross * alpha[j];
  }
};

// M rows of one bin from i on against the columns [begin, end) of a tile, or on the diagonal one row against those of them
// behind it.
template <class A, int M, bool Single, bool Grad, bool Diagonal>
inline void line_rows(const BinnedLine& a, const Kernels<A, Single>& kernels, int64_t i, const Tile& tile, int64_t begin,
                      int64_t end, Columns<A>& columns, double* value, double* grad) {
  A x[M];
  for (int m = 0; m < M; ++m) x[m] = static_cast<const A*>(a.x)[i + m];
  V<A> total = {}, sums[M] = {};
  const V<A> first = counted<A>();
  for (int64_t j = begin; j < end; j += W<A>) {
    const V<A> xj = load(columns.x + j);
    V<A> weight = load(columns.weight + j), back = load(columns.grad + j);
    if (Diagonal) weight = first + A(j) > A(i - tile.column) ? weight : V<A>{};
    V<A> gap[M], squares[M], kernel[M], slope[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      gap[m] = xj - x[m];
      squares[m] = gap[m] * gap[m];
    }
    kernels(squares, kernel, slope);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      total += weight * kernel[m];
      if (Grad) {
        const V<A> push = weight * slope[m];
        sums[m] -= push * gap[m];
        back -= push * gap[m];
      }
    }
    if (Grad) store(columns.grad + j, back);
  }
  *value += double(sum<A>(total));
  if (Grad)
    for (int m = 0; m < M; ++m) grad[i + m] += double(sum<A>(sums[m]));
}

template <class A, bool Single, bool Grad>
void line_tile(const BinnedLine& a, const Kernels<A, Single>& kernels, const Tile& tile, double* value, double* grad) {
  constexpr int M = kLineRows;
  const A *alpha = static_cast<const A*>(a.bins.alpha), *same = static_cast<const A*>(a.bins.same);
  Columns<A> columns(static_cast<const A*>(a.x), alpha, tile);
  for (int64_t i = tile.row; i < tile.row_end;) {
    const int64_t end = a.bins.bin_end[i], stop = end < tile.row_end ? end : tile.row_end;
    columns.weigh(same[i], A(-2) * alpha[i], end - tile.column);
    while (i < stop) {
      const int64_t count = i + M <= stop ? M : 1;
      int64_t begin = 0;
      if (tile.row == tile.column) {
        begin = count == M ? (i + M - 1 - tile.column) / W<A> * W<A> + W<A> : columns.n;
        for (int64_t r = i; r < i + count; ++r)
          line_rows<A, 1, Single, Grad, true>(a, kernels, r, tile, (r + 1 - tile.column) / W<A> * W<A>, begin, columns,
                                              value, grad);
      }
      count == M ? line_rows<A, M, Single, Grad, false>(a, kernels, i, tile, begin, columns.n, columns, value, grad)
                 : line_rows<A, 1, Single, Grad, false>(a, kernels, i, tile, begin, columns.n, columns, value, grad);
      i += count;
    }
  }
  if (Grad)
    for (int64_t j = 0; j < columns.n; ++j) grad[tile.column + j] -= double(columns.grad[j]);
}

template <class A, bool Single>
void line(const BinnedLine& a, int64_t first, int64_t last) {
  const Kernels<A, Single> kernels{static_cast<const A*>(a.bins.rates), a.bins.count};
  for (int64_t s = first; s < last; ++s) {
    double* grad = a.grad ? a.grad + s * a.bins.rows : nullptr;
    a.value[s] = 0;
    if (grad) memset(grad, 0, a.bins.rows * sizeof(double));
    for (int64_t t = s; t < a.tile_count; t += a.slots)
      grad ? line_tile<A, Single, true>(a, kernels, a.tiles[t], a.value + s, grad)
           : line_tile<A, Single, false>(a, kernels, a.tiles[t], a.value + s, grad);
    if (Single && grad)
      for (int64_t i = 0; i < a.bins.rows; ++i) grad[i] *= double(kernels.rates[0]);
  }
}

template <class A>
void weigh(const BinnedTile& a, int64_t first, int64_t last) {
  const Kernels<A, false> kernels{static_cast<const A*>(a.bins.rates), a.bins.count};
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
      V<A> kernel[1], slope[1];
      kernels({distance < A(0) ? V<A>{} : distance}, kernel, slope);
      total += weight * kernel[0];
      return weight * slope[0] / A(a.bins.count);
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
  const bool single = a.bins.count == 1;
  if (a.bins.dtype == DType::f64)
    single ? line<double, true>(a, first, last) : line<double, false>(a, first, last);
  else
    single ? line<float, true>(a, first, last) : line<float, false>(a, first, last);
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
