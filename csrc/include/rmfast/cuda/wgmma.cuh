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

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

#define RMFAST_FOUR(f) "+f"(f[0]), "+f"(f[1]), "+f"(f[2]), "+f"(f[3])

// d = a b (+ d): both in shared memory, each row's 16 elements side by side.
#define RMFAST_WGMMA_SS(type) \
  asm volatile( \
      "{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, " \
      "%8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, " \
      "%24, %25, %26, %27, %28, %29, %30, %31}, " \
      "%32, %33, p, 1, 1, 0, 0;}" \
      : RMFAST_FOUR(d[0]), RMFAST_FOUR(d[1]), \
        RMFAST_FOUR(d[2]), RMFAST_FOUR(d[3]), \
        RMFAST_FOUR(d[4]), RMFAST_FOUR(d[5]), \
        RMFAST_FOUR(d[6]), RMFAST_FOUR(d[7]) \
      : "l"(a), "l"(b), "r"(add))
template <typename E>
__device__ __forceinline__ void wgmma_shared(float (&d)[8][4], uint64_t a, uint64_t b, int add) {
  if constexpr (std::is_same_v<E, f16>) {
    RMFAST_WGMMA_SS("f16");
  } else {
    RMFAST_WGMMA_SS("bf16");
  }
}
#undef RMFAST_WGMMA_SS

