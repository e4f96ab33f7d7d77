"""`python -m bench.batches`: random batches of random models, the bits of each text against those it has alone.

For every family and dtype: batches of 1 to 12 texts of up to 100 tokens, most of which share a beginning with others,
in any order and with any budget of rows. Counted are the texts of which a reward differs in any bit from that of the
text alone; beside it how many rewards transformers' own padded batches of the same texts move, and by how much at most,
in units of the reward scale ‖γ⊙w‖. Exits with 1 where a packed reward moved.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import rmfast
from rmfast.binding.norms import gain_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral, window 16": ("Mistral", {"sliding_window": 16}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3", {}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}),
}


def random_model(family: str, dtype: torch.dtype) -> Any:
    name, more = FAMILIES[family]
    torch.manual_seed(0)
    shape = {k: v for k, v in _SHAPE.items() if name != "GPT2" or k in ("vocab_size", "pad_token_id", "num_labels")}
    config = getattr(transformers, f"{name}Config")(**shape, **more, bos_token_id=1, eos_token_id=2)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    return model.to(dtype).eval()


def pool(rng: random.Random, vocabulary: int, pad: int | None, count: int, longest: int = 100) -> list[list[list[int]]]:
    """Groups of texts that share a prompt, or a part of it."""

    def words(least: int, most: int) -> list[int]:
        ids = [rng.randrange(1, vocabulary - 1) for _ in range(rng.randint(least, most))]
        return [i + (i == pad) for i in ids]

    groups = []
    for _ in range(count):
        prompt = words(1, longest - 12)
        groups.append([prompt[: rng.randint(0, len(prompt))] + words(1, 12) for _ in range(10)])
    return groups


def padded(model: Any, batch: list[list[int]]) -> torch.Tensor:
    """transformers' own logits (N, K) of one right-padded batch."""
    longest = max(map(len, batch))
    ids = torch.tensor([text + [model.config.pad_token_id] * (longest - len(text)) for text in batch])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in batch])
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask).logits.float()


def compare(model: Any, batches: int, theirs: int, seed: int) -> dict[str, Any]:
    """Counts over `batches` batches, and over the first `theirs` of them for transformers."""
    rm, rng, config = rmfast.RewardModel(model), random.Random(seed), model.config.get_text_config()
    weight = next(module.weight for name, module in model.named_modules() if name in ("score", "classifier"))
    gain = None if rm.binding.norm is None else gain_of(rm.binding.norm)
    if gain is not None:
        weight = weight * (1 + gain if rm.binding.norm_kind == "gemma_rms" else gain)
    scale = float(weight.detach().float().norm(dim=1).max())
    groups = pool(rng, config.vocab_size, config.pad_token_id, 30)
    alone = {id(text): rm.score([text]).reshape(-1) for group in groups for text in group}
    counts: dict[str, Any] = dict.fromkeys(("texts", "moved", "their_texts", "their_moved"), 0)
    counts |= {"batches": batches, "their_largest": 0.0, "promised": rm.moves() or "yes"}
    for number in range(batches):
        some = rng.sample(groups, rng.randint(1, 3))
        batch = [rng.choice(rng.choice(some)) for _ in range(rng.randint(1, 12))]
        got = rm.score(batch, batch_tokens=rng.choice([None, None, 16, 64, 257])).reshape(len(batch), -1)
        counts["texts"] += len(batch)
        counts["moved"] += int((got != torch.stack([alone[id(text)] for text in batch])).any(1).sum())
        if number < theirs:
            difference = (padded(model, batch) - torch.cat([padded(model, [text]) for text in batch])).abs().amax(1)
            counts["their_texts"] += len(batch)
            counts["their_moved"] += int((difference > 0).sum())
            counts["their_largest"] = max(counts["their_largest"], float(difference.max()) / scale)
    return counts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.batches", description=__doc__)
    parser.add_argument("--batches", type=int, default=1000, help="of each family and dtype (default 1000)")
    parser.add_argument(
        "--transformers", type=int, default=50, help="of them through transformers as well (default 50)"
    )
    parser.add_argument("--model", metavar="DIR", help="a sequence classification model in place of the random ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON lines to append to")
    args = parser.parse_args(argv)
    moved = 0
    for family in [args.model] if args.model else FAMILIES:
        for dtype in DTYPES:
            if args.model:
                model = transformers.AutoModelForSequenceClassification.from_pretrained(family, dtype=dtype).eval()
            else:
                model = random_model(family, dtype)
            counts = compare(model, args.batches, args.transformers, args.seed)
            moved += counts["moved"]
            row = {"family": family, "dtype": str(dtype)[6:], "threads": torch.get_num_threads(), **counts}
            print(json.dumps(row), flush=True)
            if args.output:
                with args.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return int(moved > 0)


if __name__ == "__main__":
    sys.exit(main())
