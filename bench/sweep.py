"""Rows of the patch sweep, on random Llama models and on SmolLM2-135M.

Baselines are loops of transformers' own forward (SDPA, the same weights and dtype) with plain hooks:
- hooks: one site a forward, as the tools in use do it. A random sample of the sites is timed and scaled up to all.
- batched: several sites as the rows of one batch, at the best of 2 to 32.
- skipping: one site a forward, leaving out the sites before the first token that differs.
- reward-lens: its own grids, where it has them and is installed.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import rmfast
from bench import machine, scoring
from bench.registry import Benchmark, Maker, Problem, Shape

SAMPLE = 32  # sites that a loop is timed on, and that are compared with the truth
# Of the reward scale ‖γ⊙w‖; bf16 rewards of a patched run are off by some percent of it in every implementation.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
BATCHES = (2, 4, 8, 16, 32)

Site = tuple[str, int, Any, Any]  # kind, layer, positions (a slice), head or None
Some = tuple[list[int], Tensor]  # sites by index and their rewards


def two_texts(tokens: int, shared: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids (tokens,) of a clean and a corrupted text, which differ from the token `shared` on, at every ninth or so."""
    clean: np.ndarray = np.random.default_rng(0).integers(scoring.FIRST, vocabulary, tokens)
    corrupted = clean.copy()
    corrupted[np.array([shared, *range(shared + 5, tokens, 9)])] += 1
    return clean, corrupted % vocabulary


