// wgmma of Hopper (sm_90a): 64 rows by 64, 128 or 256 columns, 16 deep, for one warpgroup; fp32 sums.
//
// The accumulators lie as those of mma.m16n8k16 do: warp w of the four has rows 16 w to 16 w + 15, d[n] is columns 8 n
// to 8 n + 7. A and B are in shared memory, described by 64 bits, or A is in registers.
#pragma once

#include "gpu.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace rmfast::cuda {

// Rows of 128 bytes in shared memory with the 128-byte swizzle, in atoms of 8 rows (1,024 bytes, aligned to that).
// `groups`: bytes from 64 columns to the next 64, for an operand whose columns are not what is summed over (V).
__device__ __forceinline__ uint64_t matrix_at(const void* p, uint32_t groups) {
  const uint64_t address = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  return (address & 0x3ffff) >> 4 | uint64_t{groups >> 4} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// To the compiler, a place where these registers are read and written. A fence or a wait names none of those that it is
// about: nothing else keeps a read, a write or a copy of them on its own side.
__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void pin(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <typename T, int kMany, int kEach>
__device__ __forceinline__ void pin(T (&x)[kMany][kEach]) {
#pragma unroll
  for (int n = 0; n < kMany; ++n) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) pin(x[n][e]);
  }
}

// Before products whose registers, sums and A, are these: what was written to them is there.
template <typename... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... registers) {
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all products are done; then these registers are anybody's again.
template <typename... Registers>
__device__ __forceinline__ void wgmma_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  (pin(registers), ...);
}

// The accumulators' registers in an instruction, and as its operands.
#define RMFAST_REGISTERS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, " \
  "%8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define RMFAST_REGISTERS_64 \
  RMFAST_REGISTERS_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define RMFAST_REGISTERS_128 \
  RMFAST_REGISTERS_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, " \
  "%72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, " \
  "%88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, " \
  "%104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, " \
  "%120, %121, %122, %123, %124, %125, %126, %127"
#define RMFAST_FOUR(f) "+f"(f[0]), "+f"(f[1]), "+f"(f[2]), "+f"(f[3])
#define RMFAST_SUMS_32(d, n) \
  RMFAST_FOUR(d[n]), RMFAST_FOUR(d[n + 1]), RMFAST_FOUR(d[n + 2]), RMFAST_FOUR(d[n + 3]), RMFAST_FOUR(d[n + 4]), \
      RMFAST_FOUR(d[n + 5]), RMFAST_FOUR(d[n + 6]), RMFAST_FOUR(d[n + 7])
#define RMFAST_SUMS_64(d, n) RMFAST_SUMS_32(d, n), RMFAST_SUMS_32(d, n + 8)
#define RMFAST_SUMS_128(d, n) RMFAST_SUMS_64(d, n), RMFAST_SUMS_64(d, n + 16)

// d = a b (+ d) of `columns`, of which a thread has `count` numbers: both in shared memory, each row's 16 elements side
// by side. `rest` are the operands behind the accumulators, by number.
#define RMFAST_SHARED_AS(type, columns, count, add, rest) \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " add ", 0; wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type \
               "." type " {" RMFAST_REGISTERS_##count "}, " rest ", p, 1, 1, 0, 0;}" \
               : RMFAST_SUMS_##count(d, 0) \
               : "l"(a), "l"(b), "r"(add_to))
#define RMFAST_SHARED(columns, count, add, rest) \
  template <typename E> \
  __device__ __forceinline__ void wgmma_shared(float (&d)[count / 4][4], uint64_t a, uint64_t b, int add_to) { \
    if constexpr (std::is_same_v<E, f16>) \
      RMFAST_SHARED_AS("f16", columns, count, add, rest); \
    else \
      RMFAST_SHARED_AS("bf16", columns, count, add, rest); \
  }
RMFAST_SHARED("64", 32, "%34", "%32, %33")
RMFAST_SHARED("128", 64, "%66", "%64, %65")

// d += a b: a in registers; b in shared memory, 16 rows of `columns` side by side.
#define RMFAST_FROM_REGISTERS_AS(type, columns, count, rest) \
  asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type \
               " {" RMFAST_REGISTERS_##count "}, " rest ", p, 1, 1, 1;}" \
               : RMFAST_SUMS_##count(d, 0) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define RMFAST_FROM_REGISTERS(columns, count, rest) \
  template <typename E> \
  __device__ __forceinline__ void wgmma_registers(float (&d)[count / 4][4], const uint32_t (&a)[4], uint64_t b) { \
    if constexpr (std::is_same_v<E, f16>) \
      RMFAST_FROM_REGISTERS_AS("f16", columns, count, rest); \
    else \
      RMFAST_FROM_REGISTERS_AS("bf16", columns, count, rest); \
  }
RMFAST_FROM_REGISTERS("64", 32, "{%32, %33, %34, %35}, %36")
RMFAST_FROM_REGISTERS("128", 64, "{%64, %65, %66, %67}, %68")
RMFAST_FROM_REGISTERS("256", 128, "{%128, %129, %130, %131}, %132")

#undef RMFAST_FROM_REGISTERS
#undef RMFAST_FROM_REGISTERS_AS
#undef RMFAST_SHARED
#undef RMFAST_SHARED_AS
#undef RMFAST_SUMS_128
#undef RMFAST_SUMS_64
#undef RMFAST_SUMS_32
#undef RMFAST_FOUR
#undef RMFAST_REGISTERS_128
#undef RMFAST_REGISTERS_64
#undef RMFAST_REGISTERS_32

}  // namespace rmfast::cuda

#endif
