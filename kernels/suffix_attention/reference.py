"""Suffix attention in eager PyTorch.

Every backend of the op takes the arguments of `forward` below, already checked by `rmfast.ops`: tensors as the public
op describes them, `softcap` 0 and `window` 0 for none, `sinks` and `alibi` contiguous in the accumulator's dtype. Rows
come back contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Logits of one batch of suffixes: 64 MiB in fp32, a GPU wants larger launches.
_CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def visible(queries: int, rows: int, prefix: int, causal: bool, window: int, device: torch.device) -> Tensor:
    """Which keys each query, one of the last of the suffix's rows, sees: (queries, prefix + rows)."""
    own = torch.arange(prefix + rows - queries, prefix + rows, device=device)[:, None]
    key = torch.arange(prefix + rows, device=device)[None]
    if causal:
        return (key <= own) & (key > own - window) if window else key <= own
    return (key - own).abs() <= window if window else torch.ones_like(key - own, dtype=torch.bool)


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
) -> tuple[Tensor, Tensor]:
    """`out` and `lse`: suffixes of equal length and prefix length are one batch of dense, masked attention.

    Its matmuls go through BLAS, whose order of additions may change with the number of suffixes in that batch: of
    the backends, this one alone is not bit-identical between batches.
    """
    acc, (_, heads, d), kv_heads = accumulator(q.dtype), q.shape, k.size(1)
    group, device = heads // kv_heads, q.device
    out = torch.empty(q.shape, dtype=q.dtype, device=device)
    lse = torch.empty(q.shape[:2], dtype=acc, device=device)
    ends = cu_seqlens.tolist()
    asks = ends if cu_queries is None else cu_queries.tolist()
    starts = [0] * len(ends) if prefix_start is None else prefix_start.tolist()
    lens = [0] * len(ends) if prefix_len is None else prefix_len.tolist()
    batches: dict[tuple[int, int, int], list[int]] = {}
    for s in range(len(ends) - 1):
        if asks[s + 1] > asks[s]:
            batches.setdefault((asks[s + 1] - asks[s], ends[s + 1] - ends[s], lens[s]), []).append(s)

    for (queries, rows, prefix), suffixes in batches.items():
        hidden = ~visible(queries, rows, prefix, causal, window, device)
        step = max(1, _CHUNK_ELEMENTS.get(device.type, 1 << 28) // (heads * queries * (prefix + rows)))
        for i in range(0, len(suffixes), step):
            some = suffixes[i : i + step]
            own = torch.tensor([ends[s] for s in some], device=device)[:, None] + torch.arange(rows, device=device)
            keys, values = k[own], v[own]  # (B, rows, Hkv, D)
            if prefix and prefix_k is not None and prefix_v is not None:
                shared = torch.tensor([starts[s] for s in some], device=device)[:, None]
                shared = shared + torch.arange(prefix, device=device)
                keys, values = torch.cat([prefix_k[shared], keys], 1), torch.cat([prefix_v[shared], values], 1)
            asking = torch.tensor([asks[s] for s in some], device=device)[:, None]
            asking = asking + torch.arange(queries, device=device)
            rows_q = q[asking].to(acc).view(len(some), queries, kv_heads, group, d)
            keys, values = keys.to(acc), values.to(acc)
            logits = torch.einsum("blhgd,bkhd->bhglk", rows_q * scale, keys)
            if softcap:
                logits = torch.tanh(logits / softcap) * softcap
            # Biases count from the query, where they are 0: softmax is the same, and near keys' logits stay small.
            bias = logits.new_zeros(heads, queries, 1)
            if alibi is not None:
                position = torch.arange(prefix + rows, device=device, dtype=acc)
                own = position[prefix + rows - queries :, None]
                logits = logits + (alibi[:, None, None] * (position - own)).view(kv_heads, group, queries, -1)
                bias = alibi[:, None, None] * own
            bias = bias.view(kv_heads, group, -1, 1)
            logits = logits.masked_fill(hidden, -torch.inf)
            total = logits.logsumexp(-1, keepdim=True)
            if sinks is not None:
                total = torch.logaddexp(total, sinks.view(kv_heads, group, 1, 1) - bias)
            got = torch.einsum("bhglk,bkhd->blhgd", (logits - total).exp(), values)
            out[asking] = got.reshape(len(some), queries, heads, d).to(q.dtype)
            lse[asking] = (total + bias).squeeze(-1).permute(0, 3, 1, 2).reshape(len(some), queries, heads)
    return out, lse
