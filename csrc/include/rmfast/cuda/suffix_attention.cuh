// Attention of ragged suffixes over shared prefixes and themselves, by mma.sync and cp.async: sm_80 and later.
//
// What a row of q sees is a stretch of the pool and one of the suffixes' own rows (suffix_keys.cuh). So a block takes a
// full tile of rows in q's order, positions × heads of one K/V head's group, of as many suffixes as fit, and steps
// through the keys that any of them sees: a prefix that they share is read once for all of them, and their own rows lie
// side by side. One online softmax runs over both: nothing is left to be merged by log-sum-exp, and no key's share is
// rounded on the way. Keys that no row of a tile sees are leapt over, and a warp skips those that none of its rows sees.
#pragma once

#include "suffix_softmax.cuh"

namespace rmfast::cuda {

// All pointers are device pointers; rows of E start at multiples of 16 bytes. Strides in elements.
template <typename E>
struct SuffixAttention {
  const E *q, *k, *v, *pool_k, *pool_v;  // (rows, heads or kv heads, d), the last dimension contiguous
  int64_t q_row, q_head, k_row, k_head, v_row, v_head, pool_k_row, pool_k_head, pool_v_row, pool_v_head;
  const SeenKeys* seen;  // (queries,)
  int queries, heads, kv_heads, group, d;
  float scale, softcap;  // give logits in base 2; with a softcap, scale gives them in units of it. softcap 0: none
  const float *sinks, *alibi;  // (heads,) or null
  E* out;                      // (queries, heads, d)
  float* lse;                  // (queries, heads)
  const int* redo;             // null, or which tiles of 128 rows to do: (kv_heads, tiles)
};

template <int D, bool kCapped>
struct SuffixTile {
  static constexpr int kWarps = 4;
  static constexpr int kStrips = D <= 128 ? 2 : 1;  // of 16 rows, to a warp: two share each read of K and V
  static constexpr int kRows = kWarps * 16 * kStrips;
  static constexpr int kKeys = D <= 64 ? 64 : kCapped ? 32 : 48;  // what registers hold beside the sums
  static constexpr int kChunks = D / 8;  // 16 bytes each
  static constexpr int kShared = (kRows + 2 * kKeys) * D * 2 + kRows * static_cast<int>(sizeof(SeenKeys)) + kKeys;
};

// Byte offset of 16-byte chunk c of row r of a tile: eight rows' chunk c lie in eight different groups of banks.
template <int D>
__host__ __device__ constexpr int suffix_chunk(int r, int c) {
  return (r * (D / 8) + (c ^ (r % 8))) * 16;
}

// Whether one of two elements of a word is infinite or NaN; those are set to 0.
template <typename E>
__device__ __forceinline__ bool clear_non_finite(uint32_t& w) {
  constexpr uint32_t kExponent = std::is_same_v<E, f16> ? 0x7c00u : 0x7f80u;
  bool found = false;
  if ((w & kExponent) == kExponent) w &= 0xffff0000u, found = true;
  if ((w >> 16 & kExponent) == kExponent) w &= 0xffffu, found = true;
  return found;
}

template <typename E, int D, bool kCapped>
__global__ __launch_bounds__(SuffixTile<D, kCapped>::kWarps* kWarp) void suffix_attention_kernel(const SuffixAttention<E> a) {
  using Tile = SuffixTile<D, kCapped>;
  constexpr int kStrips = Tile::kStrips, kRows = Tile::kRows, kKeys = Tile::kKeys, kChunks = Tile::kChunks;
  constexpr int kThreads = Tile::kWarps * kWarp, kNone = 0x7fffffff, kStrip = 16 * D * 2;
  unsigned char* q_tile = dynamic_shared();        // [kRows, D]
  unsigned char* k_tile = q_tile + kRows * D * 2;  // [kKeys, D]
  unsigned char* v_tile = k_tile + kKeys * D * 2;  // [kKeys, D]
  SeenKeys* seen = reinterpret_cast<SeenKeys*>(v_tile + kKeys * D * 2);    // [kRows]
  unsigned char* marks = reinterpret_cast<unsigned char*>(seen + kRows);  // [kKeys]

  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  // The last rows of a causal text see the most keys: their blocks go first.
  const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kRows, rows = a.queries * a.group;
  const int kv_head = blockIdx.y, warp_row = warp * 16 * kStrips;
  if (a.redo && !a.redo[kv_head * ((rows + 127) / 128) + first / 128]) return;
  const auto q_row = [&](int r) { return (first + r) / a.group; };
  const auto q_head = [&](int r) { return kv_head * a.group + (first + r) % a.group; };

  for (int r = thread; r < kRows; r += kThreads) {
    SeenKeys mine{};  // past the last row: sees nothing, and is not stored
    if (first + r < rows) {
      mine = a.seen[q_row(r)];
      mine.slope = a.alibi ? a.alibi[q_head(r)] * kLog2E : 0.f;
    }
    seen[r] = mine;
  }
  for (int i = thread; i < kRows * kChunks; i += kThreads) {
    const int r = i / kChunks, c = i % kChunks;
    const bool in = first + r < rows && c * 8 < a.d;
    const E* from = in ? a.q + q_row(r) * a.q_row + q_head(r) * a.q_head + c * 8 : a.q;
    async_copy16(q_tile + suffix_chunk<D>(r, c), from, in ? 16 : 0);
  }
  __syncthreads();

  // Keys are rows of the pool (part 0), then of the suffixes (part 1).
  const auto bounds = [&](int r, int part) { return bounds_of(seen[r], part); };
  const Logits logits{a.scale, a.softcap, a.alibi != nullptr};
  int last[2] = {0, 0};
  for (int r = lane; r < kRows; r += kWarp) {
    last[0] = max_(last[0], seen[r].pool_last);
    last[1] = max_(last[1], seen[r].own_last);
  }
  last[0] = -warp_least(-last[0]);
  last[1] = -warp_least(-last[1]);

  struct Step {
    int part, at;  // part 2: behind the last key
  };
  // The first key from `at` on that a row of the tile sees; the same in all threads.
  const auto next = [&](int part, int at) {
    for (; part < 2; ++part, at = 0) {
      int found = kNone;
      for (int r = lane; r < kRows; r += kWarp) {
        const int* b = bounds(r, part);
        if (b[1] > at) found = min_(found, max_(b[0], at));
      }
      found = warp_least(found);
      if (found != kNone) return Step{part, found};
    }
    return Step{2, 0};
  };
  const auto fetch = [&](unsigned char* to, Step step, const E* own, int64_t own_row, int64_t own_head, const E* pool,
                         int64_t pool_row, int64_t pool_head) {
    const E* base = step.part ? own + kv_head * own_head : pool + kv_head * pool_head;
    const int64_t stride = step.part ? own_row : pool_row;
    const int left = (step.part ? last[1] : last[0]) - step.at;
    const int c = thread % kChunks;
    const E* from = base + (step.at + thread / kChunks) * stride + c * 8;
#pragma unroll
    for (int i = 0; i < kKeys * kChunks / kThreads; ++i, from += kThreads / kChunks * stride) {
      const int r = thread / kChunks + i * (kThreads / kChunks);
      const bool in = r < left && c * 8 < a.d;
      async_copy16(to + suffix_chunk<D>(r, c), in ? from : base, in ? 16 : 0);
    }
    async_commit();
  };
  const auto fetch_k = [&](Step step) {
    fetch(k_tile, step, a.k, a.k_row, a.k_head, a.pool_k, a.pool_k_row, a.pool_k_head);
  };
  const auto fetch_v = [&](Step step) {
    fetch(v_tile, step, a.v, a.v_row, a.v_head, a.pool_v, a.pool_v_row, a.pool_v_head);
  };

  // A lane's rows of strip i: warp_row + 16 i + lane / 4, and 8 further on. Its columns: lane % 4 · 2 and the next, of
  // each 8.
  // Where a lane finds its part of a fragment at the first step of 16 columns; step i is that offset ^ 32 i.
  int at_q = suffix_chunk<D>(warp_row + lane % 16, lane / 16), at_k = suffix_chunk<D>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  int at_v = suffix_chunk<D>(lane % 16, lane / 16);
  const auto row_of = [&](int strip, int half) { return warp_row + strip * 16 + half * 8 + lane / 4; };
  float out[kStrips][D / 8][4], most[kStrips][2], sum[kStrips][2];  // sums of this lane's columns alone
  uint32_t lost = 0;  // rows (bit 2 · strip + half) that see a value which is not finite

  // A weight of 0 does not keep an infinite value of another suffix out of a product. So where a result is not finite,
  // the tile is done again with such values left out, and the rows that see one become NaN.
  for (bool again = false;; again = true) {
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[i][n][e] = 0;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        most[i][half] = -INFINITY;
        sum[i][half] = 0;
        const int r = row_of(i, half);
        if (a.sinks && first + r < rows) {
          // A logit without a value; like all of them, it counts from the query's own position.
          most[i][half] = fma_(-seen[r].slope, static_cast<float>(seen[r].position), a.sinks[q_head(r)] * kLog2E);
          sum[i][half] = lane % 4 == 0 ? 1.f : 0.f;
        }
      }
    }