// d += a b: a in registers; b in shared memory, 16 rows of 64 columns side by side.
#define RMFAST_WGMMA_RS(type) \
  asm volatile( \
      "{.reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, " \
      "%8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, " \
      "%24, %25, %26, %27, %28, %29, %30, %31}, " \
      "{%32, %33, %34, %35}, %36, p, 1, 1, 1;}" \
      : RMFAST_FOUR(d[0]), RMFAST_FOUR(d[1]), \
        RMFAST_FOUR(d[2]), RMFAST_FOUR(d[3]), \
        RMFAST_FOUR(d[4]), RMFAST_FOUR(d[5]), \
        RMFAST_FOUR(d[6]), RMFAST_FOUR(d[7]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
template <typename E>
__device__ __forceinline__ void wgmma_registers(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<E, f16>) {
    RMFAST_WGMMA_RS("f16");
  } else {
    RMFAST_WGMMA_RS("bf16");
  }
}
#undef RMFAST_WGMMA_RS

// d = a b (+ d): both in shared memory, each row's 16 elements side by side.
#define RMFAST_WGMMA_SS(type) \
  asm volatile( \
      "{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, " \
      "%8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, " \
      "%24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, " \
      "%40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, " \
      "%56, %57, %58, %59, %60, %61, %62, %63}, " \
      "%64, %65, p, 1, 1, 0, 0;}" \
      : RMFAST_FOUR(d[0]), RMFAST_FOUR(d[1]), \
        RMFAST_FOUR(d[2]), RMFAST_FOUR(d[3]), \
        RMFAST_FOUR(d[4]), RMFAST_FOUR(d[5]), \
        RMFAST_FOUR(d[6]), RMFAST_FOUR(d[7]), \
        RMFAST_FOUR(d[8]), RMFAST_FOUR(d[9]), \
        RMFAST_FOUR(d[10]), RMFAST_FOUR(d[11]), \
        RMFAST_FOUR(d[12]), RMFAST_FOUR(d[13]), \
        RMFAST_FOUR(d[14]), RMFAST_FOUR(d[15]) \
      : "l"(a), "l"(b), "r"(add))
template <typename E>
__device__ __forceinline__ void wgmma_shared(float (&d)[16][4], uint64_t a, uint64_t b, int add) {
  if constexpr (std::is_same_v<E, f16>) {
    RMFAST_WGMMA_SS("f16");
  } else {
    RMFAST_WGMMA_SS("bf16");
  }
}
#undef RMFAST_WGMMA_SS

// d += a b: a in registers; b in shared memory, 16 rows of 128 columns side by side.
#define RMFAST_WGMMA_RS(type) \
  asm volatile( \
      "{.reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, " \
      "%8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, " \
      "%24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, " \
      "%40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, " \
      "%56, %57, %58, %59, %60, %61, %62, %63}, " \
      "{%64, %65, %66, %67}, %68, p, 1, 1, 1;}" \
      : RMFAST_FOUR(d[0]), RMFAST_FOUR(d[1]), \
        RMFAST_FOUR(d[2]), RMFAST_FOUR(d[3]), \
        RMFAST_FOUR(d[4]), RMFAST_FOUR(d[5]), \
        RMFAST_FOUR(d[6]), RMFAST_FOUR(d[7]), \
        RMFAST_FOUR(d[8]), RMFAST_FOUR(d[9]), \
        RMFAST_FOUR(d[10]), RMFAST_FOUR(d[11]), \
        RMFAST_FOUR(d[12]), RMFAST_FOUR(d[13]), \
        RMFAST_FOUR(d[14]), RMFAST_FOUR(d[15]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
template <typename E>
__device__ __forceinline__ void wgmma_registers(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<E, f16>) {
    RMFAST_WGMMA_RS("f16");
  } else {
    RMFAST_WGMMA_RS("bf16");
  }
}
#undef RMFAST_WGMMA_RS

// d += a b: a in registers; b in shared memory, 16 rows of 256 columns side by side.
#define RMFAST_WGMMA_RS(type) \
  asm volatile( \
      "{.reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, " \
      "%8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, " \
      "%24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, " \
      "%40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, " \
      "%56, %57, %58, %59, %60, %61, %62, %63, " \
      "%64, %65, %66, %67, %68, %69, %70, %71, " \
      "%72, %73, %74, %75, %76, %77, %78, %79, " \
      "%80, %81, %82, %83, %84, %85, %86, %87, " \
      "%88, %89, %90, %91, %92, %93, %94, %95, " \
      "%96, %97, %98, %99, %100, %101, %102, %103, " \
      "%104, %105, %106, %107, %108, %109, %110, %111, " \
      "%112, %113, %114, %115, %116, %117, %118, %119, " \
      "%120, %121, %122, %123, %124, %125, %126, %127}, " \
      "{%128, %129, %130, %131}, %132, p, 1, 1, 1;}" \
      : RMFAST_FOUR(d[0]), RMFAST_FOUR(d[1]), \
        RMFAST_FOUR(d[2]), RMFAST_FOUR(d[3]), \
        RMFAST_FOUR(d[4]), RMFAST_FOUR(d[5]), \
        RMFAST_FOUR(d[6]), RMFAST_FOUR(d[7]), \
        RMFAST_FOUR(d[8]), RMFAST_FOUR(d[9]), \
        RMFAST_FOUR(d[10]), RMFAST_FOUR(d[11]), \
        RMFAST_FOUR(d[12]), RMFAST_FOUR(d[13]), \
        RMFAST_FOUR(d[14]), RMFAST_FOUR(d[15]), \
        RMFAST_FOUR(d[16]), RMFAST_FOUR(d[17]), \
        RMFAST_FOUR(d[18]), RMFAST_FOUR(d[19]), \
        RMFAST_FOUR(d[20]), RMFAST_FOUR(d[21]), \
        RMFAST_FOUR(d[22]), RMFAST_FOUR(d[23]), \
        RMFAST_FOUR(d[24]), RMFAST_FOUR(d[25]), \
        RMFAST_FOUR(d[26]), RMFAST_FOUR(d[27]), \
        RMFAST_FOUR(d[28]), RMFAST_FOUR(d[29]), \
        RMFAST_FOUR(d[30]), RMFAST_FOUR(d[31]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
template <typename E>
__device__ __forceinline__ void wgmma_registers(float (&d)[32][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<E, f16>) {
    RMFAST_WGMMA_RS("f16");
  } else {
    RMFAST_WGMMA_RS("bf16");
  }
}
#undef RMFAST_WGMMA_RS

#undef RMFAST_FOUR

}  // namespace rmfast::cuda

#endif
