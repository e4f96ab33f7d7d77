"""`patch_rows`: the suffix rows that enter a layer, copied from a base run or replaced, and the layer's first norm."""

from __future__ import annotations

import torch
from torch import Tensor

from rmfast import backends as _backends
from rmfast.arguments import flag
from rmfast.kernels.patch_rows import reference as _reference
from rmfast.ops._library import (
    FLOATS,
    checked,
    define,
    direct,
    expect,
    expect_dtype,
    expect_eps,
    expect_no_grad,
    lib,
    no_gradient,
    readable,
)

define(
    "patch_rows",
    "(Tensor base, Tensor values, Tensor base_rows, Tensor value_rows, Tensor weight, float eps, bool gemma) "
    "-> (Tensor, Tensor)",
)


def _triton():
    from rmfast.kernels.patch_rows import triton

    return triton.patch_rows


_backends.register(
    "patch_rows",
    cuda=lambda: torch.ops.rmfast_native.patch_rows.default,
    triton=_triton,
    cpp=lambda: torch.ops.rmfast_native.patch_rows.default,
    eager=lambda: _reference.patch_rows,
)


def patch_rows(
    base: Tensor,
    values: Tensor,
    base_rows: Tensor,
    value_rows: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    gemma: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rows of a base run's stream, some replaced, and their RMSNorm: what enters a layer of a patching sweep.

    Row i of x is `values[value_rows[i]]`, or `base[base_rows[i]]` where value_rows[i] is −1; y is
    `rms_norm(x, weight, eps=eps, gemma=gemma)`, rounded as there.

    Args:
        base: (B, d), the base run's residual stream; float64, float32, bfloat16 or float16, rows of any stride (copied
            where its last dimension is not contiguous).
        values: (V, d), what replaces rows, such as the other run's stream; base's dtype and device. V may be 0.
        base_rows: int64 (n,), in [0, B), repeats allowed; also where the row is replaced.
        value_rows: int64 (n,), in [−1, V).
        weight: (d,), the norm's gain; any of the dtypes above.
        eps: added to the mean square; above 0.
        gemma: the gain is 1 + weight, and the normed row is rounded once, after it.

    Returns:
        x: (n, d) contiguous, base's dtype, copied bit by bit.
        y: the same shape and dtype. C++ and Triton give the bits that their `rms_norm` gives for x. In both and in CUDA
            C++ a row's bits do not depend on the other rows, on where it lies in memory or on the number of threads.

    Raises:
        ValueError: a shape, device or eps that does not fit; a row out of range (on CUDA it gives NaN in that row of x
            and y instead, unless RMFAST_CHECK=1); an input that requires grad while gradients are on: the op has none.
        TypeError: a dtype that is not supported, or an argument that is no tensor.
        rmfast.BackendError: a backend asked for by name cannot run.
    """
    arguments = {
        "base": base, "values": values, "base_rows": base_rows, "value_rows": value_rows, "weight": weight,
    }  # fmt: skip
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"Expected {name} to be a torch.Tensor, got {type(value).__name__}")
    expect_dtype(base.dtype in FLOATS, "base", "float64, float32, bfloat16 or float16", base.dtype)
    expect(base.dim() == 2 and base.size(1) >= 1, "base", "of shape (B, d) with d >= 1", tuple(base.shape))
    d = base.size(1)
    checked(values, "values", (None, d), base)
    expect_dtype(values.dtype == base.dtype, "values", f"{base.dtype}, that of base", values.dtype)
    checked(base_rows, "base_rows", (None,), base, index=True)
    checked(value_rows, "value_rows", (base_rows.size(0),), base, index=True)
    checked(weight, "weight", (d,), base)
    expect_eps(eps)
    expect_no_grad("patch_rows", base=base, values=values, weight=weight)
    args = (
        _rows(base), _rows(values), base_rows.contiguous(), value_rows.contiguous(), weight.contiguous(), float(eps),
        flag("gemma", gemma),
    )  # fmt: skip
    return _patch_rows(*args) if direct(args) else torch.ops.rmfast.patch_rows(*args)


def _rows(value: Tensor) -> Tensor:
    return value if value.stride(1) == 1 else value.contiguous()


def _check_values(base: Tensor, values: Tensor, base_rows: Tensor, value_rows: Tensor) -> None:
    if base_rows.numel() == 0 or not readable(base_rows):
        return
    for name, index, least, count in (
        ("base_rows", base_rows, 0, base.size(0)),
        ("value_rows", value_rows, -1, values.size(0)),
    ):
        low, high = (int(v) for v in index.aminmax())
        expect(low >= least and high < count, name, f"in [{least}, {count})", low if low < least else high)


def _patch_rows(*args):
    base, values, base_rows, value_rows = args[:4]
    _check_values(base, values, base_rows, value_rows)
    run = _backends.choose("patch_rows", base.device.type)
    return _patch_rows_fake(*args) if base_rows.size(0) == 0 else run(*args)


def _patch_rows_fake(base, values, base_rows, *args):
    shape = (base_rows.size(0), base.size(1))
    return base.new_empty(shape), base.new_empty(shape)


lib.impl("patch_rows", _patch_rows, "CompositeExplicitAutograd")
torch.library.register_fake("rmfast::patch_rows", _patch_rows_fake, lib=lib)
torch.library.register_autograd("rmfast::patch_rows", no_gradient("patch_rows"), lib=lib)
