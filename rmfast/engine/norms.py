"""Norms of a decoder layer, by kind: RMS norms as one op with the sum before them, layer norms in torch's one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.binding.compute import outside
from rmfast.binding.modules import active, is_plain, is_readable
from rmfast.binding.norms import Call, eps_of, gain, head_arguments, norm_kind
from rmfast.ops import rms_norm

_RMS = ("rms", "gemma_rms")


@dataclass
class Norm:
    """A norm and its kind: "rms", "gemma_rms" (gain 1 + γ), "layer" (with or without gain and bias), "layer_1p".

    Attributes:
        module: the norm, or peft's wrapper around several: which of them is active is looked up at each run.
    """

    module: nn.Module
    kind: str

    @classmethod
    def of(cls, module: Any, size: int) -> Norm | None:
        """A module as a norm of rows of `size` values, if it is one without hooks and with a readable weight."""
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Module) or not is_plain(module) or not is_readable(module):
            return None
        if weight is not None and tuple(weight.shape) != (size,):
            return None
        like = torch.empty(0) if weight is None else weight
        probe = torch.linspace(-2, 3, 4 * size, dtype=torch.float32).reshape(1, 4, size).to(like.device, like.dtype)
        kind = norm_kind(Call("", module, probe, None))
        return None if kind is None else cls(module, kind)

    def __call__(self, x: Tensor, residual: Tensor | None = None, post: Norm | None = None) -> Any:
        """norm(x); with a residual (norm(sum), sum) for sum = x + residual, or post(x) + residual.

        Beside a wider residual sum is of its dtype, and the norm of x's.
        """
        if self.is_rms and (post is None or post.like(self)):
            post_weight = None if post is None else post.arguments["weight"]
            with outside():
                return rms_norm(x, residual=residual, post_weight=post_weight, **self.arguments)
        if residual is None:
            return self._layer(x)
        total = residual + (x if post is None else post(x.to(residual.dtype)))
        return self(total).to(x.dtype), total

    @property
    def is_rms(self) -> bool:
        return self.kind in _RMS

    def like(self, other: Norm) -> bool:
        """Whether both are of one kind and eps, which the ops take for several at once."""
        return self.kind == other.kind and eps_of(active(self.module)) == eps_of(active(other.module))

    @property
    def arguments(self) -> dict[str, Any]:
        """Weight, eps and gemma of an RMS norm, as the ops take them."""
        norm: Any = active(self.module)
        return {"weight": norm.weight, "eps": eps_of(norm), "gemma": self.kind == "gemma_rms"}

    def head_arguments(self, device: torch.device) -> dict[str, Any]:
        """As `reward_head` takes norms."""
        return head_arguments(active(self.module), self.kind, device)

    def _layer(self, x: Tensor) -> Tensor:
        norm: Any = active(self.module)
        weight, bias = gain(norm, self.kind), getattr(norm, "bias", None)
        wide = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
        weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
        return nn.functional.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps_of(norm)).to(x.dtype)