    Step now = next(0, 0);
    fetch_k(now);
    while (now.part < 2) {
      async_wait<0>();
      __syncthreads();  // K is here, and nobody reads V any more
      fetch_v(now);
      const Step then = next(now.part, now.at + kKeys);

      // Not known to be the same in each round: else the compiler keeps all of their sums in registers, and spills.
      opaque(at_q), opaque(at_k), opaque(at_v);
      bool some = false, all = true;
#pragma unroll
      for (int i = 0; i < 2 * kStrips; ++i) {
        const int* b = bounds(row_of(i / 2, i % 2), now.part);
        const int low = b[0] - now.at, high = b[1] - now.at;
        some |= high > 0 && low < kKeys;
        all &= low <= 0 && high >= kKeys;
      }
      some = any_in_warp(some);
      all = all_in_warp(all);

      float s[kStrips][kKeys / 8][4];
      if (some) {
#pragma unroll
        for (int i = 0; i < kStrips; ++i) {
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n) s[i][n][0] = s[i][n][1] = s[i][n][2] = s[i][n][3] = 0;
        }
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
          uint32_t rows_q[kStrips][4];
#pragma unroll
          for (int i = 0; i < kStrips; ++i) {
            load_matrices(rows_q[i], q_tile + (at_q ^ 32 * step) + i * kStrip);
          }
#pragma unroll
          for (int n = 0; n < kKeys / 16; ++n) {
            uint32_t keys[4];
            load_matrices(keys, k_tile + (at_k ^ 32 * step) + n * kStrip);
#pragma unroll
            for (int i = 0; i < kStrips; ++i) {
              matmul_16x8x16<E>(s[i][2 * n], rows_q[i], keys[0], keys[1]);
              matmul_16x8x16<E>(s[i][2 * n + 1], rows_q[i], keys[2], keys[3]);
            }
          }
        }
      }
      async_wait<0>();
      __syncthreads();  // V is here, and nobody reads K any more
      if (then.part < 2) fetch_k(then);

      if (again) {
#pragma unroll 1
        for (int i = thread; i < kKeys; i += kThreads) marks[i] = 0;
        __syncthreads();
#pragma unroll 1
        for (int i = thread; i < kKeys * kChunks; i += kThreads) {
          Vec16* v = reinterpret_cast<Vec16*>(v_tile + suffix_chunk<D>(i / kChunks, i % kChunks));
          for (int w = 0; w < 4; ++w) {
            if (clear_non_finite<E>(v->w[w])) marks[i / kChunks] = 1;
          }
        }
        __syncthreads();
#pragma unroll 1
        for (int i = 0; i < 2 * kStrips; ++i) {
          const int* b = bounds(row_of(i / 2, i % 2), now.part);
#pragma unroll 1
          for (int key = 0; key < kKeys; ++key) {
            if (marks[key] && b[0] <= now.at + key && now.at + key < b[1]) lost |= 1u << i;
          }
        }
      }

      if (some) {
#pragma unroll
        for (int i = 0; i < kStrips; ++i) {
          weigh_keys<kKeys, D, kCapped>(s[i], out[i], most[i], sum[i], seen + warp_row + i * 16, logits, now.part, now.at, all);
        }
#pragma unroll
        for (int step = 0; step < kKeys / 16; ++step) {
          uint32_t weights[kStrips][4];
#pragma unroll
          for (int i = 0; i < kStrips; ++i) pack_weights<E, kKeys>(weights[i], s[i], step);
#pragma unroll
          for (int n = 0; n < D / 16; ++n) {
            uint32_t values[4];
            load_transposed(values, v_tile + (at_v ^ 32 * n) + step * kStrip);
#pragma unroll
            for (int i = 0; i < kStrips; ++i) {
              matmul_16x8x16<E>(out[i][2 * n], weights[i], values[0], values[1]);
              matmul_16x8x16<E>(out[i][2 * n + 1], weights[i], values[2], values[3]);
            }
          }
        }
      }
      now = then;
    }
    async_wait<0>();

    bool bad = false;
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) bad |= out[i][n][e] - out[i][n][e] != 0;
      }
    }
    if (again || !any_in_block(bad)) break;
  }

  // Through the warp's own rows of Q's tile, for stores of 16 bytes.
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kStrips; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row_of(i, half);
      float all = sum[i][half];
      all += shuffle_xor(all, 1);
      all += shuffle_xor(all, 2);
      if (lane % 4 == 0 && first + r < rows) {
        const float shift = seen[r].slope * static_cast<float>(seen[r].position);
        a.lse[int64_t{q_row(r)} * a.heads + q_head(r)] = (most[i][half] + log2f(all) + shift) * kLn2;
      }
      const float share = lost >> (2 * i + half) & 1 ? NAN : 1.f / all;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const uint32_t word = pack2<E>(out[i][n][half * 2] * share, out[i][n][half * 2 + 1] * share);
        *reinterpret_cast<uint32_t*>(q_tile + suffix_chunk<D>(r, n) + lane % 4 * 4) = word;
      }
    }
  }
  __syncwarp();
  for (int i = lane; i < 16 * kStrips * kChunks; i += kWarp) {
    const int r = warp_row + i / kChunks, c = i % kChunks;
    if (first + r >= rows || c * 8 >= a.d) continue;
    E* to = a.out + (int64_t{q_row(r)} * a.heads + q_head(r)) * a.d + c * 8;
    store16(to, *reinterpret_cast<const Vec16*>(q_tile + suffix_chunk<D>(r, c)));
  }
}

