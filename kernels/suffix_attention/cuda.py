"""Suffix attention in CUDA C++: `forward` with the contract of `reference.py`, on bf16 and fp16.

Which keys each query sees follows from the suffixes alone, so it is worked out once for all layers of a chunk, on the
device: a record a row, kept for as long as calls come with the same index tensors. The attention then packs the rows of
as many suffixes as fit into full tiles (csrc/include/rmfast/cuda/suffix_attention.cuh). A row's bits depend on which
others share its tile: unlike those of the C++ and Triton kernels they are not the same in any batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kept import Index, kept

_MOST_ROWS = 2**31 - 256


def refuses(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_queries: Tensor | None, *rest: Any) -> str | None:
    """Why the kernel does not take the arguments of `forward`; None where it does."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, got {q.dtype}"
    rows = {"q": q, "k": k, "v": v, "prefix_k": rest[0], "prefix_v": rest[1]}
    for name, value in rows.items():
        if value is None:
            continue
        if value.size(0) >= _MOST_ROWS or q.size(0) * (q.size(1) // k.size(1)) >= _MOST_ROWS:
            return f"it takes fewer than {_MOST_ROWS} rows of {name}, and of q times the heads of a group"
        steps = [value.stride(i) for i in range(2) if value.size(i) > 1]
        if value.numel() and (value.data_ptr() % 16 or any(step % 8 for step in steps)):
            return f"it reads 16 bytes at a time, and rows of {name} do not all start at multiples of that"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_queries: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    prefix_start: Tensor | None,
    prefix_len: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float,
    window: int,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    *,
    wgmma: bool = False,
) -> tuple[Tensor, Tensor]:
    """wgmma: by the kernel for compute capability 9.0, which no GPU has run yet; else by that for 8.0 and later."""
    index = (cu_seqlens, cu_queries, prefix_start, prefix_len)
    sizes = (q.size(0), k.size(0), 0 if prefix_k is None else prefix_k.size(0))
    seen = seen_keys(index, sizes, causal, window)
    native = torch.ops.rmfast_native
    run = native.suffix_attention_wgmma if wgmma else native.suffix_attention_seen
    return run(q, k, v, prefix_k, prefix_v, seen, scale, softcap, sinks, alibi)


def seen_keys(index: Index, sizes: tuple[int, int, int], causal: bool, window: int) -> Tensor:
    """(queries, 8) int32: rmfast::cuda::SeenKeys of each row of q.

    index: cu_seqlens, cu_queries, prefix_start and prefix_len. sizes: rows of q, of k and of the pool.
    """
    return kept(_make, index, sizes, causal, window)


def _make(index: Index, sizes: tuple[int, int, int], causal: bool, window: int) -> Tensor:
    ends, asks, start, length = (None if each is None else each.to(torch.int64) for each in index)
    reaches_all = window >= 2**31 - 1  # no two rows are that far apart
    return torch.ops.rmfast_native.suffix_seen_keys(
        ends, ends if asks is None else asks, start, length, *sizes, causal, 0 if reaches_all else window
    )
