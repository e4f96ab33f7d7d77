"""Rows of interventions: SmolLM2-135M scoring pairs with 2,000 clamped neurons, or 4 directions taken out.

Baselines:
- without: the same model's own `score`, which shows what an intervention costs;
- hooks: transformers' forward with plain hooks, texts sorted by length in batches of 8;
- score (of trial): all tokens again, where `LastTokenRuns` reruns one of each text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import rmfast
from bench import scoring
from bench.registry import Benchmark, Shape
from rmfast.interventions import Intervention, projections
from rmfast.last_token import LastTokenRuns


class Intervened(scoring.Scoring):
    """A model, its texts and an intervention."""

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        super().__init__(shape, device, rotate)
        self.rm.explain()  # tries the engine out
        rng = torch.Generator().manual_seed(0)
        self.value: Intervention
        if shape["value"] == "directions":
            d = self.model.config.hidden_size
            self.value = rmfast.DirectionRemoval(torch.randn(shape["count"], d, generator=rng))
        else:
            self.value = self._clamp(shape["count"], shape["value"], rng)
        self.debiased = self.rm.with_interventions(self.value)
        every = self.inputs[0]
        self.facts = {"tokens of a text": sum(map(len, every)) / len(every)}

    def _clamp(self, count: int, positions: Any, rng: torch.Generator) -> rmfast.NeuronClamp:
        sizes = projections(self.rm)
        chosen = torch.randperm(sum(sizes.values()), generator=rng)[:count]
        neurons, start = {}, 0
        for name, size in sizes.items():
            at = chosen[(chosen >= start) & (chosen < start + size)] - start
            neurons[name] = at, 0.1 * torch.randn(len(at), generator=rng)
            start += size
        return rmfast.NeuronClamp(neurons, positions)

    @cached_property
    def truth(self) -> Tensor:
        wide = copy.deepcopy(self.model).double()
        out = []
        with torch.inference_mode():
            for i in self.sample:
                ids = torch.from_numpy(self.inputs[0][i])[None].to(self.device)
                with hooked(wide, self.value, torch.tensor([ids.size(1) - 1])):
                    out.append(wide(input_ids=ids, use_cache=False).logits[0, 0])
        return torch.stack(out).cpu()

    def error(self, out: Tensor | tuple[str, Tensor]) -> float:
        if isinstance(out, tuple):  # "without": other rewards, by which its speed is not to be judged
            return 0.0 if bool(out[1].isfinite().all()) else float("inf")
        return super().error(out)


@contextmanager
def hooked(model: Any, value: Intervention, last: Tensor) -> Iterator[None]:
    """Plain forward hooks on transformers' modules, for a right-padded batch whose texts end at `last`."""
    rows = torch.arange(len(last))

    def setting(at: Tensor, to: Tensor, everywhere: bool) -> Callable:
        def hook(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            if everywhere:
                out[..., at] = to.to(out)
            else:
                out[rows[:, None], last[:, None], at] = to.to(out)
            return out

        return hook

    def removing(directions: Tensor) -> Callable:
        def hook(module: nn.Module, args: tuple) -> tuple:
            p = directions.to(args[0])
            return (args[0] - (args[0] @ p.T) @ p, *args[1:])

        return hook

    with ExitStack() as stack:
        if isinstance(value, rmfast.DirectionRemoval):
            stack.callback(model.model.norm.register_forward_pre_hook(removing(value.directions)).remove)
        elif isinstance(value, rmfast.NeuronClamp):
            for name, (at, to) in value.neurons.items():
                hook = setting(at, to, value.positions == "all")
                stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


def ours(p: Intervened) -> Callable[[scoring.Texts], Tensor]:
    return p.debiased.score


def without(p: Intervened) -> Callable[[scoring.Texts], tuple[str, Tensor]]:
    return lambda every: ("without", p.rm.score(every))


def hooks(p: Intervened) -> Callable[[scoring.Texts], Tensor]:
    def run(every: scoring.Texts) -> Tensor:
        out = torch.empty(len(every))
        for some in scoring._batches(scoring._longest_first(every), 8):
            batch = [every[i] for i in some]
            with hooked(p.model, p.value, torch.tensor([len(text) - 1 for text in batch])):
                out[some] = scoring._batch(p, batch).cpu()
        return out

    return run


def reruns(p: Intervened) -> Callable[[scoring.Texts], Tensor]:
    runs = LastTokenRuns(p.rm, p.inputs[0])
    return lambda every: runs.rewards(p.value)[:, 0]


def _row(name: str, value: str, count: int, least: float) -> Benchmark:
    quick = {"texts": 8, "count": 20 if count > 100 else count, "model": scoring.TINY}
    shape = {"model": "SmolLM2-135M", "dtype": "float32", "workload": "hh", "texts": 64, "value": value, "count": count}
    return Benchmark(
        f"interventions/{name}-fp32",
        shape,
        quick=shape | quick,
        problem=Intervened,
        ours=reruns if name == "trial" else ours,
        baselines={"score": {"": ours}} if name == "trial" else {"without": {"": without}, "hooks": {"": hooks}},
        targets={"cpu": {"score" if name == "trial" else "without": least}},
        rounds=(5, 20),
    )


BENCHMARKS = [
    _row("clamps-all", "all", 2000, 1 / 1.02),
    _row("clamps-last", "last", 2000, 1 / 1.05),
    _row("directions", "directions", 4, 1 / 1.02),
    _row("trial", "last", 2000, 20),
]
