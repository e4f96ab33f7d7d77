"""Rows of `topk_encode`: the k largest features of each row under an encoder W (d, F), as SAELens keeps it.

Baseline, matmul + topk: `torch.topk` of the products, with ReLU. Forms: all rows at once ("whole"), and 512 rows at a
time, written into one buffer ("rows": 32 MiB of fp32 at 16,384 features). Baseline, widened: rows of bf16 with W kept
in fp32 beside it, which is faster where the CPU's fp32 matmul is (reported, no target). In the row by-feature W is
stored as (F, d), for all, which torch's bf16 matmul takes faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.registry import Benchmark, Maker, Problem, Shape
from rmfast.ops import topk_encode

SAMPLE = 32  # rows compared with the truth
CHUNK = 512
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of the largest product, which bf16 rounds (twice with a bias)

Result = tuple[Tensor, Tensor]


class Encoder(Problem):
    """Rows (n, d) and weights (d, F), normal; with a bias and b_dec where shape["biases"]."""

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        n, d, features, self.k = shape["n"], shape["d"], shape["F"], shape["k"]
        self.dtype = getattr(torch, shape["dtype"])
        draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
        first = draw(n, d).to(self.dtype)
        self.weight = (draw(d, features) / d**0.5).to(self.dtype)
        if shape["by_feature"]:
            self.weight = self.weight.T.contiguous().T
        self.bias = draw(features).mul(0.1).to(self.dtype) if shape["biases"] else None
        self.b_dec = draw(d).to(self.dtype) if shape["biases"] else None
        self.inputs = [first] + [first.clone() for _ in range(1, rotate // first.nbytes)]
        self.input_bytes = first.nbytes
        self.output_bytes = n * self.k * (8 + 4)
        self.bytes_moved = first.nbytes + self.weight.nbytes + self.output_bytes
        self.flops = 2 * n * d * features
        self.gemm = (n, features, d)
        self.tolerance = self.baseline_tolerance = TOLERANCE[self.dtype]
        self._sample = torch.linspace(0, n - 1, min(n, SAMPLE), device=device).long()

    @functools.cached_property
    def products(self) -> Tensor:
        x = self.inputs[0][self._sample]
        x = x if self.b_dec is None else x - self.b_dec
        return x.double() @ self.weight.double() + (0 if self.bias is None else self.bias.double())

    def error(self, out: Result) -> float:
        """Of the values from the products at their indices, and from the k largest, in units of the largest."""
        values, indices = (x[self._sample] for x in out)
        if values.shape != (len(self._sample), self.k):
            return float("inf")
        at, best = self.products.gather(1, indices), self.products.topk(self.k).values
        off = max((values.double() - want.relu()).abs().max() for want in (at, best))
        return float(off / self.products.abs().max())


def ours(p: Encoder) -> Callable[[Tensor], Result]:
    return lambda x: topk_encode(x, p.weight, p.bias, p.k, b_dec=p.b_dec)


def products(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)


def whole(p: Encoder) -> Callable[[Tensor], Result]:
    def run(x: Tensor) -> Result:
        x = x if p.b_dec is None else x - p.b_dec
        values, indices = products(x, p.weight, p.bias).topk(p.k)
        return values.relu_(), indices

    return run


def rows(p: Encoder) -> Callable[[Tensor], Result]:
    return lambda x: by_rows(p, x, p.weight, p.bias)


def widened(p: Encoder) -> Callable[[Tensor], Result]:
    weight, bias = p.weight.float(), None if p.bias is None else p.bias.float()
    return lambda x: by_rows(p, x, weight, bias)


def by_rows(p: Encoder, x: Tensor, weight: Tensor, bias: Tensor | None) -> Result:
    values = weight.new_empty(x.size(0), p.k)
    indices = x.new_empty(x.size(0), p.k, dtype=torch.int64)
    buffer = weight.new_empty(CHUNK, weight.size(1))
    for i in range(0, x.size(0), CHUNK):
        some = x[i : i + CHUNK] if p.b_dec is None else x[i : i + CHUNK] - p.b_dec
        out = values[i : i + CHUNK], indices[i : i + CHUNK]
        torch.topk(products(some.to(weight), weight, bias, buffer[: some.size(0)]), p.k, out=out)
    return values.relu_(), indices


BASELINES: dict[str, dict[str, Maker]] = {"matmul + topk": {"whole": whole, "rows": rows}}


def _row(name: str, dtype: str, least: float, n: int = 8192, biases: bool = False, by_feature: bool = False,
         device: str = "cpu", F: int = 16384, **fields: Any) -> Benchmark:  # fmt: skip
    shape = {"n": n, "d": 2048, "F": F, "k": 32, "dtype": dtype, "biases": biases, "by_feature": by_feature}
    defaults: dict[str, Any] = {
        "targets": {device: {"matmul + topk": least, "memory": 0.1}},
        "memory": "matmul + topk: whole",
        "rounds": (3, 10),
    }
    baselines = BASELINES | ({"widened": {"": widened}} if dtype == "bfloat16" else {})
    return Benchmark(
        f"topk_encode/{name}", shape, shape | {"n": 17, "d": 24, "F": 200}, Encoder, ours, baselines,
        limit={"cpu": "gemm", "cuda": "gemm"}, devices=(device,), **(defaults | fields),
    )  # fmt: skip


BENCHMARKS = [
    _row("fp32", "float32", 1.0),
    _row("bf16", "bfloat16", 1.15),
    # An SAE's own call, and the layout that torch's matmul likes best.
    _row("biases-fp32", "float32", 1.0, biases=True),
    _row("by-feature-bf16", "bfloat16", 1.0, by_feature=True),
    # One text's rows, which leave less to share the packing of W.
    _row("256-rows-fp32", "float32", 1.0, n=256, targets={}, memory=None),
    _row("gpu-fp32", "float32", 1.0, device="cuda"),
    _row("gpu-bf16", "bfloat16", 1.15, device="cuda"),
]
