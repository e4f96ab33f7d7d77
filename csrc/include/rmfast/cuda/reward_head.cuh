// The reward head on CUDA, as a plain call: `plan`, a workspace of `plan(...).bytes`, then `reward_head` on a stream.
//
// Two to five launches and no host synchronisation, so it may be captured in a graph:
//   prepare (cross, with interventions): the dot vectors and their products, from the weights as they are now;
//   few or many: one read of h; writes the rewards, or with interventions the dots to the workspace;
//   intervene, recompute: rewards after each intervention; rows where they cancel, from h in fp64.
#pragma once

#include "reward_head_few.cuh"
#include "reward_head_intervene.cuh"
#include "reward_head_many.cuh"

namespace rmfast::cuda {

// The first launch that failed, or cudaSuccess.
struct Status {
  cudaError_t error = cudaSuccess;
  const char* kernel = "";
};

namespace detail {

template <typename T, int kDots>
cudaError_t run_few(const Few<T>& q, const Plan& plan, int processors, cudaStream_t stream) {
  // fp64 sums take twice the registers.
  constexpr int kRows = sizeof(T) == 8 ? 2 : 4;
  constexpr int kThreadsFew = kFewWarps * kWarp;
  const int64_t resident = int64_t{16} * processors;  // the most blocks of 128 threads that can be resident
  const auto blocks = [&](int rows) {
    const int64_t wanted = ceil_div(q.M, int64_t{kFewWarps} * rows);
    return dim3(static_cast<unsigned>(wanted < resident ? wanted : resident), static_cast<unsigned>(plan.dot_tiles));
  };
  const auto run = [&](auto kernel, int rows) { return launch(kernel, blocks(rows), kThreadsFew, 0, stream, q); };
  if (!plan.aligned) return run(few_kernel<T, kDots, 1, 2, false, true>, 1);
  constexpr int kUnroll = 16 / kDots < 8 ? 16 / kDots : 8;
  // Rows share loads of the dot vectors only where there are enough for every warp.
  const bool share = q.M >= int64_t{few_blocks(kDots)} * processors * kFewWarps * kRows;
  if constexpr (sizeof(T) < 8) {  // fp64 is there for tests
    if (q.norm != kLayer) {
      constexpr int kTwo = kDots == 4 ? 1 : 2;  // vectors of each row in flight, in 128 registers
      return share ? run(few_kernel<T, kDots, kRows, kTwo, true, false>, kRows)
                   : run(few_kernel<T, kDots, 1, kUnroll, true, false>, 1);
    }
  }
  return share ? run(few_kernel<T, kDots, kRows, 2, true, true>, kRows)
               : run(few_kernel<T, kDots, 1, kUnroll, true, true>, 1);
}

template <typename T>
cudaError_t run_few(const Few<T>& q, const Plan& plan, int processors, cudaStream_t stream) {
  switch (plan.block_dots) {
    case 1:
      return run_few<T, 1>(q, plan, processors, stream);
    case 2:
      return run_few<T, 2>(q, plan, processors, stream);
    case 4:
      return run_few<T, 4>(q, plan, processors, stream);
    default:
      return run_few<T, 8>(q, plan, processors, stream);
  }
}

template <typename T, int kBlockRows, int kBlockDots>
cudaError_t run_many(const ManyArgs<T>& q, cudaStream_t stream) {
  using Shape = ManyShape<T, kBlockRows, kBlockDots>;
  const dim3 blocks(static_cast<unsigned>(ceil_div(q.M, kBlockRows) * q.dot_tiles));
  return launch(many_kernel<T, kBlockRows, kBlockDots>, blocks, Shape::kThreads, Shape::kShared, stream, q);
}

template <typename T>
cudaError_t run_many(const ManyArgs<T>& q, const Plan& plan, int processors, cudaStream_t stream) {
  // 128 rows share each load of the dot vectors; with fewer blocks than multiprocessors, 32 do.
  const bool tall = ceil_div(q.M, 128) * plan.dot_tiles >= processors;
  if (plan.block_dots == 32) return tall ? run_many<T, 128, 32>(q, stream) : run_many<T, 32, 32>(q, stream);
  return tall ? run_many<T, 128, 64>(q, stream) : run_many<T, 32, 64>(q, stream);
}

// Where all of the products between directions fit in shared memory beside a tile of rows.
template <typename T>
bool fits_tile(const Problem<T>& p) {
  return sizeof(T) < 8 && intervene_shared(p.J, p.K) <= 64 * 1024;
}

template <typename T>
cudaError_t run_intervene_tile(const Intervene<T>& q, int processors, cudaStream_t stream) {
  const int64_t tiles = ceil_div(q.M, kTileRows), resident = int64_t{8} * processors;
  return launch(intervene_tile_kernel<T>, dim3(static_cast<unsigned>(tiles < resident ? tiles : resident)), kTileThreads,
                static_cast<size_t>(intervene_shared(q.p.J, q.p.K)), stream, q);
}

template <typename T, int kPairs>
cudaError_t run_intervene(const Intervene<T>& q, int processors, cudaStream_t stream) {
  const int64_t bytes = q.p.J * kPairs * static_cast<int64_t>(sizeof(acc_t<T>));
  int warps = kWarps;
  while (warps > 1 && warps * bytes > 32 * 1024) warps /= 2;
  const int64_t wanted = ceil_div(q.M * (q.p.index ? 1 : q.p.I), int64_t{warps} * kPairs);
  const int64_t resident = int64_t{16} * processors;
  const dim3 blocks(static_cast<unsigned>(wanted < resident ? wanted : resident));
  return launch(intervene_kernel<T, kPairs>, blocks, warps * kWarp, static_cast<size_t>(warps * bytes), stream, q,
                warps);
}

}  // namespace detail

// The most directions whose c fits one warp's shared memory on every supported GPU (96 KiB).
template <typename T>
constexpr int64_t most_directions() {
  return 96 * 1024 / static_cast<int64_t>(sizeof(acc_t<T>));
}

// Writes every element of p.out. `workspace` is 256-byte aligned and holds plan.bytes; p.J <= most_directions<T>().
template <typename T>
Status reward_head(const Problem<T>& p, const Plan& plan, void* workspace, int processors, cudaStream_t stream) {
  using A = acc_t<T>;
  unsigned char* base = static_cast<unsigned char*>(workspace);
  const auto at = [base](int64_t offset) { return reinterpret_cast<A*>(base + offset); };
  const DotTable<A> table{reinterpret_cast<double*>(base + plan.mean), at(plan.row_sum), at(plan.residual),
                          at(plan.unscale), at(plan.offset)};
  int* counters = p.J ? reinterpret_cast<int*>(base + plan.counters) : nullptr;
  A* cross = p.J ? at(plan.cross) : nullptr;

  const double inverse_d = 1.0 / double(p.d);
  const Prepare<T> prepare{p,           table,     base + plan.vectors, cross,          counters,
                           plan.chunks, plan.dots, plan.tiles,          plan.block_dots, inverse_d};
  const dim3 per_dot(static_cast<unsigned>(plan.dot_tiles * plan.block_dots));
  constexpr size_t kReduce = kWarps * sizeof(double);
  cudaError_t error = cudaSuccess;
  if constexpr (sizeof(T) < 8) {
    error = plan.many ? launch(prepare_kernel<T, true>, per_dot, kThreads, kReduce, stream, prepare)
                      : launch(prepare_kernel<T, false>, per_dot, kThreads, kReduce, stream, prepare);
  } else {
    error = launch(prepare_kernel<T, false>, per_dot, kThreads, kReduce, stream, prepare);
  }
  if (error != cudaSuccess) return {error, "prepare"};
  if (p.J) {
    const dim3 products(static_cast<unsigned>(ceil_div(p.J, kCrossTile)),
                        static_cast<unsigned>(ceil_div(plan.dots, kCrossTile)));
    error = launch(cross_kernel<T>, products, kThreads, kWarps * 16 * sizeof(double), stream, prepare);
    if (error != cudaSuccess) return {error, "cross"};
  }

  Rows<T> rows{p.hidden, p.rows, p.batches * p.tokens, p.tokens, p.stride_b, p.stride_t, 1.0 / double(p.tokens)};
  // Nothing to read: every row is out of range, and what the kernels read in its place are the dot vectors.
  if (rows.count == 0) rows.hidden = reinterpret_cast<const T*>(base + plan.vectors);

  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const int64_t first = chunk * plan.chunk_rows;
    const int64_t count = p.M - first < plan.chunk_rows ? p.M - first : plan.chunk_rows;
    A* values = p.J ? at(plan.values) : nullptr;
    if (!plan.many) {
      const Few<T> few{rows,          first,
                       count,         p.K,
                       plan.dots,     static_cast<int>(p.d),
                       static_cast<int>(plan.tiles), p.norm,
                       static_cast<A>(p.eps), static_cast<A>(inverse_d),
                       at(plan.vectors),
                       table.residual, table.offset,
                       p.out,         values,
                       plan.values_stride};
      error = detail::run_few<T>(few, plan, processors, stream);
      if (error != cudaSuccess) return {error, "few"};
    } else if constexpr (sizeof(T) < 8) {
      const ManyArgs<T> many{rows,           first,
                             count,          p.K,
                             plan.dots,      static_cast<int>(p.d),
                             static_cast<int>(plan.tiles), plan.dot_tiles,
                             p.norm,         plan.aligned,
                             static_cast<float>(p.eps), static_cast<float>(inverse_d),
                             base + plan.vectors,
                             table.residual, table.unscale,
                             table.offset,   p.out,
                             values,         plan.values_stride};
      error = detail::run_many<T>(many, plan, processors, stream);
      if (error != cudaSuccess) return {error, "many"};
    }
    if (!p.J) continue;
    const Intervene<T> intervene{p,
                                 rows,
                                 table,
                                 first,
                                 count,
                                 plan.dots,
                                 values,
                                 plan.values_stride,
                                 cross,
                                 counters + chunk,
                                 reinterpret_cast<int64_t*>(base + plan.fix_list),
                                 reinterpret_cast<double*>(base + plan.fix_scratch),
                                 inverse_d};
    // 8 pairs to a warp (2 in fp64, for the registers) while their c fits 32 KiB of shared memory.
    constexpr int kPairs = sizeof(T) == 8 ? 2 : 8;
    const bool wide = p.J * kPairs * static_cast<int64_t>(sizeof(A)) <= 32 * 1024;
    if (detail::fits_tile(p)) {
      if constexpr (sizeof(T) < 8) error = detail::run_intervene_tile<T>(intervene, processors, stream);
    } else {
      error = wide ? detail::run_intervene<T, kPairs>(intervene, processors, stream)
                   : detail::run_intervene<T, 1>(intervene, processors, stream);
    }
    if (error != cudaSuccess) return {error, "intervene"};
    error = launch(recompute_kernel<T>, dim3(static_cast<unsigned>(plan.fix_blocks)), kThreads, kReduce, stream,
                   intervene);
    if (error != cudaSuccess) return {error, "recompute"};
  }
  return {};
}

}  // namespace rmfast::cuda
