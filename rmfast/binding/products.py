"""Linear maps of rows whose bits go by the row alone: `reward_head` for a few outputs, `linear` for many."""

from __future__ import annotations

import torch
from torch import Tensor

from rmfast import backends as _backends
from rmfast.ops import linear, reward_head

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
# Outputs from which `linear` is faster: 1024 of 64 rows of d 4096 take it a third of `reward_head`'s time.
_MANY = 64


def is_product(weight: Tensor, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a weight (C, d) multiplies rows, of this dtype once they are fp32 at least, by `linear`."""
    return (
        weight.size(0) >= _MANY
        and device.type == "cpu"
        and dtype != torch.float64
        and weight.dtype in _WEIGHTS
        and _backends.runs("linear", "cpu") == "cpp"  # another backend promises nothing of a row's bits
    )


def row_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., d) and (C, d) -> (..., C), in fp32 (fp64 for fp64 rows); differentiable."""
    on = x.device
    weight, bias = weight.to(on), None if bias is None else bias.to(on)
    if not is_product(weight, on, x.dtype):
        return reward_head(x.contiguous(), weight, bias)
    out = linear(x.reshape(-1, x.size(-1)).float().contiguous(), weight.contiguous(), bias)
    return out.view(*x.shape[:-1], out.size(-1))
