"""A linear layer in fp32 on weights of 16 bits, in eager PyTorch: the contract of all backends."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of weight that are widened at once, 4 MiB: never a whole fp32 copy of a layer.
_BLOCK = 1 << 20


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, across: bool) -> Tensor:
    """y (n, m) of x (n, d) float32; weight (m, d), or (d, m) if across."""
    rows = weight.T if across else weight
    y = x.new_empty(x.size(0), rows.size(0))
    step = max(1, _BLOCK // max(1, rows.size(1)))
    for i in range(0, rows.size(0), step):
        torch.mm(x, rows[i : i + step].float().T, out=y[:, i : i + step])
    return y if bias is None else y.add_(bias)
