"""Activations of modules, with bits that do not depend on where in a tensor a number stands.

torch computes silu, sigmoid and gelu of the last few numbers of a tensor (of each thread's share) by other code than
those before, one at a time and not a vector at a time, and that code rounds otherwise. exp, tanh and erf it computes
alike everywhere, as it does sums, products and quotients: of those they are made here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Alike(TorchFunctionMode):
    """Spells these functions out on CPU tensors, for this thread."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        spelled = _SPELLED.get(func)
        x = args[0] if args else kwargs.get("input")
        if spelled is None or not isinstance(x, Tensor) or x.device.type != "cpu" or kwargs.get("inplace"):
            return func(*args, **kwargs)
        wide = x if x.dtype == torch.float64 else x.float()
        return spelled(wide, kwargs.get("approximate", "none")).to(x.dtype)


def _sigmoid(x: Tensor, _: str) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _silu(x: Tensor, _: str) -> Tensor:
    return x / (1 + torch.exp(-x))


def _gelu(x: Tensor, approximate: str) -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


_SPELLED: dict[Any, Callable[[Tensor, str], Tensor]] = {
    torch.sigmoid: _sigmoid,
    Tensor.sigmoid: _sigmoid,
    torch.special.expit: _sigmoid,
    nn.functional.silu: _silu,
    nn.functional.gelu: _gelu,
}
