// Rank correlations and medians of neurons on the CPU, compiled once for each instruction set (RMFAST_ISA).
//
// A lane of a vector is a neuron, so a tile of W neurons is sorted by one network of branch-free minima and maxima: at
// 512 texts 1,050 cycles a neuron on Zen 4, of 2,200 for all; a radix sort of each neuron (8-bit digits) takes 7,000.
// What is sorted are words of the value's leading bits above the text's number. Where bits were cut off, the few texts
// whose words agree in all that is left (a pair among 512 normal fp32 values) are put in order by their full keys
// afterwards. Ranks go back to the order of texts, where all correlations are one matrix product in integers: exact.

#include "rmfast/neuron_stats.h"
#include "rmfast/vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define RMFAST_STRING_(x) #x
#define RMFAST_STRING(x) RMFAST_STRING_(x)
#define RMFAST_INLINE inline __attribute__((always_inline))

namespace rmfast {
namespace {

// ---------------------------------------------------------------------------------------------------------- network

// Vectors sorted in registers: half of those there are (the other half holds minima), and a merge's levels in them.
#if defined(__AVX512F__)
constexpr int kSorted = 16, kLevels = 4;
#else
constexpr int kSorted = 8, kLevels = 3;
#endif

template <class K>
RMFAST_INLINE void exchange(V<K>& low, V<K>& high) {
  const V<K> a = low, b = high;
  low = a < b ? a : b;
  high = a < b ? b : a;
}

// Batcher's odd-even merge of the sorted even and odd halves of v[From], v[From + Step], ... below From + N.
template <class K, int N, int From, int Step, int I>
RMFAST_INLINE void odd_even_pairs(V<K>* v) {
  if constexpr (I + Step < From + N) {
    exchange<K>(v[I], v[I + Step]);
    odd_even_pairs<K, N, From, Step, I + 2 * Step>(v);
  }
}
template <class K, int N, int From, int Step>
RMFAST_INLINE void odd_even_merge(V<K>* v) {
  if constexpr (2 * Step < N) {
    odd_even_merge<K, N, From, 2 * Step>(v);
    odd_even_merge<K, N, From + Step, 2 * Step>(v);
    odd_even_pairs<K, N, From, Step, From + Step>(v);
  } else {
    exchange<K>(v[From], v[From + Step]);
  }
}
template <class K, int N, int From = 0>
RMFAST_INLINE void sort_block(V<K>* v) {
  if constexpr (N > 1) {
    sort_block<K, N / 2, From>(v);
    sort_block<K, N / 2, From + N / 2>(v);
    odd_even_merge<K, N, From, 1>(v);
  }
}

// Two sorted halves to two bitonic ones, all of the lower below all of the upper.
template <class K, int N, int I = 0>
RMFAST_INLINE void flip(V<K>* v) {
  if constexpr (I < N / 2) {
    exchange<K>(v[I], v[N - 1 - I]);
    flip<K, N, I + 1>(v);
  }
}
// A bitonic sequence to a sorted one.
template <class K, int N, int I = 0>
RMFAST_INLINE void clean(V<K>* v) {
  if constexpr (N > 1) {
    if constexpr (I < N / 2) {
      exchange<K>(v[I], v[I + N / 2]);
      clean<K, N, I + 1>(v);
    } else {
      clean<K, N / 2>(v);
      clean<K, N / 2>(v + N / 2);
    }
  }
}

// The first Levels levels of the merge of two sorted runs of `half` vectors; the upper one holds `count` texts.
template <class K, int Levels>
void merge_runs(V<K>* w, int64_t half, int64_t count) {
  constexpr int H = 1 << (Levels - 1);
  const int64_t step = half / H;
  if (count > step) count = step;
  V<K>* const upper = w + half;
  for (int64_t j = 0; j < count; ++j) {
    V<K> v[2 * H];
#pragma GCC unroll 16
    for (int i = 0; i < H; ++i) {
      v[i] = w[half - 1 - j - (H - 1 - i) * step];
      v[H + i] = upper[j + i * step];
    }
    flip<K, 2 * H>(v);
    clean<K, H>(v);
    clean<K, H>(v + H);
#pragma GCC unroll 16
    for (int i = 0; i < H; ++i) {
      w[half - 1 - j - (H - 1 - i) * step] = v[i];
      upper[j + i * step] = v[H + i];
    }
  }
}

template <class K>
void clean_runs(V<K>* w, int64_t size, int64_t count) {
  const int64_t step = size / kSorted;
  if (count > step) count = step;
  for (int64_t j = 0; j < count; ++j) {
    V<K> v[kSorted];
#pragma GCC unroll 16
    for (int i = 0; i < kSorted; ++i) v[i] = w[j + i * step];
    clean<K, kSorted>(v);
#pragma GCC unroll 16
    for (int i = 0; i < kSorted; ++i) w[j + i * step] = v[i];
  }
}

// A bitonic sequence of `size` vectors, of which only the first `count` hold texts; what lies behind them is larger.
template <class K>
void clean_all(V<K>* w, int64_t size, int64_t count) {
  clean_runs<K>(w, size, count);
  if (size > kSorted)
    for (int64_t i = 0; i < kSorted && i * (size / kSorted) < count; ++i)
      clean_all<K>(w + i * (size / kSorted), size / kSorted, count - i * (size / kSorted));
}

// Sorts `size` vectors, kSorted times a power of two, whose blocks are sorted already.
template <class K>
void sort(V<K>* w, int64_t size, int64_t count) {
  if (size == kSorted) return;
  const int64_t half = size / 2;
  sort<K>(w, half, count < half ? count : half);
  if (count <= half) return;
  sort<K>(w + half, half, count - half);
  // All levels but a multiple of kLevels, which clean_all does.
  const int levels = (__builtin_ctzll(size / kSorted) - 1) % kLevels + 1;
  switch (levels) {
    case 1: merge_runs<K, 1>(w, half, count - half); break;
    case 2: merge_runs<K, 2>(w, half, count - half); break;
    case 3: merge_runs<K, 3>(w, half, count - half); break;
    default: merge_runs<K, kLevels>(w, half, count - half);
  }
  const int64_t run = size >> levels;
  for (int64_t i = 0; i < count; i += run) clean_all<K>(w + i, run, count - i);
}

// -------------------------------------------------------------------------------------------------------- one tile

template <class T>
struct Format;  // its bits as a signed integer, and those of infinity
template <>
struct Format<float> {
  typedef int32_t Bits;
  static constexpr int64_t kInfinity = 0x7f800000;
};
template <>
struct Format<bf16> {
  typedef int16_t Bits;
  static constexpr int64_t kInfinity = 0x7f80;
};
template <>
struct Format<f16> {
  typedef int16_t Bits;
  static constexpr int64_t kInfinity = 0x7c00;
};
template <>
struct Format<double> {
  typedef int64_t Bits;
  static constexpr int64_t kInfinity = int64_t(0x7ff) << 52;
};

// Sign and magnitude as one number in the order of the values, the same for 0 and −0. X: K, or a vector of K.
template <class K, class T, class X>
RMFAST_INLINE X key_of(X bits) {
  constexpr K magnitude = K((uint64_t(1) << (8 * sizeof(T) - 1)) - 1);
  const X sign = bits >> int(8 * sizeof(K) - 1);
  return ((bits & magnitude) ^ sign) - sign;
}

template <class T, class K>
T value_of(K key) {
  typename Format<T>::Bits bits = key < 0 ? -key : key;
  if (key < 0) bits |= typename Format<T>::Bits(uint64_t(1) << (8 * sizeof(T) - 1));
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class K>
struct Unsigned;
template <>
struct Unsigned<int32_t> {
  typedef uint32_t type;
};
template <>
struct Unsigned<int64_t> {
  typedef uint64_t type;
};

constexpr int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Words of 32 bits serve fp32 up to 4096 texts: beyond, too many of them agree (at 8192 texts 190,000 cycles a neuron,
// 137,000 with words of 64 bits). 16-bit values fit whole as long as ranks fit int16.
inline bool narrow(const NeuronStats& s) {
  return s.texts <= (s.dtype == DType::f32 ? 4096 : s.dtype == DType::f64 ? 0 : 32768);
}

// Halves of words: a word holds a rank and a text's number once it is in its place.
template <class K>
struct Halves;
template <>
struct Halves<int32_t> {
  typedef int16_t Rank;
  typedef uint16_t Text;
  typedef int16_t Row __attribute__((vector_size(kVectorBytes / 2)));
  typedef int64_t Sum;
};
template <>
struct Halves<int64_t> {
  typedef int32_t Rank;
  typedef uint32_t Text;
  typedef int32_t Row __attribute__((vector_size(kVectorBytes / 2)));
  typedef double Sum;  // exact below 2^53: up to 300,000 texts
};
template <class K>
using Row = typename Halves<K>::Row;

// Sums of the products of int16 neighbours.
inline V<int32_t> pair_products(V<int32_t> a, V<int32_t> b) {
#if defined(__AVX512BW__)
  return (V<int32_t>)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (V<int32_t>)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (V<int32_t>)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Two rows of ranks, those of the same lane side by side.
inline V<int32_t> interleaved(const Row<int32_t>* rows) {
#if defined(__SSE2__) && !defined(__AVX2__)
  const __m128i first = _mm_loadl_epi64((const __m128i*)rows), second = _mm_loadl_epi64((const __m128i*)(rows + 1));
  return (V<int32_t>)_mm_unpacklo_epi16(first, second);
#elif defined(__clang__)
  V<int32_t> pair;
  for (int i = 0; i < W<int32_t>; ++i) pair[i] = int32_t((rows[0][i] & 0xffff) | uint32_t(rows[1][i]) << 16);
  return pair;
#else
  typedef int16_t Pair __attribute__((vector_size(kVectorBytes)));
  Pair pair, from;
  memcpy(&pair, rows, sizeof pair);
  for (int i = 0; i < 2 * W<int32_t>; ++i) from[i] = i / 2 + i % 2 * W<int32_t>;
  return (V<int32_t>)__builtin_shuffle(pair, from);
#endif
}

// The products of N columns of the attributes' ranks (of the ranks with themselves: N = 0) with all lanes, (N, W).
// Texts come in pairs, and `other` holds those of the attributes as two int16 in one number.
template <int N>
void multiply(const Row<int32_t>* ranks, int64_t texts, const int32_t* other, int64_t stride, int64_t* sums) {
  constexpr int M = N ? N : 1;
  const int64_t pairs = (texts + 1) / 2, exact = INT32_MAX / (2 * (texts - 1) * (texts - 1));  // pairs that fit int32
  for (int i = 0; i < M * W<int32_t>; ++i) sums[i] = 0;
  for (int64_t first = 0; first < pairs; first += exact) {
    const int64_t last = pairs - first < exact ? pairs : first + exact;
    V<int32_t> part[M] = {};
    for (int64_t t = first; t < last; ++t) {
      const V<int32_t> pair = interleaved(ranks + 2 * t);
#pragma GCC unroll 4
      for (int b = 0; b < M; ++b) part[b] += pair_products(pair, N ? V<int32_t>{} + other[t * stride + b] : pair);
    }
    for (int b = 0; b < M; ++b)
      for (int l = 0; l < W<int32_t>; ++l) sums[b * W<int32_t> + l] += part[b][l];
  }
}

template <int N>
void multiply(const Row<int64_t>* ranks, int64_t texts, const int32_t* other, int64_t stride, double* sums) {
  constexpr int M = N ? N : 1;
  V<double> part[M] = {};
  for (int64_t t = 0; t < texts; ++t) {
    const V<double> rank = __builtin_convertvector(ranks[t], V<double>);
#pragma GCC unroll 4
    for (int b = 0; b < M; ++b) part[b] += rank * (N ? V<double>{} + double(other[t * stride + b]) : rank);
  }
  memcpy(sums, part, sizeof part);
}

template <class K>
struct Tile {
  static constexpr int L = W<K>;
  static constexpr int kHalf = 4 * sizeof(K);
  typedef typename Unsigned<K>::type U;
  typedef V<U> Words;
  typedef typename Halves<K>::Rank Rank;
  typedef typename Halves<K>::Text Text;
  typedef typename Halves<K>::Sum Sum;

  const NeuronStats& s;
  const int64_t n, size;  // texts, and vectors of the network
  int bits = 0;           // of a text's number
  V<K>*words, *panel;     // panel: keys, (kNeurons / L, n) vectors
  Row<K>* ranks;          // in the order of texts
  int32_t *flagged, *attributes;

  static int64_t network(int64_t n) {
    int64_t size = kSorted;
    while (size < n) size *= 2;
    return size;
  }
  static int64_t scratch_bytes(const NeuronStats& s) {
    const int64_t n = s.texts, pairs = sizeof(K) == 4 ? (n + 1) / 2 * s.attributes : 0;
    return kVectorBytes * (network(n) + kNeurons / L * n + kSorted + (n + 1) / 2) + up(8 * n, 64) + up(4 * pairs, 64);
  }
  Tile(const NeuronStats& stats, void* scratch) : s(stats), n(s.texts), size(network(n)), words((V<K>*)scratch) {
    panel = words + size;
    ranks = (Row<K>*)(panel + kNeurons / L * n + kSorted);  // sort_words reads whole blocks
    flagged = (int32_t*)(ranks + up(n, 2));
    attributes = (int32_t*)((char*)flagged + up(8 * n, 64));
    while (int64_t(1) << bits < up(n, kSorted)) ++bits;
    for (int64_t p = up(n, kSorted); p < size; ++p) words[p] = V<K>{} + largest();
    ranks[up(n, 2) - 1] = Row<K>{};
    int32_t* pair = attributes;
    for (int64_t t = 0; t < n && sizeof(K) == 4; t += 2)
      for (int64_t b = 0; b < s.attributes; ++b) {
        const int32_t* rank = s.ranks + t * s.attributes + b;
        *pair++ = int32_t((*rank & 0xffff) | (t + 1 < n ? uint32_t(rank[s.attributes]) << 16 : 0));
      }
  }
  static constexpr K largest() { return K(~U(0) >> 1); }

  template <class T>
  void load(int64_t neuron, int64_t count) {
    typedef typename Format<T>::Bits Bits;
    typedef Bits Part __attribute__((vector_size(L * sizeof(Bits))));
    const Bits* x = static_cast<const Bits*>(s.x) + neuron * s.stride_neuron;
    const int64_t whole = s.stride_neuron == 1 ? count / L : 0;
    if (whole)
      for (int64_t t = 0; t < n; ++t)
        for (int64_t i = 0; i < whole; ++i) {
          Part part;
          memcpy(&part, x + t * s.stride_text + i * L, sizeof part);
          panel[i * n + t] = key_of<K, T>(__builtin_convertvector(part, V<K>));
        }
    for (int64_t i = whole; i * L < count; ++i) {
      K* to = (K*)(panel + i * n);
      for (int l = 0; l < L; ++l) {
        const Bits* from = x + (i * L + l) * s.stride_neuron;
        const bool real = i * L + l < count;
        for (int64_t t = 0; t < n; ++t) to[t * L + l] = real ? key_of<K, T>(K(from[t * s.stride_text])) : K(0);
      }
    }
  }

  // The words of a tile, sorted: above the text's number the leading bits of key − low, as many as there is room for.
  // Gives the lanes that lost bits.
  V<K> sort_words(const V<K>* keys, V<K> low, V<K> high) {
    V<K> shift, lost;
    for (int l = 0; l < L; ++l) {
      const U range = U(high[l]) - U(low[l]);
      shift[l] = (sizeof(K) == 4 ? __builtin_clz(uint32_t(range | 1)) : __builtin_clzll(range | 1));
      lost[l] = shift[l] < bits ? -1 : 0;
    }
    const Words mask = Words{} + (~U(0) << bits), sign = Words{} + (U(1) << (8 * sizeof(K) - 1));
    for (int64_t first = 0; first < n; first += kSorted) {
      V<K> v[kSorted];
#pragma GCC unroll 16
      for (int i = 0; i < kSorted; ++i) {
        const Words word = ((((Words)keys[first + i] - (Words)low) << (Words)shift) & mask) | U(first + i);
        v[i] = first + i < n ? (V<K>)(word ^ sign) : V<K>{} + largest();
      }
      sort_block<K, kSorted>(v);
#pragma GCC unroll 16
      for (int i = 0; i < kSorted; ++i) words[first + i] = v[i];
    }
    sort<K>(words, size, n);
    return lost;
  }

  // Replaces what a word holds of a key by the place where the run of equal ones starts. Lists in `flagged` the places
  // and lanes (bits) that go on with a run in a lane of `lost`; gives their number.
  int64_t find_runs(V<K> lost) {
    const V<K> text = V<K>{} + K((U(1) << bits) - 1);
    V<K> start = {}, before = ~words[0];
    int64_t count = 0;
    for (int64_t p = 0; p < n; ++p) {
      const V<K> word = words[p], same = ((word ^ before) & ~text) == 0;
      start = same ? start : V<K>{} + K(p);
      words[p] = start << kHalf | (word & text);
      before = word;
      if (const uint32_t lanes = lanes_of<K>(same & lost)) {
        flagged[2 * count] = int32_t(p);
        flagged[2 * count++ + 1] = int32_t(lanes);
      }
    }
    return count;
  }

  // Puts the runs listed in the order of their keys, and splits them into runs of equal keys.
  void split_runs(int64_t count, const V<K>* tile_keys) {
    int64_t done[L] = {};
    for (int64_t f = 0; f < count; ++f)
      for (uint32_t lanes = flagged[2 * f + 1]; lanes; lanes &= lanes - 1) {
        const int l = __builtin_ctz(lanes);
        const int64_t first = flagged[2 * f] - 1;
        if (first < done[l]) continue;
        K* run = (K*)(words + first) + l;
        const K* keys = (const K*)tile_keys + l;
        auto key = [&](int64_t i) { return keys[Text(run[i * L]) * L]; };
        int64_t length = 1;
        K differ = 0;
        for (; first + length < n && run[length * L] >> kHalf == first; ++length) differ |= key(length) ^ key(0);
        done[l] = first + length - 1;
        if (!differ) continue;
        // Shellsort: nearly all runs have two texts, but one outlier can make a run of all others.
        for (int64_t gap = length / 2; gap; gap = gap == 2 ? 1 : gap * 5 / 11)
          for (int64_t i = gap; i < length; ++i) {
            const K moved = run[i * L], moved_key = key(i);
            int64_t at = i;
            for (; at >= gap && key(at - gap) > moved_key; at -= gap) run[at * L] = run[(at - gap) * L];
            run[at * L] = moved;
          }
        int64_t start = first;
        for (int64_t i = 1; i < length; ++i) {
          if (key(i) != key(i - 1)) start = first + i;
          run[i * L] = K(U(start) << kHalf | Text(run[i * L]));
        }
      }
  }

  // start + end − (n − 1), twice the centred rank, above the text's number, then to the place of the text.
  void store_ranks() {
    const V<K> text = V<K>{} + K(Text(~Text(0)));
    V<K> end = {}, next = V<K>{} + K(n);
    for (int64_t p = n - 1; p >= 0; --p) {
      const V<K> start = words[p] >> kHalf;
      end = next == K(p + 1) ? V<K>{} + K(p) : end;
      next = start;
      words[p] = (start + end - K(n - 1)) << kHalf | (words[p] & text);
    }
    Rank* to = (Rank*)ranks;
    for (int64_t p = 0; p < n; ++p) {
      const Text* halves = (const Text*)(words + p);
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) to[int64_t(halves[2 * l]) * L + l] = Rank(halves[2 * l + 1]);
    }
  }

  template <class A, int N>
  void correlate(int64_t b, const Sum* squares, A* out, int64_t count) const {
    Sum sums[N * L];
    multiply<N>(ranks, n, (sizeof(K) == 4 ? attributes : s.ranks) + b, s.attributes, sums);
    for (int i = 0; i < N; ++i)
      for (int64_t l = 0; l < count; ++l) {
        const double square = double(squares[l]) * s.squares[b + i];
        out[l * s.attributes + b + i] = A(square == 0 ? 0 : double(sums[i * L + l]) / __builtin_sqrt(square));
      }
  }

  template <class A, class T>
  void run(int64_t neuron, const V<K>* keys) {
    V<K> low = keys[0], high = keys[0];
    for (int64_t t = 1; t < n; ++t) {
      low = keys[t] < low ? keys[t] : low;
      high = keys[t] > high ? keys[t] : high;
    }
    const V<K> lost = sort_words(keys, low, high);
    if (const int64_t count = find_runs(lost)) split_runs(count, keys);
    store_ranks();

    const int64_t count = s.neurons - neuron < L ? s.neurons - neuron : L;
    A* out = static_cast<A*>(s.spearman) + neuron * s.attributes;
    Sum squares[L];
    multiply<0>(ranks, n, nullptr, 0, squares);
    int64_t b = 0;
    for (; b + 4 <= s.attributes; b += 4) correlate<A, 4>(b, squares, out, count);
    for (; b < s.attributes; ++b) correlate<A, 1>(b, squares, out, count);

    for (int64_t l = 0; l < count; ++l) {
      auto middle = [&](int64_t p) { return to_acc<A>(value_of<T>(keys[Text(words[p][l])][l])); };
      const A lower = middle((n - 1) / 2), upper = middle(n / 2);
      static_cast<A*>(s.median)[neuron + l] = n % 2 ? lower : (lower + upper) / A(2);
      if (high[l] <= Format<T>::kInfinity && low[l] >= -Format<T>::kInfinity) continue;
      static_cast<A*>(s.median)[neuron + l] = A(__builtin_nan(""));
      for (b = 0; b < s.attributes; ++b) out[l * s.attributes + b] = A(__builtin_nan(""));
    }
  }
};

template <class K, class A, class T>
void run_panels(const NeuronStats& s, int64_t first, int64_t last, void* scratch) {
  Tile<K> tile(s, scratch);
  for (int64_t neuron = first * kNeurons; neuron < s.neurons && neuron < last * kNeurons; neuron += kNeurons) {
    const int64_t left = s.neurons - neuron, count = left < kNeurons ? left : kNeurons;
    tile.template load<T>(neuron, count);
    for (int64_t i = 0; i < count; i += W<K>) tile.template run<A, T>(neuron + i, tile.panel + i / W<K> * s.texts);
  }
}

int64_t scratch_bytes(const NeuronStats& s) {
  return narrow(s) ? Tile<int32_t>::scratch_bytes(s) : Tile<int64_t>::scratch_bytes(s);
}

template <class T>
void run_of(const NeuronStats& s, int64_t first, int64_t last, void* scratch) {
  narrow(s) ? run_panels<int32_t, float, T>(s, first, last, scratch)
            : run_panels<int64_t, float, T>(s, first, last, scratch);
}

void run(const NeuronStats& s, int64_t first, int64_t last, void* scratch) {
  switch (s.dtype) {
    case DType::f64: return run_panels<int64_t, double, double>(s, first, last, scratch);
    case DType::bf16: return run_of<bf16>(s, first, last, scratch);
    case DType::f16: return run_of<f16>(s, first, last, scratch);
    default: return run_of<float>(s, first, last, scratch);
  }
}

}  // namespace

namespace neuron_stats {
extern const NeuronStatsIsa RMFAST_ISA;
const NeuronStatsIsa RMFAST_ISA = {RMFAST_STRING(RMFAST_ISA), cpu_supported, scratch_bytes, run};
}  // namespace neuron_stats

}  // namespace rmfast
