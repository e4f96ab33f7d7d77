// Arguments of the CPU patch_rows, free of torch: raw pointers and sizes. Rows [first, last) of a call are one piece of
// work; a row's result does not depend on the piece it is in.
#pragma once

#include <cstdint>

#include "rmfast/token_wise.h"

namespace rmfast {

struct PatchRows {
  DType dtype;
  int64_t d;
  Matrix base, values;
  const int64_t *base_rows, *value_rows;  // in range; value_rows[i] < 0: row i is base row base_rows[i]
  Gain weight;
  bool gemma;
  double eps;
  void *x, *y;  // (rows, d) contiguous
};

// One table for each instruction set that the library was built for. Scratch is 64-byte-aligned memory of one piece.
struct PatchRowsIsa {
  const char* name;
  bool (*supported)();
  int64_t (*scratch_bytes)(const PatchRows&);
  void (*run)(const PatchRows&, int64_t first, int64_t last, void* scratch);
};

}  // namespace rmfast
