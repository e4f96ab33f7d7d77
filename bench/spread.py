"""`python -m bench.spread MODEL_DIR`: how far a reward moves with the batch it is scored in, and from the truth.

Every text is scored by transformers alone and in padded batches, and by the packed engine alone and together with all
others, in one dtype. The spread is |reward in the batch - reward alone|, the error |reward - fp64 truth|, both in units
of the reward scale ‖γ⊙w‖ of the head (of K heads, the largest). The truth is transformers' own forward of the text
alone, of the same rounded weights in fp64.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rmfast

TOKENS = (10, 256)  # the default lengths of random texts, ends included


@dataclass(frozen=True)
class Rewards:
    """Rewards (N, K) of the same texts in fp64: transformers' in the model's dtype, the packed engine's, the truth.

    `padded` is {how: rewards} of transformers' batches; `scale` is the reward scale.
    """

    truth: Tensor
    alone: Tensor
    padded: dict[str, Tensor]
    packed_alone: Tensor
    packed_together: Tensor
    scale: float

    def spreads(self) -> dict[str, Tensor]:
        """{how: |in the batch - alone|, (N, K)}, in units of the reward scale."""
        out = {how: (rewards - self.alone).abs() / self.scale for how, rewards in self.padded.items()}
        return out | {"packed together": (self.packed_together - self.packed_alone).abs() / self.scale}

    def errors(self) -> dict[str, Tensor]:
        """{how: |reward - truth|, (N, K)}, in units of the reward scale."""
        every = {"transformers alone": self.alone, **self.padded}
        every |= {"packed alone": self.packed_alone, "packed together": self.packed_together}
        return {how: (rewards - self.truth).abs() / self.scale for how, rewards in every.items()}


def measure(model: Any, texts: Sequence[Sequence[int]], batch: int = 16) -> Rewards:
    """Scores the texts, given as token ids, in every way.

    Args:
        model: a transformers sequence classification decoder with a linear head and a pad_token_id, which ends no text.
        texts: token ids.
        batch: texts of a padded batch.
    """
    rm = rmfast.RewardModel(model)
    packed: dict[str, Any] = {"engine": "packed", "max_length": max(map(len, texts))}
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    given = list(range(len(texts)))
    return Rewards(
        truth=padded(copy.deepcopy(model).double(), texts, given, 1),
        alone=padded(model, texts, given, 1),
        padded={
            f"transformers batch {batch}": padded(model, texts, given, batch),
            f"transformers batch {batch}, sorted": padded(model, texts, order, batch),
        },
        packed_alone=torch.cat([rm.score([ids], **packed).reshape(1, -1) for ids in texts]).double(),
        packed_together=rm.score(list(texts), **packed).reshape(len(texts), -1).double(),
        scale=reward_scale(rm),
    )


@torch.inference_mode()
def padded(model: Any, texts: Sequence[Sequence[int]], order: list[int], batch: int) -> Tensor:
    """transformers' rewards (N, K) in fp64, of batches of `order`, padded at the right."""
    pad, device = model.config.pad_token_id, model.device
    out = torch.empty(len(texts), model.config.num_labels, dtype=torch.float64)
    for i in range(0, len(order), batch):
        rows = order[i : i + batch]
        ids = torch.full((len(rows), max(len(texts[r]) for r in rows)), pad)
        mask = torch.zeros_like(ids)
        for row, r in enumerate(rows):
            ids[row, : len(texts[r])] = torch.tensor(texts[r])
            mask[row, : len(texts[r])] = 1
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        out[rows] = logits.double().cpu()
    return out


def reward_scale(rm: rmfast.RewardModel) -> float:
    """‖γ⊙w‖₂, the largest of the heads; raises ValueError for a head that is not linear."""
    linear, norm = rm.binding.head[-1], rm.binding.norm_arguments(torch.device("cpu"))
    if len(rm.binding.head) != 1 or not isinstance(linear, torch.nn.Linear) or norm["norm"] is None:
        raise ValueError("Expected a model with a final norm and one nn.Linear as head")
    gain = norm["norm_weight"].double() + (1 if norm["norm"] == "gemma_rms" else 0)
    return float((linear.weight.cpu().double() * gain).norm(dim=-1).max().detach())


def table(rewards: Rewards) -> str:
    """A Markdown table of spreads (and the share of rewards that moved at all) and errors, over texts and heads."""
    spreads = rewards.spreads()
    lines = ["| | moved | spread: mean | p99 | max | error: mean | p99 | max |", "|---|---|---|---|---|---|---|---|"]
    for how, error in rewards.errors().items():
        spread = spreads.get(how)
        cells = [""] * 4 if spread is None else [f"{float((spread > 0).double().mean()):.0%}", *_numbers(spread)]
        lines.append(f"| {' | '.join([how, *cells, *_numbers(error)])} |")
    return "\n".join(lines)


def _numbers(values: Tensor) -> list[str]:
    return [f"{float(x):.1e}" for x in (values.mean(), values.quantile(0.99), values.max())]


def _texts(args: argparse.Namespace, model: Any) -> list[list[int]]:
    if args.texts is None:
        rng = np.random.default_rng(0)
        allowed = np.setdiff1d(np.arange(model.config.vocab_size), [model.config.pad_token_id])
        lengths = rng.integers(TOKENS[0], args.tokens + 1, args.count)
        return [rng.choice(allowed, n).tolist() for n in lengths]
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    opened = gzip.open if args.texts.suffix == ".gz" else open
    with opened(args.texts, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(args.count))]
    strings = [s for row in rows for s in (row.values() if isinstance(row, dict) else [row]) if isinstance(s, str)]
    return [tokenizer(s)["input_ids"][: args.tokens] for s in strings[: args.count]]


def main(argv: list[str] | None = None) -> None:
    import transformers

    parser = argparse.ArgumentParser(prog="python -m bench.spread", description=__doc__)
    parser.add_argument("model", help="folder or hub id of a sequence classification decoder with a linear head")
    parser.add_argument("--texts", type=Path, help="JSON lines (.gz too) whose strings are texts; default random ids")
    parser.add_argument("--count", type=int, default=64, help="texts (default 64)")
    parser.add_argument("--tokens", type=int, default=TOKENS[1], help="a longer text is cut (default 256)")
    parser.add_argument("--batch", type=int, default=16, help="texts of a padded batch (default 16)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attention", help="transformers' attn_implementation; default its own choice")
    args = parser.parse_args(argv)

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation=args.attention
    )
    texts = _texts(args, model)
    print(f"{len(texts)} texts of {min(map(len, texts))} to {max(map(len, texts))} tokens, {args.dtype}, {args.device}")
    print(table(measure(model.to(args.device).eval(), texts, args.batch)))


if __name__ == "__main__":
    main()
