// The reward head's arguments, the workspace they need and where the parts of it lie.
#pragma once

#include "gpu.cuh"

namespace rmfast::cuda {

enum Norm : int { kNone = 0, kRms = 1, kGemmaRms = 2, kLayer = 3 };

// A removed component may leave less than this share of the terms it is the difference of: such a row is recomputed.
constexpr double kCancellation = 0.05;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// All pointers are device pointers, contiguous but for `hidden`; optional ones may be null.
template <typename T>
struct Problem {
  using A = acc_t<T>;
  const T* hidden;  // (batches, tokens, d), the last dimension contiguous
  int64_t batches, tokens, d;
  int64_t stride_b, stride_t;  // in elements
  const A* weight;             // (K, d)
  const A* bias;               // (K,)
  int norm;
  const A* norm_weight;  // (d,)
  const A* norm_bias;    // (d,)
  double eps;
  const int64_t* rows;   // (M,), or null for all rows
  const A* directions;   // (J, d), null without interventions
  const A* strengths;    // (I, J)
  const A* targets;      // (I, J)
  const int64_t* index;  // (M,), one intervention for each row
  int64_t M, K, J, I;
  A* out;  // (M, K), or (M, I, K) with interventions and no index
};

// The row that a kernel reads for output row m; `ok` is false for one out of range, which reads some valid row.
template <typename T>
struct Row {
  const T* data;
  bool ok;
};

template <typename T>
struct Rows {
  const T* hidden;
  const int64_t* rows;
  int64_t count, tokens, stride_b, stride_t;
  double inverse_tokens;

