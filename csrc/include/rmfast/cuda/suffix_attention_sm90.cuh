// Attention of ragged suffixes by Hopper's own units (sm_90a): TMA brings K and V, wgmma multiplies, in roles by warpgroup.
//
// Tiles, keys and the softmax are those of suffix_attention.cuh. One warp of the first warpgroup names the steps and
// starts the copies, two stages ahead; two warpgroups of 64 rows each multiply, and one's softmax runs beside the other's
// products. A tile with a result that is not finite is marked in `redo` and done again by the kernel of sm_80.
#pragma once

#include <cuda.h>

#include "suffix_attention.cuh"
#include "wgmma.cuh"

namespace rmfast::cuda {

template <int D>
struct HopperTile {
  static constexpr int kRows = 128, kThreads = 384, kStages = 2;
  static constexpr int kKeys = D <= 128 ? 128 : 64;
  static constexpr int kGroups = D / 64;  // of 64 columns: what a row of 128 bytes holds
  static constexpr int kTile = kKeys * D * 2;
  static constexpr int kSteps = (kRows + 2 * kStages * kKeys) * D * 2 + kRows * static_cast<int>(sizeof(SeenKeys));
  // The steps and barriers lie behind; the tiles' addresses are multiples of 1,024.
  static constexpr int kShared = 1024 + kSteps + (8 + 8 * 4) * kStages;
  // Of a thread that copies and of one that multiplies: together what the launch has for three warpgroups alike.
  static constexpr int kFewRegisters = 40, kManyRegisters = 232;
  static_assert(kFewRegisters + 2 * kManyRegisters <= 3 * (65536 / kThreads / 8 * 8));
};

struct Maps {
  CUtensorMap k, v, pool_k, pool_v;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void barrier_init(uint64_t* b, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* b, int parity) {
  uint32_t done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(shared_address(b)), "r"(parity)
                 : "memory");
  } while (!done);
}

// A box of 64 columns of one head, kKeys rows from `row` on; rows and columns outside are zeros.
__device__ __forceinline__ void load_box(void* to, const CUtensorMap& map, int column, int head, int row, uint64_t* b) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(column), "r"(head), "r"(row), "r"(shared_address(b))
      : "memory");
}

#endif

template <typename E, int D, bool kCapped>
__global__ __launch_bounds__(384, 1) void suffix_attention_sm90_kernel(const SuffixAttention<E> a,
                                                                       const __grid_constant__ Maps maps, int* redo) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Tile = HopperTile<D>;
  constexpr int kRows = Tile::kRows, kKeys = Tile::kKeys, kGroups = Tile::kGroups, kStages = Tile::kStages;
  constexpr int kNone = 0x7fffffff, kAtom = 128;  // bytes of a row in a tile
  unsigned char* q_tile = dynamic_shared();
  q_tile += (1024 - shared_address(q_tile) % 1024) % 1024;  // [kGroups, kRows, 64]
  unsigned char* k_tiles = q_tile + kRows * D * 2;          // [kStages, kGroups, kKeys, 64]
  unsigned char* v_tiles = k_tiles + kStages * Tile::kTile;
  SeenKeys* seen = reinterpret_cast<SeenKeys*>(v_tiles + kStages * Tile::kTile);  // [kRows]
  struct Step {
    int part, at;  // part 2: behind the last key
  };
  Step* steps = reinterpret_cast<Step*>(seen + kRows);               // [kStages]
  uint64_t* barriers = reinterpret_cast<uint64_t*>(steps + kStages);  // K full and empty, V full and empty
  uint64_t *k_full = barriers, *k_empty = k_full + kStages, *v_full = k_empty + kStages, *v_empty = v_full + kStages;

  const int thread = threadIdx.x, lane = thread % kWarp;
  const int tile = gridDim.x - 1 - blockIdx.x, kv_head = blockIdx.y;
  const int first = tile * kRows, rows = a.queries * a.group;
  const auto q_row = [&](int r) { return (first + r) / a.group; };
  const auto q_head = [&](int r) { return kv_head * a.group + (first + r) % a.group; };

  for (int r = thread; r < kRows; r += Tile::kThreads) {
    SeenKeys mine{};
    if (first + r < rows) {
      mine = a.seen[q_row(r)];
      mine.slope = a.alibi ? a.alibi[q_head(r)] * kLog2E : 0.f;
    }
    seen[r] = mine;
  }
  for (int i = thread; i < kRows * (D / 8); i += Tile::kThreads) {
    const int r = i / (D / 8), c = i % (D / 8);
    const bool in = first + r < rows && c * 8 < a.d;
    const Vec16 x = in ? load_cached(a.q + q_row(r) * a.q_row + q_head(r) * a.q_head + c * 8) : Vec16{};
    store16(q_tile + (c / 8 * kRows + r) * kAtom + (c % 8 ^ r % 8) * 16, x);
  }
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(k_full + i, 1);
      barrier_init(v_full + i, 1);
      barrier_init(k_empty + i, 8);  // a lane of each warp that multiplies
      barrier_init(v_empty + i, 8);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // Q goes to wgmma, and the barriers to TMA
  __syncthreads();

  if (thread < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Tile::kFewRegisters));
    if (thread < kWarp) {
      int part = 0, at = 0;
      for (int turn = 0;; ++turn) {
        Step step{2, 0};
        for (; part < 2; ++part, at = 0) {
          int found = kNone;
          for (int r = lane; r < kRows; r += kWarp) {
            const int* b = bounds_of(seen[r], part);
            if (b[1] > at) found = min_(found, max_(b[0], at));
          }
          found = warp_least(found);
          if (found == kNone) continue;
          step = Step{part, found};
          at = found + kKeys;
          break;
        }
        const int stage = turn % kStages, parity = turn / kStages % 2 ^ 1;
        barrier_wait(k_empty + stage, parity);
        if (lane == 0) steps[stage] = step;
        if (step.part == 2) {
          if (lane == 0) barrier_arrive(k_full + stage);
          break;
        }
        if (lane == 0) {
          const CUtensorMap &k = step.part ? maps.k : maps.pool_k, &v = step.part ? maps.v : maps.pool_v;
          barrier_expect(k_full + stage, Tile::kTile);
          for (int g = 0; g < kGroups; ++g) {
            load_box(k_tiles + stage * Tile::kTile + g * kKeys * kAtom, k, g * 64, kv_head, step.at, k_full + stage);
          }
          barrier_wait(v_empty + stage, parity);
          barrier_expect(v_full + stage, Tile::kTile);
          for (int g = 0; g < kGroups; ++g) {
            load_box(v_tiles + stage * Tile::kTile + g * kKeys * kAtom, v, g * 64, kv_head, step.at, v_full + stage);
          }
        }
        __syncwarp();
      }
    }
    __syncthreads_or(0);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Tile::kManyRegisters));
    const int group_row = (thread / 128 - 1) * 64, warp_row = group_row + thread % 128 / kWarp * 16;
    const Logits logits{a.scale, a.softcap, a.alibi != nullptr};
    float out[D / 8][4], most[2], sum[2];
