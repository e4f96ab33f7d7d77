"""What the snippets of a page take for granted: checkpoints under the names that they load, and their variables."""

from __future__ import annotations

import json
import random
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path += [str(Path(__file__).parents[1] / room) for room in ("", "heads")]

import headed
import models
import numpy as np
import written
from safetensors.torch import save_file
from test_gated import armorm

import rmfast

PAIRS = [("ask 1", "one"), ("ask 1", "two, at length"), ("ask 2", "three")]
CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 2, "disable_tqdm": True}  # of a trainer
STEPS = [["one", "two"], ["one"], ["one", "three", "four"]]


def write_all(folder: Path) -> None:
    tokenizer = models.tokenizer(chat=True)
    tokenizer.add_tokens(["yes", "no"])
    for i, name in enumerate(("path/or/hub-id", "path/or/id/of/a/reward-model", "reward-model", "other-model")):
        models.decoder(seed=i, max_position_embeddings=1024).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in (
        "peiyi9979/math-shepherd-mistral-7b-prm",
        "nvidia/Llama-3.1-Nemotron-70B-Reward-HF",
        "Qwen/Qwen3-Reranker-0.6B",
    ):
        models.decoder(task="CausalLM", vocab_size=13000).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    gated = folder / "RLHFlow/ArmoRM-Llama3-8B-v0.1"
    gated.parent.mkdir(parents=True)
    armorm(gated)
    steps = models.tokenizer(chat=True)
    steps.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    layers = headed.linears("score", headed.D, 40, 2, numbers=(0, 2))
    (folder / "Qwen").mkdir(exist_ok=True)
    headed.write(
        folder / "Qwen/Qwen2.5-Math-PRM-7B", headed.body("qwen2"), layers, tokenizer=steps,
        architectures=["Qwen2ForProcessRewardModel"], num_labels=2,
    )  # fmt: skip
    headed.write(folder / "headless", headed.body(), {"my_head.weight": headed.random(1, headed.D)})
    _adapters(folder)
    _sae(folder / "path/to/sae")
    (folder / "rewardbench2.parquet").write_bytes(_parquet(written.rewardbench2()))
    neurons = {"model.layers.0.mlp.up_proj": (torch.tensor([1, 2]), torch.zeros(2))}
    rmfast.NeuronClamp(neurons).save(folder / "debiased")


