// What every op's torch side shares: dtypes, and the table of the instruction set in use.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdlib>

#include "rmfast/isa.h"
#include "rmfast/reward_head.h"

namespace rmfast {
namespace {

inline DType dtype_of(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: return DType::f32;
  }
}

template <class Table>
const Table& required(const Table* found) {
  STD_TORCH_CHECK(found, "RMFAST_CPU_ISA=", std::getenv("RMFAST_CPU_ISA"),
                  " is not an instruction set of this build and CPU; expected avx512, avx2 or portable");
  return *found;
}

}  // namespace
}  // namespace rmfast
