"""Rows of `suffix_attention`, at the attention shape of SmolLM2 (9 query and 3 KV heads of 64) and of an 8B Llama.

Baselines, given their masks and indices for free:
- SDPA mask: one call over all rows and all keys with an explicit mask; and, where suffixes are alike, "batched": the
  suffixes as a batch over copies of their prefix, as a padded run has them.
- loop: an SDPA call for each suffix, on its prefix and own rows put together.
- flex: FlexAttention, compiled, with a block mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.registry import Benchmark, Problem, Shape
from bench.scoring import texts
from rmfast.engine.planner import plan
from rmfast.ops import suffix_attention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest output


class Suffixes(Problem):
    """One chunk of the planner; an input is (q, k, v, pool of K, pool of V)."""

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        self.dtype = getattr(torch, shape["dtype"])
        heads, kv, d = shape["heads"], shape["kv_heads"], shape["head_dim"]
        every = texts(shape)
        cu = np.cumsum([0, *map(len, every)])
        chunk = plan(np.concatenate(every), cu, batch_tokens=shape["rows"])[0]
        n, pool = chunk.rows, len(chunk.pool_rows)
        self.cu, self.start, self.length = chunk.cu_seqlens, chunk.prefix_start, chunk.prefix_len
        self.on_device = [torch.from_numpy(x).to(device) for x in (self.cu, self.start, self.length)]
        draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
        sizes = ((n, heads), (n, kv), (n, kv), (pool, kv), (pool, kv))
        first = tuple(draw(*size, d).to(self.dtype) for size in sizes)
        self.input_bytes = sum(x.nbytes for x in first)
        self.inputs = [first] + [tuple(x.clone() for x in first) for _ in range(1, rotate // self.input_bytes)]
        self.bytes_moved = self.input_bytes + first[0].nbytes
        rows = np.diff(self.cu).astype(np.int64)
        pairs = int((rows * self.length + rows * (rows + 1) // 2).sum())  # of a row and a key that it sees
        self.flops = 4 * heads * d * pairs
        # The matmul of a GEMM that is as large as all of it: rows by keys, at the depth of a head.
        self.gemm = (n, n + pool, d)
        self.tolerance = self.baseline_tolerance = TOLERANCE[self.dtype]

    def error(self, out: Tensor) -> float:
        truth = looped(self)(tuple(x.double() for x in self.inputs[0]))
        return float((out.double() - truth).abs().max() / truth.abs().max())


def ours(p: Suffixes) -> Callable[[Any], Tensor]:
    def run(inputs: tuple[Tensor, ...]) -> Tensor:
        q, k, v, pool_k, pool_v = inputs
        return suffix_attention(q, k, v, p.on_device[0], pool_k, pool_v, *p.on_device[1:])[0]

    return run


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """(n, H, D) each."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)[0].transpose(0, 1)


def looped(p: Suffixes) -> Callable[[Any], Tensor]:
    def run(inputs: tuple[Tensor, ...]) -> Tensor:
        q, k, v, pool_k, pool_v = inputs
        out = torch.empty_like(q)
        for a, b, s, n in zip(p.cu.tolist(), p.cu[1:].tolist(), p.start.tolist(), p.length.tolist()):
            keys, values = torch.cat([pool_k[s : s + n], k[a:b]]), torch.cat([pool_v[s : s + n], v[a:b]])
            mask = torch.ones(b - a, n + b - a, dtype=torch.bool, device=q.device).tril(n)
            out[a:b] = _sdpa(q[a:b], keys, values, **({"attn_mask": mask} if n else {"is_causal": True}))
        return out

    return run


