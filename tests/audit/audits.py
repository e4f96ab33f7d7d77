"""What tests of audits share: pairs with hostile texts, scores of them, and a small audit."""

from __future__ import annotations

import random
from typing import Any

import models
import numpy as np

import rmfast
from rmfast import evaluation
from rmfast.audit import Settings, collect
from rmfast.evaluation.evaluate import evaluated
from rmfast.evaluation.pairs import Pairs

SCRIPT = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1"></textarea></script><!--'
HOSTILE = [
    SCRIPT,
    "مرحبا \u202e שלום \u2066 ab",
    "日本語 🎬 ⚠️",
    "x" * 300,
    "]]>&amp;{{ 7 * 7 }}{% raw %}\u2028\u0000`${1}",
]
SMALL = Settings(show=3, sweep_pairs=2, trials=2, parity=4)


def rows(n: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of short texts, of which some are hostile, also in other columns."""
    rng = random.Random(seed)

    def text(size: int) -> str:
        return " ".join(rng.choice(["good", "bad!", "so", "it\n\nis", "very", "plain"]) for _ in range(size))

    found = []
    for i in range(n):
        found.append(
            {
                "prompt": f"ask {i // 2}", "chosen": text(rng.randint(2, 9)), "rejected": text(rng.randint(2, 9)),
                "subset": "abc"[i % 3], "id": i,
            }
        )  # fmt: skip
    for row, hostile in zip(found, HOSTILE):
        row["chosen"], row["subset"], row["id"] = hostile + " " + row["chosen"], hostile[:40], hostile
        row["prompt"] = hostile + row["prompt"]
    return found


def model(seed: int = 0, **kw: Any) -> rmfast.RewardModel:
    return rmfast.RewardModel(
        models.decoder("llama", seed=seed, max_position_embeddings=2048, **kw), models.tokenizer(chat=True)
    )


def scored(rewards: Any, prompts: Any = None) -> evaluation.Evaluation:
    """Known rewards (n, 2) of pairs whose texts are longer by the place."""
    layout = Pairs()
    items = [
        layout.item({"prompt": f"{i if prompts is None else prompts[i]}", "chosen": "a" * (i + 1), "rejected": "b"})
        for i in range(len(rewards))
    ]
    return evaluated(layout, items, np.asarray(rewards, np.float64), resamples=50)


def found_by(rm: rmfast.RewardModel, n: int = 40) -> evaluation.Evaluation:
    return evaluation.evaluate(rm, rows(n), layout="pairs", resamples=50)


def small_audit(n: int = 40, **kw: Any) -> Any:
    rm = model()
    return collect(rm, found_by(rm, n), model="a <b>model</b>", settings=SMALL, facts={"command": SCRIPT}, **kw)
