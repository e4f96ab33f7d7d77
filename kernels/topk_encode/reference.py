"""The top-k encoder in eager PyTorch: the contract of all backends, and what runs where none is built."""

from __future__ import annotations

import torch
from torch import Tensor


def keys(values: Tensor) -> Tensor:
    """Floats as integers in the same order: 0 and −0 are one value, and NaN is above all, as `torch.topk` has it."""
    kind = torch.int64 if values.dtype == torch.float64 else torch.int32
    bits = (values + 0.0).view(kind)
    key = bits ^ ((bits >> torch.iinfo(kind).bits - 1) & torch.iinfo(kind).max)
    return key.masked_fill(values.isnan(), torch.iinfo(kind).max)


def topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `torch.topk` of rows (n, F), with the lowest index first among equal values, on any device."""
    key = keys(values)
    least = key.topk(k).values[:, -1:]
    above, level = key > least, key == least
    room = k - above.sum(1, keepdim=True)
    taken = (above | (level & (level.cumsum(1) <= room))).nonzero()[:, 1].view(-1, k)
    order = key.gather(1, taken).sort(dim=1, descending=True, stable=True).indices
    indices = taken.gather(1, order)
    return values.gather(1, indices), indices


def topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, b_dec: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor]:
    """Values (N, k) in float32 (float64 for float64 x) and indices (N, k) int64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = x.new_empty((x.size(0), k), dtype=dtype)
    indices = x.new_empty((x.size(0), k), dtype=torch.int64)
    weight = weight.to(dtype)
    # 16 MiB of fp32 on a CPU, and six times as much for the keys and masks of `topk`.
    rows = max(1, (1 << (22 if x.device.type == "cpu" else 26)) // weight.size(1))
    for i in range(0, x.size(0), rows):
        some = x[i : i + rows]
        some = (some if b_dec is None else some - b_dec).to(dtype)
        pre = some @ weight if bias is None else torch.addmm(bias, some, weight)
        values[i : i + rows], indices[i : i + rows] = topk(pre, k)
    return values.relu_() if relu else values, indices
