"""The mean of several checkpoints' weights (WARM, arXiv 2401.12187), a file at a time."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmfast.arguments import path as checked_path
from rmfast.arguments import sequence
from rmfast.loading.files import Tensors, cached
from rmfast.loading.weights import listed

# Settings in which checkpoints of one base may differ.
_FREE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
# ‖θ_i − θ_1‖ / ‖θ_1‖ over all matrices: of models fine-tuned from one base far below; of independent ones √2.
_FARTHEST = 0.5


def merge(models: Sequence[Any], output: Any) -> list[float]:
    """Write the mean of reward models' weights as a checkpoint: θ = (1/M) Σ θ_i of models fine-tuned from one base.

    Tensors are added in fp32 (fp64 for fp64 weights) and stored in their own dtype. One file's tensors are in memory at
    a time. Config, tokenizer and whatever else is small are the first model's.

    Args:
        models: folders or hub ids, at least two.
        output: a folder that is not there yet, or empty.

    Returns:
        How far each model's matrices are from the first's, ‖θ_i − θ_1‖ / ‖θ_1‖; the first is 0.

    Raises:
        ValueError: a model is an adapter or quantised; models differ in their configuration, in names, shapes or dtypes
            of tensors (of the body, or of the head), or are so far apart that they have no base in common.
        FileExistsError: output holds something.
    """
    paths = sequence("models", models, "a sequence of folders or hub ids")
    if len(paths) < 2:
        raise ValueError(f"Expected models to be at least two, got {len(paths)}")
    made = checked_path("output", output)
    if made.exists() and (not made.is_dir() or any(made.iterdir())):
        raise FileExistsError(f"Expected output to be a new folder, got {made}")
    configs = [_config(each) for each in paths]
    checkpoints = [Tensors(each, {}) for each in paths]
    for path, config, tensors in zip(paths[1:], configs[1:], checkpoints[1:]):
        _expect_alike(paths[0], path, configs[0], config, checkpoints[0], tensors)
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent, prefix=f".{made.name}.") as kept:
        part = Path(kept) / "model"
        part.mkdir()
        _copy_small(Path(str(cached(paths[0], "config.json", {}))).parent, part)
        distances = _write_means(paths, checkpoints, part)
        for path, distance in zip(paths, distances):
            if not distance <= _FARTHEST:
                raise ValueError(
                    f"Expected models fine-tuned from one base: the weights of {path} are {distance:.2f} of their norm "
                    f"away from those of {paths[0]}, and the mean of models without a common base is none"
                )
        if made.exists():
            made.rmdir()
        os.replace(part, made)
    return distances


def _config(path: Any) -> dict[str, Any]:
    if cached(path, "adapter_config.json", {}) is not None:
        raise ValueError(
            f"Expected whole models, got the adapter {path}: the mean of adapters' factors is not that of their "
            "weights. Save it with merge_and_unload() first"
        )
    file = cached(path, "config.json", {})
    if file is None:
        raise ValueError(f"Expected a checkpoint, got {path} without a config.json")
    config = json.loads(Path(file).read_bytes())
    if config.get("quantization_config"):
        raise ValueError(f"Expected weights that can be averaged, got the quantised {path}")
    return config


def _expect_alike(first: Any, other: Any, one: dict[str, Any], two: dict[str, Any], a: Tensors, b: Tensors) -> None:
    """ValueError where two checkpoints are not of one base and one kind of head."""
    if one.get("architectures") != two.get("architectures"):
        raise ValueError(
            f"Expected models of one kind, got {first} with {one.get('architectures')} and {other} with "
            f"{two.get('architectures')}"
        )
    names = sorted(set(a.names) ^ set(b.names))
    if names:
        raise ValueError(
            f"Expected models with the same tensors, got {first} and {other} that differ in {listed(names)}"
        )
    shapes, others = a.shapes(), b.shapes()
    if differ := sorted(name for name in shapes if shapes[name] != others[name]):
        name = differ[0]
        raise ValueError(
            f"Expected tensors of the same shapes and dtypes, got {listed(differ)} that differ: {name} is "
            f"{shapes[name]} in {first} and {others[name]} in {other}"
        )
    settings = sorted(key for key in {*one, *two} - _FREE if one.get(key) != two.get(key))
    if settings:
        raise ValueError(
            f"Expected models of one base, got configurations of {first} and {other} that differ in {listed(settings)}"
        )


def _write_means(paths: list[Any], checkpoints: list[Tensors], folder: Path) -> list[float]:
    """Files of weights in the first model's layout; each model's distance from the first."""
    from safetensors.torch import save_file

    moved, norm = [0.0] * len(checkpoints), 0.0
    places: dict[str, str] = {}
    total = 0
    for file, names in checkpoints[0].files().items():
        means: dict[str, Tensor] = {}
        for name, inside in names.items():
            own = checkpoints[0].read([name])[name]
            wide = own.to(torch.promote_types(own.dtype, torch.float32)) if own.is_floating_point() else own
            summed = wide.clone()
            for i, tensors in enumerate(checkpoints[1:], 1):
                other = tensors.read([name])[name]
                if not own.is_floating_point():
                    if not torch.equal(own, other):
                        raise ValueError(
                            f"Expected {name}, which is no real number, to be equal in {paths[0]} and {paths[i]}"
                        )
                    continue
                other = other.to(wide.dtype)
                if own.dim() > 1:
                    moved[i] += float((other - wide).double().square().sum())
                summed += other
            if own.is_floating_point():
                norm += float(wide.double().square().sum()) if own.dim() > 1 else 0.0
                summed /= len(checkpoints)
            means[inside] = summed.to(own.dtype)
            total += means[inside].nbytes
        if file.endswith(".pt"):  # heads in files of their own
            torch.save(means, folder / Path(file).name)
            continue
        name = Path(file).name.replace("pytorch_model", "model")
        name = name.removesuffix(".bin").removesuffix(".safetensors") + ".safetensors"
        save_file({key: x.contiguous() for key, x in means.items()}, folder / name, metadata={"format": "pt"})
        if name.startswith("model-"):
            places |= dict.fromkeys(means, name)
    if places:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return [(each / norm) ** 0.5 if norm else 0.0 for each in moved]


def _copy_small(source: Path, folder: Path) -> None:
    """Config, tokenizer, templates, code: all but weights."""
    for file in sorted(source.iterdir()):
        weights = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(weights):
            shutil.copyfile(file, folder / file.name)