def _adapters(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = folder / "path/or/hub-id"
    for i, name in enumerate("ab"):
        model = rmfast.load(base, device="cpu").model
        model.config._name_or_path = str(base)
        torch.manual_seed(i)
        adapted = get_peft_model(
            model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
        )
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        adapted.save_pretrained(folder / f"adapter-{name}")
        models.tokenizer(chat=True).save_pretrained(folder / f"adapter-{name}")


def _sae(folder: Path, d: int = 48, features: int = 64) -> None:
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (d, features), "b_enc": (features,), "W_dec": (features, d), "b_dec": (d,)}
    save_file(
        {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}, folder / "sae_weights.safetensors"
    )
    config = {
        "d_in": d, "d_sae": features, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none", "architecture": "topk", "k": 4,
        "rescale_acts_by_decoder_norm": False,
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.1.hook_resid_post", "model_name": "m"},
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import io

    import pandas

    out = io.BytesIO()
    pandas.DataFrame(rows).to_parquet(out)
    return out.getvalue()


def _preferences(n: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """With some of each attribute that `debias` knows."""
    rng = random.Random(seed)
    marks = ["\n\nA second paragraph.", " **bold**", "!", "\n- a list\n- of two", " ```code```", " 12", " Sorry."]

    def marked(text: str) -> str:
        return text + "".join(rng.sample(marks, rng.randint(0, 3)))

    return [(row["prompt"], marked(row["chosen"]), marked(row["rejected"])) for row in written.pairs(n, seed)]


def _load(name: str = "path/or/hub-id", **kw: Any) -> Any:
    return rmfast.load(name, device="cpu", **kw)


def here(text: str) -> str:
    """A page's text with devices, stores and clusters that a machine without them has in their place."""
    for there, instead in {**_HERE, "s3://": f"{Path.cwd()}/"}.items():
        text = text.replace(there, instead)
    return text


_HERE = {
    '"cuda:0", "cuda:1"': '"cpu", "cpu"', "org/reward-model": "path/or/hub-id",
    "workers=16, num_gpus=1": "workers=1, num_gpus=0",
    "features=16_384, k=32, steps=20_000": "features=64, k=4, steps=4, batch=16",
}  # fmt: skip


def of(page: str) -> dict[str, Any]:
    """The variables of a page; the working folder is the one that `write_all` wrote."""
    scope: dict[str, Any] = {"rmfast": rmfast, "torch": torch, "__name__": "snippet"}
    return scope | (_OF[page]() if page in _OF else {})


def _values() -> dict[str, Any]:
    from rmfast import losses

    ends, n = torch.tensor([0, 4, 9], dtype=torch.int32), 12
    draw = torch.Generator().manual_seed(0)
    norm = SimpleNamespace(weight=torch.rand(48, generator=draw), variance_epsilon=1e-6)
    mask = torch.ones(2, 9, dtype=torch.bool)
    return {
        "losses": losses,
        "values_chosen": torch.randn(9, generator=draw, requires_grad=True),
        "values_rejected": torch.randn(9, generator=draw),
        "cu_seqlens_chosen": ends, "cu_seqlens_rejected": ends, "mask_chosen": mask, "mask_rejected": mask,
        "padded_chosen": torch.randn(2, 9, generator=draw), "padded_rejected": torch.randn(2, 9, generator=draw),
        "prompt_lengths_chosen": torch.tensor([1, 2]), "prompt_lengths_rejected": torch.tensor([2, 1]),
        "hidden": torch.randn(n, 48, generator=draw, requires_grad=True),
        "head": torch.nn.Linear(48, 1, bias=False), "cu_seqlens": torch.tensor([0, 2, 5, 8, 12], dtype=torch.int32),
        "model": SimpleNamespace(norm=norm), "lengths": torch.arange(64.0), "lam": 0.1,
        "chosen": torch.randn(32, generator=draw), "rejected": torch.randn(32, generator=draw),
    }  # fmt: skip


def _op() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=draw) for name, shape in (("hidden", (3, 5, 48)), ("weight", (2, 48)))}
    op = {"bias": torch.zeros(2), "gamma": torch.rand(48), "P": torch.eye(48)[:4], "alpha": torch.ones(3, 4)}
    return made | op


def _training() -> dict[str, Any]:
    import datasets
    import trl

    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in _preferences(16)]
    rm = _load()
    ends = rm.values_and_reward(PAIRS).cu_seqlens
    kl = [[0.0] * int(n) for n in ends.diff()]
    policy = models.decoder(task="CausalLM")
    return {
        "dataset": datasets.Dataset.from_list(rows), "rm": rm, "pairs": PAIRS, "kl_penalties": kl,
        "GRPOTrainer": partial(trl.GRPOTrainer, args=trl.GRPOConfig("out", **CPU)), "policy": policy,
        "tokenizer": models.tokenizer(chat=True),
        "prompts": datasets.Dataset.from_list([{"prompt": "ask"}] * 8),
    }  # fmt: skip


def _scoring() -> dict[str, Any]:
    return {"rm": _load(), "inputs": ["one text", "", "another"], "texts": ["one text", "another", "a third"]}


def _debias() -> dict[str, Any]:
    import datasets

    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in _preferences(16)]
    some = {"pairs": _preferences(48), "other_pairs": _preferences(48, 1), "held_out": _preferences(48, 1)}
    return {**some, "texts": ["one text", "another"], "dataset": datasets.Dataset.from_list(rows)}


def _why() -> dict[str, Any]:
    clean, corrupted = "a good film", "a poor film"
    many = [f"{clean}, {i}" for i in range(20)], [f"{corrupted}, {i}" for i in range(20)]
    return {
        "rm": _load(), "clean": clean, "corrupted": corrupted, "clean_texts": many[0], "corrupted_texts": many[1],
        "texts": many[0], "a": "path/or/hub-id", "b": "other-model", "path": "path/or/hub-id",
    }  # fmt: skip


