"""Rows of path patching, on random Llama models: all pairs of two layers, and all senders to the reward.

An input is (clean, corrupted) token ids that share their first half. Baselines are loops of transformers' own forward
(SDPA, the same weights) with plain hooks, from both runs' cached activations: what a receiver makes of its input is
computed once for a sender and a layer, and put into one forward for each pair. A random sample of the pairs is timed
and scaled up to all.
- hooks: one pair a forward, as the tools in use do it.
- batched: several pairs of one receiver layer and kind as the rows of one batch, at the best of 4 to 32.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rmfast
from bench.registry import Benchmark, Maker, Problem, Shape
from bench.sweep import LLAMA, TINY, TOLERANCE, load, two_texts
from rmfast.circuits.nodes import Node
from rmfast.circuits.paths import path_patch

SAMPLE = 24  # pairs that a loop is timed on, and that are compared with the truth

Pair = tuple[Node, Node]
Some = tuple[list[int], Tensor]  # pairs by index and their rewards


class Paths(Problem):
    """A model, two texts and the pairs of a sender and a receiver, in the order of the flattened result."""

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        self.device, self.dtype = device, getattr(torch, shape["dtype"])
        self.model = load(shape, device)
        self.rm = rmfast.RewardModel(self.model)
        config, tokens = self.model.config, shape["tokens"]
        clean, corrupted = two_texts(tokens, tokens // 2, config.vocab_size)
        self.inputs, self.input_bytes = [(clean, corrupted)], clean.nbytes * 2
        heads, kv_heads = range(config.num_attention_heads), range(config.num_key_value_heads)
        last = config.num_hidden_layers
        of = [shape["sender"]] if shape["sender"] is not None else range(last)
        self.senders = [Node("head_out", layer, head) for layer in of for head in heads]
        self.senders += [Node("mlp_out", layer) for layer in of]
        self.receivers = [Node("reward")]
        if shape["receiver"] is not None:
            to = shape["receiver"]
            self.receivers = [Node("q_input", to, head) for head in heads]
            self.receivers += [Node(kind, to, head) for kind in ("k_input", "v_input") for head in kv_heads]
            self.receivers.append(Node("mlp_input", to))
        self.pairs = [(sender, receiver) for sender in self.senders for receiver in self.receivers]
        picks = np.random.default_rng(1).choice(len(self.pairs), min(SAMPLE, len(self.pairs)), replace=False)
        self.sample = sorted(picks.tolist())
        self.tolerance = self.baseline_tolerance = TOLERANCE[self.dtype]
        self.gemm, self.flops = None, 0
        self.bytes_moved = sum(p.nbytes for p in self.model.model.layers.parameters())
        self.facts = {"pairs": len(self.pairs)}
        self.rm.explain()  # tries the engine out

    @functools.cached_property
    def _exact(self) -> Callable[[int], float]:
        wide = Loop(copy.deepcopy(self.model).double(), self.inputs[0], self.device)
        return functools.cache(lambda i: float(wide([self.pairs[i]], 1)))

    def error(self, out: Tensor | Some) -> float:
        """On the sample, or the pairs that were run, in units of the reward scale."""
        which, got = (self.sample, out[self.sample]) if isinstance(out, Tensor) else out
        gain = self.model.model.norm.weight.detach().double()
        scale = float((self.model.score.weight.detach().double() * gain).norm())
        truth = torch.tensor([self._exact(i) for i in which], dtype=torch.float64)
        return float((got.cpu().double() - truth).abs().max() / scale)


class Loop:
    """Hooked forwards of the clean text, each row of a batch with what one receiver makes of one sender's change."""

    def __init__(self, model: Any, texts: tuple[np.ndarray, np.ndarray], device: torch.device) -> None:
        self.model, self.size = model, model.model.layers[0].self_attn.head_dim
        self.clean, self.corrupted = (torch.from_numpy(ids)[None].to(device) for ids in texts)

    def __call__(self, pairs: Sequence[Pair], batch: int) -> Tensor:
        with torch.inference_mode():
            self.kept = [self._cache(ids) for ids in (self.clean, self.corrupted)]
            self.made: dict[tuple[Node, int, str], Tensor] = {}
            return torch.cat([self._forward(pairs[i : i + batch]) for i in range(0, len(pairs), batch)])

    def _cache(self, ids: Tensor) -> dict[tuple[str, int], Tensor]:
        found: dict[tuple[str, int], Tensor] = {}
        with ExitStack() as stack:
            for m, block in enumerate(self.model.model.layers):
                for name, module in (("head_out", block.self_attn.o_proj), ("mid", block.post_attention_layernorm)):

                    def before(_: Any, args: Any, key: tuple[str, int] = (name, m)) -> None:
                        found[key] = args[0][0]

                    stack.callback(module.register_forward_pre_hook(before).remove)
                for name, module in (("mlp_out", block.mlp), ("post", block)):

                    def after(_: Any, args: Any, out: Any, key: tuple[str, int] = (name, m)) -> None:
                        found[key] = (out[0] if isinstance(out, tuple) else out)[0]

                    stack.callback(module.register_forward_hook(after).remove)
            self.model(input_ids=ids, use_cache=False)
        return found

    def _change(self, sender: Node) -> Tensor:
        clean, corrupted = (kept[sender.kind, sender.layer or 0] for kept in self.kept)
        if sender.kind == "mlp_out":
            return corrupted - clean
        assert sender.head is not None
        columns = slice(sender.head * self.size, (sender.head + 1) * self.size)
        weight = self.model.model.layers[sender.layer].self_attn.o_proj.weight
        return (corrupted - clean)[:, columns] @ weight[:, columns].T

    def _made(self, sender: Node, receiver: Node) -> Tensor:
        """(T, n): what a receiver makes of its input, for all heads of its layer."""
        key = sender, -1 if receiver.layer is None else receiver.layer, receiver.kind
        if key not in self.made:
            clean, change = self.kept[0], self._change(sender)
            if receiver.layer is None:
                self.made[key] = clean["post", len(self.model.model.layers) - 1] + change
            else:
                block = self.model.model.layers[receiver.layer]
                if receiver.kind == "mlp_input":
                    mid = clean["mid", receiver.layer] + change
                    self.made[key] = block.mlp(block.post_attention_layernorm(mid[None]))[0]
                else:
                    module = getattr(block.self_attn, f"{receiver.kind[0]}_proj")
                    self.made[key] = module(block.input_layernorm(clean["post", receiver.layer - 1] + change))
        return self.made[key]

    def _forward(self, pairs: Sequence[Pair]) -> Tensor:
        """Pairs of one kind of receiver in one layer."""
        receiver = pairs[0][1]
        layers = self.model.model.layers
        module = layers[-1] if receiver.layer is None else layers[receiver.layer].mlp
        if receiver.head is not None:
            module = getattr(layers[receiver.layer].self_attn, f"{receiver.kind[0]}_proj")

        made = [self._made(sender, to) for sender, to in pairs]  # by the same modules, before they are hooked

        def patch(module: Any, args: Any, out: Any) -> Any:
            x = (out[0] if isinstance(out, tuple) else out).clone()
            for row, ((_, to), new) in enumerate(zip(pairs, made)):
                columns = slice(None) if to.head is None else slice(to.head * self.size, (to.head + 1) * self.size)
                x[row, :, columns] = new[:, columns]
            return (x, *out[1:]) if isinstance(out, tuple) else x

        handle = module.register_forward_hook(patch)
        try:
            ids = self.clean.expand(len(pairs), -1)
            return self.model(input_ids=ids, use_cache=False).logits[:, 0]
        finally:
            handle.remove()


