// Interventions, from a row's dots, squared norm and mean; and the rows where that cancels, once more from h.
#pragma once

#include "reward_head_prepare.cuh"

namespace rmfast::cuda {

template <typename T>
struct Intervene {
  using A = acc_t<T>;
  Problem<T> p;
  Rows<T> rows;
  DotTable<A> table;
  int64_t first_row, M, dots;  // of this launch
  const A* values;             // (M, stride): s (K), z (J), squared norm, mean
  int64_t values_stride;
  const A* cross;  // (J, J + K)
  int* counter;
  int64_t* list;  // pairs to recompute
  double* scratch;
  double inverse_d;
};

// A pair is a row and its intervention: all I of each row, or the one that the index names (−1: none).
template <typename T>
__device__ __forceinline__ void pair_of(const Intervene<T>& q, int64_t pair, int64_t& m, int64_t& i) {
  // A launch has less than 2^25 pairs, by the size of its list.
  m = q.p.index ? pair : static_cast<uint32_t>(pair) / static_cast<uint32_t>(q.p.I);
  i = q.p.index ? q.p.index[q.first_row + m] : pair - m * q.p.I;
}

template <typename T>
__device__ __forceinline__ acc_t<T>* rewards_of(const Intervene<T>& q, int64_t pair) {
  return q.p.out + (q.first_row * (q.p.index ? 1 : q.p.I) + pair) * q.p.K;
}

constexpr int kTileRows = 64, kTileThreads = 128, kTileColumns = 32;

__host__ __device__ constexpr int64_t tile_columns(int64_t n) { return ceil_div(n, kTileColumns) * kTileColumns; }

// Bytes of shared memory of a tile: [G; U], z, c, sums by column group, and three numbers a row.
constexpr int64_t intervene_shared(int64_t J, int64_t K) {
  return 4 * (J * (tile_columns(J) + tile_columns(K) + 2 * kTileRows) + (kTileColumns / 4 + 3) * kTileRows);
}

// A block takes 64 rows through all interventions: [G; U] is loaded once for a block, z once for a tile. A thread makes 4
// rows by 4 columns of the products, 16 FMAs for two loads of 16 bytes. Sums of fp32 only.
template <typename T>
__global__ __launch_bounds__(kTileThreads, 4) void intervene_tile_kernel(const Intervene<T> q) {
  const Problem<T>& p = q.p;
  const int J = static_cast<int>(p.J), K = static_cast<int>(p.K);
  const int g_columns = static_cast<int>(tile_columns(J)), u_columns = static_cast<int>(tile_columns(K));
  const int columns = g_columns + u_columns;
  float* matrix = reinterpret_cast<float*>(dynamic_shared());  // [J, columns]
  float* z = matrix + J * columns;                             // [J, kTileRows]
  float* c = z + J * kTileRows;                                // [J, kTileRows]
  float* quadratic = c + J * kTileRows;                        // [kTileColumns / 4, kTileRows]
  float* linear = quadratic + kTileColumns / 4 * kTileRows;    // [2, kTileRows]
  float* scale = linear + 2 * kTileRows;                       // [kTileRows]
  const int thread = static_cast<int>(threadIdx.x), group = thread % 8, rows = thread / 8 * 4;  // of the products
  const int mine = thread % kTileRows, half = thread / kTileRows;                               // of what a row needs
  const float inverse_d = static_cast<float>(q.inverse_d);

  for (int i = thread; i < J * columns; i += kTileThreads) {
    const int j = i / columns, n = i % columns;
    const bool u = n >= g_columns, in = u ? n - g_columns < K : n < J;
    matrix[i] = in ? q.cross[j * q.dots + (u ? J + n - g_columns : n)] : 0.f;
  }
  // Rows `rows` to `rows` + 3 of c by columns n to n + 3 of the matrix.
  const auto products = [&](int n, float(&y)[4][4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) y[r][0] = y[r][1] = y[r][2] = y[r][3] = 0;
#pragma unroll 4
    for (int j = 0; j < J; ++j) {
      float a[4], b[4];
      __builtin_memcpy(a, __builtin_assume_aligned(c + j * kTileRows + rows, 16), 16);
      __builtin_memcpy(b, __builtin_assume_aligned(matrix + j * columns + n, 16), 16);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int e = 0; e < 4; ++e) y[r][e] = fma_(a[r], b[e], y[r][e]);
      }
    }
  };

  for (int64_t first = int64_t{blockIdx.x} * kTileRows; first < q.M; first += int64_t{gridDim.x} * kTileRows) {
    // Past the last row: the last again, not stored.
    const int64_t m = first + mine < q.M ? first + mine : q.M - 1;
    const float* values = q.values + m * q.values_stride;
    const float mean = values[q.dots + 1], square = values[q.dots];
    __syncthreads();
    for (int j = half; j < J; j += 2) z[j * kTileRows + mine] = values[K + j];  // read back by this thread alone

    const int64_t count = p.index ? 1 : p.I;
    for (int64_t step = 0; step < count; ++step) {
      const int64_t i = p.index ? p.index[q.first_row + m] : step;
      float sum = 0;
      for (int j = half; j < J; j += 2) {
        float x = 0;
        if (i >= 0 && i < p.I) {
          // z is of the centred row (layer norm); targets are of the row itself.
          const float own = z[j * kTileRows + mine];
          const float whole = p.norm == kLayer ? fma_(mean, q.table.row_sum[K + j], own) : own;
          const float target = p.targets ? p.targets[i * J + j] : 0.f;
          x = p.strengths[i * J + j] * (whole - target);
          sum = fma_(x, own, sum);
        }
        c[j * kTileRows + mine] = x;
      }
      linear[half * kTileRows + mine] = sum;
      __syncthreads();

      float y[4][4], part[4] = {};
      for (int n0 = 0; n0 < g_columns; n0 += kTileColumns) {
        const int n = n0 + group * 4;
        if (n >= J) continue;
        products(n, y);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            if (n + e < J) part[r] = fma_(y[r][e], c[(n + e) * kTileRows + rows + r], part[r]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) quadratic[group * kTileRows + rows + r] = part[r];
      __syncthreads();

      if (half == 0) {
        float quad = 0;
        for (int g = 0; g < kTileColumns / 4; ++g) quad += quadratic[g * kTileRows + mine];
        const float twice = 2 * (linear[mine] + linear[kTileRows + mine]);
        const float norm2 = square - twice + quad, terms = square + (twice < 0 ? -twice : twice) + quad;
        const bool ok = i >= -1 && i < p.I;
        const float root = p.norm == kNone ? 1.f : inverse_root(fma_(norm2, inverse_d, static_cast<float>(p.eps)));
        scale[mine] = ok ? root : NAN;
        if (ok && first + mine < q.M && norm2 < static_cast<float>(kCancellation) * terms) {
          q.list[atomicAdd(q.counter, 1)] = m * count + step;
        }
      }
      __syncthreads();

      for (int n0 = 0; n0 < u_columns; n0 += kTileColumns) {
        const int k = n0 + group * 4;
        if (k >= K) continue;
        products(g_columns + k, y);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int64_t row = first + rows + r;
          if (row >= q.M) continue;
          float* to = rewards_of(q, row * count + step);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (k + e >= K) continue;
            to[k + e] = fma_(q.values[row * q.values_stride + k + e] - y[r][e], scale[rows + r], q.table.offset[k + e]);
          }
        }
      }
      __syncthreads();  // nobody reads c any more
    }
  }
}

