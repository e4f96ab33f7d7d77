"""Norms of the rows that a sparse autoencoder is given, as SAELens has them."""

from __future__ import annotations

from torch import Tensor

# What is computed of each row; SAELens' "expected_average_only_in" is one factor for all, which goes into the weights.
NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")


def normalized(x: Tensor, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (n, d) under a norm, and what takes it back: a factor (n, 1) and a summand (n, 1).

    Args:
        x: the rows, in the dtype to compute in.
        how: "none"; "layer_norm", x less its mean, over its standard deviation; "constant_norm_rescale", to norm √d.
    """
    one, zero = x.new_ones(x.size(0), 1), x.new_zeros(x.size(0), 1)
    if how == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        x = x - mean
        deviation = x.std(-1, keepdim=True)
        return x / (deviation + 1e-5), deviation, mean
    if how == "constant_norm_rescale":
        factor = x.size(-1) ** 0.5 / x.norm(dim=-1, keepdim=True)
        return x * factor, 1 / factor, zero
    return x, one, zero
