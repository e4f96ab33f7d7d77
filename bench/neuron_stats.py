"""Rows of `neuron_stats`: rank correlations of all neurons with five attributes, and their medians.

Baselines, given the attributes' normalised ranks for free, all over blocks of neurons, so that memory stays bounded:
- scipy: `scipy.stats.rankdata`, then the centred, normalised ranks times the attributes' and `numpy.median`. Forms:
  "axis 0", and "rows", of a transposed copy of each block.
- torch: `torch.sort`, runs of equal values from cumulative maxima and minima, ranks scattered back, one matmul; the
  median is in the sorted block. Forms as above ("axis 0", "rows").
- numpy: the same with `numpy.argsort`, which sorts fp32 with AVX-512 instructions where there are any.
- spearmanr: `scipy.stats.spearmanr` neuron by neuron, on a row small enough for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from bench.registry import Benchmark, Maker, Problem, Shape
from rmfast.ops import neuron_stats

SAMPLE = 64  # neurons compared with the truth
BLOCK = 1024  # neurons of a baseline's block on a CPU: 2 MiB of fp32 at 512 texts
GPU_BLOCK = 32768

Result = tuple[Tensor, Tensor]


class Neurons(Problem):
    """Activations (n, m), normal or half of them 0, and attributes (n, a), some with ties."""

    tolerance, baseline_tolerance = 1e-6, 1e-5
    gemm = None

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        n, m, a = shape["n"], shape["m"], shape["a"]
        self.dtype = getattr(torch, shape["dtype"])
        draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
        first = draw(n, m)
        first = (first.relu() if shape["zeros"] else first).to(self.dtype)
        self.input_bytes = first.nbytes
        self.inputs = [first] + [first.clone() for _ in range(1, rotate // first.nbytes)]
        self.attributes = draw(n, a)
        self.attributes[:, ::2] = (3 * self.attributes[:, ::2]).round()
        self.bytes_moved = self.input_bytes + 4 * m * (a + 1)
        self.flops = 2 * n * m * a
        ranks = torch.from_numpy(scipy.stats.rankdata(self.attributes.cpu().numpy(), axis=0)).to(device)
        self.ranks = torch.nn.functional.normalize(ranks - (n + 1) / 2, dim=0).float()  # (n, a)
        self._sample = torch.linspace(0, m - 1, min(m, SAMPLE), device=device).long()

    @functools.cached_property
    def truth(self) -> tuple[np.ndarray, np.ndarray]:
        x = self.inputs[0][:, self._sample].double().cpu().numpy()
        f = self.attributes.double().cpu().numpy()
        pairs = [[scipy.stats.spearmanr(column, other).statistic for other in f.T] for column in x.T]
        return np.array(pairs), np.median(x, axis=0)

    def error(self, out: Any) -> float:
        """The larger of the correlations' and, in units of the largest activation, the medians' difference."""
        spearman, median = (value[self._sample.to(value.device)].double().cpu().numpy() for value in out)
        if spearman.shape != self.truth[0].shape:
            return float("inf")
        scale = float(self.inputs[0].abs().max())
        return float(max(np.abs(spearman - self.truth[0]).max(), np.abs(median - self.truth[1]).max() / scale))


def ours(p: Neurons) -> Callable[[Tensor], Result]:
    return lambda x: neuron_stats(x, p.attributes)


def _blocks(x: Tensor, run: Callable[[Tensor], Result]) -> Result:
    parts = [run(block) for block in x.split(BLOCK if x.device.type == "cpu" else GPU_BLOCK, 1)]
    spearman, median = zip(*parts)
    return torch.cat(spearman), torch.cat(median)


def torch_sort(dim: int) -> Maker:
    def make(p: Neurons) -> Callable[[Tensor], Result]:
        def run(block: Tensor) -> Result:
            x = block if dim == 0 else block.T.contiguous()
            n = x.size(dim)
            place = torch.arange(n, dtype=torch.int32, device=x.device)
            place = place[:, None] if dim == 0 else place
            ordered, order = x.sort(dim)
            first = torch.ones_like(ordered, dtype=torch.bool)
            first.narrow(dim, 1, n - 1).copy_(ordered.narrow(dim, 1, n - 1) != ordered.narrow(dim, 0, n - 1))
            start = torch.where(first, place, 0).cummax(dim).values
            end = torch.where(first.roll(-1, dim), place, n - 1).flip(dim).cummin(dim).values.flip(dim)
            ranks = torch.empty_like(ordered, dtype=torch.float32)
            ranks.scatter_(dim, order, (start + end - (n - 1)).float())
            ranks = torch.nn.functional.normalize(ranks, dim=dim)
            middle = (ordered.select(dim, (n - 1) // 2).float() + ordered.select(dim, n // 2)) / 2
            return (ranks.T if dim == 0 else ranks) @ p.ranks, middle

        return lambda x: _blocks(x, run)

    return make


def _on_numpy(p: Neurons, run: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Tensor], Result]:
    """Over blocks as arrays; bf16, which NumPy lacks, as fp32."""
    other = p.ranks.cpu().numpy()

    def block_run(block: Tensor) -> Result:
        x = block.cpu()
        spearman, median = run((x.float() if x.dtype == torch.bfloat16 else x).numpy(), other)
        return torch.from_numpy(spearman), torch.from_numpy(median)

    return lambda x: _blocks(x, block_run)


def rankdata(axis: int) -> Maker:
    def run(block: Any, other: Any) -> tuple[Any, Any]:
        x = block if axis == 0 else np.ascontiguousarray(block.T)
        ranks = scipy.stats.rankdata(x, axis=axis)
        ranks -= (x.shape[axis] + 1) / 2
        ranks /= np.linalg.norm(ranks, axis=axis, keepdims=True)
        return (ranks.T if axis == 0 else ranks) @ other, np.median(x, axis=axis)

    return lambda p: _on_numpy(p, run)


def argsort(p: Neurons) -> Callable[[Tensor], Result]:
    def run(block: Any, other: Any) -> tuple[Any, Any]:
        x = np.ascontiguousarray(block.T)
        n = x.shape[1]
        order = np.argsort(x, axis=1)
        ordered = np.take_along_axis(x, order, 1)
        place = np.arange(n, dtype=np.int32)
        first = np.ones(x.shape, bool)
        np.not_equal(ordered[:, 1:], ordered[:, :-1], out=first[:, 1:])
        start = np.maximum.accumulate(np.where(first, place, 0), axis=1)
        end = np.minimum.accumulate(np.where(np.roll(first, -1, 1), place, n - 1)[:, ::-1], axis=1)[:, ::-1]
        ranks = np.empty(x.shape, np.float32)
        np.put_along_axis(ranks, order, (start + end - (n - 1)).astype(np.float32), 1)
        ranks /= np.linalg.norm(ranks, axis=1, keepdims=True)
        return ranks @ other, (ordered[:, (n - 1) // 2] + ordered[:, n // 2]) / 2

    return _on_numpy(p, run)


def spearmanr(p: Neurons) -> Callable[[Tensor], Result]:
    attributes = p.attributes.cpu().numpy()

    def run(block: Any, _other: Any) -> tuple[Any, Any]:
        pairs = [[scipy.stats.spearmanr(column, other).statistic for other in attributes.T] for column in block.T]
        return np.array(pairs), np.median(block, axis=0)

    return _on_numpy(p, run)


SCIPY: dict[str, dict[str, Maker]] = {"scipy": {"axis 0": rankdata(0), "rows": rankdata(1)}}
TORCH: dict[str, dict[str, Maker]] = {"torch": {"axis 0": torch_sort(0), "rows": torch_sort(1)}}
FASTEST: dict[str, dict[str, Maker]] = {"scipy": {"rows": rankdata(1)}, "torch": {"rows": torch_sort(1)}}
NUMPY: dict[str, dict[str, Maker]] = {"numpy": {"": argsort}}
TARGET = {"scipy": 5, "torch": 5}


def _row(name: str, baselines: dict[str, dict[str, Maker]], n: int = 512, m: int = 16384, dtype: str = "float32",
         zeros: bool = False, **fields: Any) -> Benchmark:  # fmt: skip
    shape = {"n": n, "m": m, "a": 5, "dtype": dtype, "zeros": zeros}
    defaults: dict[str, Any] = {
        "targets": {"cpu": {k: v for k, v in TARGET.items() if k in baselines}},
        "rounds": (3, 20),
        "devices": ("cpu",),
    }
    return Benchmark(
        f"neuron_stats/{name}", shape, shape | {"n": 17, "m": 40}, Neurons, ours, baselines, **(defaults | fields)
    )


BENCHMARKS = [
    # All forms of the baselines; the rows behind it take the fastest of each.
    _row("forms", SCIPY | TORCH | NUMPY),
    # 512 MiB: 512 texts by the projections' outputs of a few layers of an 8B Llama. A baseline takes 20 s a call.
    _row("fp32", FASTEST, m=262144, rounds=(2, 3), memory="torch: rows"),
    _row("bf16", FASTEST | NUMPY, dtype="bfloat16"),
    _row("half-zeros", FASTEST | NUMPY, zeros=True),
    _row("2048-texts", FASTEST | NUMPY, n=2048, m=4096),
    _row("16384-texts", FASTEST | NUMPY, n=16384, m=512, targets={}),
    _row("spearmanr", {"spearmanr": {"": spearmanr}}, m=512, targets={"cpu": {"spearmanr": 100}}),
    _row("gpu-fp32", TORCH, m=262144, devices=("cuda",), targets={"cuda": {"torch": 5}}, memory="torch: rows"),
    _row("gpu-bf16", TORCH, m=262144, dtype="bfloat16", devices=("cuda",), targets={"cuda": {"torch": 5}}),
    _row("gpu-2048-texts", TORCH, n=2048, m=65536, devices=("cuda",), targets={"cuda": {"torch": 5}}),
]
