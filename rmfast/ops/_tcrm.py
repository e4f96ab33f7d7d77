"""`tcrm`: the loss of temporally coherent reward modelling and its gradient, in one pass over the values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rmfast import backends as _backends
from rmfast.kernels.tcrm import reference as _reference
from rmfast.ops import _unit_gradient
from rmfast.ops._library import checked, define, direct, expect, expect_dtype, lib, readable

define(
    "tcrm",
    "(Tensor chosen, Tensor rejected, Tensor bounds, Tensor? margin, float smooth, float lookahead, bool mean) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


def _triton():
    from rmfast.kernels.tcrm import triton

    return triton.forward


_backends.register(
    "tcrm",
    triton=_triton,
    cpp=lambda: torch.ops.rmfast_native.tcrm.default,
    eager=lambda: _reference.forward,
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
        None if margin is None else margin.to(acc).contiguous(), float(smooth), float(lookahead), bool(mean),
    )  # fmt: skip
    return (_tcrm(*args) if direct(args) else torch.ops.rmfast.tcrm(*args))[:2]


def _check_values(chosen: Tensor, rejected: Tensor, bounds: Tensor) -> None:
    if not readable(bounds):
        return
    ranges = bounds.cpu().numpy()
    for name, tokens, (first, end) in (("chosen", chosen, ranges[:2]), ("rejected", rejected, ranges[2:])):
        wrong = (first < 0) | (first >= end) | (end > tokens.size(0))
        wrong[1:] |= first[1:] < end[:-1]
        if wrong.any():
            b = wrong.argmax()
            raise ValueError(
                f"Expected the {name} responses to be ascending ranges of one or more of {tokens.size(0)} tokens, got "
                f"tokens {first[b]} up to {end[b]} for response {b}"
            )


def _tcrm(*args):
    chosen, rejected, bounds = args[:3]
    _check_values(chosen, rejected, bounds)
    return _backends.choose("tcrm", chosen.device.type)(*args)


def _tcrm_fake(chosen, rejected, *args):
    acc = _reference.accumulator(chosen.dtype)
    return tuple(chosen.new_empty(shape, dtype=acc) for shape in ((), (3,), chosen.shape, rejected.shape))


lib.impl("tcrm", _tcrm, "CompositeExplicitAutograd")
torch.library.register_fake("rmfast::tcrm", _tcrm_fake, lib=lib)
_unit_gradient.register("tcrm", count=2)
