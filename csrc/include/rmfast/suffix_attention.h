// Arguments of the CPU suffix attention, free of torch: raw pointers and sizes.
#pragma once

#include <cstdint>

#include "rmfast/reward_head.h"

namespace rmfast {

// A (rows, heads, head_dim) tensor; strides in elements, the last dimension contiguous.
struct HeadRows {
  const void* data;
  int64_t stride_row, stride_head;
};

struct SuffixAttention {
  DType dtype;
  int64_t head_dim, heads, kv_heads;
  HeadRows q, k, v, prefix_k, prefix_v;
  double scale, softcap;  // softcap 0: none
  bool causal;
  int64_t window;                            // 0: none
  const void *sinks, *alibi;                 // (heads,) in double for f64, else float; null: none
  const int64_t* first;                      // (S + 1,) the suffixes' first rows of k and v
  const int64_t* first_q;                    // (S + 1,) and of q: the queries of a suffix are its last rows
  const int64_t *prefix_start, *prefix_len;  // (S,)
  const int64_t* order;                      // (S,) suffixes in the order of work: sharers of a prefix side by side
  void* out;                                 // (rows of q, heads, head_dim) contiguous
  void* lse;                                 // (rows of q, heads) contiguous, float or double
};

// A unit of work: `lanes` lanes of one K/V head from lane `lane` of the suffix order[at] on. A lane is a query row of
// one head, and the lanes of a suffix are its queries times the head's group. All lanes of a unit share prefix_start.
struct AttentionUnit {
  int64_t kv_head, at, lane, lanes;
};

// Positions of one step; steps start at multiples of it in the text, that is from the prefix's first row.
constexpr int64_t kKeys = 64;

// One table for each instruction set that the library was built for.
struct SuffixAttentionIsa {
  const char* name;
  bool (*supported)();
  int64_t (*lanes_per_panel)(DType dtype);
  int64_t (*scratch_bytes)(const SuffixAttention&, int64_t panels);  // of 64-byte-aligned memory for a unit
  void (*run)(const SuffixAttention&, const AttentionUnit&, void* scratch);
};

}  // namespace rmfast
