// Runs CUDA kernels on the CPU, block by block, with a fiber for each thread.
//
// A fiber runs until it meets a barrier or a warp-wide instruction. EMULATED_ORDER picks who goes first (0 up, 1 down,
// 2 shuffled at each turn) and when cp.async lands (odd: at once, even: as late as its wait allows), so that a missing
// barrier or wait changes some result. A thread that leaves while others wait at a barrier ends the launch with an error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  ucontext_t context;
  std::jmp_buf place;  // swapcontext would make a system call at each switch
  bool started = false, done = false;
  int turns = 0;  // warp-wide instructions so far
  int waits = -1;  // -1: runs; else the number of the barrier group it waits for
  int votes = 0;   // block-wide votes so far
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

// One barrier for each warp, then one for the block.
struct Barrier {
  int arrived = 0;
};

struct Warp {
  alignas(16) unsigned char in[2][32][64];  // by turns, so that one barrier is enough
};

inline std::vector<Fiber>* fibers;
inline std::vector<Barrier>* barriers;
inline std::vector<Warp>* warps;
inline unsigned char* shared_memory;
inline std::jmp_buf scheduler;
inline ucontext_t entry;
inline int current, schedule_order;
inline bool vote[3];
inline const std::function<void()>* body;

inline void enter(int thread) {
  current = thread;
  threadIdx = dim3(thread);
}

inline void wait(int group, int size) {
  Barrier& barrier = (*barriers)[group];
  Fiber& self = (*fibers)[current];
  const int me = current;
  if (++barrier.arrived == size) {
    barrier.arrived = 0;
    for (Fiber& f : *fibers) {
      if (f.waits == group) f.waits = -1;
    }
    return;
  }
  self.waits = group;
  if (_setjmp(self.place) == 0) _longjmp(scheduler, 1);
  enter(me);
}

inline void sync_warp() { wait(current / 32, 32); }
inline void sync_block() { wait(static_cast<int>(warps->size()), static_cast<int>(fibers->size())); }

inline void land(std::vector<Copy>& copies) {
  for (const Copy& c : copies) {
    std::memset(c.to, 0, 16);
    std::memcpy(c.to, c.from, c.bytes);
  }
  copies.clear();
}

inline void trampoline() {
  (*body)();
  Fiber& self = (*fibers)[current];
  self.done = true;
  _longjmp(scheduler, 1);
}

// Runs a fiber until it waits or ends. No inlining: no local of the scheduler's lives across the jump.
[[gnu::noinline]] inline void resume(Fiber& f, int thread) {
  enter(thread);
  if (_setjmp(scheduler) != 0) return;
  if (f.started) _longjmp(f.place, 1);
  f.started = true;
  swapcontext(&entry, &f.context);
}

inline cudaError_t launch(dim3 grid, int threads, size_t shared, const std::function<void()>& kernel) {
  if (threads % 32 || shared > 227 * 1024 || grid.x == 0 || grid.y == 0) return cudaErrorLaunchFailure;
  static std::mt19937 random(7);
  const char* order = std::getenv("EMULATED_ORDER");
  schedule_order = order ? std::atoi(order) : 0;
  body = &kernel;
  gridDim = grid;
  blockDim = dim3(threads);
  std::vector<Fiber> all(threads);
  fibers = &all;
  constexpr size_t kStack = 64 * 1024;
  static std::unique_ptr<unsigned char[]> stacks(new unsigned char[1024 * kStack]);
  for (unsigned b = 0; b < grid.x * grid.y; ++b) {
    blockIdx = dim3(b % grid.x, b / grid.x);
    std::vector<Barrier> all_barriers(threads / 32 + 1);
    std::vector<Warp> all_warps(threads / 32);
    // Exactly what was asked for, and full of NaN.
    std::unique_ptr<unsigned char[]> memory(new unsigned char[shared + 16]);
    shared_memory = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.get()) + 15) / 16 * 16);
    std::memset(shared_memory, 0xff, shared);
    barriers = &all_barriers;
    warps = &all_warps;
    for (Fiber& f : all) {
      f.started = f.done = false;
      f.turns = 0;
      f.votes = 0;
      f.waits = -1;
      f.groups.clear();
      f.open.clear();
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = stacks.get() + (&f - all.data()) * kStack;
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = nullptr;
      makecontext(&f.context, reinterpret_cast<void (*)()>(trampoline), 0);
    }
    std::fill(vote, vote + 3, false);
    std::vector<int> turn(threads);
    for (int i = 0; i < threads; ++i) turn[i] = schedule_order == 1 ? threads - 1 - i : i;
    for (bool alive = true; alive;) {
      bool moved = false;
      alive = false;
      if (schedule_order >= 2) std::shuffle(turn.begin(), turn.end(), random);
      for (int i : turn) {
        Fiber& f = all[i];
        if (f.done) continue;
        alive = true;
        if (f.waits >= 0) continue;
        moved = true;
        resume(f, i);
      }
      if (alive && !moved) return cudaErrorLaunchFailure;  // a barrier that not all reach
    }
  }
  return cudaSuccess;
}

inline unsigned char* dynamic_shared() { return shared_memory; }

