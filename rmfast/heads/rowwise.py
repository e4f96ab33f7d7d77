"""Functions of rows that give a row the same bits whatever stands beside it.

torch's element-wise loops run whole vectors through vector code and what is left over through scalar code, whose exp
differs in the last bit; BLAS adds up in an order that goes by the number of rows. Here every number goes through vector
code, and every sum through `reward_head` or `linear`, whose order goes by the length of a row alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from rmfast.binding.products import row_product as linear

__all__ = ["each", "linear", "softmax", "total"]

_VECTORS = 64  # numbers: a whole number of unrolled vectors of every instruction set, in fp32 and fp64
_ROUNDED_ONCE = (torch.relu, functional.leaky_relu)  # a product at most: the same in all code
_TOGETHER = 256  # of these at once: torch divides what is larger among its threads, at any place


def each(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An element-wise function of x, of any shape."""
    if x.device.type != "cpu" or function in _ROUNDED_ONCE:
        return function(x)
    flat = functional.pad(x.reshape(-1), (0, -x.numel() % _VECTORS)).reshape(-1, _VECTORS)
    return torch.cat([function(part) for part in flat.split(_TOGETHER)]).reshape(-1)[: x.numel()].reshape(x.shape)


def total(x: Tensor) -> Tensor:
    """(..., n) -> (...)."""
    return linear(x, x.new_ones(1, x.size(-1)))[..., 0]


def softmax(x: Tensor) -> Tensor:
    """Over the last dimension."""
    powers = each(torch.exp, x - x.detach().amax(-1, keepdim=True))
    return powers / total(powers)[..., None]
