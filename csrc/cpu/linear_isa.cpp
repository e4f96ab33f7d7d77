// y = x · weightᵀ + bias in fp32 for weights of 16 bits, compiled once for each instruction set (RMFAST_ISA).
//
// A product's blocks of weight are packed into panels before they are multiplied, in any BLAS; here they are widened on
// the way, so that 16-bit weights cost no more than 32-bit ones, and half of the memory's time where rows are few. For
// up to kFewRows rows each packed weight would be read once: there they go straight into the sums.
//
// Either way an element of y is the sum over blocks of kDepth of chains of FMAs in order, whatever else is computed
// beside it: its bits do not depend on the number of rows, their place or the threads.

#include "rmfast/linear.h"

#include "rmfast/gemm.h"

#define RMFAST_STRING_(x) #x
#define RMFAST_STRING(x) RMFAST_STRING_(x)

namespace rmfast {
namespace {

constexpr int kColumns = kTileCols<float>;
// Packed at once: 528 KiB to 1056 KiB. Each block of x is copied once for all of them: 20 would take it twice for the 21.5
// that two threads have each of topk_encode's 2,048 features in AVX-512 (5%), three times in AVX2 (2%).
constexpr int64_t kPanels = 22;
constexpr int64_t kBlockRows = 96;   // of x, copied at once: 96 KiB
constexpr int kLanes = W<float>;

// v[i][r] = v[r][i] within each four lanes.
inline void transpose_fours(V<float>* v) {
#if defined(__AVX512F__)
  const auto low = [](auto a, auto b) { return (__m512d)_mm512_unpacklo_ps((__m512)a, (__m512)b); };
  const auto high = [](auto a, auto b) { return (__m512d)_mm512_unpackhi_ps((__m512)a, (__m512)b); };
  const auto low_pairs = [](__m512d a, __m512d b) { return (V<float>)_mm512_unpacklo_pd(a, b); };
  const auto high_pairs = [](__m512d a, __m512d b) { return (V<float>)_mm512_unpackhi_pd(a, b); };
#elif defined(__AVX2__)
  const auto low = [](auto a, auto b) { return (__m256d)_mm256_unpacklo_ps((__m256)a, (__m256)b); };
  const auto high = [](auto a, auto b) { return (__m256d)_mm256_unpackhi_ps((__m256)a, (__m256)b); };
  const auto low_pairs = [](__m256d a, __m256d b) { return (V<float>)_mm256_unpacklo_pd(a, b); };
  const auto high_pairs = [](__m256d a, __m256d b) { return (V<float>)_mm256_unpackhi_pd(a, b); };
#else
  typedef V<float> F;
  const auto low = [](F a, F b) { return F{a[0], b[0], a[1], b[1]}; };
  const auto high = [](F a, F b) { return F{a[2], b[2], a[3], b[3]}; };
  const auto low_pairs = [](F a, F b) { return F{a[0], a[1], b[0], b[1]}; };
  const auto high_pairs = [](F a, F b) { return F{a[2], a[3], b[2], b[3]}; };
#endif
  const auto a = low(v[0], v[1]), b = high(v[0], v[1]), c = low(v[2], v[3]), d = high(v[2], v[3]);
  v[0] = low_pairs(a, c);
  v[1] = high_pairs(a, c);
  v[2] = low_pairs(b, d);
  v[3] = high_pairs(b, d);
}

// Words [0, 4) of rows 0, 4, 8, ..., each in four lanes. Put together on their way from memory: moving lanes between the
// quarters of registers afterwards takes twice the time.
inline V<float> fours_of(const void* rows, int64_t bytes_apart) {
#if defined(__AVX2__)
  const char* from = static_cast<const char*>(rows);
  const auto four = [&](int r) { return _mm_loadu_ps((const float*)(from + 4 * r * bytes_apart)); };
#endif
#if defined(__AVX512F__)
  __m512 v = _mm512_castps128_ps512(four(0));
  v = _mm512_insertf32x4(v, four(1), 1);
  v = _mm512_insertf32x4(v, four(2), 2);
  return (V<float>)_mm512_insertf32x4(v, four(3), 3);
#elif defined(__AVX2__)
  return (V<float>)_mm256_insertf128_ps(_mm256_castps128_ps256(four(0)), four(1), 1);
#else
  return load(static_cast<const float*>(rows));
#endif
}

// What one 32-bit word of a row holds: two neighbours in 16 bits, or one value.
template <class T>
constexpr int kPerWord = 4 / int(sizeof(T));

// out[0 .. kPerWord<T>): the values of words, lane by lane.
inline void widen(V<float> words, bf16, V<float>* out) {
  out[0] = (V<float>)((U32)words << 16);
  out[1] = (V<float>)((U32)words & 0xffff0000u);
}
inline void widen(V<float> words, f16, V<float>* out) {
  // Even halves below, odd ones above.
#if defined(__AVX512F__)
  const __m128i apart = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  const __m512i fours = _mm512_shuffle_epi8((__m512i)words, _mm512_broadcast_i32x4(apart));
  const __m512i halves = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), fours);
  out[0] = (V<float>)_mm512_cvtph_ps(_mm512_castsi512_si256(halves));
  out[1] = (V<float>)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
#elif defined(__AVX2__) && defined(__F16C__)
  const __m128i apart = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  const __m256i fours = _mm256_shuffle_epi8((__m256i)words, _mm256_broadcastsi128_si256(apart));
  const __m256i halves = _mm256_permute4x64_epi64(fours, 0xd8);
  out[0] = (V<float>)_mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  out[1] = (V<float>)_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
#else
  f16 halves[2 * kLanes];
  memcpy(halves, &words, sizeof halves);
  for (int l = 0; l < kLanes; ++l)
    for (int h = 0; h < 2; ++h) out[h][l] = to_float(halves[2 * l + h]);
#endif
}
inline void widen(V<float> words, float, V<float>* out) { out[0] = words; }