template <typename V>
struct Lanes {
  const unsigned char (*in)[64];
  V operator[](int lane) const {
    V v;
    std::memcpy(&v, in[lane], sizeof(V));
    return v;
  }
};

// Every lane's `mine`, by lane; valid until the next warp-wide instruction.
template <typename V>
Lanes<V> gather(const V& mine) {
  static_assert(sizeof(V) <= 64);
  auto& in = (*warps)[current / 32].in[(*fibers)[current].turns++ % 2];
  std::memcpy(in[current % 32], &mine, sizeof(V));
  sync_warp();
  return {in};
}

template <typename A>
A shuffle_xor(A x, int mask) {
  return gather(x)[current % 32 ^ mask];
}

inline bool any_in_warp(bool x) {
  const auto all = gather(x);
  for (int i = 0; i < 32; ++i) {
    if (all[i]) return true;
  }
  return false;
}
inline bool all_in_warp(bool x) { return !any_in_warp(!x); }
// By turns: the slot of the vote before is cleared when all have read it, and set again two votes later.
inline bool any_in_block(bool x) {
  const int slot = (*fibers)[current].votes++ % 3;
  if (x) vote[slot] = true;
  sync_block();
  vote[(slot + 2) % 3] = false;
  return vote[slot];
}

struct Words {
  uint32_t w[4];
};

struct LoadResult {
  uint32_t w[4];
  template <typename V>
  operator V() const {
    V v;
    std::memcpy(&v, w, 16);
    return v;
  }
};

inline LoadResult load_streaming(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) std::abort();
  LoadResult r;
  std::memcpy(r.w, p, 16);
  return r;
}
inline LoadResult load_cached(const void* p) { return load_streaming(p); }

inline void async_copy16(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) std::abort();
  (*fibers)[current].open.push_back({to, from, bytes});
  if (schedule_order % 2) land((*fibers)[current].open);
}
inline void async_commit() {
  Fiber& f = (*fibers)[current];
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}
template <int kPending>
void async_wait() {
  auto& groups = (*fibers)[current].groups;
  const int count = std::max(0, static_cast<int>(groups.size()) - kPending);
  for (int i = 0; i < count; ++i) land(groups[i]);
  groups.erase(groups.begin(), groups.begin() + count);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const auto rows = gather(row);
  const int lane = current % 32;
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&r[i], static_cast<const unsigned char*>(rows[i * 8 + lane / 4]) + lane % 4 * 4, 4);
  }
}

inline void load_transposed(uint32_t (&r)[4], const void* row) {
  const auto rows = gather(row);
  const int lane = current % 32;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      std::memcpy(&pair[e], static_cast<const unsigned char*>(rows[i * 8 + lane % 4 * 2 + e]) + lane / 4 * 2, 2);
    }
    std::memcpy(&r[i], pair, 4);
  }
}

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline uint16_t to_f16(float x) {
  const _Float16 h = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}
inline float from_f16(uint16_t x) {
  _Float16 h;
  std::memcpy(&h, &x, 2);
  return static_cast<float>(h);
}

template <typename E>
uint32_t pack2(float x, float y);
template <typename E>
void unpack2(uint32_t w, float& x, float& y);

template <typename E>
void matmul_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct In {
    uint32_t a[4], b[2];
  } in{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto all = gather(in);
  const int lane = current % 32;
  // Rows lane / 4 and 8 further on of A, columns lane % 4 · 2 and the next of B.
  float rows[2][16], columns[2][16];
  for (int half = 0; half < 2; ++half) {
    for (int pair = 0; pair < 8; ++pair) {
      const In of_row = all[lane / 4 * 4 + pair % 4], of_column = all[(lane % 4 * 2 + half) * 4 + pair % 4];
      unpack2<E>(of_row.a[pair / 4 * 2 + half], rows[half][2 * pair], rows[half][2 * pair + 1]);
      unpack2<E>(of_column.b[pair / 4], columns[half][2 * pair], columns[half][2 * pair + 1]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 16; ++k) sum += double(rows[i / 2][k]) * columns[i % 2][k];
    c[i] = static_cast<float>(sum);
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::sync_block(); }
inline void __syncwarp() { emulated::sync_warp(); }
inline int atomicAdd(int* p, int x) {
  const int old = *p;
  *p += x;
  return old;
}

namespace rmfast::cuda {
struct bf16;
struct f16;
}  // namespace rmfast::cuda

namespace emulated {
template <typename E>
uint32_t pack2(float x, float y) {
  if constexpr (std::is_same_v<E, rmfast::cuda::f16>) return to_f16(x) | static_cast<uint32_t>(to_f16(y)) << 16;
  return to_bf16(x) | static_cast<uint32_t>(to_bf16(y)) << 16;
}
template <typename E>
void unpack2(uint32_t w, float& x, float& y) {
  if constexpr (std::is_same_v<E, rmfast::cuda::f16>) {
    x = from_f16(static_cast<uint16_t>(w)), y = from_f16(static_cast<uint16_t>(w >> 16));
  } else {
    x = from_bf16(static_cast<uint16_t>(w)), y = from_bf16(static_cast<uint16_t>(w >> 16));
  }
}
}  // namespace emulated
