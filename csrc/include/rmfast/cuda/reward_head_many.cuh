// More than 8 dots: h times the dot vectors on the tensor cores, the squared norm beside it from the same tiles.
#pragma once

#include "reward_head_problem.cuh"

namespace rmfast::cuda {

template <typename T>
struct ManyArgs {
  Rows<T> rows;
  int64_t first_row, M;  // of this launch
  int64_t K, dots;
  int d, tiles;
  int64_t dot_tiles;
  int norm;
  bool aligned;
  float eps, inverse_d;
  const unsigned char* vectors;
  const float* residual;
  const float* unscale;
  const float* offset;
  float* out;     // as in Few
  float* values;
  int64_t values_stride;
};

template <typename T, int kBlockRows, int kBlockDots>
struct ManyShape {
  static constexpr int kThreads = 2 * kBlockRows;  // warps in two columns, each of 32 rows by half of the dots
  static constexpr int kRowBytes = 128;
  static constexpr int kHidden = kBlockRows * kRowBytes;
  static constexpr int kVectors = Many<T>::kParts * kBlockDots * Many<T>::kDepth * 2;
  static constexpr int kStage = kHidden + kVectors;
  static constexpr int kShared = kManyStages * kStage + 3 * kBlockRows * static_cast<int>(sizeof(float));
};

// Byte offset of 16-byte chunk c of row r in a tile of h. The permutation makes ldmatrix (8 rows, one chunk), the fp32
// fragments (4 rows, two chunks) and the norm's reads (4 rows, chunks c and c ^ 1) free of bank conflicts.
__host__ __device__ constexpr int tile_offset(int r, int c) {
  return r * 128 + ((c ^ (((r & 3) << 1) | ((r >> 2) & 1))) << 4);
}

// An fp32 pair as three bf16 pairs whose sum it is, to 24 bits.
__device__ __forceinline__ void split3(float x, float y, uint32_t& high, uint32_t& middle, uint32_t& low) {
  float a, b;
  high = pack2<bf16>(x, y);
  unpack2<bf16>(high, a, b);
  x -= a, y -= b;
  middle = pack2<bf16>(x, y);
  unpack2<bf16>(middle, a, b);
  low = pack2<bf16>(x - a, y - b);
}

// Two blocks of 256 threads to a multiprocessor, or eight of 64: 128 registers. Three parts of h by 64 dots need 170.
template <typename T>
constexpr int min_blocks(int rows, int dots) {
  return (rows == 128 ? 2 : 8) / (sizeof(T) == 4 && dots == 64 ? 2 : 1);
}

template <typename T, int kBlockRows, int kBlockDots>
__global__ __launch_bounds__(2 * kBlockRows, min_blocks<T>(kBlockRows, kBlockDots)) void many_kernel(const ManyArgs<T> q) {
  using Shape = ManyShape<T, kBlockRows, kBlockDots>;
  constexpr int kVec = 16 / sizeof(T), kDepth = Many<T>::kDepth, kSteps = kDepth / 16;
  constexpr int kParts = Many<T>::kParts, kHiddenParts = sizeof(T) == 4 ? 3 : 1;
  constexpr int kPairs = kBlockDots / 32;  // 16 dots each, for one warp
  using E = part_t<T>;
  unsigned char* shared = dynamic_shared();
  float* row_pivot = reinterpret_cast<float*>(shared + kManyStages * Shape::kStage);  // [kBlockRows]
  float* row_scale = row_pivot + kBlockRows;
  float* row_mean = row_scale + kBlockRows;

  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int warp_row = warp / 2 * 32, warp_dot = warp % 2;
  // The dot tiles of the same rows are neighbours, so that all but one find h in L2.
  const int64_t dot_tile = blockIdx.x % static_cast<unsigned>(q.dot_tiles);
  const int64_t m0 = int64_t{blockIdx.x / static_cast<unsigned>(q.dot_tiles)} * kBlockRows;
  const unsigned char* vectors = q.vectors + dot_tile * q.tiles * Shape::kVectors;

  // Thread t copies chunk t % 8 of rows t / 8 + i · kBlockRows / 4.
  const T* source[4];  // null: zeros
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t m = m0 + thread / 8 + i * (kBlockRows / 4);
    Row<T> row{q.rows.hidden, false};
    if (m < q.M) row = q.rows.at(q.first_row + m);
    source[i] = row.ok ? row.data : nullptr;
  }
  const auto fetch = [&](int tile) {
    unsigned char* stage = shared + tile % kManyStages * Shape::kStage;
    const int e = tile * kDepth + thread % 8 * kVec, left = q.d - e;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      unsigned char* to = stage + tile_offset(thread / 8 + i * (kBlockRows / 4), thread % 8);
      const int count = !source[i] || left <= 0 ? 0 : left < kVec ? left : kVec;
      if (q.aligned) {
        async_copy16(to, count ? source[i] + e : q.rows.hidden, count * static_cast<int>(sizeof(T)));
      } else {
        *reinterpret_cast<Vec16*>(to) = count ? load_any(source[i], e, q.d) : Vec16{};
      }
    }
    const unsigned char* from = vectors + int64_t{tile} * Shape::kVectors;
    for (int at = thread * 16; at < Shape::kVectors; at += Shape::kThreads * 16) {
      async_copy16(stage + Shape::kHidden + at, from + at, 16);
    }
  };

  float total[2][2 * kPairs][4] = {};
  // Two threads to a row for its norm; each takes every other chunk.
  const int norm_row = thread / 2, norm_half = thread % 2;
  float pivot = 0, sum = 0, square = 0;

