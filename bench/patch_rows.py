"""Rows of `patch_rows`: what enters one layer in a residual sweep over every position of a text of T tokens.

The suffix of position t is row t of the other run and the base run's rows after it: T (T + 1) / 2 rows, of 2 T distinct
ones which stay in cache, as the rows of a layer that was just computed do.

Baselines, given the indices for free:
- HF: the rows gathered, then transformers' LlamaRMSNorm. Forms of the gather: one `index_select` from both runs put
  together ("select"), `torch.where` over one from each ("where"), and the base rows with the replaced ones copied over
  them ("copy"; on CUDA its `nonzero` synchronises).
- compile: `torch.compile` of "where".
- two ops: "select", then the op `rms_norm`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bench.registry import Benchmark, Maker, Problem, Shape
from rmfast.ops import patch_rows, rms_norm

EPS = 1e-5
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of y's largest value; x must be equal
SAMPLE = 256  # rows compared with the truth

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # base, values, base_rows, value_rows
Result = tuple[Tensor, Tensor]


class Sweep(Problem):
    gemm = None

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        tokens, d = shape["tokens"], shape["d"]
        self.dtype = getattr(torch, shape["dtype"])
        draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
        base, values = (3 * draw(tokens, d)).to(self.dtype), (3 * draw(tokens, d)).to(self.dtype)
        position, base_rows = torch.ones(tokens, tokens, device=device).triu().nonzero().unbind(1)
        value_rows = torch.where(position == base_rows, position, -1)
        self.norm: Any = LlamaRMSNorm(d, EPS).to(device, self.dtype)
        with torch.no_grad():
            self.norm.weight.copy_(1 + 0.2 * draw(d))
        self.inputs = [(base, values, base_rows.contiguous(), value_rows)]
        self.input_bytes = sum(x.nbytes for x in self.inputs[0])
        n = base_rows.numel()
        self.bytes_moved = self.input_bytes + 2 * n * d * self.dtype.itemsize
        self.flops = 4 * n * d
        self.tolerance = self.baseline_tolerance = TOLERANCE[self.dtype]
        self._sample = torch.linspace(0, n - 1, min(n, SAMPLE), device=device).long()

    def error(self, out: Result) -> float:
        base, values, base_rows, value_rows = self.inputs[0]
        b, v = base_rows[self._sample], value_rows[self._sample]
        x = torch.where((v < 0)[:, None], base[b], values[v])
        if out[0].shape != (base_rows.numel(), base.size(1)) or not torch.equal(out[0][self._sample], x):
            return float("inf")
        truth = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS) * self.norm.weight.double()
        return float((out[1][self._sample].double() - truth).abs().max() / truth.abs().max())


def ours(p: Sweep) -> Callable[[Inputs], Result]:
    return lambda inputs: patch_rows(*inputs, p.norm.weight, eps=EPS)


def select(inputs: Inputs) -> Tensor:
    base, values, base_rows, value_rows = inputs
    rows = torch.where(value_rows < 0, base_rows, base.size(0) + value_rows)
    return torch.cat((base, values)).index_select(0, rows)


def where(inputs: Inputs) -> Tensor:
    base, values, base_rows, value_rows = inputs
    replaced = values.index_select(0, value_rows.clamp(min=0))
    return torch.where((value_rows < 0)[:, None], base.index_select(0, base_rows), replaced)


def copy(inputs: Inputs) -> Tensor:
    base, values, base_rows, value_rows = inputs
    at = (value_rows >= 0).nonzero()[:, 0]
    return base.index_select(0, base_rows).index_copy_(0, at, values.index_select(0, value_rows[at]))


def hf(gather: Callable[[Inputs], Tensor]) -> Maker:
    def make(p: Sweep) -> Callable[[Inputs], Result]:
        def run(inputs: Inputs) -> Result:
            x = gather(inputs)
            return x, p.norm(x)

        return run

    return make


def compiled(p: Sweep) -> Callable[[Inputs], Result]:
    return torch.compile(hf(where)(p), dynamic=False)


def two_ops(p: Sweep) -> Callable[[Inputs], Result]:
    def run(inputs: Inputs) -> Result:
        x = select(inputs)
        return x, rms_norm(x, p.norm.weight, eps=EPS)  # type: ignore[return-value]

    return run


BENCHMARKS = [
    Benchmark(
        f"patch_rows/{name}",
        {"tokens": tokens, "d": d, "dtype": dtype},
        quick={"tokens": 5, "d": 40, "dtype": dtype},
        problem=Sweep,
        ours=ours,
        baselines={
            "HF": {"select": hf(select), "where": hf(where), "copy": hf(copy)},
            "compile": {"": compiled},
            "two ops": {"": two_ops},
        },
        limit={"cpu": "copy", "cuda": "copy"},
        targets={"cuda": {"compile": 1.0}},
        devices=devices,
    )
    for name, tokens, d, dtype, devices in (
        ("fp32", 128, 576, "float32", ("cpu",)),
        ("bf16", 128, 576, "bfloat16", ("cpu",)),
        ("d2048-bf16", 128, 2048, "bfloat16", ("cpu", "cuda")),
        ("8b-bf16", 256, 4096, "bfloat16", ("cuda",)),
    )
]
