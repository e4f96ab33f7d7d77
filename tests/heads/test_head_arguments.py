"""Heads made by hand: tensors that don't fit are refused when the head is made, by name."""

from __future__ import annotations

import pytest
import torch

from rmfast import heads

D, A = 8, 4


def w(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def layers(out=A, d=D, **kw):
    return heads.Layers(**{"weights": [w(6, d), w(out, 6)], "biases": [None, w(out)], **kw})


BAD = {
    "a flat weight": (lambda: heads.Linear(weight=w(D)), "weight"),
    "a weight of integers": (lambda: heads.Linear(weight=w(1, D, dtype=torch.int64)), "weight"),
    "a weight that is none": (lambda: heads.Linear(weight=[0.0] * D), "weight"),
    "a bias of another size": (lambda: heads.Linear(weight=w(2, D), bias=w(1)), "bias of weight"),
    "layers without all biases": (lambda: layers(biases=[None]), "for each layer, got 2 and 1"),
    "layers of an unknown activation": (lambda: layers(activation="gelu"), "activation"),
    "layers with a flat weight": (lambda: layers(weights=[w(6, D), w(6)]), r"weights\[1\]"),
    "a gate of other rows": (lambda: heads.Gated(weight=w(A, D), transform=w(A, A), gate=layers(d=D + 1)), "gate"),
    "no temperature": (
        lambda: heads.Gated(weight=w(A, D), transform=w(A, A), gate=layers(), temperature=0.0), "temperature"
    ),
    "quantiles that do not divide": (
        lambda: heads.Quantile(weight=w(A * 3, D), transform=w(A, A), gate=layers(), quantiles=5), "quantiles"
    ),
    "a Gaussian's gate of other rows": (lambda: heads.Gaussian(weight=w(2 * A, D), gate=layers(d=D + 1)), "gate"),
    "a binned head's gate of other rows": (
        lambda: heads.Binned(layers=layers(A * 10), gate=layers(d=D + 1)), "gate"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name(case):
    make, name = BAD[case]
    with pytest.raises(ValueError, match=f"Expected .*{name}"):
        make()
