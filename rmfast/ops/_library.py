"""The torch libraries that hold the ops, and the checks that all ops share."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# `rmfast` holds the ops that users and torch.compile see; `rmfast_native` the compiled libraries' own kernels.
lib = torch.library.Library("rmfast", "DEF")
native = torch.library.Library("rmfast_native", "DEF")

_PLAIN = (Tensor, torch.nn.Parameter)


def define(name: str, schema: str) -> None:
    for library in (lib, native):
        library.define(name + schema)


def direct(args: tuple) -> bool:
    """Whether the dispatcher has nothing to add: no gradient, tracing, mode, transform or tensor subclass.

    Going through it costs 27 µs of a 60 µs call (12 arguments boxed four times).
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
    ):
        return False
    grad = torch.is_grad_enabled()
    for a in args:
        if a is None:
            continue
        if type(a) in _PLAIN:
            if grad and a.requires_grad:
                return False
        elif isinstance(a, Tensor):
            return False
    return True


def expect(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"Expected {name} to be {expected}, got {got}")


def expect_dtype(ok: bool, name: str, expected: str, got: torch.dtype) -> None:
    if not ok:
        raise TypeError(f"Expected {name} to have dtype {expected}, got {got}")


def expect_eps(eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"Expected eps to be a float, got {type(eps).__name__}")
    expect(eps > 0 and math.isfinite(eps), "eps", "finite and above 0", eps)


def expect_no_grad(op: str, **inputs: Tensor | None) -> None:
    if torch.is_grad_enabled():
        for name, value in inputs.items():
            if value is not None and value.requires_grad:
                raise ValueError(
                    f"Expected {name} not to require grad: {op} has no gradient; call it under torch.no_grad() or "
                    f"detach {name}"
                )


def checked(value: Tensor | None, name: str, shape: tuple[int | None, ...], like: Tensor, index: bool = False) -> None:
    """One argument's type, dtype, shape (None: any size) and device, which is that of `like`, the op's first one."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected {name} to be a torch.Tensor, got {type(value).__name__}")
    if index:
        expect_dtype(value.dtype == torch.int64, name, "torch.int64", value.dtype)
    else:
        expect_dtype(value.dtype in FLOATS, name, "float64, float32, bfloat16 or float16", value.dtype)
    got = value.shape
    fits = len(got) == len(shape)
    for size, want in zip(got, shape):
        fits = fits and (want is None or want == size)
    if not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"Expected {name} to have shape ({wanted}), got {tuple(got)}")
    # A message made in vain costs 1 µs of a call's 10.
    if value.device != like.device:
        raise ValueError(f"Expected {name}.device to be that of the first argument, {like.device}, got {value.device}")


def readable(value: Tensor) -> bool:
    """Whether a check may read a tensor: on the CPU always, on CUDA (where that synchronises) with RMFAST_CHECK=1."""
    if torch.compiler.is_compiling():
        return False
    return value.device.type == "cpu" or os.environ.get("RMFAST_CHECK") == "1"


def no_gradient(op: str):
    """The backward of an op that has none: without one autograd would silently give no gradient."""

    def backward(ctx, *grads):
        raise RuntimeError(f"{op} has no gradient; call it under torch.no_grad() or detach its inputs")

    return backward
