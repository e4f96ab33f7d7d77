// What does not depend on the hidden states: the folded dot vectors in the layout of the kernel that reads them, and
// the products between them.
#pragma once

#include "reward_head_problem.cuh"

namespace rmfast::cuda {

template <typename T>
struct Prepare {
  Problem<T> p;
  DotTable<acc_t<T>> table;
  void* vectors;
  acc_t<T>* cross;  // (J, J + K): G, then Uᵀ
  int* counters;
  int64_t chunks, dots, tiles;
  int block_dots;
  double inverse_d;
};

// Element e of dot vector n: a_k = γ⊙w_k (Gemma: (1 + γ)⊙w_k), then the directions, then zeros.
template <typename T>
__device__ __forceinline__ double dot_element(const Problem<T>& p, int64_t n, int64_t e) {
  if (n >= p.K + p.J) return 0;
  if (n >= p.K) return p.directions[(n - p.K) * p.d + e];
  const double w = p.weight[n * p.d + e];
  if (p.norm == kNone || !p.norm_weight) return w;
  const double gain = p.norm_weight[e];
  return w * (p.norm == kGemmaRms ? 1 + gain : gain);
}

__device__ __forceinline__ uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

__device__ __forceinline__ float bits_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// The sum (or maximum) over a block's threads, the same bits in each.
template <bool kMax = false>
__device__ __forceinline__ double block_reduce(double x) {
  double* part = reinterpret_cast<double*>(dynamic_shared());
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const double other = shuffle_xor(x, mask);
    x = kMax ? (other > x ? other : x) : x + other;
  }
  __syncthreads();
  if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = x;
  __syncthreads();
  double out = part[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) out = kMax ? (part[i] > out ? part[i] : out) : out + part[i];
  return out;
}

// One block per dot vector. For a layer norm the vector is centred: a·(h − μ) = (a − ā)·h, which turns the layer
// norm into an RMS norm of the centred row, interventions included.
template <typename T, bool kMany>
__global__ __launch_bounds__(kThreads, 1) void prepare_kernel(const Prepare<T> q) {
  using A = acc_t<T>;
  const Problem<T>& p = q.p;
  const int64_t n = blockIdx.x;
  const bool head = n < p.K, real = n < q.dots;
  for (int64_t i = threadIdx.x; n == 0 && q.counters && i < q.chunks; i += kThreads) q.counters[i] = 0;

  double sum = 0, mean = 0, offset = 0;
  if (p.norm == kLayer && real) {
    for (int64_t e = threadIdx.x; e < p.d; e += kThreads) {
      sum += dot_element(p, n, e);
      if (head && p.norm_bias) offset += double(p.norm_bias[e]) * double(p.weight[n * p.d + e]);
    }
    sum = block_reduce(sum);
    offset = block_reduce(offset);
    mean = sum * q.inverse_d;
  }
  // fp16 has 5 bits of exponent: a power of two brings the largest element to [2^12, 2^13), and the low part of all
  // that matter beside it stays a normal number.
  double scale = 1, unscale = 1;
  if constexpr (kMany && std::is_same_v<T, f16>) {
    double most = 0;
    for (int64_t e = threadIdx.x; real && e < p.d; e += kThreads) {
      const double x = fabs(dot_element(p, n, e) - mean);
      most = x > most ? x : most;
    }
    most = block_reduce<true>(most);
    // Beyond these the power of two or its inverse leaves fp32.
    if (most > 1e-30 && most < 1e30) {
      // By the exponent's bits: exp2 and log2 in fp64 are calls.
      const uint32_t exponent = float_bits(static_cast<float>(most)) >> 23;
      scale = bits_float((127 + 12 + 127 - exponent) << 23);
      unscale = bits_float((exponent - 12) << 23);
    }
  }

  double residual = 0;
  const int width = static_cast<int>(q.tiles) * (kMany ? Many<T>::kDepth : few_chunk<T>());
  for (int e = static_cast<int>(threadIdx.x); e < width; e += kThreads) {
    const double x = real && e < p.d ? (dot_element(p, n, e) - mean) * scale : 0;
    double stored = 0;
    if constexpr (kMany) {
      using E = part_t<T>;
      float rest = static_cast<float>(x);
#pragma unroll
      for (int i = 0; i < Many<T>::kParts; ++i) {
        const uint32_t word = pack2<E>(rest, 0.f);
        float value, unused;
        unpack2<E>(word, value, unused);
        static_cast<uint16_t*>(q.vectors)[many_offset<T>(blockIdx.x, e, i, q.block_dots, q.tiles)] =
            static_cast<uint16_t>(word);
        stored += value;
        rest -= value;
      }
    } else {
      const A value = static_cast<A>(x);
      static_cast<A*>(q.vectors)[few_offset<T>(blockIdx.x, e, q.block_dots, q.tiles)] = value;
      stored = value;
    }
    residual += stored;
  }
  if (p.norm == kLayer) residual = block_reduce(residual);
  if (threadIdx.x == 0) {
    q.table.mean[n] = mean;
    q.table.row_sum[n] = static_cast<A>(sum);
    q.table.residual[n] = p.norm == kLayer ? static_cast<A>(residual * unscale) : A(0);
    q.table.unscale[n] = static_cast<A>(unscale);
    q.table.offset[n] = static_cast<A>(offset + (head && p.bias ? double(p.bias[n]) : 0));
  }
}

