"""Training of TopK sparse autoencoders on the activations of a site: `train_sae`, a folder as SAELens saves it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm.auto import tqdm

from rmfast.arguments import device as device_of
from rmfast.arguments import flag, instance, whole
from rmfast.arguments import path as path_of
from rmfast.engine.memory import reuse_freed_memory
from rmfast.patching.activations import Activations
from rmfast.training.sae_step import AVERAGE, StepResult, TopKRecipe, TopKTraining

__all__ = ["SAETraining", "TopKRecipe", "train_sae"]

_CHECKPOINT = "checkpoint.safetensors"

# Rows by which b_dec and the factor of "expected_average_only_in" are set.
_SAMPLE = 1 << 14


@dataclass(eq=False, repr=False, kw_only=True)
class SAETraining:
    """What a training has come by; the autoencoder itself is in the folder, for `rmfast.SAE.load`.

    Attributes:
        folder: cfg.json and sae_weights.safetensors, as SAELens saves an SAE for inference.
        recipe: by which it was trained.
        loss: (steps,) fp64, of each step before its update: mean over rows of ‖x̂ − x‖², in units of the rows given.
        aux: (steps,), the weighted auxiliary loss.
        explained_variance: (steps,), 1 − Σ‖x̂ − x‖² / Σ‖x − mean‖² of the batch.
        l0: (steps,), mean number of activations above 0.
        dead: (steps,), latents that had not been active for `dead_after` steps.
        idle: (F,) int64, steps since each latent was last active.
    """

    folder: Path
    recipe: TopKRecipe
    loss: Tensor
    aux: Tensor
    explained_variance: Tensor
    l0: Tensor
    dead: Tensor
    idle: Tensor

    def __repr__(self) -> str:
        recipe = self.recipe
        return (
            f"SAETraining({recipe.features} features, topk {recipe.k}, {recipe.steps} steps of {recipe.batch} rows: "
            f"explained variance {float(self.explained_variance[-1]):.4f}, {int(self.dead[-1])} dead, "
            f"{str(self.folder)!r})"
        )


def train_sae(
    activations: Activations | Tensor,
    recipe: TopKRecipe,
    folder: Any,
    *,
    checkpoint_steps: int = 500,
    device: Any = None,
    progress: bool = False,
) -> SAETraining:
    """Trains a TopK sparse autoencoder and writes it to a folder as SAELens saves one for inference.

    `rmfast.SAE.load(folder)` and SAELens' `SAE.load_from_disk(folder)` read it. A folder that holds a checkpoint of
    this recipe on these activations is gone on with from there: on one machine with as many threads, an interrupted
    training ends at the bits of one that was not.

    Args:
        activations: of `rmfast.patching.activations.collect`, or rows (N, d); float32, bfloat16 or float16.
        recipe: how.
        folder: where to.
        checkpoint_steps: steps between two checkpoints; the last one is removed when the training is done.
        device: to train on; default the rows'.
        progress: whether to show a bar.

    Raises:
        ValueError: fewer rows than a batch; the folder holds a checkpoint of another recipe or of other activations;
            the loss is no longer finite.
    """
    if isinstance(activations, Tensor):
        activations = Activations(rows=activations)
    instance("activations", activations, Activations, " or a tensor")
    instance("recipe", recipe, TopKRecipe)
    flag("progress", progress)
    folder, checkpoint_steps = path_of("folder", folder), whole("checkpoint_steps", checkpoint_steps, 1)
    where = activations.rows.device if device is None else device_of("device", device)
    batches = activations.batches(recipe.batch, seed=recipe.seed)  # refused before anything is written
    reuse_freed_memory()
    training = TopKTraining(recipe, activations.sample(_SAMPLE).to(where))
    found = torch.full((recipe.steps, len(StepResult._fields)), torch.nan, dtype=torch.float64)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = _Checkpoint(folder / _CHECKPOINT, recipe, activations)
    checkpoint.restore(training, found)
    if training.done:
        batches = activations.batches(recipe.batch, seed=recipe.seed, start=training.done)
    with tqdm(total=recipe.steps, initial=training.done, unit="step", disable=not progress) as bar:
        while training.done < recipe.steps:
            at = training.done
            result = training.step(next(batches).to(where, non_blocking=True))
            if not all(map(torch.isfinite, torch.tensor(result[:2]))):
                raise ValueError(
                    f"Expected a finite loss, got {result.loss} at step {at}: activations hold values that are "
                    "not finite, or lr is too high"
                )
            found[at] = torch.tensor(result, dtype=torch.float64)
            bar.update()
            if progress and at % 10 == 0:
                bar.set_postfix(explained=f"{result.explained:.4f}", dead=result.dead, refresh=False)
            if training.done % checkpoint_steps == 0 and training.done < recipe.steps:
                checkpoint.write(training, found)
    _save(folder, training, activations)
    checkpoint.path.unlink(missing_ok=True)
    loss, aux, explained, l0, dead = found.T.clone()
    scale = training.scale**-2
    return SAETraining(
        folder=folder, recipe=recipe, loss=loss * scale, aux=aux * scale, explained_variance=explained, l0=l0,
        dead=dead.long(), idle=training.idle.cpu(),
    )  # fmt: skip


def _save(folder: Path, training: TopKTraining, activations: Activations) -> None:
    """cfg.json and sae_weights.safetensors, as SAELens 6 writes them."""
    recipe = training.recipe
    tensors = {name: tensor.cpu() for name, tensor in training.inference().items()}
    d, features = tensors["W_enc"].shape
    told = {
        "architecture": "topk", "d_in": d, "d_sae": features, "k": recipe.k, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": recipe.apply_b_dec_to_input, "reshape_activations": "none",
        "normalize_activations": "none" if recipe.normalize == AVERAGE else recipe.normalize,
        "rescale_acts_by_decoder_norm": False,
        "metadata": {"hook_name": activations.hook_name, "rmfast_recipe": asdict(recipe)},
    }  # fmt: skip
    safetensors.torch.save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(told, indent=1))


class _Checkpoint:
    """All that the next step depends on, in one file; one of another training is refused."""

    def __init__(self, path: Path, recipe: TopKRecipe, activations: Activations) -> None:
        self.path = path
        self.told = {"recipe": json.dumps(asdict(recipe)), "activations": activations.fingerprint}

    def restore(self, training: TopKTraining, found: Tensor) -> None:
        """Sets both to where the file is, if there is one."""
        if not self.path.exists():
            return
        with safetensors.safe_open(self.path, "pt") as file:
            told = file.metadata() or {}
            for name, own in self.told.items():
                if told.get(name) != own:
                    raise ValueError(
                        f"Expected {self.path} to be a checkpoint of these {name}, got {told.get(name)} and not {own}. "
                        "Remove it, or give another folder"
                    )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found.copy_(tensors.pop("found"))
        training.restore(tensors)

    def write(self, training: TopKTraining, found: Tensor) -> None:
        partial = self.path.with_name(f"{self.path.name}.partial")
        tensors = {name: tensor.cpu() for name, tensor in training.tensors().items()}
        safetensors.torch.save_file({**tensors, "found": found}, partial, self.told)
        os.replace(partial, self.path)