// v[i], lane r: word i of row r.
template <class T>
inline void load_words(const T* rows, int64_t stride, V<float>* v) {
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r, rows += stride) {
    asm("" : "+r"(rows));  // or GCC keeps all addresses of all words, on the stack
#pragma GCC unroll 4
    for (int i = 0; i < kLanes; i += 4) v[i + r] = fours_of(rows + i * kPerWord<T>, stride * int64_t(sizeof(T)));
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) transpose_fours(v + i);
}

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
load_words(from + j * stride + i, stride, v);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        V<float> wide[kPerWord<T>];
        widen(v[l], T{}, wide);
#pragma GCC unroll 2
        for (int h = 0; h < kPerWord<T>; ++h) store(to + (i + l * kPerWord<T> + h) * kColumns + j, wide[h]);
      }
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

constexpr int64_t kFewRows = 8;

inline bool few(const Linear& s) { return s.rows <= kFewRows && s.outer >= kColumns && !s.across; }

// The first `rows` of M rows of x against kLanes · G columns, of which the first `skip` are left out. Sums go in the
// packed way's order, but each weight goes from memory through the registers into them.
template <class T, int M, int G>
void few_columns(const Linear& s, int64_t row, int64_t rows, int64_t column, int64_t skip) {
  constexpr int kLine = 64 / int(sizeof(T)), kStep = kLanes * kPerWord<T>;
  const T* weight = static_cast<const T*>(s.weight) + column * s.stride_weight;
  const float* x[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) x[m] = s.x + (row + (m < rows ? m : 0)) * s.stride_x;
  V<float> total[M][G] = {};
  for (int64_t start = 0; start < s.inner; start += kDepth) {
    const int64_t end = s.inner - start < kDepth ? s.inner : start + kDepth;
    V<float> acc[M][G] = {};
    int64_t i = start;
    // A line of the cache at a time, since lines 4 KiB apart, of one column and the next, push each other out.
    for (; i + kLine <= end; i += kLine)
#pragma GCC unroll 3
      for (int g = 0; g < G; ++g)
#pragma GCC unroll 2
        for (int step = 0; step < kLine; step += kStep) {
          V<float> v[kLanes];
          load_words(weight + g * kLanes * s.stride_weight + i + step, s.stride_weight, v);
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) {
            V<float> wide[kPerWord<T>];
            widen(v[l], T{}, wide);
#pragma GCC unroll 2
            for (int h = 0; h < kPerWord<T>; ++h)
#pragma GCC unroll 8
              for (int m = 0; m < M; ++m) acc[m][g] += x[m][i + step + l * kPerWord<T> + h] * wide[h];
          }
        }
    for (; i < end; ++i)
#pragma GCC unroll 3
      for (int g = 0; g < G; ++g) {
        float lanes[kLanes];
        for (int l = 0; l < kLanes; ++l) lanes[l] = to_acc<float>(weight[(g * kLanes + l) * s.stride_weight + i]);
        const V<float> v = load(lanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[m][g] += x[m][i] * v;
      }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
      for (int g = 0; g < G; ++g) total[m][g] += acc[m][g];
  }
  for (int m = 0; m < rows; ++m) {
    float out[G * kLanes];
    for (int g = 0; g < G; ++g)
      store(out + g * kLanes, s.bias ? total[m][g] + load(s.bias + column + g * kLanes) : total[m][g]);
    memcpy(s.y + (row + m) * s.outer + column + skip, out + skip, sizeof(float) * (G * kLanes - skip));
  }
}

// Columns [begin, end) of at most M rows.
template <class T, int M>
void few_rows(const Linear& s, int64_t row, int64_t rows, int64_t begin, int64_t end) {
  if constexpr (M > 1)
    if (rows <= M / 2) return few_rows<T, M / 2>(s, row, rows, begin, end);
  // Sums enough to hide an FMA's latency, of the registers that the weights leave.
  constexpr int kGroups = kVectorBytes == 64 ? (M == 1 ? 2 : 1) : (M == 1 ? 3 : M <= 4 ? 2 : 1);
  constexpr int64_t kWidth = kGroups * kLanes;
  for (; begin < end; begin += kWidth) {
    const int64_t column = begin + kWidth <= end ? begin : end - kWidth;
    few_columns<T, M, kGroups>(s, row, rows, column, begin - column);
  }
}

template <class T>
void run_of(const Linear& s, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, void* scratch) {
  float* const packed = static_cast<float*>(scratch);
  float* const block = packed + kPanels * kDepth * kColumns;
  const T* weight = static_cast<const T*>(s.weight);
  const int64_t end = panel_end * kColumns < s.outer ? panel_end * kColumns : s.outer;
  if (few(s)) return few_rows<T, kFewRows>(s, row, row_end - row, panel * kColumns, end);
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

int64_t scratch_bytes(const Linear& s) {
  return few(s) ? 0 : int64_t(sizeof(float)) * (kPanels * kColumns + kBlockRows) * kDepth;
}

}  // namespace

namespace linear {
extern const LinearIsa RMFAST_ISA;
const LinearIsa RMFAST_ISA = {RMFAST_STRING(RMFAST_ISA), cpu_supported, kColumns, kTileRows, scratch_bytes, run};
}  // namespace linear

}  // namespace rmfast
