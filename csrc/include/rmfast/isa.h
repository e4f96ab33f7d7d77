// Picks, among the tables of an op that the library was built with, the one for this CPU. Tables come widest first.
#pragma once

#include <cstdlib>
#include <cstring>

namespace rmfast {

// Null where RMFAST_CPU_ISA asks for one that is not built or cannot run. Read at every call (50 ns), so that a test
// can compare the paths in one process.
template <class Table, int N>
const Table* choose_isa(const Table* const (&all)[N]) {
  const char* asked = std::getenv("RMFAST_CPU_ISA");
  for (const Table* isa : all)
    if ((!asked || !*asked || !std::strcmp(asked, isa->name)) && isa->supported()) return isa;
  return nullptr;
}

}  // namespace rmfast