constexpr int kCrossTile = 4;

// G and U: block (x, y) gives a 4 x 4 tile of the products of direction 4x.. with direction or head 4y..
template <typename T>
__global__ __launch_bounds__(kThreads, 1) void cross_kernel(const Prepare<T> q) {
  const Problem<T>& p = q.p;
  const int64_t j0 = int64_t{blockIdx.x} * kCrossTile, n0 = int64_t{blockIdx.y} * kCrossTile;
  int64_t left[kCrossTile], right[kCrossTile];
  double left_mean[kCrossTile], right_mean[kCrossTile], sum[kCrossTile][kCrossTile] = {};
#pragma unroll
  for (int i = 0; i < kCrossTile; ++i) {
    // Past the end: some other product, which is not stored.
    const int64_t j = j0 + i < p.J ? j0 + i : 0, n = n0 + i < q.dots ? n0 + i : 0;
    left[i] = p.K + j;
    right[i] = n < p.J ? p.K + n : n - p.J;
    left_mean[i] = q.table.mean[left[i]];
    right_mean[i] = q.table.mean[right[i]];
  }
  for (int64_t e = threadIdx.x; e < p.d; e += kThreads) {
    double a[kCrossTile], b[kCrossTile];
#pragma unroll
    for (int i = 0; i < kCrossTile; ++i) {
      a[i] = dot_element(p, left[i], e) - left_mean[i];
      b[i] = dot_element(p, right[i], e) - right_mean[i];
    }
#pragma unroll
    for (int i = 0; i < kCrossTile; ++i) {
#pragma unroll
      for (int k = 0; k < kCrossTile; ++k) sum[i][k] = fma_(a[i], b[k], sum[i][k]);
    }
  }
  double* part = reinterpret_cast<double*>(dynamic_shared());
#pragma unroll
  for (int i = 0; i < kCrossTile; ++i) {
#pragma unroll
    for (int k = 0; k < kCrossTile; ++k) {
      const double total = warp_sum(sum[i][k]);
      if (threadIdx.x % kWarp == 0) part[(threadIdx.x / kWarp) * 16 + i * kCrossTile + k] = total;
    }
  }
  __syncthreads();
  if (threadIdx.x < 16) {
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += part[w * 16 + threadIdx.x];
    const int64_t j = j0 + threadIdx.x / kCrossTile, n = n0 + threadIdx.x % kCrossTile;
    if (j < p.J && n < q.dots) q.cross[j * q.dots + n] = static_cast<acc_t<T>>(total);
  }
}

}  // namespace rmfast::cuda
