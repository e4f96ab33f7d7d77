"""The same bits in any batch: row counts at which a matmul gives each row what it gives it in any other company.

A BLAS takes the last few rows of a matrix, or all of a small one, by other kernels, which add in another order. At
multiples of some small number of rows, a *tile*, all of them go one way. `tile_of` finds the smallest such number for
the matmuls of a model on this machine, with this number of threads, by trying; runs pad their rows to its multiples
(`padding`). All else that a packed run does to a row is the same wherever the row stands: attention steps at absolute
positions, and norms, rotations and activations row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rmfast import backends as _backends
from rmfast.binding.compute import holds, is_ours
from rmfast.binding.modules import is_readable
from rmfast.engine.experts import is_experts, of_first_expert, product

# Rows that are tried, the fewest first. MKL's fp32 wants 4 for each thread; a GPU's kernels have tiles of 64 to 256.
_TILES = {"cpu": (8, 16, 32, 64, 128)}
_TILES_ACCELERATOR = (128, 256, 512)

# Of a kind and shape of module, with a number of threads: its tile, or None. The same in all of a process.
_found: dict[tuple, int | None] = {}


def padding(rows: int, reads: int | None, tile: int) -> tuple[int, int]:
    """Rows to add to `rows`, and how many of them to read beside `reads` (None: all), for multiples of `tile`.

    At least one is read: bitsandbytes' 4-bit product divides by the rows that it is given.
    """
    more = -rows % tile
    if reads is None:
        return more, more
    read = -reads % tile if reads else tile
    return more + (tile if read > more else 0), read


def padded(index: np.ndarray, tile: int) -> np.ndarray:
    """Rows to gather, (n,), with the first of them again at the end up to a multiple of `tile`."""
    more = -len(index) % tile
    return np.concatenate([index, np.repeat(index[:1], more)]) if more else index


def tile_of(body: nn.Module) -> int | str:
    """The fewest rows of whose multiples every matmul of a body computes each alike, or why there is none.

    One of each kind, shape and dtype is run on random rows, a few milliseconds for a small model.
    """
    # bitsandbytes' int8: a row's products depend on which columns have an outlier in any row beside it.
    if any(getattr(getattr(module, "state", None), "threshold", 0) for module in body.modules()):
        return "int8 products take the columns with outliers of all their rows in 16 bits (llm_int8_threshold)"
    most = 1
    for key, matmul in _matmuls(body).items():
        if key not in _found:
            _found[key] = _smallest(matmul)
        tile = _found[key]
        if tile is None:
            _, shape, dtype, *_ = key
            return f"a row of a matmul with {shape[0]} × {shape[1]} in {str(dtype)[6:]} depends on the others"
        most = max(most, tile)
    return most


@dataclass(frozen=True)
class _Matmul:
    """A product that a module makes of rows, whatever else its forward does (a router's gives a tuple)."""

    weight: Tensor
    bias: Tensor | None
    across: bool  # the weight is (columns of x, columns of the product)

    def __call__(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias, self.across)


def _matmuls(body: nn.Module) -> dict[tuple, _Matmul]:
    """A product of each kind, shape and dtype, of those whose rows may move."""
    found: dict[tuple, _Matmul] = {}
    ours = holds() and _backends.runs("linear", "cpu") == "cpp"
    for module in body.modules():
        for matmul in _products(module):
            weight = matmul.weight
            if ours and is_ours(weight):
                continue  # `rmfast.ops.linear`, whose rows do not
            biased = matmul.bias is not None
            key = matmul.across, tuple(weight.shape), weight.dtype, weight.device, biased, torch.get_num_threads()
            found.setdefault(key, matmul)
    return found


def _products(module: Any) -> Iterator[_Matmul]:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is not None and weight is getattr(getattr(module, "base_layer", None), "weight", None):
        return  # peft's, which shows what is another module's, and not how that multiplies
    if is_experts(module):
        yield from (_Matmul(matrix, bias, module.is_transposed) for matrix, bias in of_first_expert(module))
    elif isinstance(weight, Tensor) and weight.dim() == 2 and is_readable(module) and type(module) is not nn.Embedding:
        yield _Matmul(weight, bias, isinstance(module, Conv1D))
        if not isinstance(module, nn.Linear | Conv1D) and weight.dtype in (torch.bfloat16, torch.float16):
            # Some routers widen what they multiply.
            yield _Matmul(weight.float(), None if bias is None else bias.float(), False)


def _smallest(matmul: _Matmul) -> int | None:
    weight = matmul.weight
    columns = weight.size(0) if matmul.across else weight.size(1)
    generator = torch.Generator().manual_seed(0)
    for tile in _TILES.get(weight.device.type, _TILES_ACCELERATOR):
        x = torch.randn(5 * tile, columns, generator=generator).to(weight)
        if _alike(matmul, x, tile):
            return tile
    return None


def _alike(matmul: _Matmul, x: Tensor, tile: int) -> bool:
    """Whether rows have the same bits in one, three and five tiles, and at other places in them."""
    whole = matmul(x)
    some = [slice(0, tile), slice(tile + 1, 2 * tile + 1), slice(2 * tile - 1, 5 * tile - 1)]
    return all(torch.equal(matmul(x[rows]), whole[rows]) for rows in some) and torch.equal(
        matmul(x.flip(0)).flip(0), whole
    )
