// Arguments of the CPU TCRM loss, free of torch: raw pointers and sizes. Pairs [first, last) are one piece of work; a
// pair's result does not depend on the piece it is in.
#pragma once

#include <cstdint>

#include "rmfast/reward_head.h"

namespace rmfast {

// The chosen responses, or the rejected ones: response b is tokens first[b] .. end[b] − 1, ascending, without overlap.
struct Responses {
  const void* values;  // (tokens,)
  int64_t tokens;
  const int64_t *first, *end;  // (pairs,)
  void* grad;                  // (tokens,) in the values' type; backward only
};

struct Tcrm {
  DType dtype;
  int64_t pairs;
  Responses sides[2];
  const void* margin;  // (pairs,) in the accumulation type, or null
  double smooth, lookahead;
  bool mean;
  double* terms;  // (pairs, 3): Bradley-Terry, smoothness, lookahead; forward only
  double grad;    // of the loss; backward only
};

// One table for each instruction set that the library was built for.
struct TcrmIsa {
  const char* name;
  bool (*supported)();
  void (*forward)(const Tcrm&, int64_t first, int64_t last);
  void (*backward)(const Tcrm&, int64_t first, int64_t last);
};

}  // namespace rmfast
