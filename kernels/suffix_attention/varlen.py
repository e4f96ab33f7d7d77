"""Suffix attention by PyTorch's own `varlen_attn` (FlashAttention), in two calls that are merged by log-sum-exp.

One call takes each suffix's rows over themselves, the other all rows that stand on the same stretch of the pool as one
sequence over that stretch, all of which they see. Which rows and stretches those are is worked out on the host, once
for all layers of a chunk. A row's bits depend on the batch, and it is rounded to its dtype once more than elsewhere.

`varlen_attn` runs FlashAttention 2, or what `torch.nn.attention.activate_flash_attention_impl` puts in its place.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from . import cuda
from .kept import Index, is_capturing, kept

_MOST_COPIES = 4  # of the pool's rows: prefixes of many lengths of one text would need rows² of them

# Before 2.12 the kernel takes fewer heads of K and V too, without being told.
_GQA: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@dataclass(frozen=True)
class _Sequences:
    """Those of one call: (B + 1,) int32 each, and the longest ones."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


@dataclass(frozen=True)
class _Shared(_Sequences):
    """Rows of q on the same stretch of the pool are one sequence; `rows` and `keys` say which those are, in order."""

    rows: Tensor | None  # None: all, as they are
    keys: Tensor | slice
    copies: int  # rows of the pool, where `keys` is no slice


@dataclass(frozen=True)
class _Plan:
    own: _Sequences
    longest: int  # text
    shared: _Shared | None = None


