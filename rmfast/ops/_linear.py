"""`linear`: a linear layer in fp32 on weights that stay as they are stored, in 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from rmfast import backends as _backends
from rmfast.arguments import flag
from rmfast.kernels.linear import reference as _reference
from rmfast.ops._library import checked, define, direct, expect, expect_dtype, lib, native

WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)

define("linear", "(Tensor x, Tensor weight, Tensor? bias, bool across) -> Tensor")
native.define("linear_(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias, bool across) -> ()")  # y contiguous

_backends.register("linear", cpp=lambda: torch.ops.rmfast_native.linear.default, eager=lambda: _reference.linear)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, across: bool = False) -> Tensor:
    """y = x weightᵀ + bias, multiplied and added in float32 whatever weight is stored in.

    The weight is widened in pieces, on its way into the registers; no copy of it in float32 is made.

    Args:
        x: (n, d) float32; rows contiguous. Differentiable.
        weight: (m, d); float32, bfloat16 or float16; its last dimension contiguous. Differentiable.
        bias: (m,), any of these dtypes, or None. Differentiable.
        across: weight is (d, m) instead, as transformers' Conv1D keeps it.

    Returns:
        (n, m) float32, contiguous. In the C++ backend an element's bits depend on its row of x and its row of weight
        alone: not on n, on where the row stands, or on the number of threads.

    Raises:
        ValueError: a shape, stride or device that does not fit.
        TypeError: a dtype that is not supported, or an argument that is no tensor.
        rmfast.BackendError: a backend asked for by name cannot run (there are C++ and eager).
    """
    across = flag("across", across)
    if not _fits(x, weight, across):
        _refuse(x, weight, across)
    if bias is not None:
        checked(bias, "bias", (weight.size(1 if across else 0),), x)
        bias = bias.float().contiguous()
    args = x, weight, bias, across
    return _linear(*args) if direct(args) else torch.ops.rmfast.linear(*args)


def _fits(x: Tensor, weight: Tensor, across: bool) -> bool:
    """What `_refuse` says one by one, in 2 µs."""
    return (
        isinstance(x, Tensor) and isinstance(weight, Tensor) and x.dtype == torch.float32 and weight.dtype in WEIGHTS
        and x.dim() == weight.dim() == 2 and x.size(1) == weight.size(0 if across else 1) and x.device == weight.device
        and x.stride(1) == 1 and weight.stride(1) == 1
    )  # fmt: skip


def _refuse(x: Tensor, weight: Tensor, across: bool) -> None:
    """The error of what does not fit, by name."""
    if not isinstance(x, Tensor):
        raise TypeError(f"Expected x to be a torch.Tensor, got {type(x).__name__}")
    expect_dtype(x.dtype == torch.float32, "x", "float32", x.dtype)
    expect(x.dim() == 2, "x", "of shape (n, d)", tuple(x.shape))
    if not isinstance(weight, Tensor):
        raise TypeError(f"Expected weight to be a torch.Tensor, got {type(weight).__name__}")
    checked(weight, "weight", (x.size(1), None) if across else (None, x.size(1)), x)
    expect_dtype(weight.dtype in WEIGHTS, "weight", "float32, bfloat16 or float16", weight.dtype)
    for name, value in (("x", x), ("weight", weight)):
        expect(value.stride(1) == 1 or value.size(1) == 1, name, "contiguous in its last dimension", value.stride())


def _linear(x, weight, bias, across):
    run = _backends.choose("linear", x.device.type)
    return run(x, weight, bias, across) if x.size(0) else _linear_fake(x, weight, bias, across)


def _linear_fake(x, weight, bias, across):
    return x.new_empty(x.size(0), weight.size(1 if across else 0))


def _setup_context(ctx, inputs, output):
    x, weight, _, ctx.across = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias, _ = ctx.needs_input_grad
    grad = grad.contiguous()
    of_x = torch.ops.rmfast.linear(grad, weight, None, not ctx.across) if need_x else None
    of_weight = None
    if need_weight:
        of_weight = (x.T @ grad if ctx.across else grad.T @ x).to(weight.dtype)
    return of_x, of_weight, grad.sum(0) if need_bias else None, None


lib.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("rmfast::linear", _linear_fake, lib=lib)
torch.library.register_autograd("rmfast::linear", _backward, setup_context=_setup_context, lib=lib)
