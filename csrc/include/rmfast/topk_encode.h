// Arguments of the CPU's merge of a tile of products into the k largest of each row, free of torch. Rows [first, last)
// are one piece of work.
#pragma once

#include <cstdint>

#include "rmfast/reward_head.h"

namespace rmfast {

struct TopkMerge {
  DType dtype;  // of the products
  int64_t rows, columns, k;
  int64_t first;         // the tile's first feature: min(first, k) of a row's k places are taken by those before it
  const void* products;  // (rows, columns)
  int64_t stride;        // of its rows
  const void* bias;      // (columns,) or null; double for f64, else float
  void* values;          // (rows, k) contiguous, of type as bias; with all k places taken, the smallest is the last
  int64_t* indices;      // (rows, k) contiguous
  bool last;             // of the tiles: sorts a row's values, largest first
};

// One table for each instruction set that the library was built for. Scratch is 64-byte-aligned memory of one piece.
struct TopkMergeIsa {
  const char* name;
  bool (*supported)();
  int64_t (*scratch_bytes)(const TopkMerge&);
  void (*run)(const TopkMerge&, int64_t first, int64_t last, void* scratch);
};

}  // namespace rmfast