#pragma unroll
    for (int n = 0; n < D / 8; ++n) out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = warp_row + half * 8 + lane / 4;
      const bool sink = a.sinks && first + r < rows;
      const float position = static_cast<float>(seen[r].position);
      most[half] = sink ? fma_(-seen[r].slope, position, a.sinks[q_head(r)] * kLog2E) : -INFINITY;
      sum[half] = sink && lane % 4 == 0 ? 1.f : 0.f;
    }
    for (int turn = 0;; ++turn) {
      const int stage = turn % kStages, parity = turn / kStages % 2;
      barrier_wait(k_full + stage, parity);
      const Step now = steps[stage];
      if (now.part == 2) break;
      // All threads of a warpgroup take the same way: its 64 rows are looked at by each warp.
      bool some = false, all = true;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int* b = bounds_of(seen[group_row + i * kWarp + lane], now.part);
        const int low = b[0] - now.at, high = b[1] - now.at;
        some |= high > 0 && low < kKeys;
        all &= low <= 0 && high >= kKeys;
      }
      some = any_in_warp(some);
      all = all_in_warp(all);

      float s[kKeys / 8][4];
      if (some) {
        wgmma_fence(s);
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
          const int group = step / 4, bytes = step % 4 * 32;
          wgmma_shared<E>(s, matrix_at(q_tile + (group * kRows + group_row) * kAtom + bytes, 0),
                          matrix_at(k_tiles + stage * Tile::kTile + group * kKeys * kAtom + bytes, 0), step > 0);
        }
        wgmma_commit();
        wgmma_wait(s);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(k_empty + stage);

      if (some) weigh_keys<kKeys, D, kCapped>(s, out, most, sum, seen + warp_row, logits, now.part, now.at, all);
      barrier_wait(v_full + stage, parity);
      if (some) {
        uint32_t weights[kKeys / 16][4];
#pragma unroll
        for (int step = 0; step < kKeys / 16; ++step) pack_weights<E, kKeys>(weights[step], s, step);
        wgmma_fence(out, weights);
#pragma unroll
        for (int step = 0; step < kKeys / 16; ++step) {
          const unsigned char* v = v_tiles + stage * Tile::kTile + step * 16 * kAtom;
          wgmma_registers<E>(out, weights[step], matrix_at(v, kKeys * kAtom));
        }
        wgmma_commit();
        wgmma_wait(out, weights);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(v_empty + stage);
    }

    bool bad = false;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) bad |= out[n][e] - out[n][e] != 0;
    }
    bad = __syncthreads_or(bad);
    if (thread == 128) redo[kv_head * gridDim.x + tile] = bad;
    if (bad) return;

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = warp_row + half * 8 + lane / 4;
      float total = sum[half];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      const float share = 1.f / total;
      const bool real = first + r < rows;
      const int64_t to = int64_t{q_row(real ? r : 0)} * a.heads + q_head(real ? r : 0);
      if (lane % 4 == 0 && real) {
        const float shift = seen[r].slope * static_cast<float>(seen[r].position);
        a.lse[to] = (most[half] + log2f(total) + shift) * kLn2;
      }
      uint32_t* row = reinterpret_cast<uint32_t*>(a.out + to * a.d);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const uint32_t word = pack2<E>(out[n][half * 2] * share, out[n][half * 2 + 1] * share);
        if (real && n * 8 < a.d) row[n * 4 + lane % 4] = word;
      }
    }
  }
#endif
}

// The kernel's tensor maps, by the driver's function cuTensorMapEncodeTiled.
template <typename E, int D>
bool encode(CUtensorMap& map, decltype(&cuTensorMapEncodeTiled) encode_tiled, const E* data, int64_t rows, int heads,
            int d, int64_t row, int64_t head) {
  // Strides of a dimension of 1 are never used, but looked at.
  const cuuint64_t bytes[] = {static_cast<cuuint64_t>((heads > 1 ? head : d) * 2),
                              static_cast<cuuint64_t>((rows > 1 ? row : int64_t{heads} * d) * 2)};
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(d), static_cast<cuuint64_t>(heads),
                              static_cast<cuuint64_t>(rows)};
  const cuuint32_t box[] = {64, 1, HopperTile<D>::kKeys}, ones[] = {1, 1, 1};
  const auto type = std::is_same_v<E, f16> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode_tiled(&map, type, 3, const_cast<E*>(data), sizes, bytes, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace rmfast::cuda
