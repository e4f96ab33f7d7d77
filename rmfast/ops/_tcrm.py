"""`tcrm`: the loss of temporally coherent reward modelling, and its gradient, each in one pass over the values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rmfast import backends as _backends
from rmfast.arguments import flag
from rmfast.kernels.tcrm import reference as _reference
from rmfast.ops._library import checked, define, direct, expect, expect_dtype, lib, readable

_INPUTS = "Tensor chosen, Tensor rejected, Tensor bounds, Tensor? margin, float smooth, float lookahead, bool mean"

define("tcrm", f"({_INPUTS}) -> (Tensor, Tensor)")
define("tcrm_backward", f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor)")


def _triton(name: str):
    def load():
        from rmfast.kernels.tcrm import triton

        return getattr(triton, name)

    return load


_backends.register(
    "tcrm",
    triton=_triton("forward"),
    cpp=lambda: torch.ops.rmfast_native.tcrm.default,
    eager=lambda: _reference.forward,
)
_backends.register(
    "tcrm_backward",
    triton=_triton("backward"),
    cpp=lambda: torch.ops.rmfast_native.tcrm_backward.default,
    eager=lambda: _reference.backward,
)


def tcrm(
    chosen: Tensor,
    rejected: Tensor,
    bounds: Tensor,
    *,
    margin: Tensor | None = None,
    smooth: float = 0.1,
    lookahead: float = 0.01,
    mean: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss of `rmfast.losses.tcrm_loss`, whose formula it documents, for responses given as ranges of tokens.

    Args:
        chosen: (N,), values of tokens; float64, float32, bfloat16 or float16.
        rejected: (N',), chosen's dtype. It may be the same tensor as `chosen`.
        bounds: int64 (4, B): response b of the chosen is tokens bounds[0, b] .. bounds[1, b] − 1 of `chosen`, response
            b of the rejected is tokens bounds[2, b] .. bounds[3, b] − 1 of `rejected`. Ascending, without overlap,
            none empty; tokens in no range have no part.
        margin: (B,), any of these dtypes, or None for 0.
        smooth: weight of the smoothness term; finite, at least 0.
        lookahead: weight of the lookahead term; the same.
        mean: a response's terms are averaged over its tokens instead of summed.

    Returns:
        The loss () and its terms (3,) (Bradley-Terry, smoothness, lookahead, before their weights), in float32 (float64
        for float64 values). The loss is differentiable, once, in `chosen` and `rejected`; the terms are not.

    Raises:
        ValueError: a shape, device, range or weight that does not fit (on CUDA a range that is empty or outside
            of the tokens gives NaN instead, unless RMFAST_CHECK=1); a margin that requires grad.
        TypeError: a dtype that is not supported, or an argument that is no tensor.
        rmfast.BackendError: a backend asked for by name cannot run.
    """
    for name, value in (("chosen", chosen), ("rejected", rejected), ("bounds", bounds)):
        if not isinstance(value, Tensor):
            raise TypeError(f"Expected {name} to be a torch.Tensor, got {type(value).__name__}")
    checked(chosen, "chosen", (None,), chosen)
    checked(rejected, "rejected", (None,), chosen)
    expect_dtype(rejected.dtype == chosen.dtype, "rejected", f"{chosen.dtype}, that of chosen", rejected.dtype)
    checked(bounds, "bounds", (4, None), chosen, index=True)
    pairs = bounds.size(1)
    expect(pairs >= 1, "bounds", "of shape (4, B) with B >= 1", tuple(bounds.shape))
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        expect(value.size(0) >= pairs, name, f"at least one token for each of the {pairs} pairs", value.size(0))
    checked(margin, "margin", (pairs,), chosen)
    if margin is not None and margin.requires_grad and torch.is_grad_enabled():
        raise ValueError("Expected margin not to require grad: the op has no gradient for it; detach it")
    for name, factor in (("smooth", smooth), ("lookahead", lookahead)):
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise TypeError(f"Expected {name} to be a float, got {type(factor).__name__}")
        expect(factor >= 0 and math.isfinite(factor), name, "finite and at least 0", factor)
    acc = _reference.accumulator(chosen.dtype)
    args = (
        chosen.contiguous(), rejected.contiguous(), bounds.contiguous(),
        None if margin is None else margin.to(acc).contiguous(), float(smooth), float(lookahead), flag("mean", mean),
    )  # fmt: skip
    return _tcrm(*args) if direct(args) else torch.ops.rmfast.tcrm(*args)


def _check_values(chosen: Tensor, rejected: Tensor, bounds: Tensor) -> None:
    if not readable(bounds):
        return
    ranges = bounds.cpu().numpy().reshape(2, 2, -1)
    first, end = ranges[:, 0], ranges[:, 1]
    wrong = (first < 0) | (first >= end)
    wrong[:, 1:] |= first[:, 1:] < end[:, :-1]
    wrong |= end > [[chosen.size(0)], [rejected.size(0)]]
    if wrong.any():
        side, b = divmod(int(wrong.argmax()), bounds.size(1))
        name, tokens = (("chosen", chosen), ("rejected", rejected))[side]
        raise ValueError(
            f"Expected the {name} responses to be ascending ranges of one or more of {tokens.size(0)} tokens, got "
            f"tokens {first[side, b]} up to {end[side, b]} for response {b}"
        )


def _tcrm(*args):
    chosen, rejected, bounds = args[:3]
    _check_values(chosen, rejected, bounds)
    return _backends.choose("tcrm", chosen.device.type)(*args)


def _tcrm_fake(chosen, *args):
    acc = _reference.accumulator(chosen.dtype)
    return chosen.new_empty((), dtype=acc), chosen.new_empty(3, dtype=acc)


def _tcrm_backward(grad, chosen, *args):
    return _backends.choose("tcrm_backward", chosen.device.type)(grad, chosen, *args)


def _tcrm_backward_fake(grad, chosen, rejected, *args):
    return chosen.new_empty(chosen.shape), rejected.new_empty(rejected.shape)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]
    # The backward may run in a thread of autograd's, which does not see this one's choice.
    ctx.backend = _backends.requested()


def _backward(ctx, grad, _):
    args = (grad, *ctx.saved_tensors, *ctx.options)
    with _backends.backend(ctx.backend):
        grads = _tcrm_backward(*args) if direct(args) else torch.ops.rmfast.tcrm_backward(*args)
    return *grads, *[None] * 5


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("tcrm has no second derivative")


for _name, _run, _fake in (("tcrm", _tcrm, _tcrm_fake), ("tcrm_backward", _tcrm_backward, _tcrm_backward_fake)):
    lib.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rmfast::{_name}", _fake, lib=lib)
torch.library.register_autograd("rmfast::tcrm", _backward, setup_context=_setup_context, lib=lib)
torch.library.register_autograd("rmfast::tcrm_backward", _no_second_derivative, lib=lib)
