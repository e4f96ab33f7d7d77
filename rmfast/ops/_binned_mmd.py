"""`binned_mmd`: the sum of MMD² over pairs of bins and its gradient, in one tiled pass over pairs of rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from rmfast import backends as _backends
from rmfast.arguments import flag, number, sequence
from rmfast.kernels.binned_mmd import reference as _reference
from rmfast.ops._library import FLOATS, checked, define, direct, expect, expect_dtype, lib, native

MEDIAN_ROWS = 512  # 131,000 distances; of 2,048 rows the median alone takes longer than all else for N = 8,192

define(
    "binned_mmd",
    "(Tensor x, Tensor bins, Tensor? groups, float[] bandwidths, bool unbiased, bool need_grad) -> (Tensor, Tensor)",
)
define("binned_mmd_backward", "(Tensor grad, Tensor unit, Tensor x) -> Tensor")
# What C++ brings to the reference's pass: rows of one number, and what lies between the matmuls of longer ones.
native.define(
    "binned_mmd_line(Tensor x, Tensor ranges, Tensor alpha, Tensor same, Tensor rates, bool need_grad) "
    "-> (Tensor, Tensor)"
)
native.define(
    "binned_mmd_weigh(Tensor(a!) dots, Tensor squares, Tensor ranges, Tensor alpha, Tensor same, Tensor rates, "
    "int row, int column) -> Tensor"
)


def _cpp():
    ops = torch.ops.rmfast_native
    return functools.partial(_reference.forward, line=ops.binned_mmd_line.default, weigh=ops.binned_mmd_weigh.default)


def _triton():
    from rmfast.kernels.binned_mmd import triton

    return triton.forward


_backends.register("binned_mmd", triton=_triton, cpp=_cpp, eager=lambda: _reference.forward)


def binned_mmd(
    x: Tensor,
    bins: Tensor,
    groups: Tensor | None = None,
    *,
    bandwidths: Sequence[float] = (),
    unbiased: bool = False,
) -> Tensor:
    """The loss that `rmfast.losses.binned_mmd` documents, of one rank's rows.

    Args:
        x: (N,) or (N, f), N and f at least 1; float64, float32, bfloat16 or float16.
        bins: int64 (N,); any number names a bin.
        groups: int64 (N,) or None.
        bandwidths: of Gaussian kernels, whose mean is taken, each finite and above 0; none: the median heuristic.
        unbiased: the estimator.

    Returns:
        The sum (), in float32 (float64 for float64 x); differentiable once in x.

    Raises:
        ValueError: a shape, device or bandwidth that does not fit.
        TypeError: a dtype that is not supported, or an argument that is no tensor.
        rmfast.BackendError: a backend asked for by name cannot run.
    """
    for name, value in (("x", x), ("bins", bins)):
        if not isinstance(value, Tensor):
            raise TypeError(f"Expected {name} to be a torch.Tensor, got {type(value).__name__}")
    expect_dtype(x.dtype in FLOATS, "x", "float64, float32, bfloat16 or float16", x.dtype)
    expect(x.dim() in (1, 2) and x.numel() > 0, "x", "of shape (N,) or (N, f), not empty", tuple(x.shape))
    checked(bins, "bins", (x.size(0),), x, index=True)
    checked(groups, "groups", (x.size(0),), x, index=True)
    widths = [
        number("bandwidths", h, 0, above=True) for h in sequence("bandwidths", bandwidths, "a sequence of numbers")
    ]
    need_grad = torch.is_grad_enabled() and x.requires_grad
    args = (
        x if x.dim() == 2 else x[:, None], bins, groups, widths, flag("unbiased", unbiased), need_grad
    )  # fmt: skip
    return (_binned_mmd(*args) if direct(args) else torch.ops.rmfast.binned_mmd(*args))[0]


def _layout(bins: Tensor, groups: Tensor | None, unbiased: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row order, ranges int64 (4, N), and the coefficients alpha and same (N,) in fp64, as `reference` has them.

    Sorting and bisection only: nothing waits for the device to say how many bins there are.
    """
    order = bins.argsort(stable=True)
    if groups is not None:
        order = order[groups[order].argsort(stable=True)]
    bins = bins[order]
    new_group = torch.ones_like(bins, dtype=torch.bool)
    new_group[1:] = False if groups is None else groups[order].diff() != 0
    new_bin = new_group.clone()
    new_bin[1:] |= bins.diff() != 0
    ranges = []
    for new in (new_bin, new_group):
        run = new.cumsum(0)
        ranges += [torch.searchsorted(run, run), torch.searchsorted(run, run, right=True)]
    _, _, group_first, group_end = ranges
    count = ranges[1] - ranges[0]
    part = count >= (2 if unbiased else 1)
    before = torch.nn.functional.pad((new_bin & part).cumsum(0), (1, 0))
    taking_part = before[group_end] - before[group_first]
    size = count.double()
    same = 2 * (taking_part - 1) / (size * (size - 1) if unbiased else size * size)
    return order, torch.stack(ranges), size.reciprocal().where(part, 0), same.where(part, 0)


