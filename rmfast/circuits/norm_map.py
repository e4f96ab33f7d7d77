"""A norm taken apart: the linear map that it is but for its scale, and the scale of a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rmfast.engine.norms import Norm


@dataclass(frozen=True)
class NormMap:
    """A norm as y = gain ⊙ s (x − its mean, where centred) + bias, s = 1 / rms; as it is made, none: y = x."""

    gain: Tensor | None = None
    bias: Tensor | None = None
    eps: float | None = None
    centred: bool = False

    @classmethod
    def of(cls, norm: Norm | None, like: Tensor) -> NormMap:
        """With weights of the dtype and device of `like`."""
        if norm is None:
            return cls()
        given = norm.head_arguments(like.device)
        gain, bias = (None if x is None else x.detach().to(like) for x in (given["norm_weight"], given["norm_bias"]))
        if given["norm"] == "gemma_rms" and gain is not None:
            gain = gain + 1
        return cls(gain, bias, given["eps"], given["norm"] == "layer")

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
