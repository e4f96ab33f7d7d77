"""Rows of the reward lens and of attribution by heads.

`lens/pairs`: the lens of pairs that share their prompt at the read token, in the form that reward-lens has (w·h + b,
without the final norm), so that all contenders give the same numbers:
- reward-lens: its `RewardLens.trace`, a hooked forward for each text;
- batched: padded batches sorted by length with output_hidden_states (and the last layer's stream by a hook, since
  transformers normalises that), the read tokens' streams stacked and multiplied with the head.

`attribution/pairs`: the same texts and contenders for what the embedding and each layer's attention and MLP add to the
reward at the read token, w·o_c; reward-lens' is its `ComponentAttribution`, batched has hooks on attention and MLPs.

`lens/streams`: every token's stream of every layer through the final norm and head, a layer at a time, against the norm
and head as modules and the baselines of `reward_head`.

`lens/heads`: contributions of all heads of a layer at all tokens, against the heads' own outputs W_O x_h by einsum and
their dots with the reward's direction.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench import reward_head, scoring, sweep
from bench.registry import Benchmark, Maker, Problem, Shape
from rmfast.interpret.components import projector, unit_dots

SAMPLE = 8  # texts compared with the truth
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of the largest reward of any layer


class Pairs(scoring.Scoring):
    """Texts 0, 1 are a pair, 2, 3 the next. Results are (texts, layers + 1)."""

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        super().__init__(shape, device, rotate)
        self.tolerance = self.baseline_tolerance = TOLERANCE[self.dtype]
        self.sample = self.sample[:: max(1, len(self.sample) // SAMPLE)]
        self.prompts = [row[0] for row in json.loads(scoring.LENGTHS.read_text())[: shape["texts"] // 2]]
        self.flops += 2 * self.model.config.hidden_size * (len(self.model.model.layers) + 1) * shape["texts"]

    @functools.cached_property
    def exact(self) -> Tensor:
        wide = copy.deepcopy(self.model).double()
        return torch.stack([self.batch(wide, [self.inputs[0][i]], self.device)[0] for i in self.sample])

    @staticmethod
    def batch(model: Any, texts: scoring.Texts, device: torch.device) -> Tensor:
        return _streams(model, texts, device)

    def error(self, out: Tensor) -> float:
        return float((out.cpu().double()[self.sample] - self.exact.cpu()).abs().max() / self.exact.abs().max())


class Parts(Pairs):
    """Results are (texts, 1 + 2 layers): the embedding, attention and MLP of layer 0, of layer 1, ..."""

    @staticmethod
    def batch(model: Any, texts: scoring.Texts, device: torch.device) -> Tensor:
        return _parts(model, texts, device)


def _seen(
    model: Any, texts: scoring.Texts, device: torch.device, modules: list[nn.Module], options: dict[str, bool]
) -> tuple[list[Tensor], Any, tuple[Tensor, Tensor]]:
    """What modules are given (norms) or give at the last tokens in one padded batch, its result, and these tokens."""
    longest, lengths = max(map(len, texts)), torch.tensor([len(text) for text in texts], device=device)
    at = torch.arange(len(texts), device=device), lengths - 1
    ids = torch.full((len(texts), longest), scoring.PAD, device=device)
    for row, text in zip(ids, texts):
        row[: len(text)] = torch.from_numpy(text)
    mask = (torch.arange(longest, device=device) < lengths[:, None]).long()
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple, out: Any) -> None:
        out = args[0] if module is model.model.norm else out
        seen.append((out[0] if isinstance(out, tuple) else out)[at])

    handles = [module.register_forward_hook(see) for module in modules]
    try:
        with torch.inference_mode():
            out = model.model(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    finally:
        for handle in handles:
            handle.remove()
    return seen, out, at


def _streams(model: Any, texts: scoring.Texts, device: torch.device) -> Tensor:
    """(texts, layers + 1): w·h at the last tokens, from one padded batch."""
    last, out, at = _seen(model, texts, device, [model.model.norm], {"output_hidden_states": True})
    return _dots(model, [*(states[at] for states in out.hidden_states[:-1]), *last])


def _parts(model: Any, texts: scoring.Texts, device: torch.device) -> Tensor:
    """(texts, 1 + 2 layers): w·o_c of every component at the last tokens, from one padded batch."""
    blocks = [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]
    return _dots(model, _seen(model, texts, device, [model.model.embed_tokens, *blocks], {})[0])


def _dots(model: Any, rows: list[Tensor]) -> Tensor:
    stacked = torch.stack(rows, 1)
    wide = stacked if stacked.dtype == torch.float64 else stacked.float()
    with torch.inference_mode():
        return wide @ model.score.weight[0].to(wide)


def lens(p: Pairs) -> Callable[[scoring.Texts], Tensor]:
    assert p.rm.explain().startswith("engine: packed, fused"), p.rm.explain()
    return lambda texts: p.rm.lens(texts, norm="raw").rewards


def attribute(p: Parts) -> Callable[[scoring.Texts], Tensor]:
    assert p.rm.explain().startswith("engine: packed, fused"), p.rm.explain()

    def run(texts: scoring.Texts) -> Tensor:
        found = p.rm.attribute(texts, norm="raw")
        pairs = [torch.stack([each.of("attn_out"), each.of("mlp_out")], 1).flatten() for each in found]
        return torch.stack([torch.cat([each.of("embedding")[None], pair]) for each, pair in zip(found, pairs)])

    return run


def batched(size: int) -> Maker:
    def make(p: Pairs) -> Callable[[scoring.Texts], Tensor]:
        def run(texts: scoring.Texts) -> Tensor:
            order = np.argsort([-len(text) for text in texts], kind="stable")
            parts = [order[i : i + size] for i in range(0, len(order), size)]
            out = torch.cat([p.batch(p.model, [texts[i] for i in some], p.device) for some in parts])
            return out[torch.from_numpy(np.argsort(order)).to(out.device)]

        return run

    return make


def reward_lens(tool: str, method: str, found: str) -> Maker:
    """Its tool's method on every pair, whose result has `found` for the preferred and the dispreferred text."""

    def make(p: Pairs) -> Callable[[scoring.Texts], Tensor]:
        wrapper = sweep.peer(p.model, "{{ messages[0]['content'] }} {{ messages[1]['content'] }}", p.device)
        call = getattr(getattr(importlib.import_module("reward_lens"), tool)(wrapper), method)
        # Token ids come to it as words, prompt and response apart.
        words = [[" ".join(map(str, part)) for part in np.split(text, [p.prompts[i // 2]])] for i, text in
                 enumerate(p.inputs[0])]  # fmt: skip
        pairs = [(a[0], a[1], b[1]) for a, b in zip(words[::2], words[1::2])]

        def run(texts: scoring.Texts) -> Tensor:
            each = [call(*pair) for pair in pairs]
            both = [getattr(one, f"{found}_{side}") for one in each for side in ("preferred", "dispreferred")]
            return torch.from_numpy(np.stack(both))

        return run

    return make


class Streams(reward_head.Head):
    """The streams of all layers, one after another: (layers · tokens, d)."""

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        self.tokens = shape["tokens"]
        heads = {"heads": 1, "norm": "rms", "n": shape["layers"] * shape["tokens"]}
        super().__init__({**shape, **heads}, device, rotate)


def by_layer(maker: Maker) -> Maker:
    """A maker's function on one layer's streams after another's, as they come."""

    def make(p: Streams) -> Callable[[Tensor], Tensor]:
        run = maker(p)
        return lambda streams: torch.cat([run(x) for x in streams.split(p.tokens)])

    return make


class Heads(Problem):
    """What the heads of one layer give their output projection, (tokens, heads, width), and the reward's direction."""

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        tokens, heads, d = shape["tokens"], shape["heads"], shape["d"]
        self.dtype = getattr(torch, shape["dtype"])
        draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
        self.linear = nn.Linear(d, d, bias=False, device=device, dtype=self.dtype)
        self.direction = draw(1, d) / d**0.5
        first = draw(tokens, heads, d // heads).to(self.dtype)
        self.inputs = [first] + [first.clone() for _ in range(1, max(1, rotate // first.nbytes))]
        self.input_bytes = first.nbytes
        self.output_bytes = tokens * heads * 4
        self.bytes_moved = first.nbytes + self.linear.weight.nbytes + self.output_bytes
        self.flops = 2 * tokens * d + 2 * d * d
        self.gemm = None
        self.tolerance, self.baseline_tolerance = 1e-5, 1e-5

    def error(self, out: Tensor) -> float:
        directions = (self.direction.double() @ self.linear.weight.detach().double()).view(self.inputs[0].shape[1:])
        truth = (self.inputs[0].double() * directions).sum(-1)
        return float((out.double() - truth).abs().max() / truth.abs().max())


def projected(p: Heads) -> Callable[[Tensor], Tensor]:
    """As `rm.attribute` does for each layer, the projector made anew in every call."""

    def run(x: Tensor) -> Tensor:
        directions, _ = projector(p.linear, p.direction, x[0].numel())
        return unit_dots(x, directions.unflatten(-1, x.shape[1:]))[..., 0]

    return run


def vectors(p: Heads) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        weight = p.linear.weight.unflatten(1, x.shape[1:])  # (d, heads, width)
        return torch.einsum("thd,d->th", torch.einsum("thw,dhw->thd", x, weight), p.direction[0])

    return run


def _pairs(short: str, dtype: str, targets: dict[str, float], parts: bool = False) -> Benchmark:
    tiny = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2}  # fmt: skip
    shape = {"model": "SmolLM2-135M", "workload": "hh", "texts": 128, "dtype": dtype}
    baselines: dict[str, dict[str, Maker]] = {"batched": {str(size): batched(size) for size in (4, 8, 16)}}
    if importlib.util.find_spec("reward_lens"):
        what = (
            ("ComponentAttribution", "attribute", "contributions") if parts else ("RewardLens", "trace", "reward_lens")
        )
        baselines["reward-lens"] = {"": reward_lens(*what)}
    else:
        targets = {name: least for name, least in targets.items() if name != "reward-lens"}
    return Benchmark(
        f"{'attribution' if parts else 'lens'}/pairs-{short}",
        shape,
        quick=shape | {"model": json.dumps(tiny), "texts": 4},
        problem=Parts if parts else Pairs,
        ours=attribute if parts else lens,
        baselines=baselines,
        limit={"cpu": "gemm", "cuda": "gemm"},
        targets={"cpu": targets},
        rounds=(2, 10),
    )


STREAMS = {"layers": 32, "tokens": 2048, "d": 2048, "dtype": "bfloat16"}
HEADS = {"tokens": 2048, "heads": 32, "d": 2048, "dtype": "float32"}

BENCHMARKS = [
    _pairs("fp32", "float32", {"reward-lens": 2.5}),
    _pairs("bf16", "bfloat16", {"reward-lens": 5}),
    _pairs("fp32", "float32", {}, parts=True),
    _pairs("bf16", "bfloat16", {}, parts=True),
    Benchmark(
        "lens/streams-bf16",
        STREAMS,
        quick=STREAMS | {"layers": 3, "tokens": 16, "d": 96},
        problem=Streams,
        ours=by_layer(reward_head.ours),
        baselines={
            "eager": {"": by_layer(reward_head.hf)},
            "algebraic": {"native": by_layer(reward_head.native), "chunked": by_layer(reward_head.chunked)},
        },
        limit={"cpu": "read", "cuda": "copy"},
        targets={"cpu": {"eager": 30}},
    ),
    Benchmark(
        "lens/heads-fp32",
        HEADS,
        quick=HEADS | {"tokens": 16, "heads": 4, "d": 96},
        problem=Heads,
        ours=projected,
        baselines={"vectors": {"": vectors}},
        limit={"cpu": "read", "cuda": "copy"},
        targets={"cpu": {"vectors": 10, "memory": 0.1}},
        memory="vectors",
    ),
]