template <typename E, int D, bool kCapped>
cudaError_t launch_suffix_attention(const SuffixAttention<E>& a, cudaStream_t stream) {
  using Tile = SuffixTile<D, kCapped>;
  const int64_t rows = int64_t{a.queries} * a.group;
  const dim3 blocks(static_cast<unsigned>((rows + Tile::kRows - 1) / Tile::kRows), static_cast<unsigned>(a.kv_heads));
  return launch(suffix_attention_kernel<E, D, kCapped>, blocks, Tile::kWarps * kWarp, Tile::kShared, stream, a);
}

// Writes all of out and lse; queries > 0, d a multiple of 8 up to 256, fewer than 2^31 - 256 rows of each tensor and of
// queries × group.
template <typename E>
cudaError_t suffix_attention(const SuffixAttention<E>& a, cudaStream_t stream) {
  if (a.softcap != 0) {
    return a.d <= 64    ? launch_suffix_attention<E, 64, true>(a, stream)
           : a.d <= 128 ? launch_suffix_attention<E, 128, true>(a, stream)
                        : launch_suffix_attention<E, 256, true>(a, stream);
  }
  return a.d <= 64    ? launch_suffix_attention<E, 64, false>(a, stream)
         : a.d <= 128 ? launch_suffix_attention<E, 128, false>(a, stream)
                      : launch_suffix_attention<E, 256, false>(a, stream);
}

}  // namespace rmfast::cuda
