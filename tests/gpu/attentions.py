"""Attention's workloads and contenders: ours on each backend, with older tiles, and kernels that others keep.

- "whole texts": eight texts of 2,048 tokens, causal, nothing shared;
- "shared prompt": a prompt of 2,048 tokens and sixteen responses of 512 to it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import rmfast
from rmfast.ops import suffix_attention

WORKS = ("whole texts", "shared prompt")


@dataclass
class Case:
    """`count` suffixes of n rows each, all over one prefix of `shared` rows (0: none)."""

    q: Tensor
    k: Tensor
    v: Tensor
    pool_k: Tensor
    pool_v: Tensor
    ends: Tensor
    start: Tensor
    length: Tensor
    count: int
    shared: int

    @classmethod
    def of(cls, work: str, d: int, heads: int, kv_heads: int, device: torch.device, *, small: bool) -> Case:
        count, n, shared = (8, 2048, 0) if work == "whole texts" else (16, 512, 2048)
        if small:
            count, n, shared, heads, kv_heads = 2, 8, shared // 128, 4, 1
        make = torch.Generator(device).manual_seed(0)

        def draw(rows: int, heads: int) -> Tensor:
            return torch.randn(rows, heads, d, device=device, generator=make).bfloat16()

        rows = count * n
        return cls(
            draw(rows, heads), draw(rows, kv_heads), draw(rows, kv_heads), draw(max(1, shared), kv_heads),
            draw(max(1, shared), kv_heads), torch.arange(count + 1, device=device, dtype=torch.int32) * n,
            torch.zeros(count, device=device, dtype=torch.int32),
            torch.full((count,), shared, device=device, dtype=torch.int32), count, shared,
        )  # fmt: skip

    @property
    def flops(self) -> int:
        n = self.q.size(0) // self.count
        pairs = self.count * (n * self.shared + n * (n + 1) // 2)
        return 4 * self.q.size(1) * self.q.size(2) * pairs

    def ours(self) -> Tensor:
        return suffix_attention(
            self.q, self.k, self.v, self.ends, self.pool_k, self.pool_v, self.start, self.length
        )[0]  # fmt: skip

    def truth(self) -> Tensor:
        wide = [t.double() for t in (self.q, self.k, self.v, self.pool_k, self.pool_v)]
        with rmfast.backend("eager"):
            return suffix_attention(*wide[:3], self.ends, *wide[3:], self.start, self.length)[0]


def contenders(case: Case, backends: tuple[str, ...]) -> dict[str, Callable[[], Tensor]]:
    found: dict[str, Callable[[], Tensor]] = {name: _on(case, name) for name in backends}
    found["cuda, wgmma"] = lambda: _wgmma(case)
    found["triton, tiles of 64 rows"] = lambda: _with_old_tiles(case)
    found["flash of torch, two calls and a merge"] = lambda: cascade(case)
    if not case.shared:
        found["varlen_attn of torch"] = _varlen(case)
    return found


def _on(case: Case, name: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with rmfast.backend(name):
            return case.ours()

    return run


def _wgmma(case: Case) -> Tensor:
    from rmfast.kernels.suffix_attention import cuda

    scale = case.q.size(2) ** -0.5
    pool = (case.pool_k, case.pool_v, case.start, case.length)
    return cuda.forward(case.q, case.k, case.v, case.ends, None, *pool, scale, True, 0.0, 0, wgmma=True)[0]


def _with_old_tiles(case: Case) -> Tensor:
    with _old_tiles(), rmfast.backend("triton"):
        return case.ours()


@contextlib.contextmanager
def _old_tiles() -> Iterator[None]:
    """The tiles of the first version, 64 rows by 32 or 16 keys, in place of those that are chosen now."""
    from rmfast.kernels.suffix_attention import triton

    def config(dtype: torch.dtype, d: int, *rest: object) -> dict[str, int]:
        parts = {"num_warps": 4, "num_stages": 3} if d <= 64 else {"num_warps": 8, "num_stages": 2}
        return {"BD": d, "BM": 64, "BN": 32 if d <= 128 else 16, "DQ": d, **parts}

    name = "_config"
    now = getattr(triton, name)
    setattr(triton, name, config)
    try:
        yield
    finally:
        setattr(triton, name, now)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """(B, H, n, d) and its log-sum-exp (B, H, n), by torch's flash attention."""
    aten = torch.ops.aten
    run = aten._scaled_dot_product_flash_attention if q.is_cuda else aten._scaled_dot_product_flash_attention_for_cpu
    out, lse, *_ = run(q, k, v, 0.0, causal)
    return out, lse


def cascade(case: Case) -> Tensor:
    """The prefix in one call for all rows, each suffix's own rows in another, merged by log-sum-exp."""
    heads, group, d = case.q.size(1), case.q.size(1) // case.k.size(1), case.q.size(2)

    def batch(t: Tensor, size: int) -> Tensor:
        return t.view(size, -1, t.size(1), d).transpose(1, 2)

    q, k, v = (batch(t, case.count) for t in (case.q, case.k, case.v))
    own, own_lse = _flash(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), True)
    own, own_lse = own.transpose(1, 2).reshape(-1, heads, d), own_lse.transpose(1, 2).reshape(-1, heads)
    if not case.shared:
        return own
    pool = (batch(t, 1).repeat_interleave(group, 1) for t in (case.pool_k, case.pool_v))
    out, lse = _flash(batch(case.q, 1), *pool, False)
    out, lse = out.transpose(1, 2).reshape(-1, heads, d), lse.transpose(1, 2).reshape(-1, heads)
    share = torch.sigmoid(lse - own_lse)[..., None]
    return (out * share + own * (1 - share)).to(own.dtype)


def _varlen(case: Case) -> Callable[[], Tensor]:
    """torch's variable-length attention, with FlashAttention 3 where it is installed."""
    n = case.q.size(0) // case.count
    group = case.q.size(1) // case.k.size(1)

    def run() -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        takes = inspect.signature(varlen_attn).parameters
        causal = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
        k, v = case.k, case.v
        if "enable_gqa" in takes:
            causal["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        out = varlen_attn(case.q, k, v, case.ends, case.ends, n, n, **causal)
        return out if isinstance(out, Tensor) else out[0]

    return run
