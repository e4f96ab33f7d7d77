"""What a benchmark is, and the list of all of them: a new op adds a module to OPS, a new case a row in it."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# Modules of this package, one per op or workload, each with its rows in a list called BENCHMARKS.
OPS = (
    "reward_head",
    "suffix_attention",
    "token_wise",
    "patch_rows",
    "neuron_stats",
    "topk_encode",
    "linear",
    "tcrm",
    "binned_mmd",
    "scoring",
    "serve",
    "sweep",
    "interventions",
    "lens",
    "probes",
    "heads",
    "reward_lens",
    "edges",
)

# The L3 of a server CPU is hundreds of MiB: fewer distinct bytes would time the cache.
ROTATE = 1 << 30

Shape = Mapping[str, Any]


class Problem(abc.ABC):
    """A benchmark's parameters and inputs on one device, with the truth that every contender is checked against."""

    inputs: list[Any]  # distinct memory; each call reads the next one
    input_bytes: int  # that a call needs of one of them
    grad = False  # whether contenders need autograd
    bytes_moved: int  # that one call must read and write
    flops: int
    gemm: tuple[int, int, int] | None  # (m, n, k) of the matmul inside, where it can be the limit
    dtype: torch.dtype
    output_bytes = 0  # of results that all contenders return, and that do not count as memory they take
    tolerance: float  # of ours, for `error`
    baseline_tolerance: float
    facts: Mapping[str, float] = {}  # figures to print and keep beside the times

    @abc.abstractmethod
    def error(self, out: Any) -> float:
        """Largest difference of a result for inputs[0] from the fp64 truth, in units of the result's own scale."""

    def memory_input(self) -> Any:
        """What `Benchmark.memory` is measured on."""
        return self.inputs[0]


# Given a problem, the function of one of its inputs that is timed; what is computed once per model stays outside it.
Maker = Callable[[Any], Callable[[Any], Any]]


@dataclass(frozen=True)
class Benchmark:
    """One row of the benchmark table.

    A baseline is a group of forms of the same idea; its time is that of its fastest form whose numbers pass.
    `targets` by device type: the least ratio over a baseline of that name, or of "share", the least share of `limit`
    ("read" or "copy" bandwidth, "gemm" rate; by device type), which is measured in the same run; or of "memory", the
    most that ours may take of the peak memory of the baseline named by `memory`.
    """

    name: str
    shape: Shape
    quick: Shape  # the same keys, tiny
    problem: Callable[[Shape, torch.device, int], Problem]  # (shape, device, bytes of distinct inputs)
    ours: Maker
    baselines: Mapping[str, Mapping[str, Maker]]
    limit: Mapping[str, str] = field(default_factory=dict)
    targets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rotate: int = ROTATE
    rounds: tuple[int, int] = (5, 100)  # of samples: at least, at most
    memory: str | None = None  # the contender whose peak memory, beyond the problem's own, ours is compared with
    devices: tuple[str, ...] = ("cpu", "cuda")

    def contenders(self) -> dict[str, Maker]:
        """Every form that is timed, by its label: "ours", "HF", "compile: default", ..."""
        forms = {
            f"{group}: {form}" if form else group: maker
            for group, forms in self.baselines.items()
            for form, maker in forms.items()
        }
        return {"ours": self.ours, **forms}


def benchmarks() -> list[Benchmark]:
    """All rows, in the order of OPS."""
    return [row for op in OPS for row in importlib.import_module(f"bench.{op}").BENCHMARKS]
