"""What tests of loading share: a model's folder whose weights are other than its config says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from written import write_weights

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
    write_weights(path, weights, form)
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
