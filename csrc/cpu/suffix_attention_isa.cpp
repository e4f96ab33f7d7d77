// Suffix attention on the CPU, compiled once for each instruction set (RMFAST_ISA names it).
//
// A panel is as many lanes (query rows of the heads of one group) as three vectors hold, and every step is vertical:
// with Q transposed, Sᵀ = K Qᵀ and Oᵀ += Vᵀ P have keys and dimensions as rows and lanes as columns. So K and V are read
// as they lie, maxima and sums of the softmax need no shuffles, and a lane's arithmetic is the same wherever it
// stands: masked keys add exact zeros, and a step holds the keys of kKeys positions of the text from a multiple of kKeys
// on, be they rows of a prefix, of the suffix, or (in the one step that the suffix starts in) some of both. So a lane's bits
// are those of its text alone, however it is cut into prefix and suffix. Lanes of any suffixes may share a panel, and all
// that share a prefix read it together.

#include "rmfast/suffix_attention.h"
#include "rmfast/vmath.h"

#define RMFAST_STRING_(x) #x
#define RMFAST_STRING(x) RMFAST_STRING_(x)

namespace rmfast {
namespace {

constexpr int kVectors = 3;  // 8 × 3 accumulators of 32 registers with AVX-512, 4 × 3 of 16 elsewhere
template <class A>
constexpr int kLanes = kVectors * W<A>;
constexpr int kTile = kVectorBytes == 64 ? 8 : 4;
constexpr double kLog2e = 1.4426950408889634;
template <class A>
constexpr A kInf = A(__builtin_inf());

// c (M, lanes) = scale ⊙ c + A · B for B (depth, lanes), over depth in order; element (m, i) of A is
// a[m * stride + i], or a[i * stride + m] if Across. Without a scale c starts from zero.
template <class A, int M, int N, bool Across>
inline void tile(const A* a, int64_t stride, int64_t depth, const A* b, A* c, const A* scale) {
  V<A> acc[M][N] = {};
  if (scale)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
      for (int v = 0; v < N; ++v) acc[m][v] = load(c + m * kLanes<A> + v * W<A>) * load(scale + v * W<A>);
  for (int64_t i = 0; i < depth; ++i) {
    V<A> row[N];
#pragma GCC unroll 3
    for (int v = 0; v < N; ++v) row[v] = load(b + i * kLanes<A> + v * W<A>);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const A x = Across ? a[i * stride + m] : a[m * stride + i];
#pragma GCC unroll 3
      for (int v = 0; v < N; ++v) acc[m][v] += x * row[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (int v = 0; v < N; ++v) store(c + m * kLanes<A> + v * W<A>, acc[m][v]);
}

// A lane: where its query lies, and its own key and those it sees as positions relative to its suffix's first own row.
struct Lane {
  int64_t row, head, prefix_len, own, low, high;
  int32_t at;  // index into the order of suffixes, from the unit's first one on
};

// One panel's state; Qᵀ is (D, lanes), Oᵀ (D, lanes).
template <class A>
struct Panel {
  A *q, *o, *max, *sum;
  int vectors;
};

template <class A>
int64_t panel_size(const SuffixAttention& a) {
  return (2 * a.head_dim + 2) * kLanes<A>;
}

// Keys that are held at once: the own rows of several suffixes' first steps behind the end of the prefix that they share.
constexpr int64_t kHeld = 2 * kKeys;

// Keys of one step, converted: a suffix's or prefix's rows [base, base + count) as keys [offset, offset + count).
template <class A>
struct Step {
  A *k, *v, *raw;  // (kHeld, D), k with a tile's rows more; raw keeps the rows of v, keys `odd`, that are not finite
  int64_t odd[kHeld], n_odd;
  int64_t keys;
};

// Which of the step's keys a lane sees, or a panel reads: those of a prefix's end, and those behind it. Counted as these
// are, a lane's query is key own[part], be it in the step or not.
struct Seen {
  int64_t low[2], high[2], own[2];
  bool sees(int part) const { return low[part] < high[part]; }
  bool any() const { return sees(0) || sees(1); }
};

template <class A>
struct Scratch {
  A *scores, *low[2], *high[2], *own[2], *slopes, *alpha, *ones, *panels;
  Step<A> step;
  Lane* lanes;
  char* end;

  Scratch(const SuffixAttention& a, void* memory, int64_t panels_n) {
    char* at = static_cast<char*>(memory);
    auto take = [&](int64_t bytes) {
      char* out = at;
      at += (bytes + 63) / 64 * 64;
      return out;
    };
    auto floats = [&](int64_t n) { return reinterpret_cast<A*>(take(n * int64_t(sizeof(A)))); };
    scores = floats((kHeld + kTile) * kLanes<A>);
    for (int part = 0; part < 2; ++part) {
      low[part] = floats(kLanes<A>);
      high[part] = floats(kLanes<A>);
      own[part] = floats(kLanes<A>);
    }
    slopes = floats(kLanes<A>);
    alpha = floats(kLanes<A>);
    ones = floats(kLanes<A>);
    step.k = floats((kHeld + kTile) * a.head_dim);
    step.v = floats(kHeld * a.head_dim);
    step.raw = floats(kHeld * a.head_dim);
    panels = floats(panels_n * panel_size<A>(a));
    lanes = reinterpret_cast<Lane*>(take(panels_n * kLanes<A> * int64_t(sizeof(Lane))));
    end = at;
  }
};

template <class A>
inline bool finite(V<A> v) {
  const V<A> zero = v - v;
  return sum<A>(zero) == 0;
}

template <class A, class T>
inline V<A> convert(const T* from, int64_t d, A* to) {
  V<A> odd = {};
  int64_t i = 0;
  for (; i + W<A> <= d; i += W<A>) {
    const V<A> x = load(from + i);
    odd += x - x;
    store(to + i, x);
  }
  if (i < d) {
    const V<A> x = load_part<A>(from + i, d - i);
    odd += x - x;
    store_part<A>(to + i, x, d - i);
  }
  return odd;  // zeros, or a NaN where something is not finite
}

// Rows [first, first + count) of one head become the next keys of the step. A value row that is not finite is kept
// apart, zeros in its place: 0 · NaN must not reach lanes that do not see the key.
template <class A, class T>
void add_keys(Step<A>& step, const HeadRows& k, const HeadRows& v, int64_t head, int64_t first, int64_t count, int64_t d) {
  const T* from_k = static_cast<const T*>(k.data) + first * k.stride_row + head * k.stride_head;
  const T* from_v = static_cast<const T*>(v.data) + first * v.stride_row + head * v.stride_head;
  V<A> odd = {};
  const int64_t start = step.keys;
  for (int64_t i = 0; i < count; ++i) {
    // The next step's row on its way to L2: a head's rows lie too far apart for the hardware to guess. Past the last
    // row it fetches what nobody asked for, which is harmless.
    for (int64_t j = 0; j < d; j += 64 / int64_t(sizeof(T))) {
      __builtin_prefetch(from_k + (i + kKeys) * k.stride_row + j, 0, 2);
      __builtin_prefetch(from_v + (i + kKeys) * v.stride_row + j, 0, 2);
    }
    convert<A>(from_k + i * k.stride_row, d, step.k + (start + i) * d);
    odd += convert<A>(from_v + i * v.stride_row, d, step.v + (start + i) * d);
  }
  step.keys += count;
  if (finite<A>(odd)) return;
  for (int64_t i = start; i < step.keys; ++i) {
    A* row = step.v + i * d;
    if (finite<A>(convert<A>(row, d, step.raw + step.n_odd * d))) continue;
    memset(row, 0, sizeof(A) * d);
    step.odd[step.n_odd++] = i;
  }
}

// Logits to probabilities: updates max and sum, leaves the factor of what came before in alpha. v0: the panel's first vector.
template <class A, int N, bool Masked, bool Capped, bool Biased>
inline void softmax(Scratch<A>& s, const Panel<A>& panel, int64_t v0, const Seen& read, A cap) {
#pragma GCC unroll 3
  for (int v = 0; v < N; ++v) {
    A* scores = s.scores + v * W<A>;
    const V<A> old = load(panel.max + v * W<A>);
    V<A> max = old;
    for (int part = 0; part < 2; ++part) {
      const V<A> low = load(s.low[part] + (v0 + v) * W<A>), high = load(s.high[part] + (v0 + v) * W<A>);
      V<A> slope, own;
      if (Biased) {
        slope = load(s.slopes + (v0 + v) * W<A>);
        own = load(s.own[part] + (v0 + v) * W<A>);
      }
      for (int64_t k = read.low[part]; k < read.high[part]; ++k) {
        V<A> x = load(scores + k * kLanes<A>);
        if (Capped) x = tanh(x) * cap;
        if (Biased) x += slope * (splat(A(k)) - own);
        if (Masked) {
          const V<A> key = splat(A(k));
          x = low <= key ? x : splat(-kInf<A>);
          x = key < high ? x : splat(-kInf<A>);
        }
        if (Masked || Capped || Biased) store(scores + k * kLanes<A>, x);
        max = larger<A>(x, max);
      }
    }
    const V<A> safe = max == -kInf<A> ? V<A>{} : max;
    const V<A> alpha = exp2(old - safe);
    V<A> sum = load(panel.sum + v * W<A>) * alpha;
    for (int part = 0; part < 2; ++part)
      for (int64_t k = read.low[part]; k < read.high[part]; ++k) {
        const V<A> p = exp2(load(scores + k * kLanes<A>) - safe);
        store(scores + k * kLanes<A>, p);
        sum += p;
      }
    store(panel.max + v * W<A>, max);
    store(panel.sum + v * W<A>, sum);
    store(s.alpha + v * W<A>, alpha);
  }
}

template <class A, int N, bool Biased>
void softmax(Scratch<A>& s, const Panel<A>& panel, int64_t v0, const Seen& read, bool masked, A cap) {
  if (cap != 0)
    masked ? softmax<A, N, true, true, Biased>(s, panel, v0, read, cap)
           : softmax<A, N, false, true, Biased>(s, panel, v0, read, cap);
  else
    masked ? softmax<A, N, true, false, Biased>(s, panel, v0, read, cap)
           : softmax<A, N, false, false, Biased>(s, panel, v0, read, cap);
}

template <class A, int N>
void attend(Scratch<A>& s, const Panel<A>& panel, int64_t v0, const Seen& read, bool masked, bool biased, int64_t d, A cap) {
  const Step<A>& step = s.step;
  // The last tile of a part may pass its end: what it leaves there the other part writes anew, or nobody reads.
  for (int part = 0; part < 2; ++part)
    for (int64_t k = read.low[part]; k < read.high[part]; k += kTile)
      tile<A, kTile, N, false>(step.k + k * d, d, d, panel.q, s.scores + k * kLanes<A>, nullptr);

  biased ? softmax<A, N, true>(s, panel, v0, read, masked, cap) : softmax<A, N, false>(s, panel, v0, read, masked, cap);

  const A* scale = s.alpha;
  for (int part = 0; part < 2; ++part) {
    const int64_t k0 = read.low[part], k1 = read.high[part];
    if (k0 >= k1) continue;
    for (int64_t i = 0; i < d; i += kTile)  // d is a multiple of 8
      tile<A, kTile, N, true>(step.v + k0 * d + i, d, k1 - k0, s.scores + k0 * kLanes<A>, panel.o + i * kLanes<A>, scale);
    scale = s.ones;
  }
  for (int64_t j = 0; j < step.n_odd; ++j) {
    const int64_t k = step.odd[j];
    if (!(k >= read.low[0] && k < read.high[0]) && !(k >= read.low[1] && k < read.high[1])) continue;
    for (int64_t i = 0; i < d; ++i)
      for (int v = 0; v < N; ++v) {
        const V<A> p = load(s.scores + k * kLanes<A> + v * W<A>);
        A* o = panel.o + i * kLanes<A> + v * W<A>;
        store(o, p != 0 ? load(o) + p * step.raw[j * d + i] : load(o));
      }
  }
}

template <class A, class T>
struct Run {
  const SuffixAttention& a;
  const AttentionUnit& unit;
  const int64_t d, group, panels;
  Scratch<A> s;
  const A cap;  // in base-2 logits

  Run(const SuffixAttention& a, const AttentionUnit& unit, void* memory)
      : a(a),
        unit(unit),
        d(a.head_dim),
        group(a.heads / a.kv_heads),
        panels((unit.lanes + kLanes<A> - 1) / kLanes<A>),
        s(a, memory, panels),
        cap(A(a.softcap * kLog2e)) {}

  int64_t suffix(int64_t at) const { return a.order[unit.at + at]; }
  int64_t rows(int64_t at) const { return a.first[suffix(at) + 1] - a.first[suffix(at)]; }
  int64_t queries(int64_t at) const { return a.first_q[suffix(at) + 1] - a.first_q[suffix(at)]; }
  int64_t lanes_of(int64_t panel) const {
    const int64_t left = unit.lanes - panel * kLanes<A>;
    return left < kLanes<A> ? left : kLanes<A>;
  }
  Panel<A> panel(int64_t p) const {
    A* at = s.panels + p * panel_size<A>(a);
    const int64_t n = d * kLanes<A>;
    return {at, at + n, at + 2 * n, at + 2 * n + kLanes<A>, int((lanes_of(p) + W<A> - 1) / W<A>)};
  }

  void find_lanes() {
    int64_t at = 0, i = unit.lane / group, h = unit.lane % group;
    for (int64_t l = 0; l < unit.lanes; ++l) {
      while (i >= queries(at)) {
        i = h = 0;
        ++at;
      }
      const int64_t prefix = a.prefix_len[suffix(at)], last = rows(at), own = last - queries(at) + i;
      Lane& x = s.lanes[l];
      x.row = a.first_q[suffix(at)] + i;
      x.head = unit.kv_head * group + h;
      x.prefix_len = prefix;
      x.own = own;
      x.at = int32_t(at);
      x.low = a.window ? own - a.window + a.causal : -prefix;
      if (x.low < -prefix) x.low = -prefix;
      x.high = a.causal ? own + 1 : a.window ? own + a.window + 1 : last;
      if (x.high > last) x.high = last;
      if (++h == group) {
        h = 0;
        ++i;
      }
    }
  }

  // Of a lane's head, in base-2 logits. The bias of a key counts from the query, where it is 0, and not from the text's
  // first key: softmax is the same, near keys' logits stay small, and a sink moves along with them by `shift`.
  A slope(const Lane& x) const { return a.alibi ? A(static_cast<const A*>(a.alibi)[x.head] * kLog2e) : A(0); }
  double shift(const Lane& x) const { return double(slope(x)) * double(x.own + x.prefix_len); }

  // Scores are taken in base 2, or for a softcap in units of the cap.
  void start() {
    for (int l = 0; l < kLanes<A>; ++l) s.ones[l] = 1;
    const A factor = A(a.softcap != 0 ? a.scale / a.softcap : a.scale * kLog2e);
    for (int64_t p = 0; p < panels; ++p) {
      const Panel<A> x = panel(p);
      const int64_t n = lanes_of(p);
      for (int v = 0; v < x.vectors; ++v) {
        const T* from[W<A>];
        for (int l = 0; l < W<A>; ++l) {
          // Lanes past the last repeat it.
          const Lane& lane = s.lanes[p * kLanes<A> + (v * W<A> + l < n ? v * W<A> + l : n - 1)];
          from[l] = static_cast<const T*>(a.q.data) + lane.row * a.q.stride_row + lane.head * a.q.stride_head;
        }
        for (int64_t i = 0; i < d; i += W<A>) {
          const int64_t some = d - i < W<A> ? d - i : W<A>;
          V<A> rows[W<A>];
          for (int l = 0; l < W<A>; ++l)
            rows[l] = (some == W<A> ? load(from[l] + i) : load_part<A>(from[l] + i, some)) * factor;
          transpose<A>(rows);
          for (int64_t j = 0; j < some; ++j) store(x.q + (i + j) * kLanes<A> + v * W<A>, rows[j]);
        }
      }
      memset(x.o, 0, sizeof(A) * d * kLanes<A>);
      for (int64_t l = 0; l < kLanes<A>; ++l) {
        x.max[l] = -kInf<A>;
        x.sum[l] = 0;
        if (!a.sinks) continue;
        const Lane& lane = s.lanes[p * kLanes<A> + (l < n ? l : n - 1)];
        x.max[l] = A(static_cast<const A*>(a.sinks)[lane.head] * kLog2e - shift(lane));
        x.sum[l] = 1;
      }
    }
  }

  // One panel over the step's keys, or its vectors with lanes that see any; seen_by gives each lane's own.
  template <class SeenBy>
  void attend_panel(int64_t p, SeenBy seen_by) {
    const int64_t n = lanes_of(p);
    const Lane* lanes = s.lanes + p * kLanes<A>;
    Seen read = {{kHeld, kHeld}, {0, 0}, {0, 0}}, each[kLanes<A>];
    int64_t first = n, last = 0;
    for (int64_t l = 0; l < n; ++l) {
      Seen& seen = each[l] = seen_by(lanes[l]);
      for (int part = 0; part < 2; ++part) {
        if (!seen.sees(part)) {
          seen.low[part] = seen.high[part] = 0;
          continue;
        }
        read.low[part] = seen.low[part] < read.low[part] ? seen.low[part] : read.low[part];
        read.high[part] = seen.high[part] > read.high[part] ? seen.high[part] : read.high[part];
        first = first < l ? first : l;
        last = l;
      }
    }
    if (!read.any()) return;
    // A suffix with one query has few lanes here; the other vectors need not wait for its keys.
    const int64_t v0 = first / W<A>, v1 = last / W<A> + 1, end = v1 * W<A> < n ? v1 * W<A> : n;
    bool masked = false;
    for (int part = 0; part < 2; ++part)
      for (int64_t l = v0 * W<A>; l < v1 * W<A>; ++l) {
        s.low[part][l] = l < n ? A(each[l].low[part]) : A(0);
        s.high[part][l] = l < n ? A(each[l].high[part]) : A(0);
        if (a.alibi) s.own[part][l] = l < n ? A(each[l].own[part]) : A(0);
        if (l < end && read.sees(part))
          masked |= each[l].low[part] > read.low[part] || each[l].high[part] < read.high[part];
      }
    if (a.alibi)
      for (int64_t l = v0 * W<A>; l < v1 * W<A>; ++l) s.slopes[l] = l < n ? slope(lanes[l]) : A(0);
    const Panel<A> x = panel(p);
    const Panel<A> some = {x.q + v0 * W<A>, x.o + v0 * W<A>, x.max + v0 * W<A>, x.sum + v0 * W<A>, int(v1 - v0)};
    switch (some.vectors) {
      case 1: return attend<A, 1>(s, some, v0, read, masked, a.alibi, d, cap);
      case 2: return attend<A, 2>(s, some, v0, read, masked, a.alibi, d, cap);
      default: return attend<A, 3>(s, some, v0, read, masked, a.alibi, d, cap);
    }
  }

  void clear_step() { s.step.keys = s.step.n_odd = 0; }

  // Where the step begins in which a suffix starts: rows of its prefix from there on are read with its own first ones.
  int64_t step_of(int64_t at) const { return a.prefix_len[suffix(at)] / kKeys * kKeys; }

  // Whole steps of prefixes.
  void prefixes() {
    int64_t first = INT64_MAX, last = 0;
    for (int64_t l = 0; l < unit.lanes; ++l) {
      const Lane& x = s.lanes[l];
      const int64_t low = x.low + x.prefix_len, high = step_of(x.at);
      if (low >= high) continue;
      first = low < first ? low : first;
      last = high > last ? high : last;
    }
    const int64_t start = a.prefix_start[suffix(0)];
    for (int64_t b = first < last ? first / kKeys * kKeys : last; b < last; b += kKeys) {
      clear_step();
      add_keys<A, T>(s.step, a.prefix_k, a.prefix_v, unit.kv_head, start + b, kKeys, d);
      for (int64_t p = 0; p < panels; ++p)
        attend_panel(p, [&](const Lane& x) {
          const int64_t low = x.low + x.prefix_len - b;
          return Seen{{low < 0 ? 0 : low, 0}, {step_of(x.at) > b ? kKeys : 0, 0}, {x.own + x.prefix_len - b, 0}};
        });
    }
  }

  // Keys of the suffixes themselves, and before them those of the prefix in the same step. Suffixes that end in their first
  // step share one: each has its keys in one step only, as alone.
  void own_rows() {
    struct Piece {
      int64_t offset, count;
    } pieces[kKeys];
    const int64_t suffixes = s.lanes[unit.lanes - 1].at + 1;
    int64_t lane = 0, next = 0;
    for (int64_t at = 0; at < suffixes; at = next) {
      // The lanes of suffixes [at, next), whose own keys are held at once, or of one longer suffix.
      const int64_t first_lane = lane, base = step_of(at);
      const auto in_step = [&](int64_t i) { return a.prefix_len[suffix(i)] - base; };  // of its prefix
      int64_t total = 0;
      bool together = true;
      for (next = at; next < suffixes && together; ++next) {
        const bool ends = rows(next) <= kKeys - in_step(next);
        if (next > at && (step_of(next) != base || !ends || total + rows(next) > kKeys || next - at == kKeys)) break;
        together = ends;
        pieces[next - at] = {total, rows(next)};
        total += rows(next);
        while (lane < unit.lanes && s.lanes[lane].at == next) ++lane;
      }
      if (first_lane == lane) continue;
      const int64_t p0 = first_lane / kLanes<A>, p1 = (lane - 1) / kLanes<A> + 1;
      int64_t low = INT64_MAX, high = 0;  // of the positions that are seen
      for (int64_t l = first_lane; l < lane; ++l) {
        const Lane& x = s.lanes[l];
        low = x.low + x.prefix_len < low ? x.low + x.prefix_len : low;
        high = x.high + x.prefix_len > high ? x.high + x.prefix_len : high;
      }
      const int64_t pool = a.prefix_start[suffix(at)] + base;
      // Suffixes are in the order of their prefixes' lengths: the last one's end holds those of the others.
      const int64_t shared = low < a.prefix_len[suffix(next - 1)] ? in_step(next - 1) : 0;
      if (low < base + kKeys) {
        clear_step();
        if (shared) add_keys<A, T>(s.step, a.prefix_k, a.prefix_v, unit.kv_head, pool, shared, d);
        for (int64_t i = at; i < next; ++i) {
          const int64_t most = kKeys - in_step(i);
          add_keys<A, T>(s.step, a.k, a.v, unit.kv_head, a.first[suffix(i)], rows(i) < most ? rows(i) : most, d);
        }
        for (int64_t p = p0; p < p1; ++p)
          attend_panel(p, [&](const Lane& x) {
            if (x.at < at || x.at >= next) return Seen{{0, 0}, {0, 0}, {0, 0}};
            const int64_t before = in_step(x.at), most = kKeys - before, from = x.low + before;
            const int64_t offset = shared + pieces[x.at - at].offset;
            return Seen{{from < 0 ? 0 : from, offset + (x.low > 0 ? x.low : 0)},
                        {shared ? before : 0, offset + (x.high < most ? x.high : most)},
                        {x.own + before, offset + x.own}};
          });
      }
      if (together) continue;
      const int64_t prefix = base + in_step(at), first = low > base + kKeys ? low / kKeys * kKeys : base + kKeys;
      for (int64_t b = first; b < high; b += kKeys) {
        clear_step();
        const int64_t row = b - prefix, left = high - b;
        add_keys<A, T>(s.step, a.k, a.v, unit.kv_head, a.first[suffix(at)] + row, left < kKeys ? left : kKeys, d);
        for (int64_t p = p0; p < p1; ++p)
          attend_panel(p, [&](const Lane& x) {
            if (x.at != at) return Seen{{0, 0}, {0, 0}, {0, 0}};
            return Seen{{0, x.low > row ? x.low - row : 0},
                        {0, x.high - row < kKeys ? x.high - row : kKeys},
                        {0, x.own - row}};
          });
      }
    }
  }

  void finish() {
    for (int64_t p = 0; p < panels; ++p) {
      const Panel<A> x = panel(p);
      const Lane* lanes = s.lanes + p * kLanes<A>;
      for (int v = 0; v < x.vectors; ++v) {
        const int64_t left = lanes_of(p) - v * W<A>, n = left < W<A> ? left : W<A>;
        const V<A> inverse = A(1) / load(x.sum + v * W<A>);
        int64_t at[W<A>];
        for (int64_t l = 0; l < n; ++l) {
          const Lane& lane = lanes[v * W<A> + l];
          at[l] = lane.row * a.heads + lane.head;
          const double sum = __builtin_log2(double(x.sum[v * W<A> + l]));
          static_cast<A*>(a.lse)[at[l]] = A((x.max[v * W<A> + l] + sum + shift(lane)) / kLog2e);
        }
        for (int64_t i = 0; i < d; i += W<A>) {
          const int64_t some = d - i < W<A> ? d - i : W<A>;
          V<A> rows[W<A>];
          for (int64_t j = 0; j < some; ++j) rows[j] = load(x.o + (i + j) * kLanes<A> + v * W<A>) * inverse;
          for (int64_t j = some; j < W<A>; ++j) rows[j] = V<A>{};
          transpose<A>(rows);
          for (int64_t l = 0; l < n; ++l) {
            T* to = static_cast<T*>(a.out) + at[l] * d + i;
            some == W<A> ? store(to, rows[l]) : store_part<A>(to, rows[l], some);
          }
        }
      }
    }
  }
};

template <class A, class T>
void run(const SuffixAttention& a, const AttentionUnit& unit, void* scratch) {
  Run<A, T> work(a, unit, scratch);
  work.find_lanes();
  work.start();
  work.prefixes();
  work.own_rows();
  work.finish();
}

void run_unit(const SuffixAttention& a, const AttentionUnit& unit, void* scratch) {
  switch (a.dtype) {
    case DType::f64: return run<double, double>(a, unit, scratch);
    case DType::bf16: return run<float, bf16>(a, unit, scratch);
    case DType::f16: return run<float, f16>(a, unit, scratch);
    default: return run<float, float>(a, unit, scratch);
  }
}

int64_t lanes_per_panel(DType dtype) { return dtype == DType::f64 ? kLanes<double> : kLanes<float>; }

int64_t scratch_bytes(const SuffixAttention& a, int64_t panels) {
  return a.dtype == DType::f64 ? Scratch<double>(a, nullptr, panels).end - static_cast<char*>(nullptr)
                               : Scratch<float>(a, nullptr, panels).end - static_cast<char*>(nullptr);
}

}  // namespace

namespace suffix_attention {
extern const SuffixAttentionIsa RMFAST_ISA;
const SuffixAttentionIsa RMFAST_ISA = {RMFAST_STRING(RMFAST_ISA), cpu_supported, lanes_per_panel, scratch_bytes, run_unit};
}  // namespace suffix_attention

}  // namespace rmfast
