// Which keys each query of ragged suffixes sees: two stretches of rows, whatever the mask.
#pragma once

#include "gpu.cuh"

namespace rmfast::cuda {

// What one row of q sees: pool rows [pool_first, pool_last) and suffix rows [own_first, own_last), 0 and 0 for none.
struct alignas(16) SeenKeys {
  int32_t pool_first, pool_last, own_first, own_last;
  // Of the pool and of the suffixes, the row that stands (or would stand) at the query's own position: a key's distance
  // is its row less this one.
  int32_t pool_self, own_self;
  int32_t position;
  float slope;  // the attention kernel's own use
};

// All pointers are device pointers.
struct Suffixes {
  const int64_t *ends, *asks;     // (suffixes + 1,): where each one's rows lie in k, and in q
  const int64_t *start, *length;  // (suffixes,): its prefix in the pool; null without
  int64_t suffixes, queries, keys, pool;
  bool causal;
  int64_t window;  // 0: none; else below 2^31
};

// A thread to a row of q. Once for all layers of a chunk: they differ in what their rows hold, not in where those lie.
template <int kThreads>
__global__ __launch_bounds__(kThreads) void seen_keys_kernel(const Suffixes q, SeenKeys* out) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= q.queries) return;
  int64_t s = 0, behind = q.suffixes;  // asks[s] <= row < asks[behind]
  while (behind - s > 1) {
    const int64_t middle = (s + behind) / 2;
    if (q.asks[middle] <= row) {
      s = middle;
    } else {
      behind = middle;
    }
  }
  const int64_t first = q.ends[s], own = q.ends[s + 1] - first;
  const int64_t prefix = q.length ? q.length[s] : 0, start = q.length ? q.start[s] : 0;
  const int64_t position = prefix + own - (q.asks[s + 1] - row);  // queries are the last rows of their suffix
  int64_t low = 0, high = q.causal ? position + 1 : prefix + own;
  if (q.window) {
    low = q.causal ? position - q.window + 1 : position - q.window;
    if (!q.causal && position + q.window + 1 < high) high = position + q.window + 1;
  }
  if (low < 0) low = 0;

  SeenKeys seen{};
  // Of lengths that do not fit their tensors, which nobody has checked, nothing outside of these is read.
  const auto stretch = [](int64_t a, int64_t b, int64_t rows, int32_t& from, int32_t& to) {
    a = a < 0 ? 0 : a;
    b = b > rows ? rows : b;
    from = a < b ? static_cast<int32_t>(a) : 0;
    to = a < b ? static_cast<int32_t>(b) : 0;
  };
  stretch(start + low, start + (high < prefix ? high : prefix), q.pool, seen.pool_first, seen.pool_last);
  stretch(first + (low > prefix ? low - prefix : 0), first + high - prefix, q.keys, seen.own_first, seen.own_last);
  seen.pool_self = static_cast<int32_t>(start + position);
  seen.own_self = static_cast<int32_t>(first + position - prefix);
  seen.position = static_cast<int32_t>(position);
  out[row] = seen;
}

// Writes a record for each of q.queries > 0 rows.
inline cudaError_t seen_keys(const Suffixes& q, SeenKeys* out, cudaStream_t stream) {
  constexpr int kThreads = 128;
  const dim3 blocks(static_cast<unsigned>((q.queries + kThreads - 1) / kThreads));
  return launch(seen_keys_kernel<kThreads>, blocks, kThreads, 0, stream, q, out);
}

}  // namespace rmfast::cuda
