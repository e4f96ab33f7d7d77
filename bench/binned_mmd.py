"""Rows of the sum of MMD² over bins, forward and backward.

Baselines, given bandwidth and membership for free:
- pairs: a loop over bins. Forms: "naive", all three kernel means of each unordered pair of bins; "blocks", each block
  of the kernel matrix once.
- full: the whole kernel matrix. Forms: "blocks", block means by two matmuls; "weights", a sum weighted by a matrix of
  coefficients made before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from bench.registry import Benchmark, Maker, Problem, Shape
from bench.tcrm import Result, error_of
from rmfast.losses import binned_mmd

CHUNK = 512  # rows of the truth's kernel matrix at a time


class Binned(Problem):
    """Rewards (n,) or representations (n, features) in bins of equal sizes; the mean rises with the bin."""

    grad = True
    gemm = None

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        n, features, count = shape["n"], shape["features"], shape["bins"]
        self.dtype = torch.float32
        generator = torch.Generator(device).manual_seed(0)
        self.bins = torch.randperm(n, device=device, generator=generator) * count // n
        self.bandwidth = float(features) ** 0.5
        self.tolerance, self.baseline_tolerance = (1e-5, 1e-4) if features == 1 else (1e-4, 1e-3)

        def draw() -> Tensor:
            x = torch.randn(n, features, device=device, generator=generator) + self.bins[:, None] / count
            return (x[:, 0] if features == 1 else x).contiguous().requires_grad_()

        first = draw()
        self.input_bytes = first.nbytes
        self.inputs = [first] + [draw() for _ in range(1, min(64, rotate // self.input_bytes))]
        self.bytes_moved = 2 * self.input_bytes
        self.flops = n * n // 2 * (6 * features + 20)
        self.members = one_hot(self.bins, count).float()
        self.means = self.members / self.members.sum(0)  # (n, M): K's block means are meansᵀ K means
        self.rows = [torch.nonzero(self.bins == m)[:, 0] for m in range(count)]

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        if a.dim() == 1:
            squares = (a[:, None] - b).square()
        else:
            squares = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)
        return torch.exp(squares * (-0.5 / self.bandwidth**2))

    @staticmethod
    def total(a: Tensor) -> Tensor:
        """Σ_{m,m'} MMD² of block means (M, M)."""
        within = a.diagonal()
        return (within[:, None] + within - 2 * a).sum()

    @functools.cached_property
    def truth(self) -> Result:
        x = self.inputs[0].detach().double().requires_grad_()
        means = self.means.double()
        value, grad = 0.0, torch.zeros_like(x)
        for first in range(0, x.size(0), CHUNK):  # the total is linear in the block means, and so in strips of K
            rows = slice(first, first + CHUNK)
            part = self.total(means[rows].T @ self.kernel(x[rows], x) @ means)
            value += float(part.detach())
            grad += torch.autograd.grad(part, x)[0]
        return torch.tensor(value, dtype=torch.float64, device=x.device), grad

    def error(self, out: Any) -> float:
        return error_of(list(out), self.truth)


def _graded(value_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Result]:
    def run(x: Tensor) -> Result:
        value = value_of(x)
        return value, *torch.autograd.grad(value, x)

    return run


def ours(p: Binned) -> Callable[[Tensor], Result]:
    return _graded(lambda x: binned_mmd(x, p.bins, bandwidth=p.bandwidth))


def naive(p: Binned) -> Callable[[Tensor], Result]:
    def value(x: Tensor) -> Tensor:
        parts = [x[rows] for rows in p.rows]
        total = x.new_zeros(())
        for i, a in enumerate(parts):
            for b in parts[:i]:
                total = total + 2 * (p.kernel(a, a).mean() + p.kernel(b, b).mean() - 2 * p.kernel(a, b).mean())
        return total

    return _graded(value)


def blocks(p: Binned) -> Callable[[Tensor], Result]:
    def value(x: Tensor) -> Tensor:
        parts = [x[rows] for rows in p.rows]
        within = torch.stack([p.kernel(a, a).mean() for a in parts])
        between = torch.stack([p.kernel(a, b).mean() for i, a in enumerate(parts) for b in parts[:i]])
        return 2 * (len(parts) - 1) * within.sum() - 4 * between.sum()

    return _graded(value)


def full_blocks(p: Binned) -> Callable[[Tensor], Result]:
    return _graded(lambda x: p.total(p.means.T @ p.kernel(x, x) @ p.means))


def full_weights(p: Binned, compiled: bool = False) -> Callable[[Tensor], Result]:
    bins = p.means.size(1)
    sizes = p.members.sum(0)[p.bins]
    same = p.bins[:, None] == p.bins
    weights = torch.where(same, 2.0 * (bins - 1) / sizes**2, -2 / (sizes[:, None] * sizes))
    value = lambda x: (weights * p.kernel(x, x)).sum()  # noqa: E731
    return _graded(torch.compile(value, dynamic=False) if compiled else value)


MMD = {"n": 8192, "features": 1, "bins": 30}
FULL: dict[str, Maker] = {"blocks": full_blocks, "weights": full_weights}

BENCHMARKS = [
    Benchmark(
        "losses/mmd",
        MMD,
        quick=MMD | {"n": 60, "bins": 4},
        problem=Binned,
        ours=ours,
        baselines={
            "pairs": {"naive": naive, "blocks": blocks},
            "full": FULL,
            "compile": {"full": functools.partial(full_weights, compiled=True)},
        },
        targets={"cpu": {"pairs": 10, "full": 2}, "cuda": {"full": 2}},
        memory="full: weights",
    ),
    Benchmark(
        "losses/mmd-representations",
        MMD | {"features": 256},
        quick=MMD | {"n": 60, "features": 5, "bins": 4},
        problem=Binned,
        ours=ours,
        baselines={"full": FULL, "compile": {"full": functools.partial(full_weights, compiled=True)}},
        memory="full: weights",
    ),
]
