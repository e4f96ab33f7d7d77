"""Rows of `linear`: fp32 products on weights stored in 16 (and 32) bits, at the sizes of SmolLM2-135M and of d 2048.

Baselines: torch's product of fp32 rows and an fp32 copy of the weight, which takes twice the memory, and of 16-bit rows
and the weight as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.registry import Benchmark, Maker, Problem, Shape
from rmfast.ops import linear


class Product(Problem):
    """Rows (n, d) fp32 and a weight (m, d); for few rows many weights in turn."""

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        n, d, m = shape["n"], shape["d"], shape["m"]
        self.dtype = getattr(torch, shape["dtype"])
        draw = torch.Generator(device).manual_seed(0)
        x = torch.randn(n, d, generator=draw, device=device)
        # A model's weights come from memory once for each batch; a batch's rows from the cache.
        count = 1 if n > 64 else max(1, min(16, (1 << 28) // (m * d * 4)))
        weights = [torch.randn(m, d, generator=draw, device=device).to(self.dtype) for _ in range(count)]
        self.inputs = [(x, w, w.float(), x.to(self.dtype)) for w in weights]
        self.input_bytes = x.nbytes + weights[0].nbytes
        self.bytes_moved = self.input_bytes + 4 * n * m
        self.flops = 2 * n * d * m
        self.gemm = (n, m, d)
        self.tolerance, self.baseline_tolerance = 2e-6, 2e-2

    def error(self, out: Tensor) -> float:
        x, w, *_ = self.inputs[0]
        truth = x.double() @ w.double().T
        return float((out.double() - truth).abs().max() / truth.abs().max())


Inputs = tuple[Tensor, ...]


def ours(p: Product) -> Callable[[Inputs], Tensor]:
    return lambda inputs: linear(inputs[0], inputs[1])


def widened(p: Product) -> Callable[[Inputs], Tensor]:
    return lambda inputs: nn.functional.linear(inputs[0], inputs[2])


def native(p: Product) -> Callable[[Inputs], Tensor]:
    return lambda inputs: nn.functional.linear(inputs[3], inputs[1])


def _row(name: str, n: int, d: int, m: int, dtype: str, target: float) -> Benchmark:
    baselines: dict[str, dict[str, Maker]] = {"fp32 copy": {"": widened}}
    if dtype != "float32":
        baselines["native"] = {"": native}
    return Benchmark(
        f"linear/{name}", {"n": n, "d": d, "m": m, "dtype": dtype}, {"n": 5, "d": 40, "m": 50, "dtype": dtype}, Product,
        ours, baselines, targets={"cpu": {"fp32 copy": target}}, limit={"cpu": "gemm"}, devices=("cpu",),
    )  # fmt: skip


BENCHMARKS = [
    *(
        _row(f"{size}-{short}-{n}", n, d, m, dtype, 0.95 if n > 8 else 0.5)
        for size, d, m in (("d576", 576, 1536), ("d2048", 2048, 8192), ("m2048", 8192, 2048))
        for short, dtype in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"))
        for n in (8, 64, 3072)
    )
]
