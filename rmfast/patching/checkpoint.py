"""The finished rewards of a sweep in one file, from which an interrupted one goes on."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from rmfast.texts.files import target

_SAVE_SECONDS = 20  # between two writes of a checkpoint


class Checkpoint:
    """Rewards of the edits that are done, in one file; a file of another sweep is refused."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = target(path, "checkpoint"), fingerprint  # a link is followed, not replaced
        self.refusal = (
            f"Expected {path.name} to be a checkpoint of this very sweep (texts, sites, mode and model), got one of "
            "another. Remove it, or give another path"
        )
        self.tensors: dict[str, Tensor] = {}
        self.written = time.monotonic()
        if self.path.exists():
            if _fingerprint(self.path) != fingerprint:
                raise ValueError(self.refusal)
            with safetensors.safe_open(self.path, "pt") as file:
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def of(self, number: int, cells: Tensor, runs: Tensor, budget: int) -> tuple[np.ndarray, Tensor, int]:
        """Which of a pair's edits are done, their rewards (edits, K) and the budget that they were cut into chunks by.

        The rewards of the two runs tell what no fingerprint of the texts and weights does: adapters, hooks, the token
        that is read.
        """
        fresh = {
            "cells": cells.clone(),
            "runs": runs.clone(),
            "done": torch.zeros(len(cells), dtype=torch.bool),
            "rewards": runs.new_zeros(len(cells), runs.size(1)),
            "budget": torch.tensor(budget),
        }
        found = {name: self.tensors.setdefault(f"{name}.{number}", tensor) for name, tensor in fresh.items()}
        near = torch.allclose(found["runs"], runs, rtol=1e-4, atol=1e-5, equal_nan=True)
        if not torch.equal(found["cells"], cells) or not near:
            self.tensors = {}
            raise ValueError(self.refusal)
        return found["done"].numpy().copy(), found["rewards"], int(found["budget"])

    def add(self, number: int, some: np.ndarray, rewards: Tensor) -> None:
        at = torch.from_numpy(some)
        self.tensors[f"rewards.{number}"][at] = rewards.to(self.tensors[f"rewards.{number}"].dtype)
        self.tensors[f"done.{number}"][at] = True
        if time.monotonic() - self.written > _SAVE_SECONDS:
            self.write()

    def write(self) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.tensors:
            return
        safetensors.torch.save_file(self.tensors, partial, {"fingerprint": self.fingerprint})
        os.replace(partial, self.path)
        self.written = time.monotonic()


def discard(path: Path) -> None:
    """Remove a checkpoint, where there is one. Raises ValueError, and removes nothing, where it is something else."""
    real = target(path, "checkpoint")
    if real.exists():
        _fingerprint(real)
        real.unlink()


def _fingerprint(path: Path) -> str:
    """Of the sweep that a checkpoint is of. Raises ValueError where the file is none."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata()["fingerprint"]
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"Expected {path} to be the checkpoint of a sweep, got another file") from error
