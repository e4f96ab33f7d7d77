"""Rows of edge attribution and of circuits run by edges, on SmolLM2-135M with a random head.

An input is a pair of texts as token ids, of which two thirds of the tokens differ. Baselines are PyTorch with hooks on
transformers' own model, which give each head of queries, keys and values a stream of its own, as libraries with split
inputs do, and with its gradient:
- dense: what senders write (U, T, d) and gradients of receivers (V, T, d) whole, and one einsum over all of them;
- edge by edge: of the same, a product for each edge.
Circuits: a forward for each circuit, whose receivers read an einsum of all senders.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rmfast
from bench import scoring
from bench.registry import Benchmark, Problem, Shape
from rmfast.circuits.circuit import Circuit
from rmfast.circuits.edges import edge_attribution
from rmfast.circuits.faithfulness import faithfulness

Texts = tuple[np.ndarray, np.ndarray]
Reads = Callable[[int, str, Tensor], Tensor]  # layer, "heads" or "mlp" or "end", (T, d) -> (V, T, d) or (T, d)


class Split:
    """A Llama whose heads each read a stream of their own, and what its senders write, by hooks."""

    def __init__(self, model: Any) -> None:
        self.model, self.blocks = model, model.model.layers
        config = model.config
        self.heads, self.kv, self.size = (
            config.num_attention_heads,
            config.num_key_value_heads,
            self.blocks[0].self_attn.head_dim,
        )
        self.each = self.heads + 2 * self.kv  # receivers of a layer's attention

    def run(
        self, ids: np.ndarray, reads: Reads, embedding: Tensor | None = None, write: Any = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The reward, and what senders write in turn: (1, T, d), (H, T, d), (1, T, d), ..."""
        sent: list[Tensor] = []

        def wrote(x: Tensor) -> None:
            sent.append(x)
            if write is not None:
                write(x)

        with ExitStack() as stack:

            def on(module: Any, hook: Any, before: bool = False) -> None:
                stack.callback(
                    (module.register_forward_pre_hook if before else module.register_forward_hook)(hook).remove
                )

            def enter(module: Any, args: Any) -> Any:
                x = args[0] if embedding is None else embedding[None]
                wrote(x)
                return (x, *args[1:])

            on(self.blocks[0], enter, before=True)
            for index, block in enumerate(self.blocks):
                self._hook(on, index, block, reads, wrote)
            on(self.blocks[-1], lambda module, args, out: reads(len(self.blocks), "end", out[0])[None])
            logits = self.model(input_ids=torch.from_numpy(ids)[None].to(self.model.device), use_cache=False).logits
        return logits[0, 0], sent

    def _hook(self, on: Any, index: int, block: Any, reads: Reads, wrote: Any) -> None:
        attn, made = block.self_attn, {}

        def stream(module: Any, args: Any) -> None:
            made["x"] = block.input_layernorm.forward(reads(index, "heads", args[0][0]))

        def projected(start: int) -> Callable[..., Tensor]:
            def hook(module: Any, args: Any, out: Tensor) -> Tensor:
                weight = module.weight.unflatten(0, (-1, self.size))  # (heads, D, d)
                x = made["x"][start : start + len(weight)]
                return torch.bmm(x, weight.transpose(1, 2)).transpose(0, 1).flatten(1)[None]

            return hook

        def heads(module: Any, args: Any) -> None:
            weight = module.weight.T.unflatten(0, (self.heads, self.size))
            wrote(torch.bmm(args[0][0].unflatten(-1, (self.heads, self.size)).transpose(0, 1), weight))

        on(block, stream, before=True)
        for start, projection in ((0, attn.q_proj), (self.heads, attn.k_proj), (self.heads + self.kv, attn.v_proj)):
            on(projection, projected(start))
        on(attn.o_proj, heads, before=True)
        on(block.post_attention_layernorm, lambda module, args: (reads(index, "mlp", args[0][0])[None],), before=True)
        on(block.mlp, lambda module, args, out: wrote(out))

    def pieces(self, pair: Texts, way: np.ndarray) -> tuple[Tensor, Tensor]:
        """What senders write (U, T, d) in the second text less the first, and the mean gradients (V, T, d)."""
        with torch.no_grad():
            own, other = (torch.cat(self.run(ids, self.whole)[1]) for ids in pair)
        total = None
        for share in way:
            leaves: list[Tensor] = []

            def reads(layer: int, place: str, x: Tensor, leaves: list[Tensor] = leaves) -> Tensor:
                leaves.append(x.new_zeros(self.each if place == "heads" else 1, *x.shape).requires_grad_())
                return x + (leaves[-1] if place == "heads" else leaves[-1][0])

            embedding = (own[0] + float(share) * (other[0] - own[0])).requires_grad_()
            grads = torch.autograd.grad(self.run(pair[0], reads, embedding)[0], leaves)
            total = torch.cat(grads) if total is None else total + torch.cat(grads)
        assert total is not None
        return other - own, total / len(way)

    def whole(self, layer: int, place: str, x: Tensor) -> Tensor:
        return x.expand(self.each, -1, -1) if place == "heads" else x

    def circuit(self, ids: np.ndarray, other: Tensor, kept: Tensor) -> Tensor:
        """The reward of a text whose receivers read kept (U, V) senders, and of others what they write elsewhere."""
        now = torch.empty_like(other)
        done = [0]

        def write(x: Tensor) -> None:
            now[done[0] : done[0] + len(x)] = x
            done[0] += len(x)

        def reads(layer: int, place: str, x: Tensor) -> Tensor:
            first = layer * (self.each + 1) + (self.each if place == "mlp" else 0)
            columns = kept[: done[0], first : first + (self.each if place == "heads" else 1)]
            apart = now[: done[0]] - other[: done[0]]
            out = torch.einsum("uv,utd->vtd", columns, apart) + other[: done[0]].sum(0)
            return out if place == "heads" else out[0]

        return self.run(ids, reads, write=write)[0]