#pragma unroll
  for (int i = 0; i < kManyStages - 1; ++i) {
    if (i < q.tiles) fetch(i);
    async_commit();
  }
  for (int tile = 0; tile < q.tiles; ++tile) {
    async_wait<kManyStages - 2>();
    __syncthreads();
    if (tile + kManyStages - 1 < q.tiles) fetch(tile + kManyStages - 1);
    async_commit();
    const unsigned char* stage = shared + tile % kManyStages * Shape::kStage;

    const int left = q.d - tile * kDepth;
    if (q.norm == kLayer && tile == 0) {
      float first = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float x[kVec];
        unpack<T>(*reinterpret_cast<const Vec16*>(stage + tile_offset(norm_row, 2 * c + norm_half)), x);
#pragma unroll
        for (int i = 0; i < kVec; ++i) first += x[i];
      }
      first += shuffle_xor(first, 1);
      pivot = first * (left < kDepth ? q.inverse_d : 1.f / kDepth);
      row_pivot[norm_row] = pivot;
      __syncthreads();
    }
#pragma unroll 1  // registers
    for (int c = 0; c < 4; ++c) {
      float x[kVec];
      unpack<T>(*reinterpret_cast<const Vec16*>(stage + tile_offset(norm_row, 2 * c + norm_half)), x);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        x[i] -= pivot;
        if ((2 * c + norm_half) * kVec + i >= left) x[i] = 0;
        sum += x[i];
        square = fma_(x[i], x[i], square);
      }
    }

    // A tile's products are summed apart and then added: the tensor cores truncate, and 256 truncations in a row
    // (d = 4096) would bias an fp32 sum by 1e-5.
    float acc[2][2 * kPairs][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[kHiddenParts][2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (sizeof(T) == 2) {
          const int r = warp_row + half * 16 + lane % 16;
          load_matrices(a[0][half], stage + tile_offset(r, 2 * step + lane / 16));
        } else {
#pragma unroll
          for (int w = 0; w < 4; ++w) {
            const int r = warp_row + half * 16 + lane / 4 + w % 2 * 8;
            const int byte = 64 * step + 32 * (w / 2) + lane % 4 * 8;
            float x[2];
            __builtin_memcpy(x, __builtin_assume_aligned(stage + tile_offset(r, byte / 16) + byte % 16, 8), 8);
            if (q.norm == kLayer) x[0] -= row_pivot[r], x[1] -= row_pivot[r];
            split3(x[0], x[1], a[0][half][w], a[1][half][w], a[2][half][w]);
          }
        }
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          const int block = (part * kSteps + step) * (kBlockDots / 16) + warp_dot * kPairs + pair;
          const Vec16 b = *reinterpret_cast<const Vec16*>(stage + Shape::kHidden + (block * kWarp + lane) * 16);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < kHiddenParts; ++i) {
              if (i + part >= kParts) continue;
              matmul_16x8x16<E>(acc[half][2 * pair], a[i][half], b.w[0], b.w[1]);
              matmul_16x8x16<E>(acc[half][2 * pair + 1], a[i][half], b.w[2], b.w[3]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < 2 * kPairs; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) total[half][n][i] += acc[half][n][i];
      }
    }
  }
  async_wait<0>();

  const float d = static_cast<float>(q.d);
  sum += shuffle_xor(sum, 1);
  square += shuffle_xor(square, 1);
  const float off = sum * q.inverse_d, mean = pivot + off;
  if (q.norm == kLayer) square = fma_(-off * d, off, square);
  if (norm_half == 0) {
    const int64_t m = m0 + norm_row;
    const bool in = m < q.M && q.rows.at(q.first_row + m).ok;
    float scale = 1;
    if (!q.values && q.norm != kNone) scale = inverse_root(fma_(square, q.inverse_d, q.eps));
    row_scale[norm_row] = in ? scale : NAN;
    // The mean of what the tensor cores multiplied: fp32 is shifted on the way, 2-byte h is not.
    row_mean[norm_row] = sizeof(T) == 4 ? off : mean;
    if (q.values && m < q.M && dot_tile == 0) {
      q.values[m * q.values_stride + q.dots] = square;
      q.values[m * q.values_stride + q.dots + 1] = q.norm == kLayer ? mean : 0.f;
    }
  }
  __syncthreads();

  float scale[2][2], shift[2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      scale[half][j] = row_scale[warp_row + half * 16 + lane / 4 + j * 8];
      shift[half][j] = row_mean[warp_row + half * 16 + lane / 4 + j * 8];
    }
  }
  float* out = q.values ? q.values : q.out + q.first_row * q.K;
  const int64_t stride = q.values ? q.values_stride : q.K, count = q.values ? q.dots : q.K;
#pragma unroll
  for (int n = 0; n < 2 * kPairs; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t column = dot_tile * kBlockDots + warp_dot * (kBlockDots / 2) + n * 8 + lane % 4 * 2 + i;
      if (column >= count) continue;
      const float unscale = q.unscale[column], residual = q.residual[column];
      const float offset = q.values ? 0.f : q.offset[column];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int r = warp_row + half * 16 + lane / 4 + j * 8;
          if (m0 + r >= q.M) continue;
          float dot = total[half][n][j * 2 + i] * unscale;
          if (q.norm == kLayer) dot = fma_(-residual, shift[half][j], dot);
          out[(m0 + r) * stride + column] = fma_(dot, scale[half][j], offset);
        }
      }
    }
  }
}

}  // namespace rmfast::cuda