def ours(p: Paths) -> Callable[[Any], Tensor]:
    def run(texts: tuple[np.ndarray, np.ndarray]) -> Tensor:
        found: Any = path_patch(p.rm, *texts, senders=p.senders, receivers=p.receivers)
        return found.rewards.flatten()

    assert p.rm.explain().startswith("engine: packed, fused"), p.rm.explain()
    return run


def loop(batch: int = 1) -> Maker:
    """Timed on the sample, or on a batch of one kind of receiver; `scale` is what all pairs take of it."""

    def make(p: Paths) -> Callable[[Any], Some]:
        hooked, which = Loop(p.model, p.inputs[0], p.device), p.sample
        if batch > 1:
            kind = p.pairs[which[0]][1].kind
            which = [i for i, (_, receiver) in enumerate(p.pairs) if receiver.kind == kind][:batch]

        def run(texts: Any) -> Some:
            return which, hooked([p.pairs[i] for i in which], batch).float()

        run.scale = len(p.pairs) / len(which)  # type: ignore[attr-defined]
        return run

    return make


BENCHMARKS = [
    Benchmark(
        f"circuits/{name}-{short}",
        {"model": json.dumps({**LLAMA, "num_hidden_layers": 8}), "tokens": 96, "dtype": dtype, **which},
        quick={"model": TINY, "tokens": 6, "dtype": dtype, **quick},
        problem=Paths,
        ours=ours,
        baselines={"hooks": {"": loop()}, "batched": {str(batch): loop(batch) for batch in (4, 8, 16, 32)}},
        targets={"cpu": {"hooks": 10}} if short == "fp32" else {},
        rounds=(3, 20),
    )
    for name, which, quick in (
        ("two-layers", {"sender": 3, "receiver": 5}, {"sender": 0, "receiver": 1}),
        ("to-reward", {"sender": None, "receiver": None}, {"sender": None, "receiver": None}),
    )
    for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
]