class Edges(Problem):
    """A model and a pair of texts."""

    grad = True

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        self.device, self.dtype, self.shape = device, getattr(torch, shape["dtype"]), shape
        self.model = scoring.load(shape, device)
        self.rm = rmfast.RewardModel(self.model)
        rng, tokens = np.random.default_rng(0), shape["tokens"]
        clean, corrupted = rng.integers(scoring.FIRST, scoring.LAST, (2, tokens))
        corrupted[: tokens // 3] = clean[: tokens // 3]
        self.inputs = [(clean, corrupted)]
        self.input_bytes = clean.nbytes * 2
        self.way = (np.arange(shape["steps"]) + 0.5) / shape["steps"] if shape["steps"] > 1 else np.zeros(1)
        layers = self.model.model.layers
        weights = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
        self.bytes_moved = sum(p.nbytes for p in layers.parameters())
        passes = 2 + 2 * shape["steps"] + (shape["steps"] if shape["steps"] > 1 else 0)
        self.flops = 2 * weights * tokens * passes
        self.gemm = (tokens * shape["steps"], *layers[0].mlp.up_proj.weight.shape)
        self.tolerance = self.baseline_tolerance = 1e-3
        self.split = Split(self.model)
        self.rm.packed_engine()

    @functools.cached_property
    def truth(self) -> Tensor:
        pieces = Split(copy.deepcopy(self.model).double()).pieces(self.inputs[0], self.way)
        return torch.einsum("utd,vtd->uv", *pieces).cpu()

    def error(self, out: Tensor) -> float:
        """Over all edges, in units of the largest score."""
        there = ~out.isnan().cpu()
        return float((out.cpu().double() - self.truth)[there].abs().max() / self.truth[there].abs().max())


def ours(p: Edges) -> Callable[[Texts], Tensor]:
    steps = p.shape["steps"] if p.shape["steps"] > 1 else None
    return lambda pair: edge_attribution(p.rm, *pair, steps=steps).scores


def dense(p: Edges) -> Callable[[Texts], Tensor]:
    none = edge_attribution(p.rm, *p.inputs[0]).scores.isnan().to(p.device)

    def run(pair: Texts) -> Tensor:
        return torch.einsum("utd,vtd->uv", *p.split.pieces(pair, p.way)).masked_fill(none, torch.nan)

    return run


def edge_by_edge(p: Edges) -> Callable[[Texts], Tensor]:
    none = edge_attribution(p.rm, *p.inputs[0]).scores.isnan()

    def run(pair: Texts) -> Tensor:
        change, slopes = p.split.pieces(pair, p.way)
        out = torch.full(none.shape, torch.nan)
        for u, v in (~none).nonzero().tolist():
            out[u, v] = float((change[u] * slopes[v]).sum())
        return out

    return run


class Circuits(Edges):
    """Random circuits of a tenth to nine tenths of the edges; a result is their rewards."""

    grad = False

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        super().__init__({**shape, "steps": 1}, device, rotate)
        rng, scores = np.random.default_rng(0), edge_attribution(self.rm, *self.inputs[0])
        every, shares = scores.top(scores.edges), np.linspace(0.1, 0.9, shape["circuits"])
        self.circuits = [Circuit(tuple(edge for edge in every if rng.random() < share)) for share in shares]
        self.masks = [each.mask(scores.senders, scores.receivers).to(device) for each in self.circuits]
        self.flops = self.flops // 4 * 2 * len(self.circuits)  # and as many without each circuit
        self.gemm = (min(4096, shape["tokens"] * len(self.circuits)), *self.gemm[1:])  # type: ignore[index]

    @functools.cached_property
    def truth(self) -> Tensor:
        return self.by_hooks(Split(copy.deepcopy(self.model).double()))

    def by_hooks(self, split: Split) -> Tensor:
        """(2 S + 1,), of the circuits, of all without each, and of none."""
        clean, corrupted = self.inputs[0]
        with torch.no_grad():
            other = torch.cat(split.run(corrupted, split.whole)[1])
            every = [*self.masks, *(~mask for mask in self.masks), torch.zeros_like(self.masks[0])]
            return torch.stack([split.circuit(clean, other, mask.to(other)) for mask in every]).cpu()

    def error(self, out: Tensor) -> float:
        """In units of the largest reward."""
        return float((out.double() - self.truth).abs().max() / self.truth.abs().max())


def our_circuits(p: Circuits) -> Callable[[Texts], Tensor]:
    def run(pair: Texts) -> Tensor:
        found = faithfulness(p.rm, p.circuits, *pair, resamples=1)
        return torch.from_numpy(np.concatenate([found.circuit[:, 0], found.rest[:, 0], found.none]))

    return run


def hooked_circuits(p: Circuits) -> Callable[[Texts], Tensor]:
    return lambda pair: p.by_hooks(p.split)


SHAPE = {"model": "SmolLM2-135M", "dtype": "float32", "tokens": 48}
QUICK = {"model": scoring.TINY, "dtype": "float32", "tokens": 6}

BENCHMARKS = [
    *(
        Benchmark(
            f"edges/{name}-fp32",
            {**SHAPE, "steps": steps},
            {**QUICK, "steps": min(steps, 2)},
            Edges,
            ours,
            {"dense": {"": dense}, "edge by edge": {"": edge_by_edge}},
            limit={"cpu": "gemm", "cuda": "gemm"},
            rounds=(3, 20),
        )
        for name, steps in (("eap", 1), ("eap-ig-5", 5))
    ),
    Benchmark(
        "edges/circuits-fp32",
        {**SHAPE, "circuits": 16},
        {**QUICK, "circuits": 2},
        Circuits,
        our_circuits,
        {"hooks": {"": hooked_circuits}},
        limit={"cpu": "gemm", "cuda": "gemm"},
        rounds=(2, 10),
    ),
]