class Sweep(Problem):
    """A pair of texts and a grid; sites in the order of the flattened result. An input is (clean, corrupted) ids."""

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        self.device, self.dtype = device, getattr(torch, shape["dtype"])
        self.model = load(shape, device)
        self.rm = rmfast.RewardModel(self.model)
        tokens, shared = shape["tokens"], shape["shared"]
        clean, corrupted = two_texts(tokens, shared, self.model.config.vocab_size)
        self.inputs = [(clean, corrupted)]
        self.input_bytes = clean.nbytes * 2
        config = self.model.config
        self.grids = shape["grids"].split(", ")
        layers, heads = range(config.num_hidden_layers), range(config.num_attention_heads)
        whole = slice(0, tokens)
        each = [slice(t, t + 1) for t in range(tokens)]
        every: dict[str, list[Site]] = {
            "resid_post": [("resid_post", layer, at, None) for layer in layers for at in each],
            "head_out": [("head_out", layer, at, h) for layer in layers for at in each for h in heads],
            "components": [(kind, layer, whole, None) for kind in ("attn_out", "mlp_out") for layer in layers],
            "heads": [("head_out", layer, whole, h) for layer in layers for h in heads],
        }
        self.sites = [site for grid in self.grids for site in every[grid]]
        self.shared = shared
        picks = np.random.default_rng(1).choice(len(self.sites), min(SAMPLE, len(self.sites)), replace=False)
        self.sample = sorted(picks.tolist())
        self.gemm = (min(4096, tokens * len(self.sites)), config.intermediate_size, config.hidden_size)
        self.tolerance = self.baseline_tolerance = TOLERANCE[self.dtype]
        self.bytes_moved = sum(p.nbytes for p in self.model.model.layers.parameters())
        floors = np.array([self._floor(site) for site in self.sites])
        matmuls, attention = (int(part) for part in floors.sum(0))
        self.flops = matmuls + attention
        counting = copy.copy(self)  # by torch's products: the counter does not see those of our op
        counting.rm = rmfast.RewardModel(self.model, compute="native")
        counting.rm.explain()  # tries the engine out
        with FlopCounterMode(display=False) as counted:
            ours(counting)(self.inputs[0])
        block = self.model.model.layers[0]
        weights = sum(m.weight.numel() for m in block.modules() if isinstance(m, torch.nn.Linear))
        self.facts = {
            "GFLOP of layer and prefix reuse and the last-layer skip": self.flops / 1e9,
            "GFLOP done": (counted.get_total_flops() + attention) / 1e9,
            "GFLOP of a forward for each site": 2 * weights * len(layers) * tokens * len(self.sites) / 1e9,
        }
        self.flops = counted.get_total_flops() + attention  # below the floor: replaced rows alone enter a layer anew

    def _floor(self, site: Site) -> tuple[int, int]:
        """FLOPs that layer and prefix reuse and the last-layer skip leave of a site: of weights, of attention."""
        kind, layer, at, _ = site
        config, block = self.model.config, self.model.model.layers[0]
        tokens, depth = len(self.inputs[0][0]), config.num_hidden_layers
        first = max(at.start, self.shared)
        rows = tokens - first
        if at.stop <= first or (layer == depth - 1 and at.stop < tokens):
            return 0, 0
        sizes = {name: m.weight.numel() for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        whole, kv = sum(sizes.values()), sizes["self_attn.k_proj"] + sizes["self_attn.v_proj"]
        mlp = sum(size for name, size in sizes.items() if name.startswith("mlp"))
        tail = {"attn_out": mlp, "head_out": mlp + sizes["self_attn.o_proj"]}.get(kind, 0)
        if layer == depth - 1:
            return 2 * tail, 0
        width = config.num_attention_heads * block.self_attn.head_dim
        keys = rows * first + rows * (rows + 1) // 2
        weights = tail * (at.stop - first) + (depth - 2 - layer) * whole * rows + kv * rows + whole - kv
        return 2 * weights, 4 * width * ((depth - 2 - layer) * keys + tokens)

    @functools.cached_property
    def _exact(self) -> Callable[[int], float]:
        """The reward of a site in fp64; of a model too large for that in fp32, 100,000 times finer than bf16."""
        weights = sum(p.numel() for p in self.model.parameters())
        precise = torch.float64 if 8 * weights < machine.free_memory(self.device) else torch.float32
        wide = Loop(copy.deepcopy(self.model).to(precise), self.inputs[0], self.device)
        return functools.cache(lambda site: float(wide(self.sites, [site], 1)))

    def error(self, out: Tensor | Some) -> float:
        """On the sample, or the sites that were run, in units of the reward scale."""
        which, got = (self.sample, out[self.sample]) if isinstance(out, Tensor) else out
        gain = self.model.model.norm.weight.detach().double()
        scale = float((self.model.score.weight.detach().double() * gain).norm())
        truth = torch.tensor([self._exact(i) for i in which], dtype=torch.float64)
        return float((got.cpu().double() - truth).abs().max() / scale)


def load(shape: Shape, device: torch.device) -> Any:
    if shape["model"] == "SmolLM2-135M":
        return scoring.load(shape, device)
    sizes: Any = json.loads(shape["model"])
    more: Any = {"vocab_size": 8192, "max_position_embeddings": 2048, "num_labels": 1, "pad_token_id": 0}
    config = transformers.LlamaConfig(**more, **sizes)
    torch.manual_seed(0)
    dtype = getattr(torch, shape["dtype"])
    with torch.device(device):
        return transformers.AutoModelForSequenceClassification.from_config(config, dtype=dtype).eval()


class Loop:
    """Hooked forwards of the corrupted text, each row of a batch with one site's clean activations."""

    def __init__(self, model: Any, texts: tuple[np.ndarray, np.ndarray], device: torch.device) -> None:
        self.model = model
        self.clean, self.corrupted = (torch.from_numpy(ids)[None].to(device) for ids in texts)

    def _module(self, kind: str, layer: int) -> tuple[Any, bool]:
        block = self.model.model.layers[layer]
        if kind == "head_out":
            return block.self_attn.o_proj, True
        return {"resid_post": block, "attn_out": block.self_attn, "mlp_out": block.mlp}[kind], False

    def cache(self, sites: Sequence[Site]) -> dict[tuple[str, int], Tensor]:
        """The clean run's activations, from one forward."""
        found: dict[tuple[str, int], Tensor] = {}
        with ExitStack() as stack, torch.inference_mode():
            for kind, layer in {site[:2] for site in sites}:
                module, before = self._module(kind, layer)

                def keep(*args: Any, key: tuple[str, int] = (kind, layer)) -> None:
                    x = args[-1][0] if isinstance(args[-1], tuple) else args[-1]
                    found[key] = x[0]

                hook = module.register_forward_pre_hook if before else module.register_forward_hook
                stack.callback(hook(keep).remove)
            self.model(input_ids=self.clean, use_cache=False)
        return found

    def __call__(self, sites: Sequence[Site], which: Sequence[int], batch: int) -> Tensor:
        clean = self.cache(sites)
        out = []
        # A batch holds sites of one layer and kind, so that one hook serves it.
        ordered = itertools.groupby(which, key=lambda i: sites[i][:2])
        for _, group in ordered:
            some = list(group)
            for start in range(0, len(some), batch):
                out.append(self._forward([sites[i] for i in some[start : start + batch]], clean))
        return torch.cat(out)

    def _forward(self, sites: Sequence[Site], clean: dict[tuple[str, int], Tensor]) -> Tensor:
        kind, layer = sites[0][:2]
        module, before = self._module(kind, layer)
        source, size = clean[kind, layer], self.model.model.layers[layer].self_attn.head_dim

        def patch(*args: Any) -> Any:
            given = args[-1]
            x = (given[0] if isinstance(given, tuple) else given).clone()
            for row, (_, _, at, head) in enumerate(sites):
                columns = slice(None) if head is None else slice(head * size, (head + 1) * size)
                x[row, at, columns] = source[at, columns]
            return (x, *given[1:]) if isinstance(given, tuple) else x

        handle = (module.register_forward_pre_hook if before else module.register_forward_hook)(patch)
        try:
            with torch.inference_mode():
                ids = self.corrupted.expand(len(sites), -1)
                return self.model(input_ids=ids, use_cache=False).logits[:, 0].float()
        finally:
            handle.remove()


def ours(p: Sweep) -> Callable[[Any], Tensor]:
    def run(texts: tuple[np.ndarray, np.ndarray]) -> Tensor:
        parts = []
        for grid in p.grids:
            sites: Any = {"components": ["attn_out", "mlp_out"], "heads": "head_out"}.get(grid, grid)
            positions = "joint" if grid in ("components", "heads") else "all"
            parts.append(p.rm.patch_sweep(*texts, sites=sites, positions=positions).rewards.flatten())
        return torch.cat(parts)

    assert p.rm.explain().startswith("engine: packed, fused"), p.rm.explain()
    return run


def loop(batch: int = 1, skipping: bool = False) -> Maker:
    """Timed on the sample; `scale` is what all sites take of it."""

    def make(p: Sweep) -> Callable[[Any], Some]:
        hooked = Loop(p.model, p.inputs[0], p.device)
        total, which = len(p.sites), p.sample
        if batch > 1:  # neighbours, as a loop over all sites would batch them
            start = max(0, min(which[len(which) // 2], total - batch))
            which = [i for i in range(start, total) if p.sites[i][:2] == p.sites[start][:2]][:batch]
        if skipping:
            total = sum(p.sites[i][2].stop > p.shared for i in range(total))

        def run(texts: Any) -> Some:
            return which, hooked(p.sites, which, batch)

        run.scale = total / len(which)  # type: ignore[attr-defined]
        return run

    return make


def peer(model: Any, template: str, device: torch.device) -> Any:
    """reward-lens' own wrapper of a model, whose texts are token ids as words, put together by a chat template."""
    from reward_lens.model import RewardModel
    from reward_lens.model_adapters import get_adapter

    tokenizer = scoring.numbers()
    tokenizer.chat_template = template
    return RewardModel(model, tokenizer, get_adapter(model), device)


def reward_lens(p: Sweep) -> Callable[[Any], Some]:
    """Its component grid and its head grid, denoising; token ids come to it as words."""
    from reward_lens import ActivationPatcher

    theirs = peer(p.model, "{{ messages[1]['content'] }}", p.device)
    patcher = ActivationPatcher(theirs)
    clean, corrupted = (" ".join(map(str, ids)) for ids in p.inputs[0])

    def run(texts: Any) -> Some:
        options: Any = {"mode": "denoising", "show_progress": False}
        parts = [patcher.patch_all_components("", clean, corrupted, **options).patch_effects]
        parts[0] = parts[0].reshape(-1, 2).T.ravel()  # its order is attention, MLP, layer by layer
        parts.append(patcher.patch_all_heads("", clean, corrupted, **options).patch_effects)
        effects = torch.from_numpy(np.concatenate(parts))
        return list(range(len(p.sites))), effects + theirs.score("", corrupted)

    return run


LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4}
TINY = json.dumps({**LLAMA, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2})


def _rows(
    name: str, layers: int, tokens: int, grids: str, targets: dict[str, dict[str, float]], shared: int = 0,
    model: str = "", devices: tuple[str, ...] = ("cpu", "cuda"),
) -> list[Benchmark]:  # fmt: skip
    """A row for each dtype that has targets, or where they are empty is there to report."""
    rows = []
    for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        if short not in targets:
            continue
        shape = {
            "model": model or json.dumps({**LLAMA, "num_hidden_layers": layers}),
            "tokens": tokens, "shared": shared, "grids": grids, "dtype": dtype,
        }  # fmt: skip
        baselines: dict[str, dict[str, Maker]] = {"hooks": {"": loop()}}
        baselines["batched"] = {str(batch): loop(batch) for batch in BATCHES}
        if grids == "components, heads" and importlib.util.find_spec("reward_lens"):
            baselines["reward-lens"] = {"": reward_lens}
        if shared:
            baselines["skipping"] = {"": loop(skipping=True)}
        rows.append(
            Benchmark(
                f"sweep/{name}-{short}",
                shape,
                quick=shape | {"model": TINY, "tokens": 6, "shared": min(shared, 3)},
                problem=Sweep,
                ours=ours,
                baselines=baselines,
                limit={"cpu": "gemm", "cuda": "gemm"},
                targets={"cpu": targets[short]},
                rounds=(2 if model else 3, 20),
                memory=None if model else "hooks",
                devices=devices,
            )
        )
    return rows


BENCHMARKS = [
    *_rows(
        "resid-post", 8, 128, "resid_post",
        {"fp32": {"hooks": 8, "share": 0.7}, "bf16": {"hooks": 20, "share": 0.45}},
    ),
    *_rows(
        "resid-post-smollm2", 30, 96, "resid_post", {"fp32": {"hooks": 15}, "bf16": {"hooks": 35}},
        shared=48, model="SmolLM2-135M",
    ),
    *_rows(
        "resid-post-8b", 32, 128, "resid_post", {"bf16": {}}, model=json.dumps({**LARGE, "num_hidden_layers": 32}),
        devices=("cuda",),
    ),
    *_rows("head-out", 4, 64, "head_out", {"fp32": {"hooks": 6}, "bf16": {"hooks": 18}}),
    *_rows("joint", 8, 128, "components, heads", {"fp32": {"hooks": 2.2}, "bf16": {"hooks": 5}}),
]  # fmt: skip