  __device__ Row<T> at(int64_t m) const {
    const int64_t flat = rows ? rows[m] : m;
    if (flat < 0 || flat >= count) return {hidden, false};
    // flat / tokens by a product that is off by one at most below 2^52 (a 64-bit division is a call, and spills).
    int64_t b = static_cast<int64_t>(static_cast<double>(flat) * inverse_tokens), t = flat - b * tokens;
    if (t < 0) --b, t += tokens;
    if (t >= tokens) ++b, t -= tokens;
    return {hidden + b * stride_b + t * stride_t, true};
  }
};

// What `prepare` derives for each dot vector n: heads first, then directions, then padding.
template <typename A>
struct DotTable {
  double* mean;  // subtracted from the vector for a layer norm
  A* row_sum;    // P 1, before that
  A* residual;   // Σ of the stored vector: what rounding left of a sum of 0 (layer norm only)
  A* unscale;    // power of two that undoes the stored vector's scale
  A* offset;     // β·w_k + b_k
};

constexpr int kFewDots = 8;  // above, the dots go to the tensor cores
constexpr int kManyStages = 3;

// The tensor-core kernel's shapes. A tile of h is 128 bytes wide; each k16 step takes `parts` products.
template <typename T>
struct Many {
  static constexpr int kDepth = 128 / sizeof(T);
  // fp32 as three bf16 (24 bits) on both sides; 2-byte h is exact, and two parts of its own type give a dot vector
  // 16 (bf16) or 22 bits. TF32 would need 3 products at half the rate: no faster, and 2 bits worse.
  static constexpr int kParts = sizeof(T) == 4 ? 3 : 2;
};
template <typename T>
struct part {
  using type = bf16;
};
template <>
struct part<f16> {
  using type = f16;
};
template <typename T>
using part_t = typename part<T>::type;

template <typename T>
__host__ __device__ constexpr int few_chunk() {  // elements that a warp takes with one load per lane
  return kWarp * 16 / static_cast<int>(sizeof(T));
}

// Where the few-dots kernel finds element e of dot n: chunk by chunk, and in a chunk so that each lane's 16-byte
// loads of a warp are consecutive.
template <typename T>
__host__ __device__ constexpr int64_t few_offset(uint32_t n, int e, uint32_t dots, int64_t chunks) {
  constexpr int kChunk = few_chunk<T>(), kVec = 16 / sizeof(T), kQuad = 16 / sizeof(acc_t<T>);
  const int64_t tile = n / dots, chunk = e / kChunk;
  const int x = e % kChunk, lane = x / kVec, i = x % kVec;
  return ((tile * chunks + chunk) * dots + n % dots) * kChunk + (i / kQuad) * (kWarp * kQuad) + lane * kQuad +
         i % kQuad;
}

// Where the tensor-core kernel finds part p of element e of dot n: in the order of mma's B fragments, so that a lane
// reads the fragments of 16 dots with one 16-byte load and a stage is one contiguous block.
template <typename T>
__host__ __device__ constexpr int64_t many_offset(uint32_t n, int e, int p, uint32_t block_dots, int64_t tiles) {
  constexpr int kDepth = Many<T>::kDepth, kParts = Many<T>::kParts;
  const int64_t dot_tile = n / block_dots, tile = e / kDepth;
  const int x = static_cast<int>(n % block_dots), y = e % kDepth, k = y % 16;
  const int lane = (x % 8) * 4 + (k % 8) / 2, word = (x % 16) / 8 * 2 + k / 8;
  const int64_t stage = (dot_tile * tiles + tile) * kParts + p;
  return (((stage * (kDepth / 16) + y / 16) * (block_dots / 16) + x / 16) * kWarp + lane) * 8 + word * 2 + k % 2;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Every size and offset that follows from the arguments; byte offsets into one workspace.
struct Plan {
  int64_t dots;       // K + J
  bool many;          // tensor cores
  int block_dots;     // dots that one block or warp takes
  int64_t dot_tiles;  // ceil(dots / block_dots)
  int64_t tiles;      // steps along d
  bool aligned;       // every row starts at a multiple of 16 bytes
  int64_t chunk_rows, chunks, values_stride, fix_blocks;
  int64_t vectors, mean, row_sum, residual, unscale, offset, cross, values, fix_list, fix_scratch, counters, bytes;
};

template <typename T>
Plan plan(const Problem<T>& p, int processors) {
  using A = acc_t<T>;
  Plan out{};
  out.dots = p.K + p.J;
  out.many = out.dots > kFewDots && sizeof(T) < 8;
  if (out.many) {
    out.block_dots = out.dots <= 32 ? 32 : 64;
  } else {
    out.block_dots = out.dots <= 1 ? 1 : out.dots <= 2 ? 2 : out.dots <= 4 ? 4 : 8;
  }
  out.dot_tiles = ceil_div(out.dots, out.block_dots);
  const int64_t padded = out.dot_tiles * out.block_dots;
  out.tiles = ceil_div(p.d, out.many ? Many<T>::kDepth : few_chunk<T>());
  // With one row or one batch, the stride over it is never used.
  out.aligned = reinterpret_cast<uintptr_t>(p.hidden) % 16 == 0 &&
                (p.batches == 1 || p.stride_b * sizeof(T) % 16 == 0) &&
                (p.tokens == 1 || p.stride_t * sizeof(T) % 16 == 0);

  int64_t used = 0;
  const auto take = [&used](int64_t bytes) {
    const int64_t at = used;
    used += ceil_div(bytes, 256) * 256;
    return at;
  };
  out.vectors = take(out.many ? padded * out.tiles * Many<T>::kDepth * Many<T>::kParts * 2
                              : padded * out.tiles * few_chunk<T>() * static_cast<int64_t>(sizeof(A)));
  out.mean = take(padded * sizeof(double));
  out.row_sum = take(padded * sizeof(A));
  out.residual = take(padded * sizeof(A));
  out.unscale = take(padded * sizeof(A));
  out.offset = take(padded * sizeof(A));
  out.chunk_rows = p.M;
  out.chunks = 1;
  if (p.J > 0) {
    out.values_stride = out.dots + 2;
    // Rows go through the workspace in chunks of about 256 MiB at most, however many there are.
    const int64_t interventions = p.index ? 1 : p.I;
    const int64_t row_bytes = out.values_stride * sizeof(A) + interventions * sizeof(int64_t);
    const int64_t rows = ceil_div(int64_t{1} << 28, row_bytes * 1024) * 1024;
    if (rows < p.M) out.chunk_rows = rows;
    out.chunks = ceil_div(p.M, out.chunk_rows);
    const int64_t pairs = out.chunk_rows * interventions;
    out.fix_blocks = pairs < 2 * processors ? pairs : 2 * processors;
    out.cross = take(p.J * out.dots * sizeof(A));
    out.values = take(out.chunk_rows * out.values_stride * sizeof(A));
    out.fix_list = take(pairs * sizeof(int64_t));
    out.fix_scratch = take(out.fix_blocks * (p.J + p.d) * sizeof(double));
    out.counters = take(out.chunks * sizeof(int));
  }
  out.bytes = used;
  return out;
}

}  // namespace rmfast::cuda
