"""The same bits in any batch: row counts at which a matmul gives each row what it gives it in any other company.

A BLAS takes the last few rows of a matrix, or all of a small one, by other kernels, which add in another order. At
multiples of some small number of rows, a *tile*, all of them go one way. `tile_of` finds the smallest such number for
the matmuls of a model on this machine, with this number of threads, by trying; runs pad their rows to its multiples
(`padding`). All else that a packed run does to a row is the same wherever the row stands: attention steps at absolute
positions, and norms, rotations and activations row by row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rmfast import backends as _backends
from rmfast.binding.compute import holds, is_ours
from rmfast.binding.modules import is_readable

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
    """The fewest rows of whose multiples every linear module of a body computes each alike, or why there is none.

    One module of each kind, shape and dtype is run on random rows, a few milliseconds for a small model.
    """
    # bitsandbytes' int8: a row's products depend on which columns have an outlier in any row beside it.
    if any(getattr(getattr(module, "state", None), "threshold", 0) for module in body.modules()):
        return "int8 products take the columns with outliers of all their rows in 16 bits (llm_int8_threshold)"
    most = 1
    for key, module in _matmuls(body).items():
        if key not in _found:
            _found[key] = _smallest(module)
        tile = _found[key]
        if tile is None:
            _, shape, dtype, *_ = key
            return f"a row of a matmul with {shape[0]} × {shape[1]} in {str(dtype)[6:]} depends on the others"
        most = max(most, tile)
    return most


def _matmuls(body: nn.Module) -> dict[tuple, nn.Module]:
    """A module of each kind, shape and dtype, of those whose rows may move."""
    found: dict[tuple, nn.Module] = {}
    ours = holds() and _backends.runs("linear", "cpu") == "cpp"
    for module in body.modules():
        if isinstance(module, nn.Linear | Conv1D) and is_readable(module):
            weight = module.weight
            if ours and is_ours(weight):
                continue  # `rmfast.ops.linear`, whose rows do not
            key = (type(module), tuple(weight.shape), weight.dtype, weight.device, torch.get_num_threads())
            found.setdefault(key, module)
    return found


def _smallest(module: nn.Module) -> int | None:
    weight: Tensor = module.weight  # type: ignore[assignment]
    columns = weight.size(0) if isinstance(module, Conv1D) else weight.size(1)
    generator = torch.Generator().manual_seed(0)
    for tile in _TILES.get(weight.device.type, _TILES_ACCELERATOR):
        x = torch.randn(5 * tile, columns, generator=generator).to(weight)
        if _alike(module, x, tile):
            return tile
    return None


def _alike(module: nn.Module, x: Tensor, tile: int) -> bool:
    """Whether rows have the same bits in one, three and five tiles, and at other places in them."""
    whole = _product(module, x)
    some = [slice(0, tile), slice(tile + 1, 2 * tile + 1), slice(2 * tile - 1, 5 * tile - 1)]
    return all(torch.equal(_product(module, x[rows]), whole[rows]) for rows in some) and torch.equal(
        _product(module, x.flip(0)).flip(0), whole
    )


def _product(module: nn.Module, x: Tensor) -> Tensor:
    """As the module multiplies, whatever else its forward does (a router's gives a tuple)."""
    weight, bias = module.weight, module.bias
    return torch.addmm(bias, x, weight) if isinstance(module, Conv1D) else nn.functional.linear(x, weight, bias)  # type: ignore[arg-type]
