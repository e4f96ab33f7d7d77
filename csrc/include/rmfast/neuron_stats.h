// Arguments of the CPU neuron statistics, free of torch: raw pointers and sizes. Panels [first, last) of kNeurons
// columns are one piece of work; a column's result does not depend on the piece it is in.
#pragma once

#include <cstdint>

#include "rmfast/reward_head.h"

namespace rmfast {

// Columns read together: a row of a panel is whole cache lines (256 bytes of fp32), and a panel's keys fit in L2.
constexpr int64_t kNeurons = 64;

struct NeuronStats {
  DType dtype;
  int64_t texts, neurons, attributes;
  const void* x;  // (texts, neurons); strides in elements
  int64_t stride_text, stride_neuron;
  const int32_t* ranks;     // (texts, attributes) contiguous: the attributes' centred average ranks, doubled: integers
  const double* squares;    // (attributes,): the sums of their squares
  void *spearman, *median;  // (neurons, attributes) and (neurons,); double for f64, else float
};

// One table for each instruction set that the library was built for. Scratch is 64-byte-aligned memory of one piece.
struct NeuronStatsIsa {
  const char* name;
  bool (*supported)();
  int64_t (*scratch_bytes)(const NeuronStats&);
  void (*run)(const NeuronStats&, int64_t first, int64_t last, void* scratch);
};

}  // namespace rmfast