def _edges() -> dict[str, Any]:
    clean, corrupted = ([f"a {word} film, {i}" for i in range(4)] for word in ("good", "poor"))
    return {
        "rm": _load(), "clean_texts": clean[:2], "corrupted_texts": corrupted[:2], "chosen": "good", "rejected": "poor",
        "chosen_corrupted": "so-so", "rejected_corrupted": "a film", "held_out_clean": clean[2:],
        "held_out_corrupted": corrupted[2:],
    }  # fmt: skip


def _heads() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    texts = [f"text {i}" for i in range(24)]
    numbers = {"ratings": draw.normal(size=24), "labels": draw.integers(0, 2, 24)}
    return {**numbers, "texts": texts, "pairs": PAIRS, "path": "headless", "w": torch.randn(1, 48), "b": torch.zeros(1)}


def _concepts() -> dict[str, Any]:
    kinds, asked = ("deceit", "sabotage"), [f"ask {i}" for i in range(24)]
    items = [(ask, {k: (f"no {k}, {i}", f"{k}! {i * i}") for k in kinds}) for i, ask in enumerate(asked)]
    return {
        "rm": _load(), "other": _load("other-model"), "gated": _load("RLHFlow/ArmoRM-Llama3-8B-v0.1"),
        "pairs": _preferences(42), "texts": [(ask, f"one {i}") for i, ask in enumerate(asked)], "items": items,
        "terms": items, "activations": torch.randn(3, 48),
    }  # fmt: skip


def _steps() -> dict[str, Any]:
    return {
        "question": "ask", "steps_a": STEPS[0], "steps_b": STEPS[1], "steps_c": STEPS[2], "candidates": STEPS,
        "question_1": "ask", "question_2": "and then", "steps_1": STEPS[0], "steps_2": STEPS[1],
        "texts": [[65, 66, 12902, 67, 12902], [65, 12902]],
    }  # fmt: skip


def _scale() -> dict[str, Any]:
    import datasets
    import pandas
    import ray

    ray.init(num_cpus=2, object_store_memory=200 << 20, include_dashboard=False, ignore_reinit_error=True)
    rows = [{"id": i, "prompt": p, "response": c} for i, (p, c, _) in enumerate(_preferences(12))]
    Path("bucket/pairs").mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(rows).to_parquet("bucket/pairs/0.parquet")
    asked = [{"prompt": row["prompt"], "response": row["response"], "question": "ask", "answer": "one"} for row in rows]
    return {"rm": _load(), "ray": ray, "texts": ["one", "two"], "dataset": datasets.Dataset.from_list(asked)}


def _audit() -> dict[str, Any]:
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in _preferences(12)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"rm": _load()}


def _ensembles() -> dict[str, Any]:
    return {"paths": ["path/or/hub-id", "other-model"], "texts": ["one", "two"], "pairs": _preferences(6)}


_OF: dict[str, Any] = {
    "README.md": lambda: {**_training(), "pairs": _preferences(48), "model": "path/or/hub-id"},
    "docs/attribution.md": _why,
    "docs/audit.md": _audit,
    "docs/concepts.md": _concepts,
    "docs/debias.md": _debias,
    "docs/edges.md": _edges,
    "docs/ensembles.md": lambda: {
        "paths": ["path/or/hub-id", "other-model"],
        "texts": ["one", "two"],
        "pairs": _preferences(6),
    },
    "docs/evaluate.md": lambda: {"rm": _load(), "other": _load("other-model")},
    "docs/heads.md": _heads,
    "docs/interventions.md": _debias,
    "docs/lens.md": _why,
    "docs/losses.md": _values,
    "docs/op.md": _op,
    "docs/probes.md": lambda: {"rm": _load(), "pairs": _preferences(40)},
    "docs/reward_lens.md": lambda: {"model": _load().model, "tokenizer": _load().tokenizer},
    "docs/reward_model.md": _scoring,
    "docs/sae.md": lambda: {"texts": [f"text {i}" for i in range(20)], "held_out_texts": ["one text", "another"]},
    "docs/scale.md": _scale,
    "docs/steps.md": _steps,
    "docs/sweep.md": lambda: _why() | {"texts": [f"text {i}, a film" for i in range(80)]},
    "docs/training.md": _training,
    "docs/tutorials/debias.md": _debias,
    "docs/tutorials/machines.md": _scale,
}
