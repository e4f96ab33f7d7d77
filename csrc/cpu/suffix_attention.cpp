// Registers the CPU suffix attention with torch: unpacks tensors, cuts the work into units and spreads them over threads.

#include "rmfast/suffix_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace rmfast {

namespace suffix_attention {
#ifdef RMFAST_X86
extern const SuffixAttentionIsa avx512, avx2;
#endif
extern const SuffixAttentionIsa portable;
}  // namespace suffix_attention

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const SuffixAttentionIsa& isa() {
#ifdef RMFAST_X86
  static const SuffixAttentionIsa* const all[] = {&suffix_attention::avx512, &suffix_attention::avx2,
                                                  &suffix_attention::portable};
#else
  static const SuffixAttentionIsa* const all[] = {&suffix_attention::portable};
#endif
  return required(choose_isa(all));
}

HeadRows head_rows(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

std::vector<int64_t> integers(const std::optional<Tensor>& t, int64_t size) {
  if (!t) return std::vector<int64_t>(size);
  if (t->scalar_type() == ScalarType::Int) {
    const auto* from = static_cast<const int32_t*>(t->const_data_ptr());
    return {from, from + size};
  }
  const auto* from = static_cast<const int64_t*>(t->const_data_ptr());
  return {from, from + size};
}

struct Work {
  std::vector<AttentionUnit> units;  // costly ones first
  double cost = 0;                   // lanes × keys
  int64_t panels = 0;                // of the largest unit
};

// Cuts the lanes of each run of suffixes that share a prefix_start into units of at most max_panels panels.
Work plan(const SuffixAttention& a, const std::vector<int64_t>& order, int64_t lanes_per_panel, int64_t threads) {
  const int64_t group = a.heads / a.kv_heads;
  // Panels of a unit share converted K and V; half a MiB of their state fits in L2.
  const int64_t state = 2 * a.head_dim * lanes_per_panel * (a.dtype == DType::f64 ? 8 : 4);
  const int64_t all_lanes = a.first_q[order.size()] * a.heads;
  const int64_t for_balance = all_lanes / (lanes_per_panel * threads * 4);
  const int64_t max_panels = std::max<int64_t>(1, std::min((int64_t(1) << 19) / state, for_balance));
  const int64_t max_lanes = max_panels * lanes_per_panel;

  Work work;
  std::vector<double> costs;
  AttentionUnit unit{};
  double cost = 0;
  auto flush = [&] {
    if (unit.lanes == 0) return;
    for (unit.kv_head = 0; unit.kv_head < a.kv_heads; ++unit.kv_head) {
      work.units.push_back(unit);
      costs.push_back(cost);
    }
    work.cost += cost * a.kv_heads;
    work.panels = std::max(work.panels, (unit.lanes + lanes_per_panel - 1) / lanes_per_panel);
    unit.lanes = 0;
    cost = 0;
  };
  for (size_t at = 0; at < order.size(); ++at) {
    const int64_t s = order[at], prefix = a.prefix_len[s], lanes = (a.first_q[s + 1] - a.first_q[s]) * group;
    const int64_t last = (a.first[s + 1] - a.first[s]) * group;  // the lanes of its keys
    const int64_t before = at ? order[at - 1] : s;
    const bool shares = prefix == 0 ? a.prefix_len[before] == 0
                                    : a.prefix_len[before] != 0 && a.prefix_start[before] == a.prefix_start[s];
    if (!shares) flush();
    for (int64_t lane = 0; lane < lanes;) {
      if (unit.lanes == 0) {
        unit.at = int64_t(at);
        unit.lane = lane;
      }
      const int64_t take = std::min(max_lanes - unit.lanes, lanes - lane);
      cost += double(take) * double(prefix + (a.causal ? (last - lanes + lane + take / 2) : last) / group + 1);
      unit.lanes += take;
      lane += take;
      if (unit.lanes == max_lanes) flush();
    }
  }
  flush();
  std::vector<int64_t> by_cost(work.units.size());
  std::iota(by_cost.begin(), by_cost.end(), 0);
  std::stable_sort(by_cost.begin(), by_cost.end(), [&](int64_t x, int64_t y) { return costs[x] > costs[y]; });
  std::vector<AttentionUnit> sorted;
  for (int64_t i : by_cost) sorted.push_back(work.units[i]);
  work.units = std::move(sorted);
  return work;
}

struct Aligned {
  void* data;
  explicit Aligned(int64_t bytes) : data(::operator new(size_t(bytes), std::align_val_t(64))) {}
  ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
};

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                                     const std::optional<Tensor>& cu_queries, const std::optional<Tensor>& prefix_k,
                                     const std::optional<Tensor>& prefix_v, const std::optional<Tensor>& prefix_start,
                                     const std::optional<Tensor>& prefix_len, double scale, bool causal, double softcap,
                                     int64_t window, const std::optional<Tensor>& sinks,
                                     const std::optional<Tensor>& alibi) {
  const int64_t suffixes = cu_seqlens.size(0) - 1;
  const std::vector<int64_t> first = integers(cu_seqlens, suffixes + 1),
                             first_q = cu_queries ? integers(cu_queries, suffixes + 1) : first,
                             start = integers(prefix_start, suffixes), len = integers(prefix_len, suffixes);
  std::vector<int64_t> order(suffixes);
  std::iota(order.begin(), order.end(), 0);
  if (prefix_len)
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
      return std::make_tuple(len[x] ? start[x] : -1, len[x]) < std::make_tuple(len[y] ? start[y] : -1, len[y]);
    });

  SuffixAttention a{};
  a.dtype = dtype_of(q);
  a.head_dim = q.size(2);
  a.heads = q.size(1);
  a.kv_heads = k.size(1);
  a.q = head_rows(q);
  a.k = head_rows(k);
  a.v = head_rows(v);
  if (prefix_k) a.prefix_k = head_rows(*prefix_k);
  if (prefix_v) a.prefix_v = head_rows(*prefix_v);
  a.scale = scale;
  a.softcap = softcap;
  a.causal = causal;
  a.window = window;
  a.sinks = sinks ? sinks->const_data_ptr() : nullptr;
  a.alibi = alibi ? alibi->const_data_ptr() : nullptr;
  a.first = first.data();
  a.first_q = first_q.data();
  a.prefix_start = start.data();
  a.prefix_len = len.data();
  a.order = order.data();
  Tensor out = empty(q.scalar_type(), {q.size(0), a.heads, a.head_dim});
  Tensor lse = empty(a.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float, {q.size(0), a.heads});
  a.out = out.mutable_data_ptr();
  a.lse = lse.mutable_data_ptr();

  const SuffixAttentionIsa& run = isa();
  const int64_t threads = torch::stable::get_num_threads();
  const Work work = plan(a, order, run.lanes_per_panel(a.dtype), threads);
  // Threads take the next unit as they come free. Below about 2^18 multiply-adds (30 µs) a second one does not pay.
  const int64_t count = int64_t(work.units.size());
  const int64_t workers = work.cost * double(a.head_dim) < double(1 << 18) ? 1 : std::min(threads, count);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    Aligned scratch(run.scratch_bytes(a, work.panels));
    for (; begin < end; ++begin)
      for (int64_t i; (i = next.fetch_add(1)) < count;) run.run(a, work.units[i], scratch.data);
  });
  return {out, lse};
}

}  // namespace
}  // namespace rmfast

STABLE_TORCH_LIBRARY_IMPL(rmfast_native, CPU, m) { m.impl("suffix_attention", TORCH_BOX(&rmfast::attention)); }
