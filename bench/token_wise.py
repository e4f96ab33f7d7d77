"""Rows of `rms_norm`, `rotary` and `gated_activation`, at the sizes of SmolLM2-135M and of an 8B Llama.

Baselines: transformers' own code (its LlamaRMSNorm after an add, apply_rotary_pos_emb, act_fn(gate) * up), and
`torch.compile` of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from bench.registry import Benchmark, Maker, Problem, Shape
from rmfast.ops import gated_activation, rms_norm, rotary

EPS = 1e-5
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of the largest value; transformers rounds up to three times

Inputs = tuple[Tensor, ...]


class TokenWise(Problem):
    """(n, ...) inputs of one op, drawn by `draw`; `plain` is transformers' formula, at any dtype."""

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        self.dtype = getattr(torch, shape["dtype"])
        normal = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
        first = tuple(x.to(self.dtype) for x in self.draw(normal, shape))
        self.input_bytes = sum(x.nbytes for x in first)
        self.inputs = [first] + [tuple(x.clone() for x in first) for _ in range(1, rotate // self.input_bytes)]
        outputs = self.plain(self.inputs[0])
        self.bytes_moved = self.input_bytes + sum(x.nbytes for x in outputs)
        self.flops = sum(x.numel() for x in first)
        self.gemm = None
        self.tolerance = self.baseline_tolerance = TOLERANCE[self.dtype]

    def draw(self, normal: Callable[..., Tensor], shape: Shape) -> Inputs:
        raise AssertionError

    def plain(self, inputs: Inputs) -> Inputs:
        raise AssertionError

    def fused(self, inputs: Inputs) -> Inputs:
        raise AssertionError

    def error(self, out: Inputs) -> float:
        wide = tuple(x.double() for x in self.inputs[0])
        return max(float((a.double() - t).abs().max() / t.abs().max()) for a, t in zip(out, self.plain(wide)))


class RMSNorm(TokenWise):
    """x + residual and the norm of it."""

    def draw(self, normal: Callable[..., Tensor], shape: Shape) -> Inputs:
        d = shape["d"]
        self.norm = LlamaRMSNorm(d, EPS).to(normal(0).device, self.dtype)
        with torch.no_grad():
            self.norm.weight.copy_(1 + 0.2 * normal(d))
        return normal(shape["n"], d), normal(shape["n"], d)

    def plain(self, inputs: Inputs) -> Inputs:
        total = inputs[0] + inputs[1]
        if total.dtype == torch.float64:  # the module computes in fp32
            scaled = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS)
            return scaled * self.norm.weight.double(), total
        return self.norm(total), total

    def fused(self, inputs: Inputs) -> Inputs:
        return rms_norm(inputs[0], self.norm.weight, residual=inputs[1], eps=EPS)  # type: ignore[return-value]


class Rotary(TokenWise):
    def draw(self, normal: Callable[..., Tensor], shape: Shape) -> Inputs:
        n, d = shape["n"], shape["head_dim"]
        angle = normal(n, d // 2).repeat(1, 2)
        return normal(n, shape["heads"], d), normal(n, shape["kv_heads"], d), angle.cos(), angle.sin()

    def plain(self, inputs: Inputs) -> Inputs:
        q, k, cos, sin = inputs
        turned = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
        return tuple(x[0].transpose(0, 1) for x in turned)

    def fused(self, inputs: Inputs) -> Inputs:
        return rotary(*inputs)


class Gated(TokenWise):
    def draw(self, normal: Callable[..., Tensor], shape: Shape) -> Inputs:
        return normal(shape["n"], shape["m"]), normal(shape["n"], shape["m"])

    def plain(self, inputs: Inputs) -> Inputs:
        return (nn.functional.silu(inputs[0]) * inputs[1],)

    def fused(self, inputs: Inputs) -> Inputs:
        return (gated_activation(*inputs, kind="silu"),)


def ours(p: TokenWise) -> Callable[[Inputs], Inputs]:
    return p.fused


def hf(p: TokenWise) -> Callable[[Inputs], Inputs]:
    return p.plain


def compiled(p: TokenWise) -> Callable[[Inputs], Inputs]:
    return torch.compile(p.plain, dynamic=False)


def _rows(name: str, problem: Any, small: dict[str, int], large: dict[str, int]) -> list[Benchmark]:
    baselines: dict[str, dict[str, Maker]] = {"HF": {"": hf}, "compile": {"": compiled}}
    return [
        Benchmark(
            f"{name}{suffix}",
            sizes | {"dtype": dtype},
            quick={k: 3 if k == "n" else 32 if v > 32 else v for k, v in sizes.items()} | {"dtype": dtype},
            problem=problem,
            ours=ours,
            baselines=baselines,
            limit={"cpu": "copy", "cuda": "copy"},
            devices=devices,
        )
        for suffix, sizes, dtype, devices in (
            ("-fp32", small, "float32", ("cpu",)),
            ("-bf16", small, "bfloat16", ("cpu",)),
            ("-8b-bf16", large, "bfloat16", ("cuda",)),
        )
    ]


BENCHMARKS = [
    *_rows("rms_norm/residual", RMSNorm, {"n": 4096, "d": 576}, {"n": 16384, "d": 4096}),
    *_rows(
        "rotary/half",
        Rotary,
        {"n": 4096, "heads": 9, "kv_heads": 3, "head_dim": 64},
        {"n": 16384, "heads": 32, "kv_heads": 8, "head_dim": 128},
    ),
    *_rows("gated_activation/silu", Gated, {"n": 4096, "m": 1536}, {"n": 16384, "m": 14336}),
]
