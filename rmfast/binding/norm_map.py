"""A norm taken apart: the linear map that it is but for its scale, and the scale of a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NormMap:
    """A norm as y = gain ⊙ s (x − its mean, where centred) + bias, s = 1 / rms; as it is made, none: y = x.

    With s taken from some row it is a linear map, of any part of that row.
    """

    gain: Tensor | None = None
    bias: Tensor | None = None
    eps: float | None = None
    centred: bool = False

    @classmethod
    def of(
        cls, dtype: torch.dtype, norm: str | None, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None,
        eps: float = 0.0,
    ) -> NormMap:  # fmt: skip
        """From `reward_head`'s arguments, with weights of a dtype."""
        if norm is None:
            return cls()
        gain, bias = (None if x is None else x.detach().to(dtype) for x in (norm_weight, norm_bias))
        if norm == "gemma_rms" and gain is not None:
            gain = gain + 1
        return cls(gain, bias, eps, norm == "layer")

    def centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., 1)."""
        if self.eps is None:
            return x.new_ones(*x.shape[:-1], 1)
        return torch.rsqrt(self.centre(x).square().mean(-1, keepdim=True) + self.eps)

    def fold(self, directions: Tensor) -> Tensor:
        """Directions (..., d) in what it gives as those in what it is given, but for the scale."""
        return self.centre(directions if self.gain is None else directions * self.gain)

    def constant(self, directions: Tensor) -> Tensor:
        """(K,): what its bias adds along directions (K, d) in what it gives."""
        return directions.new_zeros(len(directions)) if self.bias is None else directions @ self.bias

    def linear(self, x: Tensor) -> Tensor:
        """What it gives of x (..., d), but for the scale and the bias."""
        x = self.centre(x)
        return x if self.gain is None else x * self.gain

    def __call__(self, x: Tensor) -> Tensor:
        y = self.linear(x) * self.scale(x)
        return y if self.bias is None else y + self.bias

    def back(self, x: Tensor, slope: Tensor) -> Tensor:
        """The gradient at x (..., d), of one at y."""
        folded = self.fold(slope)
        if self.eps is None:
            return folded
        s, x = self.scale(x), self.centre(x)
        return s * folded - s**3 * (x * folded).mean(-1, keepdim=True) * x
