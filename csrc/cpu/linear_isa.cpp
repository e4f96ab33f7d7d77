// y = x · weightᵀ + bias in fp32 for weights of 16 bits, compiled once for each instruction set (RMFAST_ISA).
//
// A product's blocks of weight are packed into panels before they are multiplied, in any BLAS; here they are widened on
// the way, so that 16-bit weights cost no more than 32-bit ones, and half of the memory's time where rows are few. An
// element of y is the sum over blocks of kDepth of chains of FMAs in order, whatever else is computed beside it: its
// bits do not depend on the number of rows, their place or the threads.

#include "rmfast/linear.h"

#include "rmfast/gemm.h"

#define RMFAST_STRING_(x) #x
#define RMFAST_STRING(x) RMFAST_STRING_(x)

namespace rmfast {
namespace {

constexpr int kColumns = kTileCols<float>;
constexpr int64_t kPanels = 20;      // packed at once: 480 KiB to 960 KiB
constexpr int64_t kBlockRows = 96;   // of x, copied at once: 96 KiB
constexpr int kLanes = W<float>;

// Lanes i of v[0 .. kLanes) become vector i.
inline void transpose(V<float>* v) {
#if defined(__clang__)
  float from[kLanes][kLanes];
  memcpy(from, v, sizeof from);
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) v[i][j] = from[j][i];
#else
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    Vector<int32_t>::type low, high;
    for (int i = 0; i < kLanes; ++i) {
      low[i] = i & step ? kLanes + i - step : i;
      high[i] = i & step ? kLanes + i : i + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & step) continue;
      const V<float> a = v[i], b = v[i + step];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + step] = __builtin_shuffle(a, b, high);
    }
  }
#endif
}

// What one 32-bit word of a row holds: two neighbours in 16 bits, or one value.
template <class T>
constexpr int kPerWord = 4 / int(sizeof(T));

inline V<float> half_of(V<float> words, bf16, int which) {
  const U32 bits = (U32)words;
  return (V<float>)(which ? bits & 0xffff0000u : bits << 16);
}
inline V<float> half_of(V<float> words, f16, int which) {
  const U32 bits = (U32)words;
  const U16 halves = __builtin_convertvector(which ? bits >> 16 : bits & 0xffff, U16);
  f16 lanes[kLanes];
  memcpy(lanes, &halves, sizeof lanes);
  return load(lanes);
}
inline V<float> half_of(V<float> words, float, int) { return words; }

// to (depth, kColumns) = the transpose of `count` rows of weight from `from` on, zeros behind them.
template <class T>
void pack_rows(const T* from, int64_t stride, int64_t count, int64_t depth, float* to) {
  constexpr int kStep = kLanes * kPerWord<T>;
  if (count < kColumns) memset(to, 0, sizeof(float) * depth * kColumns);
  const int64_t whole = depth - depth % kStep;
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    for (int64_t i = 0; i < whole; i += kStep) {
      V<float> v[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) memcpy(&v[l], from + (j + l) * stride + i, sizeof v[l]);
      transpose(v);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l)
#pragma GCC unroll 2
        for (int h = 0; h < kPerWord<T>; ++h)
          store(to + (i + l * kPerWord<T> + h) * kColumns + j, half_of(v[l], T{}, h));
    }
    for (int64_t i = whole; i < depth; ++i)
      for (int l = 0; l < kLanes; ++l) to[i * kColumns + j + l] = to_acc<float>(from[(j + l) * stride + i]);
  }
  for (; j < count; ++j)
    for (int64_t i = 0; i < depth; ++i) to[i * kColumns + j] = to_acc<float>(from[j * stride + i]);
}

// to (depth, kColumns) = `count` columns of weight from `from` on, zeros behind them.
template <class T>
void pack_across(const T* from, int64_t stride, int64_t count, int64_t depth, float* to) {
  for (int64_t i = 0; i < depth; ++i, from += stride, to += kColumns)
    for (int64_t j = 0; j < kColumns; j += kLanes) {
      const int64_t n = count - j;
      store(to + j, n >= kLanes ? load(from + j) : n > 0 ? load_part<float>(from + j, n) : V<float>{});
    }
}

