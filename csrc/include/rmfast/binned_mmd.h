// Arguments of the CPU sum of MMD² over bins, free of torch: raw pointers and sizes. Rows are sorted by group, then by bin.
#pragma once

#include <cstdint>

#include "rmfast/reward_head.h"

namespace rmfast {

// Coefficients of the kernel of two rows, all arrays of (rows,): `same[i]` inside of i's bin, −2 alpha[i] alpha[j]
// elsewhere in its group, 0 outside and on the diagonal. The kernel is the mean of e^{−rate |x_i − x_j|²} over `rates`.
struct Binned {
  DType dtype;  // fp64 or fp32, of all arrays of floats
  int64_t rows;
  const int64_t *bin_first, *bin_end, *group_first, *group_end;
  const void *alpha, *same;
  const void* rates;
  int64_t count;  // of rates
};

// Pairs of rows, all of one group: a square under the diagonal of all pairs, or the pairs row < column of one on it.
struct Tile {
  int64_t row, row_end, column, column_end;
};

constexpr int64_t kTile = 512;

// Rows of one number. Slot s takes every slots-th tile from s on, so that all have about the same work whatever the
// number of threads.
struct BinnedLine {
  Binned bins;
  const void* x;  // (rows,)
  const Tile* tiles;
  int64_t tile_count, slots;
  double* value;  // (slots,): sums over pairs
  double* grad;   // (slots, rows) or null: sums over pairs that −4 / count turns into gradients
};

// A tile of inner products, which becomes the pairs' weights in the gradient, and what each row adds to the value.
struct BinnedTile {
  Binned bins;
  void* dots;           // (height, width)
  const void* squares;  // (rows,): of the rows' lengths
  int64_t row, column, height, width;
  double* value;  // (height,)
};

// One table for each instruction set that the library was built for.
struct BinnedIsa {
  const char* name;
  bool (*supported)();
  void (*line)(const BinnedLine&, int64_t first_slot, int64_t last_slot);
  void (*weigh)(const BinnedTile&, int64_t first_row, int64_t last_row);
};

}  // namespace rmfast