def refuses(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_queries: Tensor | None, prefix_k: Tensor | None,
    prefix_v: Tensor | None, prefix_start: Tensor | None, prefix_len: Tensor | None, scale: float, causal: bool,
    softcap: float, window: int, sinks: Tensor | None = None, alibi: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why two calls of `varlen_attn` do not give what `forward` of reference.py does; None where they do."""
    for name, given in (("softcap", softcap), ("sinks", sinks is not None), ("alibi", alibi is not None)):
        if given:
            return f"varlen_attn has no {name}"
    if is_capturing(q):
        return "it reads lengths on the host, which cannot be while a graph is captured"
    if (cause := cuda.refuses(q, k, v, cu_seqlens, cu_queries, prefix_k, prefix_v)) is not None:
        return cause
    if (shape := _shape_of_lse()) != (2, 3):
        return (
            f"varlen_attn of torch {torch.__version__} gives {shape} as log-sum-exp of 3 rows and 2 heads, not (2, 3)"
        )
    plan = _planned(cu_seqlens, cu_queries, prefix_k, prefix_start, prefix_len)
    if plan.shared is None or prefix_k is None:
        return None
    if 0 < window < plan.longest:
        return "a window ends at another key of the prefix for each row of a suffix"
    if plan.shared.copies > _MOST_COPIES * prefix_k.size(0):
        return f"it would copy {plan.shared.copies} rows of prefixes that overlap in a pool of {prefix_k.size(0)}"
    return None


@functools.cache
def _shape_of_lse() -> tuple[int, ...]:
    """(heads, rows) in 2.11 to 2.13, though their documentation says (rows, heads)."""
    q, ends = (
        torch.empty(3, 2, 8, dtype=torch.bfloat16, device="meta"),
        torch.empty(2, dtype=torch.int32, device="meta"),
    )
    return tuple(varlen_attn(q, q, q, ends, ends, 3, 3, return_aux=AuxRequest(lse=True))[1].shape)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_queries: Tensor | None, prefix_k: Tensor | None,
    prefix_v: Tensor | None, prefix_start: Tensor | None, prefix_len: Tensor | None, scale: float, causal: bool,
    softcap: float, window: int, sinks: Tensor | None = None, alibi: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    plan = _planned(cu_seqlens, cu_queries, prefix_k, prefix_start, prefix_len)
    reach = window if 0 < window < plan.longest else 0
    left = reach - causal if reach else -1
    out, lse = _attend(q, k, v, plan.own, scale, (left, 0 if causal else left))
    if (shared := plan.shared) is None or prefix_k is None or prefix_v is None:
        return out.contiguous(), lse.contiguous()
    rows = slice(None) if shared.rows is None else shared.rows
    more, more_lse = _attend(q[rows], prefix_k[shared.keys], prefix_v[shared.keys], shared, scale, (-1, -1))
    own, own_lse = out[rows], lse[rows]
    share = torch.sigmoid(more_lse - own_lse)[..., None]
    merged = own.to(lse.dtype).lerp(more.to(lse.dtype), share).to(q.dtype)
    out, lse = out.contiguous(), lse.contiguous()
    out[rows], lse[rows] = merged, own_lse.logaddexp(more_lse)
    return out, lse


def _attend(
    q: Tensor, k: Tensor, v: Tensor, of: _Sequences, scale: float, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Out, and log-sum-exp (rows, heads). Of fewer queries than keys, the last query is aligned with the last key."""
    # The kernel's branch for one query a sequence takes no empty ones, which a bound of 2 keeps it out of.
    out, lse = varlen_attn(
        q, k, v, of.cu_q, of.cu_k, max(of.max_q, 2), of.max_k, return_aux=AuxRequest(lse=True), scale=scale,
        window_size=window, **_GQA,
    )  # fmt: skip
    return out, lse.T


def _planned(
    cu_seqlens: Tensor, cu_queries: Tensor | None, pool: Tensor | None, start: Tensor | None, length: Tensor | None
) -> _Plan:
    return kept(_plan, (cu_seqlens, cu_queries, start, length), 0 if pool is None else pool.size(0))


def _plan(index: Index, pool: int) -> _Plan:
    device = index[0].device
    given = [each for each in index if each is not None]
    read = torch.cat([each.to(torch.int64) for each in given]).cpu().numpy()  # at once: the host waits for the device
    parts = iter(np.split(read, np.cumsum([each.numel() for each in given])[:-1]))
    ends, asks, start, length = (None if each is None else next(parts) for each in index)
    assert ends is not None
    asks = ends if asks is None else asks
    queries, keys = np.diff(asks), np.diff(ends)

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    def sequences(queries: np.ndarray, keys: np.ndarray) -> tuple[Tensor, Tensor, int, int]:
        cu_q, cu_k = (on_device(_ends(counts).astype(np.int32)) for counts in (queries, keys))
        return cu_q, cu_k, int(queries.max()), int(keys.max())

    own = _Sequences(*sequences(queries, keys))
    stands = np.zeros(0, int) if start is None or length is None else np.flatnonzero((length > 0) & (queries > 0))
    if start is None or length is None or not len(stands):
        return _Plan(own, own.max_k)
    if start[stands].min() < 0 or (start + length)[stands].max() > pool:
        raise ValueError(f"Expected prefix_start and prefix_len to stay in the {pool} rows of prefix_k")
    stretches, which = np.unique(np.stack([start[stands], length[stands]], 1), axis=0, return_inverse=True)
    which = which.reshape(-1)
    order = stands[np.argsort(which, kind="stable")]
    rows = _ranges(asks[order], queries[order])
    first, lengths = stretches.T
    apart = bool((first[1:] != (first + lengths)[:-1]).any())
    shared = _Shared(
        *sequences(np.bincount(which, queries[stands]).astype(int), lengths),
        rows=None if np.array_equal(rows, np.arange(asks[-1])) else on_device(rows),
        keys=on_device(_ranges(first, lengths)) if apart else slice(int(first[0]), int((first + lengths)[-1])),
        copies=int(lengths.sum()) if apart else 0,
    )
    return _Plan(own, int((keys + length)[stands].max(initial=own.max_k)), shared)


def _ends(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])


def _ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ..., `counts` each, end to end."""
    return np.arange(counts.sum()) + np.repeat(first - _ends(counts)[:-1], counts)