template <int M>
inline void tile_rows(int64_t rows, const float* a, int64_t depth, const float* b, float* c, int64_t stride) {
  if constexpr (M > 1)
    if (rows < M) return tile_rows<M - 1>(rows, a, depth, b, c, stride);
  tile<float, M>(a, kDepth, depth, b, kColumns, c, stride);
}

// The first n columns of c (rows, kColumns) += a · b.
void edge(int64_t rows, const float* a, int64_t depth, const float* b, float* c, int64_t stride, int64_t n) {
  float part[kTileRows * kColumns] = {};
  for (int64_t r = 0; r < rows; ++r) memcpy(part + r * kColumns, c + r * stride, sizeof(float) * n);
  tile_rows<kTileRows>(rows, a, depth, b, part, kColumns);
  for (int64_t r = 0; r < rows; ++r) memcpy(c + r * stride, part + r * kColumns, sizeof(float) * n);
}

template <class T>
void run_of(const Linear& s, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, void* scratch) {
  float* const packed = static_cast<float*>(scratch);
  float* const block = packed + kPanels * kDepth * kColumns;
  const T* weight = static_cast<const T*>(s.weight);
  const int64_t end = panel_end * kColumns < s.outer ? panel_end * kColumns : s.outer;
  for (int64_t p0 = panel; p0 < panel_end; p0 += kPanels) {
    const int64_t p1 = p0 + kPanels < panel_end ? p0 + kPanels : panel_end;
    for (int64_t i = 0; i < s.inner; i += kDepth) {
      const int64_t depth = s.inner - i < kDepth ? s.inner - i : kDepth;
      const bool last = i + depth == s.inner;
      for (int64_t p = p0; p < p1; ++p) {
        const int64_t j = p * kColumns, count = s.outer - j < kColumns ? s.outer - j : kColumns;
        float* to = packed + (p - p0) * kDepth * kColumns;
        s.across ? pack_across(weight + i * s.stride_weight + j, s.stride_weight, count, depth, to)
                 : pack_rows(weight + j * s.stride_weight + i, s.stride_weight, count, depth, to);
      }
      for (int64_t r0 = row; r0 < row_end; r0 += kBlockRows) {
        const int64_t r1 = r0 + kBlockRows < row_end ? r0 + kBlockRows : row_end;
        for (int64_t r = r0; r < r1; ++r)
          memcpy(block + (r - r0) * kDepth, s.x + r * s.stride_x + i, sizeof(float) * depth);
        for (int64_t p = p0; p < p1; ++p) {
          const int64_t j = p * kColumns, count = end - j < kColumns ? end - j : kColumns;
          const float* b = packed + (p - p0) * kDepth * kColumns;
          for (int64_t r = r0; r < r1; r += kTileRows) {
            const int64_t rows = r1 - r < kTileRows ? r1 - r : kTileRows;
            float* c = s.y + r * s.outer + j;
            const float* a = block + (r - r0) * kDepth;
            if (i == 0)
              for (int64_t k = 0; k < rows; ++k) memset(c + k * s.outer, 0, sizeof(float) * count);
            if (count == kColumns)
              tile_rows<kTileRows>(rows, a, depth, b, c, s.outer);
            else
              edge(rows, a, depth, b, c, s.outer, count);
            if (last && s.bias)
              for (int64_t k = 0; k < rows; ++k)
                for (int64_t l = 0; l < count; ++l) c[k * s.outer + l] += s.bias[j + l];
          }
        }
      }
    }
  }
}

void run(const Linear& s, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, void* scratch) {
  switch (s.dtype) {
    case DType::bf16: return run_of<bf16>(s, row, row_end, panel, panel_end, scratch);
    case DType::f16: return run_of<f16>(s, row, row_end, panel, panel_end, scratch);
    default: return run_of<float>(s, row, row_end, panel, panel_end, scratch);
  }
}

int64_t scratch_bytes(const Linear&) { return int64_t(sizeof(float)) * (kPanels * kColumns + kBlockRows) * kDepth; }

}  // namespace

namespace linear {
extern const LinearIsa RMFAST_ISA;
const LinearIsa RMFAST_ISA = {RMFAST_STRING(RMFAST_ISA), cpu_supported, kColumns, kTileRows, scratch_bytes, run};
}  // namespace linear

}  // namespace rmfast
