// Arguments of the CPU reward head, free of torch: raw pointers and sizes.
#pragma once

#include <cstdint>

namespace rmfast {

enum class DType { f64, f32, bf16, f16 };
enum Norm : int64_t { kNone, kRms, kGemmaRms, kLayer };

// The rows that are read of hidden (B, T, d); strides in elements, the last dimension contiguous.
struct Rows {
  const void* data;
  DType dtype;
  int64_t d, per_batch, stride_b, stride_t;
  const int64_t* picked;  // (count,) indices into the B * T rows, or null for all
  int64_t count;
};

template <class Acc>
struct RewardHead {
  Rows rows;
  int64_t K, J, I;
  Norm norm;
  double eps;
  const Acc *weight, *bias, *norm_weight, *norm_bias;  // (K, d), (K,), (d,), (d,); all but the first may be null
  const Acc *directions, *strengths, *targets;         // (J, d), (I, J), (I, J) or null
  const int64_t* index;                                // (count,) or null
  Acc* workspace;                                      // of workspace_size() elements, filled by prepare()
  Acc* out;                                            // (count, K) or (count, I, K)
};

template <class Acc>
struct RewardHeadBackward {
  Rows rows;
  int64_t K;
  Norm norm;
  double eps;
  const Acc *grad, *weight, *norm_weight;  // (count, K), (K, d), (d,) or null
  Acc* workspace;                          // (K, d) gains as rows are read (row_dots.h), then (K,) their sums
  void* grad_rows;                         // (count, d) in hidden's dtype, or null
  Acc* partial;                            // (chunks, K, d), or null
  int64_t chunk;                           // rows of one partial sum
};

// Rows of one unit of work; a row's result does not depend on which others share its block.
constexpr int64_t kBlock = 32;

// One table for each instruction set that the library was built for.
template <class Acc>
struct RewardHeadKernels {
  void (*widen)(DType, const void* from, int64_t n, Acc* to);
  int64_t (*workspace_size)(const RewardHead<Acc>&);
  void (*prepare)(const RewardHead<Acc>&);
  void (*forward)(const RewardHead<Acc>&, int64_t first_block, int64_t last_block);
  void (*prepare_backward)(const RewardHeadBackward<Acc>&);
  void (*backward)(const RewardHeadBackward<Acc>&, int64_t first_chunk, int64_t last_chunk);
};

struct Isa {
  const char* name;
  bool (*supported)();
  RewardHeadKernels<float> f32;
  RewardHeadKernels<double> f64;
};

}  // namespace rmfast
