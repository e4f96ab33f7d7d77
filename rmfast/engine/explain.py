"""What `RewardModel.explain` tells: the engine that scores a model and why, in which arithmetic, by which backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rmfast import backends as _backends
from rmfast.binding.binding import Binding
from rmfast.binding.compute import chosen, measured, stored_dtype
from rmfast.binding.modules import modules_of, parameters_of

if TYPE_CHECKING:
    from rmfast.engine.packed import Engine


def explained(binding: Binding, packed: Engine | str, graphs: str | None, moves: str | None) -> str:
    """Lines of text.

    Args:
        packed: the packed engine, or why there is none.
        graphs: what there is to say of CUDA graphs, or None.
        moves: why a text's bits may depend on its batch, or None.
    """
    engine = f"padded (not packed: {packed})" if isinstance(packed, str) else packed
    lines = [f"engine: {engine}"]
    if graphs is not None:
        lines.append(f"CUDA graphs: {graphs}")
    bits = "the same in any batch" if moves is None else f"may move with the batch ({moves})"
    backends = _backends.explain(device=binding.device.type)
    return "\n".join([*lines, f"compute: {_compute(binding)}", f"bits: {bits}", str(backends)])


def _compute(binding: Binding) -> str:
    """In which arithmetic linear layers run, by which rule, and what a short measurement says of it."""
    fp32, why = chosen(binding.compute, binding.root)
    stored = stored_dtype(parameters_of(modules_of(binding.root)))
    way = f"fp32 on {str(stored)[6:]} weights" if fp32 else f"torch's own, {str(stored)[6:]} weights"
    witness = f"; {measured(stored)}" if binding.device.type == "cpu" and stored != torch.float64 else ""
    return f"{way} ({why}{witness})"
