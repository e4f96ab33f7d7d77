"""FlashAttention's kernel behind torch's `varlen_attn`, written out for CPU tensors: what it takes and gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch


def flash(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, return_debug_mask, *, scale=None,
          window_size_left=-1, window_size_right=-1, **others):  # fmt: skip
    """(rows, heads, D), log-sum-exp (heads, rows) and three more; keys beyond a window and, with `causal`, behind a
    diagonal that ends at a sequence's last query and last key are hidden."""
    assert dropout == 0 and not return_debug_mask and not any(other is not None for other in others.values())
    for cu, rows in ((cu_q, q.size(0)), (cu_k, k.size(0))):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu[0] == 0 and cu[-1] == rows
        assert (cu.diff() >= 0).all()
    assert cu_q.numel() == cu_k.numel() > 1 and q.size(1) % k.size(1) == 0 and q.size(2) % 8 == 0 and q.size(2) <= 256
    assert max_q >= cu_q.diff().max() and max_k >= cu_k.diff().max() > 0
    assert all(x.stride(-1) == 1 and x.dtype == q.dtype for x in (q, k, v))
    assert max_q > 1 or len(q) == cu_q.numel() - 1, "with a bound of 1, each sequence is one query"
    left, right = window_size_left, 0 if causal else window_size_right
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty_like(q)  # a permuted q gets a permuted out
    lse = torch.full((q.size(1), q.size(0)), torch.nan, dtype=acc)
    group = q.size(1) // k.size(1)
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist())):
        own, keys = (x.to(acc).repeat_interleave(group, 1).transpose(0, 1) for x in (k[c:d], v[c:d]))
        logits = q[a:b].to(acc).transpose(0, 1) @ own.transpose(1, 2) * scale
        ahead = torch.arange(d - c) - torch.arange(b - a)[:, None] - (d - c - (b - a))
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        hidden |= ahead > right if right >= 0 else False
        hidden |= ahead < -left if left >= 0 else False
        logits = logits.masked_fill(hidden, -torch.inf)
        out[a:b] = (logits.softmax(-1) @ keys).transpose(0, 1).to(q.dtype)
        lse[:, a:b] = logits.logsumexp(-1)
        if c == d:  # no key: zeros, and not the log of a sum of none
            out[a:b], lse[:, a:b] = 0, torch.inf
    nothing = torch.empty(0)
    return out, lse, nothing, nothing, nothing


@contextmanager
def varlen_on_cpu() -> Iterator[None]:
    """`varlen_attn` itself runs, down to the kernel."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", flash, "CPU")
    try:
        yield
    finally:
        library._destroy()
