// Arguments of the CPU token-wise ops, free of torch: raw pointers and sizes. Rows [first, last) of a call are one
// piece of work; a row's result does not depend on the piece it is in.
#pragma once

#include <cstdint>

#include "rmfast/reward_head.h"

namespace rmfast {

// A vector of any float dtype, converted before it is used; null: none.
struct Gain {
  const void* data;
  DType dtype;
};

// (rows, d) with the last dimension contiguous; the stride in elements.
struct Matrix {
  const void* data;
  int64_t stride;
};

struct RmsNorm {
  DType dtype;
  bool wide;  // the residual and the sum are float32 beside 16-bit x and y
  int64_t d;
  Matrix x, residual;  // residual.data null: y = norm(x)
  Gain weight, post_weight;
  bool post, gemma;
  double eps;
  void *y, *sum;  // (rows, d) contiguous; sum where there is a residual
};

// (rows, heads, head_dim) with the last dimension contiguous; strides in elements.
struct Heads {
  const void* data;
  int64_t stride_row, stride_head, heads;
  Gain norm;
  void* out;  // contiguous
};

struct Rotary {
  DType dtype, cos_dtype, sin_dtype;
  int64_t head_dim, rotated;
  Heads parts[2];  // q and k
  Matrix cos, sin;
  bool gemma;
  double eps;
};

enum Activation : int64_t { kSilu, kGelu, kGeluTanh };

struct GatedActivation {
  DType dtype;
  int64_t d;
  Matrix gate, up;
  Activation kind;
  void* out;  // (rows, d) contiguous
};

// One table for each instruction set that the library was built for. Scratch is 64-byte-aligned memory of one piece.
struct TokenWiseIsa {
  const char* name;
  bool (*supported)();
  int64_t (*rms_norm_scratch)(const RmsNorm&);  // bytes
  void (*rms_norm)(const RmsNorm&, int64_t first, int64_t last, void* scratch);
  int64_t (*rotary_scratch)(const Rotary&);
  void (*rotary)(const Rotary&, int64_t first, int64_t last, void* scratch);
  void (*gated_activation)(const GatedActivation&, int64_t first, int64_t last);
};

}  // namespace rmfast
