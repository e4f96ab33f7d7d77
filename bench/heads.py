"""Rows of heads: ArmoRM's whole head, an ensemble of heads on one body, and the scores of solutions' steps.

ArmoRM's head (19 attributes, a gate of three hidden layers of 1024) reads the final stream at the last token of each
text and at its prompt's end. Baselines:
- PyTorch: what its published module computes: the norm of all rows, the attributes of a text's last one, the gate's
  MLP on its prompt's end, for every text, R, T, softmax and sum;
- a gate a prompt: the same, with the MLP run once for the texts that share a prompt, which it does not do.
Ours multiplies in fp32 whatever the states and weights are stored in; on bf16 ones PyTorch's products are in 16 bits,
and off by 5e-3. Targets are those of fp32.

An ensemble is 8 linear heads on SmolLM2-135M; its baseline is a run of our own engine for each.

Steps are those of solutions to one question, read by the model's head at each step's end. Baselines are transformers'
own forward:
- a forward a step: of the text up to each step's end, alone;
- a forward a solution: of each whole solution, read at all its steps' ends;
- one batch: of all solutions, right-padded.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import rmfast
from bench import scoring
from bench.registry import Benchmark, Maker, Problem, Shape
from rmfast import heads

ATTRIBUTES, HIDDEN = 19, 1024  # of ArmoRM
EPS = 1e-5
SAMPLE = 64  # texts compared with the fp64 truth


class GatedRows(Problem):
    """States (P + N, d): those at the ends of P prompts, and at the ends of the N texts that go on from them."""

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        prompts, responses, d, inner = (shape[name] for name in ("prompts", "responses", "d", "hidden"))
        self.dtype, self.device, self.prompts = getattr(torch, shape["dtype"]), device, prompts
        draw = torch.Generator(device).manual_seed(0)

        def random(*size: int) -> Tensor:
            x = torch.randn(size, generator=draw, device=device)
            return (x / size[-1] ** 0.5 if len(size) > 1 else x).to(self.dtype)

        sizes = [d, inner, inner, inner, ATTRIBUTES]
        weights = [random(m, n) for n, m in pairwise(sizes)]
        gate = heads.Layers(weights=weights, biases=[random(m) for m in sizes[1:]])
        self.head = heads.Gated(
            weight=random(ATTRIBUTES, d), transform=random(ATTRIBUTES, ATTRIBUTES), gate=gate, pattern=(1, 2)
        )
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=d, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8,
            num_key_value_heads=1, rms_norm_eps=EPS,
        )  # fmt: skip
        body: Any = transformers.LlamaModel(config)  # its norm is what is run of it
        body = body.to(device, self.dtype)
        nn.init.uniform_(body.norm.weight, 0.5, 1.5)
        self.norm = body.norm.requires_grad_(False)
        self.rm = rmfast.RewardModel(body, head=self.head)
        count = prompts * (1 + responses)
        self.input_bytes = count * d * self.dtype.itemsize
        self.inputs = [
            torch.randn(count, d, generator=draw, device=device).to(self.dtype)
            for _ in range(max(1, min(64, rotate // self.input_bytes)))
        ]
        self.of = torch.arange(prompts, device=device).repeat_interleave(responses)  # the prompt of each text
        self.bytes_moved = self.input_bytes + sum(w.nbytes for w in weights)
        self.flops = 2 * (prompts * sum(w.numel() for w in weights) + len(self.of) * ATTRIBUTES * (d + ATTRIBUTES))
        self.gemm = (prompts, inner, d)
        self.tolerance = 1e-5
        self.baseline_tolerance = 1e-5 if self.dtype == torch.float32 else 5e-2

    @functools.cached_property
    def truth(self) -> Tensor:
        some = self.sample
        read = torch.cat([self.of[some], self.prompts + some])
        norm = copy.deepcopy(self.norm).double()
        rows = self.inputs[0][read].double()
        rows = norm.weight * rows * torch.rsqrt(rows.square().mean(1, keepdim=True) + EPS)
        return _published(rows[: len(some)], rows[len(some) :], self.head, torch.float64)

    @property
    def sample(self) -> Tensor:
        return torch.linspace(0, len(self.of) - 1, min(SAMPLE, len(self.of)), device=self.device).long()

    def error(self, out: Tensor) -> float:
        return float((out[self.sample].double() - self.truth).abs().max() / self.truth.abs().max())


def _published(gate_rows: Tensor, rows: Tensor, head: heads.Gated, dtype: torch.dtype | None = None) -> Tensor:
    """Scores (N,) of normed rows (N, d), with those of their gates (N, d)."""

    def cast(x: Tensor | None) -> Any:
        return x if x is None or dtype is None else x.to(dtype)

    rewards = nn.functional.linear(rows, cast(head.weight))
    x = gate_rows
    for i, (weight, bias) in enumerate(zip(head.gate.weights, head.gate.biases)):
        x = nn.functional.linear(x if i == 0 else nn.functional.relu(x), cast(weight), cast(bias))
    gates = nn.functional.softmax(x / head.temperature, dim=1) * head.scale
    if len(gates) != len(rewards):
        gates = gates.repeat_interleave(len(rewards) // len(gates), 0)
    return (gates * (rewards @ cast(head.transform))).sum(1)


def ours(p: GatedRows) -> Callable[[Tensor], Tensor]:
    binding = p.rm.binding
    every = torch.arange(len(p.inputs[0]), device=p.device)
    gates = every[: p.prompts]

    def run(hidden: Tensor) -> Tensor:
        with binding.session():
            values = binding.row_values(hidden[None], every, gates)
            return p.head.rewards(values[p.prompts :], values[p.of])[:, 0]

    return run


def published(p: GatedRows) -> Callable[[Tensor], Tensor]:
    def run(hidden: Tensor) -> Tensor:
        rows = p.norm(hidden)
        return _published(rows[p.of], rows[p.prompts :], p.head)

    return run


def a_gate_a_prompt(p: GatedRows) -> Callable[[Tensor], Tensor]:
    def run(hidden: Tensor) -> Tensor:
        rows = p.norm(hidden)
        return _published(rows[: p.prompts], rows[p.prompts :], p.head)

    return run


def _armorm(name: str, prompts: int, responses: int, target: float) -> list[Benchmark]:
    rows = []
    for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        shape = {"prompts": prompts, "responses": responses, "d": 4096, "hidden": HIDDEN, "dtype": dtype}
        baselines = {"PyTorch": {"": published}, "a gate a prompt": {"": a_gate_a_prompt}}
        quick = shape | {"prompts": 3, "d": 48, "hidden": 32}
        rows.append(
            Benchmark(
                f"heads/armorm-{name}-{short}", shape, quick, GatedRows, ours, baselines,
                targets={"cpu": {"PyTorch": target}} if short == "fp32" else {}, rotate=1 << 28, rounds=(2, 100),
            )
        )  # fmt: skip
    return rows


class Ensemble(scoring.Scoring):
    """Heads on one body; a result is the rewards (M, N) of all."""

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        super().__init__(shape, device, rotate)
        d = self.model.config.hidden_size
        draw = torch.Generator(device).manual_seed(0)
        self.weights = [0.02 * torch.randn(1, d, generator=draw, device=device) for _ in range(shape["members"])]
        body = self.model.model
        self.members = [rmfast.RewardModel(body, head=heads.Linear(weight=weight)) for weight in self.weights]
        for rm in self.members:
            rm.packed_engine()  # tries the engine out
        self.ensemble = rmfast.Ensemble(self.members)

    @functools.cached_property
    def truth(self) -> Tensor:
        wide = copy.deepcopy(self.model.model).double()
        with torch.inference_mode():
            ids = [torch.from_numpy(self.inputs[0][i])[None].to(self.device) for i in self.sample]
            rows = torch.stack([wide(input_ids=x, use_cache=False).last_hidden_state[0, -1] for x in ids])
            return (torch.cat(self.weights).double() @ rows.T).cpu()

    def error(self, out: Tensor) -> float:
        gain = self.model.model.norm.weight.detach().double()
        scale = float((torch.cat(self.weights).double() * gain).norm(dim=1).max())
        return float((out.cpu().double()[:, self.sample] - self.truth).abs().max() / scale)


def together(p: Ensemble) -> Callable[[scoring.Texts], Tensor]:
    assert p.ensemble.runs == 1, p.ensemble
    return lambda every: p.ensemble.score(every).members


def passes(p: Ensemble) -> Callable[[scoring.Texts], Tensor]:
    return lambda every: torch.stack([rm.score(every) for rm in p.members])


class Steps(scoring.Scoring):
    """Solutions to one question, as token ids; a result is the values (S,) at the ends of all their steps."""

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        super().__init__(shape, device, rotate)
        self.steps = shape["steps"]
        self.ends = np.arange(1, self.steps + 1) * shape["step"] + shape["question"] - 1
        self.sample = self.sample[:4]

    @functools.cached_property
    def truth(self) -> Tensor:
        wide = copy.deepcopy(self.model).double()
        with torch.inference_mode():
            return torch.stack([_at_ends(wide, self.inputs[0][i], self.ends, self.device) for i in self.sample]).cpu()

    def error(self, out: Tensor) -> float:
        got = out.cpu().double().reshape(-1, self.steps)[self.sample]
        return float((got - self.truth.sigmoid()).abs().max())


def _at_ends(model: Any, text: np.ndarray, ends: np.ndarray, device: torch.device) -> Tensor:
    """The head (S,) at these tokens of one forward."""
    ids = torch.from_numpy(text)[None].to(device)
    return model.score(model.model(input_ids=ids, use_cache=False).last_hidden_state[0, ends])[:, 0]


def packed(p: Steps) -> Callable[[scoring.Texts], Tensor]:
    return lambda every: torch.cat(p.rm.step_scores(every, step_tag_id=scoring.LAST))


def a_step(p: Steps) -> Callable[[scoring.Texts], Tensor]:
    def run(every: scoring.Texts) -> Tensor:
        with torch.inference_mode():
            prefixes = ((text, end) for text in every for end in p.ends)
            values = [_at_ends(p.model, text[: end + 1], np.array([end]), p.device) for text, end in prefixes]
            return torch.cat(values).float().sigmoid()

    return run


def a_solution(p: Steps) -> Callable[[scoring.Texts], Tensor]:
    def run(every: scoring.Texts) -> Tensor:
        with torch.inference_mode():
            return torch.cat([_at_ends(p.model, text, p.ends, p.device) for text in every]).float().sigmoid()

    return run


def one_batch(p: Steps) -> Callable[[scoring.Texts], Tensor]:
    def run(every: scoring.Texts) -> Tensor:
        ids = torch.from_numpy(np.stack(every)).to(p.device)  # of equal lengths: no padding
        with torch.inference_mode():
            rows = p.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, p.ends]
            return p.model.score(rows).float().sigmoid().reshape(-1)

    return run


def _on_a_model(
    name: str, problem: Any, ours: Maker, baselines: dict[str, dict[str, Maker]], target: dict[str, float],
    tiny: dict[str, Any], **workload: Any,
) -> list[Benchmark]:  # fmt: skip
    rows = []
    for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        shape = {"model": "SmolLM2-135M", "dtype": dtype, **workload}
        rows.append(
            Benchmark(
                f"heads/{name}-{short}", shape, shape | {"model": scoring.TINY} | tiny, problem, ours, baselines,
                targets={"cpu": target, "cuda": target}, rounds=(1, 20),
            )
        )  # fmt: skip
    return rows


BENCHMARKS = [
    *_armorm("32768-rows", 2048, 16, 10),
    *_armorm("64-pairs", 64, 2, 2),
    *_on_a_model(
        "ensemble-of-8", Ensemble, together, {"8 passes": {"": passes}}, {"8 passes": 7}, {"texts": 4, "tokens": 12},
        workload="equal", texts=16, tokens=128, members=8,
    ),
    *_on_a_model(
        "steps-16x12", Steps, packed,
        {
            "a forward a step": {"": a_step}, "a forward a solution": {"": a_solution}, "one batch": {"": one_batch},
        },
        {"a forward a step": 8}, {"texts": 3, "question": 7, "step": 4, "steps": 3},
        workload="steps", texts=16, question=64, step=25, steps=12,
    ),
]  # fmt: skip
