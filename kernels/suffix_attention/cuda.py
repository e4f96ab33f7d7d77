"""Suffix attention in CUDA C++: `forward` with the contract of `reference.py`, on bf16 and fp16.

Which keys each query sees follows from the suffixes alone, so it is worked out once for all layers of a chunk, on the
device: a record a row, kept for as long as calls come with the same index tensors. The attention then packs the rows of
as many suffixes as fit into full tiles (csrc/include/rmfast/cuda/suffix_attention.cuh). A row's bits depend on which
others share its tile: unlike those of the C++ and Triton kernels they are not the same in any batch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

_MOST_ROWS = 2**31 - 256
_KEPT = 16  # records of a chunk's layers (two windows, all rows or the last ones), of a few threads

_seen: OrderedDict[tuple, tuple[tuple, Tensor]] = OrderedDict()
_guard = threading.Lock()


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


def seen_keys(
    index: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None], sizes: tuple[int, int, int], causal: bool,
    window: int,
) -> Tensor:  # fmt: skip
    """(queries, 8) int32: rmfast::cuda::SeenKeys of each row of q.

    index: cu_seqlens, cu_queries, prefix_start and prefix_len. sizes: rows of q, of k and of the pool.
    """
    if _is_capturing(index[0]) or any(each is not None and each.is_inference() for each in index):
        # A graph replays on what the tensors hold then, and a tensor of inference mode does not say when it changes.
        return _make(index, sizes, causal, window)
    stream = torch.cuda.current_stream(index[0].device).cuda_stream if index[0].is_cuda else 0
    key = (*(id(each) for each in index), *sizes, causal, window, stream)
    versions = tuple(None if each is None else each._version for each in index)
    with _guard:
        found = _seen.get(key)
        # Kept tensors are alive, so nothing else has their ids.
        if found is not None and found[0][1] == versions:
            _seen.move_to_end(key)
            return found[1]
    made = _make(index, sizes, causal, window)
    with _guard:
        _seen[key] = ((index, versions), made)
        _seen.move_to_end(key)
        while len(_seen) > _KEPT:
            _seen.popitem(last=False)
    return made


def _is_capturing(like: Tensor) -> bool:
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def _make(index: tuple, sizes: tuple[int, int, int], causal: bool, window: int) -> Tensor:
    ends, asks, start, length = (None if each is None else each.to(torch.int64) for each in index)
    reaches_all = window >= 2**31 - 1  # no two rows are that far apart
    return torch.ops.rmfast_native.suffix_seen_keys(
        ends, ends if asks is None else asks, start, length, *sizes, causal, 0 if reaches_all else window
    )