def median_rows(rows: int, device: torch.device) -> Tensor:
    """At most MEDIAN_ROWS indices: one of each of as many stretches, at the place in it that multiples of the golden
    ratio give, so that rows that take turns (chosen, rejected) all get in."""
    count = min(rows, MEDIAN_ROWS)
    i = torch.arange(count, device=device)
    return i * rows // count + ((i * 2654435769 % 2**32) * (rows // count) >> 32)


def _median_bandwidth(x: Tensor) -> Tensor:
    """The median distance of these rows (1,); their mean distance where it is 0, and 1 where that is."""
    distances = torch.pdist(x[median_rows(x.size(0), x.device)])
    if distances.size(0) == 0:
        return x.new_ones(1)
    median, mean = distances.median(), distances.mean()
    median = torch.where(median == 0, mean, median)
    return torch.where(median == 0, 1, median)[None]


def _binned_mmd(x, bins, groups, bandwidths, unbiased, need_grad):
    run = _backends.choose("binned_mmd", x.device.type)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    order, ranges, alpha, same = _layout(bins, groups, unbiased)
    wide = x.to(acc)
    width = torch.tensor(bandwidths, dtype=acc, device=x.device) if bandwidths else _median_bandwidth(wide)
    rates = 0.5 / width.square()
    value, grad = run(wide[order], ranges, alpha.to(acc), same.to(acc), rates, need_grad)
    if not unbiased:
        value = value + same.sum()  # the diagonal, where the kernel is 1
    if need_grad:
        grad = torch.empty_like(grad).index_copy_(0, order, grad)
    return value.to(acc), grad


def _binned_mmd_fake(x, bins, groups, bandwidths, unbiased, need_grad):
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((), dtype=acc), x.new_empty(x.shape if need_grad else (0,), dtype=acc)


def _binned_mmd_backward(grad, unit, x):
    if unit.shape != x.shape:
        raise RuntimeError("binned_mmd was called without need_grad, so it has no gradient")
    return (grad * unit).to(x.dtype)


def _binned_mmd_backward_fake(grad, unit, x):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    # x only ties the backward to it, so that a second derivative raises instead of being 0.
    ctx.save_for_backward(output[1], inputs[0])


def _backward(ctx, grad, _):
    return torch.ops.rmfast.binned_mmd_backward(grad, *ctx.saved_tensors), *[None] * 5


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("binned_mmd has no second derivative")


for _name, _run, _fake in (
    ("binned_mmd", _binned_mmd, _binned_mmd_fake),
    ("binned_mmd_backward", _binned_mmd_backward, _binned_mmd_backward_fake),
):
    lib.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rmfast::{_name}", _fake, lib=lib)
torch.library.register_autograd("rmfast::binned_mmd", _backward, setup_context=_setup_context, lib=lib)
torch.library.register_autograd("rmfast::binned_mmd_backward", _no_second_derivative, lib=lib)