// The same for directions too many for that, and in fp64. A warp takes kPairs pairs through the matrix [G; U], which costs
// J (J + K) of the GPU's FMAs a pair; each of its elements is loaded once for all of them. No order of additions depends
// on kPairs.
template <typename T, int kPairs>
__global__ __launch_bounds__(kThreads, 1) void intervene_kernel(const Intervene<T> q, int warps) {
  using A = acc_t<T>;
  const Problem<T>& p = q.p;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  A* c = reinterpret_cast<A*>(dynamic_shared()) + int64_t{warp} * p.J * kPairs;  // [J, kPairs]
  const int64_t pairs = q.M * (p.index ? 1 : p.I);
  const A inverse_d = static_cast<A>(q.inverse_d);

  for (int64_t first = (int64_t{blockIdx.x} * warps + warp) * kPairs; first < pairs;
       first += int64_t{gridDim.x} * warps * kPairs) {
    int values[kPairs];  // offsets: a launch's values fill 256 MiB at most
    bool ok[kPairs];
    A linear[kPairs], quadratic[kPairs] = {}, scale[kPairs] = {};
#pragma unroll
    for (int r = 0; r < kPairs; ++r) {
      int64_t m, i;
      pair_of(q, first + r < pairs ? first + r : pairs - 1, m, i);
      values[r] = static_cast<int>(m * q.values_stride);
      ok[r] = i >= -1 && i < p.I;
      const A mean = q.values[values[r] + q.dots + 1];
      A sum = 0;
      for (int64_t j = lane; j < p.J; j += kWarp) {
        const A z = q.values[values[r] + p.K + j];
        A x = 0;
        if (i >= 0 && i < p.I) {
          // z is of the centred row (layer norm); targets are of the row itself.
          const A whole = p.norm == kLayer ? fma_(mean, q.table.row_sum[p.K + j], z) : z;
          const A target = p.targets ? p.targets[i * p.J + j] : A(0);
          x = p.strengths[i * p.J + j] * (whole - target);
          sum = fma_(x, z, sum);
        }
        c[j * kPairs + r] = x;
      }
      linear[r] = 2 * warp_sum(sum);
    }
    __syncwarp();

    for (int64_t n0 = 0; n0 < q.dots; n0 += kWarp) {
      const int64_t n = n0 + lane;
      A y[kPairs] = {};
      if (n < q.dots) {
        for (int64_t j = 0; j < p.J; ++j) {
          const A g = q.cross[j * q.dots + n];
#pragma unroll
          for (int r = 0; r < kPairs; ++r) y[r] = fma_(g, c[j * kPairs + r], y[r]);
        }
      }
      if (n < p.J) {
#pragma unroll
        for (int r = 0; r < kPairs; ++r) quadratic[r] = fma_(y[r], c[n * kPairs + r], quadratic[r]);
      }
      if (n0 < p.J && n0 + kWarp >= p.J) {  // G ends in this tile
#pragma unroll
        for (int r = 0; r < kPairs; ++r) {
          const A square = q.values[values[r] + q.dots], quad = warp_sum(quadratic[r]);
          const A norm2 = square - linear[r] + quad;
          scale[r] = p.norm == kNone ? A(1) : inverse_root(fma_(norm2, inverse_d, static_cast<A>(p.eps)));
          const A terms = square + (linear[r] < 0 ? -linear[r] : linear[r]) + quad;
          if (ok[r] && first + r < pairs && lane == 0 && norm2 < static_cast<A>(kCancellation) * terms) {
            q.list[atomicAdd(q.counter, 1)] = first + r;
          }
        }
      }
      if (n >= p.J && n < q.dots) {
        const int64_t k = n - p.J;
#pragma unroll
        for (int r = 0; r < kPairs; ++r) {
          if (first + r >= pairs) continue;
          const A reward = fma_(q.values[values[r] + k] - y[r], scale[r], q.table.offset[k]);
          rewards_of(q, first + r)[k] = ok[r] ? reward : static_cast<A>(NAN);
        }
      }
    }
    __syncwarp();
  }
}