def _sees(p: Suffixes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each row's suffix and its index in it, and each suffix' range of the pool; on the problem's device."""
    cu, start, length = p.on_device
    suffix = torch.repeat_interleave(torch.arange(len(start), device=cu.device), cu.diff())
    return suffix, torch.arange(len(suffix), device=cu.device) - cu[suffix], start, length


def masked(p: Suffixes) -> Callable[[Any], Tensor]:
    suffix, at, start, length = _sees(p)
    pool = torch.arange(p.inputs[0][3].size(0), device=at.device)
    first = start[suffix][:, None]
    prefix = (pool >= first) & (pool < first + length[suffix][:, None])
    own = (suffix[:, None] == suffix) & (at[:, None] >= at)
    mask = torch.cat([prefix, own], 1)
    return lambda inputs: _sdpa(
        inputs[0], torch.cat([inputs[3], inputs[1]]), torch.cat([inputs[4], inputs[2]]), attn_mask=mask
    )


def batched(p: Suffixes) -> Callable[[Any], Tensor]:
    """One batch over the suffixes that stand on the pool, all alike; the segments before them by themselves."""
    rows, lengths = np.diff(p.cu), p.length
    alike = np.flatnonzero(lengths == lengths.max())
    if len(set(rows[alike].tolist())) != 1:
        raise ValueError("suffixes of several sizes make no batch")
    n, prefix, begin = int(rows[alike[0]]), int(lengths[alike[0]]), int(p.cu[alike[0]])
    mask = torch.ones(n, prefix + n, dtype=torch.bool, device=p.on_device[0].device).tril(prefix)

    def run(inputs: tuple[Tensor, ...]) -> Tensor:
        q, k, v, pool_k, pool_v = inputs
        first = _sdpa(q[:begin], k[:begin], v[:begin], is_causal=True)
        stacked = [x[begin:].view(len(alike), n, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
        keys, values = (
            torch.cat([pool[:prefix].transpose(0, 1).expand(len(alike), -1, -1, -1), own], 2)
            for pool, own in zip((pool_k, pool_v), stacked[1:])
        )
        rest = scaled_dot_product_attention(stacked[0], keys, values, attn_mask=mask, enable_gqa=True)
        return torch.cat([first, rest.transpose(1, 2).flatten(0, 1)])

    return run


def flex(p: Suffixes) -> Callable[[Any], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    suffix, at, start, length = _sees(p)
    pool = p.inputs[0][3].size(0)

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        first = start[suffix[row]]
        prefix = (key >= first) & (key < first + length[suffix[row]])
        own = key - pool
        inside = (key >= pool) & (suffix[own.clamp(min=0)] == suffix[row]) & (own <= row)
        return (prefix & (key < pool)) | inside

    n = len(suffix)
    block = create_block_mask(sees, None, None, n, pool + n, device=str(at.device))
    run = torch.compile(flex_attention, dynamic=False)

    def call(inputs: tuple[Tensor, ...]) -> Tensor:
        q, k, v, pool_k, pool_v = inputs
        parts = (q, torch.cat([pool_k, k]), torch.cat([pool_v, v]))
        q, k, v = (x.transpose(0, 1)[None].contiguous() for x in parts)
        out: Any = run(q, k, v, block_mask=block, enable_gqa=True)
        return out[0].transpose(0, 1)

    return call


SMOLLM2 = {"heads": 9, "kv_heads": 3, "head_dim": 64, "rows": 4096}
LLAMA_8B = {"heads": 32, "kv_heads": 8, "head_dim": 128, "rows": 16384}
HH = {"workload": "hh", "texts": 64}
BEST_OF_16 = {"workload": "best-of-16", "texts": 16, "prompt": 256, "response": 64}
QUICK = {"heads": 4, "kv_heads": 2, "head_dim": 16, "rows": 64, "texts": 16, "prompt": 12, "response": 3}


def _rows(name: str, work: dict[str, Any], model: dict[str, Any], device: str) -> list[Benchmark]:
    forms = {"": masked, "batched": batched} if work["workload"] == "best-of-16" else {"": masked}
    rows = []
    for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        if device == "cuda" and short == "fp32":
            continue
        shape = {**work, **model, "dtype": dtype}
        quick = shape | {k: v for k, v in QUICK.items() if k in shape}
        rows.append(
            Benchmark(
                f"suffix_attention/{name}-{short}",
                shape,
                quick=quick | ({"rows": 2048} if work["workload"] == "hh" else {}),
                problem=Suffixes,
                ours=ours,
                baselines={"SDPA mask": forms, "loop": {"": looped}, "compile flex": {"": flex}},
                limit={device: "gemm"},
                devices=(device,),
                rotate=1 << 28,
            )
        )
    return rows


BENCHMARKS = [
    *_rows("hh", HH, SMOLLM2, "cpu"),
    *_rows("best-of-16", BEST_OF_16, SMOLLM2, "cpu"),
    *_rows("hh-8b", HH | {"texts": 256}, LLAMA_8B, "cuda"),
    *_rows("best-of-16-8b", BEST_OF_16 | {"prompt": 2048, "response": 512}, LLAMA_8B, "cuda"),
]
