// Merges a tile of products into the k largest of each row, compiled once for each instruction set (RMFAST_ISA).
//
// A tile is compared with the smallest of a row's k values, a vector at a time; of 16,384 random features 230 pass for
// k = 32. Those are gathered, and the k largest selected whenever there are 2k: 6 µs a row in tiles of 2,048, where
// torch.topk takes 30. What is compared are words of a value's ordered bits above its index' complement, so that of equal values
// the one of the lowest index is the largest.

#include "rmfast/topk_encode.h"
#include "rmfast/vec.h"

#define RMFAST_STRING_(x) #x
#define RMFAST_STRING(x) RMFAST_STRING_(x)

namespace rmfast {
namespace {

template <class A>
struct WordOf;
template <>
struct WordOf<float> {
  typedef int64_t type;
};
template <>
struct WordOf<double> {
  typedef __int128 type;
};
template <class A>
using Word = typename WordOf<A>::type;
template <class A>
constexpr int kKeyBits = 8 * sizeof(A);
template <class A>
constexpr Integer<A> kNanKey = Integer<A>((uint64_t(1) << (kKeyBits<A> - 1)) - 1);
// Greater words are greater values, NaN above all and −0 as 0, or of equal values the one of lower index.
template <class A>
inline Word<A> word_of(A value, int64_t index) {
  value += 0;
  Integer<A> bits;
  memcpy(&bits, &value, sizeof bits);
  const Integer<A> key = value == value ? bits ^ ((bits >> (kKeyBits<A> - 1)) & kNanKey<A>) : kNanKey<A>;
  const uint64_t low = ~uint64_t(index) & (~uint64_t(0) >> (64 - kKeyBits<A>));
  return Word<A>(key) * (Word<A>(1) << kKeyBits<A>) + low;
}

template <class A>
inline A value_of(Word<A> word) {
  const Integer<A> key = Integer<A>(word >> kKeyBits<A>);
  Integer<A> bits = key ^ ((key >> (kKeyBits<A> - 1)) & kNanKey<A>);
  A value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class A>
inline int64_t index_of(Word<A> word) {
  return int64_t(~uint64_t(word) & (~uint64_t(0) >> (64 - kKeyBits<A>)));
}

// Largest first.
template <class T>
void sort(T* words, int64_t n) {
  static const int64_t kGaps[] = {8929, 3905, 1750, 701, 301, 132, 57, 23, 10, 4, 1};
  for (const int64_t gap : kGaps)
    for (int64_t i = gap; i < n; ++i) {
      const T word = words[i];
      int64_t j = i;
      for (; j >= gap && words[j - gap] < word; j -= gap) words[j] = words[j - gap];
      words[j] = word;
    }
}

// Quickselect of different words: the k-th largest to its place, larger ones before it. Without branches on the words.
template <class T>
void select(T* words, int64_t n, int64_t k) {
  int64_t low = 0, high = n - 1;
  const auto order = [&](int64_t i, int64_t j) {
    const T a = words[i], b = words[j];
    words[i] = a < b ? a : b;
    words[j] = a < b ? b : a;
  };
  while (low < high) {
    order(low, high);
    order((low + high) / 2, high);
    order(low, (low + high) / 2);
    const T pivot = words[(low + high) / 2];
    words[(low + high) / 2] = words[high];
    int64_t end = low;
    for (int64_t i = low; i < high; ++i) {
      const T word = words[i];
      words[i] = words[end];
      words[end] = word;
      end += word > pivot;
    }
    words[high] = words[end];
    words[end] = pivot;
    if (end == k - 1) return;
    if (end < k - 1)
      low = end + 1;
    else
      high = end - 1;
  }
}

// How many words are gathered beyond k before the k largest are selected: few keep the threshold high.
inline int64_t gathered(int64_t k) { return k < 16 ? 16 : k; }

template <class A, class T>
void merge_row(const TopkMerge& s, const T* x, A* values, int64_t* indices, Word<A>* words) {
  constexpr int N = 4;  // vectors compared together
  const A* bias = static_cast<const A*>(s.bias);
  const int64_t before = s.first < s.k ? s.first : s.k, most = s.k + gathered(s.k);
  int64_t count = 0, j = 0;
  A least = 0;
  const auto value_at = [&](int64_t i) { return to_acc<A>(x[i]) + (bias ? bias[i] : A(0)); };
  const auto load_words = [&] {
    for (; count < before; ++count) words[count] = word_of(values[count], indices[count]);
  };
  const auto cut = [&] {
    select(words, count, s.k);
    count = s.k;
    least = value_of<A>(words[s.k - 1]);
  };
  if (before < s.k) {
    load_words();
    for (; count < s.k && j < s.columns; ++j) words[count++] = word_of(value_at(j), s.first + j);
    if (count == s.k) cut();
  } else {
    least = values[s.k - 1];
  }
  for (; j < s.columns && least == least; j += N * W<A>) {  // k times NaN is final
    const V<A> limit = V<A>{} + least;
    V<A> v[N];
    typename Vector<Integer<A>>::type within[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const int64_t at = j + i * W<A>;
      if (j + N * W<A> <= s.columns) {
        v[i] = load(x + at);
        if (bias) v[i] += load(bias + at);
      } else {
        v[i] = limit;  // no candidate
        for (int l = 0; l < W<A> && at + l < s.columns; ++l) v[i][l] = value_at(at + l);
      }
      within[i] = v[i] <= limit;
    }
    if (!lanes_of<Integer<A>>(~(within[0] & within[1] & within[2] & within[3]))) continue;
    load_words();
    // One loop over the bits of all vectors: a loop for each would be mispredicted twice as often.
    uint64_t beyond = 0;
    A lanes[N * W<A>];
    for (int i = 0; i < N; ++i) {
      beyond |= uint64_t(lanes_of<Integer<A>>(~within[i])) << (i * W<A>);
      store(lanes + i * W<A>, v[i]);
    }
    for (; beyond; beyond &= beyond - 1) {
      const int l = __builtin_ctzll(beyond);
      words[count++] = word_of(lanes[l], s.first + j + l);
      if (count == most) cut();
    }
  }
  if (s.last) load_words();
  if (!count) return;
  if (count > s.k) cut();
  if (s.last) sort(words, count);
  for (int64_t i = 0; i < count; ++i) {
    values[i] = value_of<A>(words[i]);
    indices[i] = index_of<A>(words[i]);
  }
}

template <class A, class T>
void run_rows(const TopkMerge& s, int64_t first, int64_t last, void* scratch) {
  for (int64_t n = first; n < last; ++n)
    merge_row<A, T>(s, static_cast<const T*>(s.products) + n * s.stride, static_cast<A*>(s.values) + n * s.k,
                    s.indices + n * s.k, static_cast<Word<A>*>(scratch));
}

void run(const TopkMerge& s, int64_t first, int64_t last, void* scratch) {
  switch (s.dtype) {
    case DType::f64: return run_rows<double, double>(s, first, last, scratch);
    case DType::bf16: return run_rows<float, bf16>(s, first, last, scratch);
    case DType::f16: return run_rows<float, f16>(s, first, last, scratch);
    default: return run_rows<float, float>(s, first, last, scratch);
  }
}

int64_t scratch_bytes(const TopkMerge& s) {
  return (s.k + gathered(s.k)) * int64_t(s.dtype == DType::f64 ? sizeof(Word<double>) : sizeof(Word<float>));
}

}  // namespace

namespace topk_encode {
extern const TopkMergeIsa RMFAST_ISA;
const TopkMergeIsa RMFAST_ISA = {RMFAST_STRING(RMFAST_ISA), cpu_supported, scratch_bytes, run};
}  // namespace topk_encode

}  // namespace rmfast
