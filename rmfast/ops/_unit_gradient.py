"""Autograd of losses whose forward also computes their gradient: the backward multiplies it by the incoming one."""

from __future__ import annotations

import torch

from rmfast.ops._library import define, lib

define("unit_gradient", "(Tensor grad, Tensor unit, Tensor values) -> Tensor")


def register(op: str, count: int) -> None:
    """For an op that returns (loss, ..., gradients of the loss in its first `count` arguments)."""

    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        # The values only tie the backward to them, so that a second derivative raises instead of being 0.
        ctx.save_for_backward(*inputs[:count], *output[-count:])
        ctx.others = len(inputs) - count

    def backward(ctx, grad, *others):
        values, units = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        grads = (
            torch.ops.rmfast.unit_gradient(grad, unit, value) if needed else None
            for unit, value, needed in zip(units, values, ctx.needs_input_grad)
        )
        return *grads, *[None] * ctx.others

    torch.library.register_autograd(f"rmfast::{op}", backward, setup_context=setup_context, lib=lib)


def _unit_gradient(grad, unit, values):
    if unit.shape != values.shape:
        raise RuntimeError("This loss was computed without its gradient: need_grad was False")
    return (grad * unit).to(values.dtype)


def _unit_gradient_fake(grad, unit, values):
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("This loss has no second derivative: its gradient is a result of its forward")


lib.impl("unit_gradient", _unit_gradient, "CompositeExplicitAutograd")
torch.library.register_fake("rmfast::unit_gradient", _unit_gradient_fake, lib=lib)
torch.library.register_autograd("rmfast::unit_gradient", _no_second_derivative, lib=lib)
