"""What tests of loading share: a model's folder whose weights are other than its config says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name.replace(old, new): tensor for name, tensor in weights.items()}


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


def with_one(name: str, *shape: int) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, name: torch.ones(shape)}


def changed(
    path: Path, model: Any, change: Callable[[Weights], Weights], form: str = "safetensors", **config: Any
) -> Path:
    """A folder of the model with other weights, as one file, shards or a pickle, and another config."""
    weights = {name: tensor.clone() for name, tensor in change(model.state_dict()).items()}
    path.mkdir(exist_ok=True)
    given = {**model.config.to_dict(), "architectures": [type(model).__name__], **config}
    (path / "config.json").write_text(json.dumps(given))
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
    return path


def remote(path: Path, model: Any, code: str, **config: Any) -> Path:
    """A folder of the model with code of its own: OwnRewardModel, for AutoModel, with its head under v_head."""
    module = f"own_{path.name}"  # transformers keeps modules by name
    changed(
        path, model, renamed("score.", "v_head."), architectures=["OwnRewardModel"],
        auto_map={"AutoModel": f"{module}.OwnRewardModel"}, **config,
    )  # fmt: skip
    (path / f"{module}.py").write_text(code)
    return path
