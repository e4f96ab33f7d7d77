"""Small files in the published layouts: checkpoints and data; and formulas written out plainly."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import models
import torch
from safetensors.torch import save_file
from torch import Tensor

SUBSETS = ("alpacaeval-easy", "mt-bench-hard", "donotanswer", "math-prm", "hep-cpp", "hep-rust")  # of all four sections
WORDS = ["good", "bad", "one", "two", "long and plain", "!", "yes", "no way"]


def texts(rng: random.Random, count: int) -> list[str]:
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6))) + f" {i}" for i in range(count)]


def pairs(n: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a user: two to each prompt, three subsets."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        chosen, rejected = texts(rng, 2)
        rows.append({"prompt": f"ask {i // 2}", "chosen": chosen, "rejected": rejected, "subset": "abc"[i % 3]})
    return rows


def rewardbench(n: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        chosen, rejected = texts(rng, 2)
        models = {"chosen_model": "a", "rejected_model": "b"}
        rows.append({"prompt": f"ask {i}", "chosen": chosen, "rejected": rejected, **models,
                     "subset": SUBSETS[i % len(SUBSETS)], "id": i})  # fmt: skip
    return rows


def rewardbench2(n: int = 12, ties: int = 5, seed: int = 0) -> list[dict[str, Any]]:
    """Best of 4 in two subsets, and for each of `ties` numbers a reference and a tied prompt."""
    rng = random.Random(seed)
    rows = [best_of(rng, f"{i}", f"ask {i}", 1, 3, ("Math", "Factuality")[i % 2]) for i in range(n)]
    for i in range(ties):
        rows.append(best_of(rng, f"ref:{i}", f"the colour {i}", 1, 4, "Ties"))
        rows.append(best_of(rng, f"tied:{i}", f"a colour {i}", rng.randint(2, 4), 3, "Ties"))
    return rows


def best_of(rng: random.Random, id_: str, prompt: str, right: int, wrong: int, subset: str) -> dict[str, Any]:
    some = texts(rng, right + wrong)
    return {
        "id": id_, "prompt": prompt, "chosen": some[:right], "rejected": some[right:], "num_correct": right,
        "num_incorrect": wrong, "total_completions": right + wrong, "models": ["m"] * len(some), "subset": subset,
        "additional_metadata": None,
    }  # fmt: skip


def rm_bench(n: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    domains = ("chat", "code", "math", "safety-refuse", "safety-response")
    rows = []
    for i in range(n):
        some = texts(rng, 6)
        rows.append({"id": f"r{i}", "prompt": f"ask {i}", "chosen": some[:3], "rejected": some[3:],
                     "domain": domains[i % len(domains)]})  # fmt: skip
    return rows


def process_bench(n: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """Solutions of two sets, half of them with a wrong step."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        steps = texts(rng, rng.randint(1, 5))
        label = rng.randrange(len(steps)) if i % 4 < 2 else -1
        rows.append({"id": f"{('gsm8k', 'math')[i % 2]}-{i}", "generator": "m", "problem": f"sum {i}", "steps": steps,
                     "final_answer_correct": label < 0, "label": label})  # fmt: skip
    return rows


def step_tokenizer() -> Any:
    """A tokenizer with a chat template and the tag <t>."""
    made = models.tokenizer("decoder", chat=True)
    made.add_special_tokens({"additional_special_tokens": ["<t>"]})
    return made


def ordinal(rng: random.Random, counts: list[int], most: int = 6) -> list[list[float]]:
    """Scores with many ties."""
    return [[float(rng.randint(0, most)) for _ in range(count)] for count in counts]


def write_weights(path: Path, weights: dict[str, Tensor], form: str) -> None:
    """A checkpoint's weights in a folder, as one file ("safetensors"), a pickle ("bin") or two shards."""
    if form == "bin":
        torch.save(weights, path / "pytorch_model.bin")
    elif form == "safetensors":
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    else:
        names, places = sorted(weights), {}
        for i, part in enumerate((names[::2], names[1::2]), 1):
            file = f"model-0000{i}-of-00002.safetensors"
            save_file({name: weights[name] for name in part}, path / file, metadata={"format": "pt"})
            places |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": places}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
