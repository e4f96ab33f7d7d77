"""`neuron_stats`: each neuron's rank correlation with attributes of the texts, and its median, from one read."""

from __future__ import annotations

import torch
from torch import Tensor

from rmfast import backends as _backends
from rmfast.kernels.neuron_stats import reference as _reference
from rmfast.ops._library import (
    FLOATS,
    checked,
    define,
    direct,
    expect,
    expect_dtype,
    expect_no_grad,
    lib,
    no_gradient,
    readable,
)

define("neuron_stats", "(Tensor activations, Tensor ranks, Tensor squares) -> (Tensor, Tensor)")


def _triton(activations: Tensor, ranks: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    from rmfast.kernels.neuron_stats import triton

    if (cause := triton.why_not(activations)) is None:
        return triton.neuron_stats(activations, ranks, squares)
    if _backends.requested() == "triton":
        raise _backends.BackendError(f"Backend 'triton' cannot run neuron_stats: {cause}")
    return _reference.neuron_stats(activations, ranks, squares)


_backends.register(
    "neuron_stats",
    triton=lambda: _triton,
    cpp=lambda: torch.ops.rmfast_native.neuron_stats.default,
    eager=lambda: _reference.neuron_stats,
)


def neuron_stats(activations: Tensor, attributes: Tensor) -> tuple[Tensor, Tensor]:
    """Spearman's rank correlation of each neuron with each attribute over the texts, and each neuron's median.

    What finds the neurons that carry a bias and gives the values to fix them at (CIRM, arXiv 2604.27495): a neuron's
    activations are at the last token of n texts, an attribute is the texts' length, number of paragraphs, ... The
    correlation is Pearson's of the average ranks, ties averaged, as `scipy.stats.spearmanr`; sums of ranks are exact
    integers, so all backends give the same bits, and a neuron's do not depend on the other neurons. The median is the
    mean of the two middle values for even n, as `numpy.median`.

    A neuron's column is read once, sorted and ranked; no (n, m) matrix of ranks is held.

    Args:
        activations: (n, m), n >= 2 texts by m neurons; float64, float32, bfloat16 or float16, any strides (a unit
            stride over neurons is the fastest). 0 and −0 are equal, infinities are values like any other.
        attributes: (n, a); any of these dtypes. a may be 0 where only medians are wanted.

    Returns:
        spearman (m, a) and median (m,), in float32 (float64 for float64 activations). A constant neuron or attribute
        has correlation 0, where scipy gives NaN. A neuron with a NaN has correlations and median NaN.

    Raises:
        ValueError: a shape or device that does not fit; fewer than two texts; a NaN attribute (read on the CPU only; on
            CUDA, and under torch.compile, its correlations are NaN instead, unless RMFAST_CHECK=1); inputs that require
            grad while gradients are on: the op has none.
        TypeError: a dtype that is not supported, or an argument that is no tensor.
        rmfast.BackendError: a backend asked for by name cannot run (Triton above 2048 texts and in float64).
    """
    if not isinstance(activations, Tensor):
        raise TypeError(f"Expected activations to be a torch.Tensor, got {type(activations).__name__}")
    expect_dtype(activations.dtype in FLOATS, "activations", "float64, float32, bfloat16 or float16", activations.dtype)
    expect(activations.dim() == 2, "activations", "of shape (n, m)", tuple(activations.shape))
    n = activations.size(0)
    expect(n >= 2, "activations.size(0), the number of texts,", "at least 2", n)
    if not isinstance(attributes, Tensor):
        raise TypeError(f"Expected attributes to be a torch.Tensor, got {type(attributes).__name__}")
    checked(attributes, "attributes", (n, None), activations)
    expect_no_grad("neuron_stats", activations=activations, attributes=attributes)
    nan = attributes.isnan().any(0)
    if readable(attributes) and nan.any():
        raise ValueError(f"Expected attributes to have no NaN, got one in column {int(nan.int().argmax())}")
    ranks = _reference.doubled_ranks(attributes.T.contiguous())[0].T
    squares = ranks.double().square().sum(0).masked_fill(nan, torch.nan)
    args = (activations, ranks.int().contiguous(), squares)
    return _neuron_stats(*args) if direct(args) else torch.ops.rmfast.neuron_stats(*args)


def _neuron_stats(activations, ranks, squares):
    run = _backends.choose("neuron_stats", activations.device.type)
    return _neuron_stats_fake(activations, ranks) if activations.size(1) == 0 else run(activations, ranks, squares)


def _neuron_stats_fake(activations, ranks, squares=None):
    dtype = torch.float64 if activations.dtype == torch.float64 else torch.float32
    m = activations.size(1)
    return activations.new_empty((m, ranks.size(1)), dtype=dtype), activations.new_empty(m, dtype=dtype)


lib.impl("neuron_stats", _neuron_stats, "CompositeExplicitAutograd")
torch.library.register_fake("rmfast::neuron_stats", _neuron_stats_fake, lib=lib)
torch.library.register_autograd("rmfast::neuron_stats", no_gradient("neuron_stats"), lib=lib)
