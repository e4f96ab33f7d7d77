// Arguments of the CPU's linear layer on weights of 16 (or 32) bits, free of torch: y = x · weightᵀ + bias in fp32.
#pragma once

#include <cstdint>

#include "rmfast/reward_head.h"

namespace rmfast {

struct Linear {
  DType dtype;  // of weight and bias: bf16, f16 or f32
  int64_t rows, inner, outer;
  const float* x;  // (rows, inner), rows `stride_x` apart
  int64_t stride_x;
  const void* weight;  // (outer, inner), rows `stride_weight` apart; (inner, outer) if `across`
  int64_t stride_weight;
  bool across;
  const float* bias;  // (outer,) or null
  float* y;           // (rows, outer) contiguous
};

// One table for each instruction set that the library was built for. Work is cut into panels of `columns` of y; scratch
// is 64-byte-aligned memory of one piece of work, rows [row, row_end) of panels [panel, panel_end).
struct LinearIsa {
  const char* name;
  bool (*supported)();
  int64_t columns;
  int64_t rows;  // of one tile
  int64_t (*scratch_bytes)(const Linear&);
  void (*run)(const Linear&, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, void* scratch);
};

}  // namespace rmfast
