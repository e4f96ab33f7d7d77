// The few instructions that the kernels need beyond plain C++, and the three 2-, 4- and 8-byte element types.
//
// With RMFAST_EMULATE_CUDA these come from tests/ops/cuda_emulator, which runs the same kernels on the CPU, a
// fiber per thread: what a machine without a GPU can say about indices, barriers and rounding.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef RMFAST_EMULATE_CUDA
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace rmfast::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <typename T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <typename T>
using acc_t = typename accumulator<T>::type;

// 16 bytes, one load: 8, 4 or 2 elements.
struct alignas(16) Vec16 {
  uint32_t w[4];
};

constexpr int kWarp = 32;

#ifdef RMFAST_EMULATE_CUDA

using emulated::all_in_warp;
using emulated::any_in_block;
using emulated::any_in_warp;
using emulated::async_commit;
using emulated::async_copy16;
using emulated::async_wait;
using emulated::dynamic_shared;
using emulated::load_cached;
using emulated::load_streaming;
using emulated::load_matrices;
using emulated::load_transposed;
using emulated::matmul_16x8x16;
using emulated::pack2;
using emulated::shuffle_xor;
using emulated::unpack2;

inline float fma_(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma_(double a, double b, double c) { return std::fma(a, b, c); }
inline float mul_(float a, float b) { return a * b; }
inline float exp2_(float x) { return std::exp2(x); }
inline float inverse_root(float x) { return float(1.0 / std::sqrt(double(x))); }
inline double inverse_root(double x) { return 1.0 / std::sqrt(x); }

template <typename... P, typename... Args>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, cudaStream_t, const Args&... args) {
  return emulated::launch(grid, threads, shared, [=] { kernel(args...); });
}

#else

// Explicit: contraction is the compiler's choice, and may fall differently in two instances of one template.
__device__ __forceinline__ float fma_(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fma_(double a, double b, double c) { return __fma_rn(a, b, c); }
// Never part of an fma.
__device__ __forceinline__ float mul_(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// One Newton step takes rsqrtf from 2 ulp to 1; __frsqrt_rn has a branch with a call, around which registers spill.
__device__ __forceinline__ float inverse_root(float x) {
  const float y = rsqrtf(x), error = __fmaf_rn(-__fmul_rn(x, y), y, 1.f);
  return error - error == 0 ? __fmaf_rn(__fmul_rn(0.5f, y), error, y) : y;  // not for x = 0, inf or NaN
}
__device__ __forceinline__ double inverse_root(double x) { return rsqrt(x); }

template <typename A>
__device__ __forceinline__ A shuffle_xor(A x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

__device__ __forceinline__ bool any_in_warp(bool x) { return __any_sync(0xffffffffu, x); }
__device__ __forceinline__ bool all_in_warp(bool x) { return __all_sync(0xffffffffu, x); }
__device__ __forceinline__ bool any_in_block(bool x) { return __syncthreads_or(x); }  // a barrier too

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char rmfast_shared[];
  return rmfast_shared;
}

// Hidden states are read once: they stay out of L1, which keeps the dot vectors.
__device__ __forceinline__ Vec16 load_streaming(const void* p) {
  Vec16 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p));
  return v;
}

__device__ __forceinline__ Vec16 load_cached(const void* p) {
  const uint4 v = __ldg(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies `bytes` (0 to 16) and fills the rest of the 16 with zeros.
__device__ __forceinline__ void async_copy16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 2-byte elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

template <typename E>
__device__ __forceinline__ void matmul_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(E) == sizeof(f16) && std::is_same_v<E, f16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Two elements in one word, the first in the low half; rounded to nearest even.
template <typename E>
__device__ __forceinline__ uint32_t pack2(float x, float y) {
  uint32_t out;
  if constexpr (std::is_same_v<E, f16>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(y), "f"(x));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(y), "f"(x));
  }
  return out;
}

template <typename E>
__device__ __forceinline__ void unpack2(uint32_t w, float& x, float& y) {
  if constexpr (std::is_same_v<E, f16>) {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(x), "=f"(y) : "r"(w));
  } else {
    x = __uint_as_float(w << 16);
    y = __uint_as_float(w & 0xffff0000u);
  }
}

template <typename... P, typename... Args>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
                   const Args&... args) {
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared, stream>>>(args...);
  return cudaGetLastError();
}

#endif

template <typename A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// A value that the compiler knows nothing of.
__device__ __forceinline__ void opaque(int& x) { asm volatile("" : "+r"(x)); }

__device__ __forceinline__ int min_(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int max_(int a, int b) { return a < b ? b : a; }

__device__ __forceinline__ int warp_least(int x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = min_(x, shuffle_xor(x, mask));
  return x;
}

__device__ __forceinline__ void store16(void* p, const Vec16& v) { *static_cast<Vec16*>(p) = v; }

// The elements of one vector as accumulators, by compile-time index.
template <typename T>
__device__ __forceinline__ void unpack(const Vec16& v, acc_t<T> (&x)[16 / sizeof(T)]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack2<T>(v.w[i], x[2 * i], x[2 * i + 1]);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) __builtin_memcpy(&x[i], &v.w[i], 4);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) __builtin_memcpy(&x[i], &v.w[2 * i], 8);
  }
}

template <typename T>
__device__ __forceinline__ acc_t<T> to_acc(T x) {
  if constexpr (sizeof(T) == 2) {
    float lo, hi;
    unpack2<T>(x.bits, lo, hi);
    return lo;
  } else {
    return x;
  }
}

// Elements [e, e + 16 / sizeof(T)) of a row of d, zero from d on; `row` may have any alignment of T.
//
// Which lane holds which element follows from e alone, so a row's sum is the same however it is aligned. A
// misaligned vector is cut from the two aligned ones that cover it; the second is read only where it lies inside the row.
template <typename T>
__device__ __forceinline__ Vec16 load_any(const T* row, int e, int d) {
  constexpr int kVec = 16 / sizeof(T);
  const uintptr_t address = reinterpret_cast<uintptr_t>(row + e);
  const int offset = static_cast<int>(address & 15);
  if (offset == 0 && e + kVec <= d) return load_streaming(row + e);
  if (offset != 0 && e + 2 * kVec - offset / static_cast<int>(sizeof(T)) <= d) {
    const unsigned char* base = reinterpret_cast<const unsigned char*>(row + e) - offset;
    const Vec16 low = load_cached(base), high = load_cached(base + 16);
    uint32_t w[8], half[6];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = low.w[i], w[i + 4] = high.w[i];
#pragma unroll
    for (int i = 0; i < 6; ++i) half[i] = offset & 8 ? w[i + 2] : w[i];
    const int bits = 8 * (offset & 3);
    Vec16 out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t first = offset & 4 ? half[i + 1] : half[i], second = offset & 4 ? half[i + 2] : half[i + 1];
      out.w[i] = static_cast<uint32_t>(((static_cast<uint64_t>(second) << 32) | first) >> bits);
    }
    return out;
  }
  Vec16 out{};
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (e + i < d) {
      if constexpr (sizeof(T) == 2) {
        out.w[i / 2] |= static_cast<uint32_t>(row[e + i].bits) << (16 * (i % 2));
      } else {
        const T value = row[e + i];
        __builtin_memcpy(&out.w[i * sizeof(T) / 4], &value, sizeof(T));
      }
    }
  }
  return out;
}

}  // namespace rmfast::cuda