// A block per listed pair, all in fp64: z, then h' itself, its mean and norm, and the heads on it. The list's order is
// that of arrival, each of its entries stands alone.
template <typename T>
__global__ __launch_bounds__(kThreads, 1) void recompute_kernel(const Intervene<T> q) {
  const Problem<T>& p = q.p;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double* c = q.scratch + blockIdx.x * (p.J + p.d);  // [J]
  double* changed = c + p.J;                         // [d]
  const int64_t count = *q.counter;
  for (int64_t item = blockIdx.x; item < count; item += gridDim.x) {
    int64_t m, i;
    pair_of(q, q.list[item], m, i);
    const T* h = q.rows.at(q.first_row + m).data;
    for (int64_t j = warp; j < p.J; j += kWarps) {
      double z = 0;
      for (int64_t e = lane; e < p.d; e += kWarp) z = fma_(double(to_acc(h[e])), double(p.directions[j * p.d + e]), z);
      z = warp_sum(z);
      const double target = p.targets ? p.targets[i * p.J + j] : 0;
      if (lane == 0) c[j] = i < 0 ? 0 : double(p.strengths[i * p.J + j]) * (z - target);
    }
    __syncthreads();
    double sum = 0, square = 0;
    for (int64_t e = threadIdx.x; e < p.d; e += kThreads) {
      double x = to_acc(h[e]);
      for (int64_t j = 0; j < p.J; ++j) x = fma_(-c[j], double(p.directions[j * p.d + e]), x);
      changed[e] = x;
      sum += x;
    }
    const double mean = p.norm == kLayer ? block_reduce(sum) / double(p.d) : 0;
    for (int64_t e = threadIdx.x; e < p.d; e += kThreads) {
      const double x = changed[e] - mean;
      square = fma_(x, x, square);
    }
    square = block_reduce(square);
    const double scale = p.norm == kNone ? 1 : 1 / sqrt(square / double(p.d) + p.eps);
    for (int64_t k = warp; k < p.K; k += kWarps) {
      double dot = 0;
      for (int64_t e = lane; e < p.d; e += kWarp) dot = fma_(dot_element(p, k, e), changed[e] - mean, dot);
      dot = warp_sum(dot);
      if (lane == 0) rewards_of(q, q.list[item])[k] = static_cast<acc_t<T>>(fma_(dot, scale, double(q.table.offset[k])));
    }
    __syncthreads();
  }
}

}  // namespace rmfast::cuda
