// Rows copied from two sources, and their RMS norm, on the CPU; compiled once for each instruction set (RMFAST_ISA).
//
// The norm's arithmetic is that of rms_norm in token_wise_isa.cpp, to the bit.

#include "rmfast/patch_rows.h"
#include "rmfast/row_norm.h"

#define RMFAST_STRING_(x) #x
#define RMFAST_STRING(x) RMFAST_STRING_(x)

namespace rmfast {
namespace {

template <class A, class T, bool Gemma>
void patch_rows(const PatchRows& a, int64_t first, int64_t last, void* scratch) {
  const int64_t d = a.d;
  A* gain = static_cast<A*>(scratch);
  gains(a.weight, Gemma, d, gain);
  for (int64_t row = first; row < last; ++row) {
    const int64_t value = a.value_rows[row];
    const T* from = value < 0 ? static_cast<const T*>(a.base.data) + a.base_rows[row] * a.base.stride
                              : static_cast<const T*>(a.values.data) + value * a.values.stride;
    T* x = static_cast<T*>(a.x) + row * d;
    T* y = static_cast<T*>(a.y) + row * d;
    V<A> squares = {};
    vectors<A>(d, RMFAST_VECTOR {
      const V<A> v = get<A>(from + i, n);
      squares += v * v;
      // A copy of constant size is one load and one store; of n elements it is a call.
      if (n == W<A>) memcpy(x + i, from + i, W<A> * sizeof(T));
      else memcpy(x + i, from + i, n * sizeof(T));
    });
    const A inverse = inverse_rms(sum<A>(squares), d, a.eps);
    vectors<A>(d, RMFAST_VECTOR {
      put<A>(y + i, normed<A, T, Gemma>(get<A>(x + i, n), inverse, get<A>(gain + i, n)), n);
    });
  }
}

template <class A, class T>
void patch_rows_of(const PatchRows& a, int64_t first, int64_t last, void* scratch) {
  a.gemma ? patch_rows<A, T, true>(a, first, last, scratch) : patch_rows<A, T, false>(a, first, last, scratch);
}

void run(const PatchRows& a, int64_t first, int64_t last, void* scratch) {
  switch (a.dtype) {
    case DType::f64: return patch_rows_of<double, double>(a, first, last, scratch);
    case DType::bf16: return patch_rows_of<float, bf16>(a, first, last, scratch);
    case DType::f16: return patch_rows_of<float, f16>(a, first, last, scratch);
    default: return patch_rows_of<float, float>(a, first, last, scratch);
  }
}

int64_t scratch_bytes(const PatchRows& a) { return padded<double>(a.d) * int64_t(sizeof(double)); }

}  // namespace

namespace patch_rows_isa {
extern const PatchRowsIsa RMFAST_ISA;
const PatchRowsIsa RMFAST_ISA = {RMFAST_STRING(RMFAST_ISA), cpu_supported, scratch_bytes, run};
}  // namespace patch_rows_isa

}  // namespace rmfast
