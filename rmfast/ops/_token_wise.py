"""What a layer does beside GEMMs and attention: `rms_norm` (with residual), `rotary` and `gated_activation`."""

from __future__ import annotations

import torch
from torch import Tensor

from rmfast import backends as _backends
from rmfast.arguments import flag
from rmfast.kernels.token_wise import reference as _reference
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
)

_HALVES = (torch.bfloat16, torch.float16)

define(
    "rms_norm",
    "(Tensor x, Tensor? weight, Tensor? residual, Tensor? post_weight, float eps, bool gemma) -> (Tensor, Tensor)",
)
define(
    "rotary",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_norm, Tensor? k_norm, float eps, bool gemma) "
    "-> (Tensor, Tensor)",
)
define("gated_activation", "(Tensor gate, Tensor up, int kind) -> Tensor")


def _register(name: str) -> None:
    def triton():
        from rmfast.kernels.token_wise import triton

        return getattr(triton, name)

    _backends.register(
        name,
        triton=triton,
        cpp=lambda: getattr(torch.ops.rmfast_native, name).default,
        eager=lambda: getattr(_reference, name),
    )


for _name in ("rms_norm", "rotary", "gated_activation"):
    _register(_name)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    *,
    residual: Tensor | None = None,
    post_weight: Tensor | None = None,
    eps: float,
    gemma: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm of each row, alone or of its sum with the residual stream.

    With `residual`, sum = x + residual, or residual + norm(x; post_weight) (the norms after the blocks of Gemma 2 and
    3), and y = norm(sum; weight): the end of one block and the start of the next from one read of each.

    Values are rounded where transformers rounds them, so that a layer's scores are those of the model's own code: sum
    to x's dtype; norm(x; w) is round(round(x · rsqrt(mean x² + eps)) · w), or with `gemma`
    round(x · rsqrt(mean x² + eps) · (1 + w)); in float32 before rounding (float64 for float64 x, where transformers'
    modules fall back to float32). In 16 bits they equal transformers' but for rare last bits, since the mean is summed
    in another order. The result has x's dtype, also for a weight of another one.

    Beside a float32 residual (a stream that is not rounded between 16-bit blocks) sum is float32, and nothing is
    rounded but y, once.

    Args:
        x: (..., d); float64, float32, bfloat16 or float16, any strides whose last dimension is contiguous.
        weight: (d,), any of these dtypes, or None for a norm without a gain.
        residual: x's shape and dtype, or float32 beside 16-bit x; or None.
        post_weight: (d,), only with `residual`.
        eps: added to the mean square; above 0.
        gemma: the gain is 1 + weight, and the normed row is rounded once, after it.

    Returns:
        y, or (y, sum) with `residual`; x's shape, contiguous; y in x's dtype, sum in the residual's. In the C++ and
        Triton kernels a row's bits do not depend on the other rows, on where it lies in memory or on the number of
        threads.

    Raises:
        ValueError: a shape, stride, device or eps that does not fit; post_weight without residual; an input that
            requires grad while gradients are on: the op has none.
        TypeError: a dtype that is not supported, or an argument that is no tensor.
        rmfast.BackendError: a backend asked for by name cannot run.
    """
    _rows(x, "x", None, x)
    d = x.size(-1)
    checked(weight, "weight", (d,), x)
    checked(post_weight, "post_weight", (d,), x)
    if residual is not None:
        wide = residual.dtype == torch.float32 and x.dtype in _HALVES if isinstance(residual, Tensor) else False
        _rows(residual, "residual", x.shape, x, wide)
    expect(post_weight is None or residual is not None, "post_weight", "None without residual", "a tensor")
    expect_eps(eps)
    expect_no_grad("rms_norm", x=x, weight=weight, residual=residual, post_weight=post_weight)
    args = (
        _flat(x), _contiguous(weight), None if residual is None else _flat(residual), _contiguous(post_weight),
        float(eps), flag("gemma", gemma),
    )  # fmt: skip
    y, total = _rms_norm(*args) if direct(args) else torch.ops.rmfast.rms_norm(*args)
    return _like(y, x) if residual is None else (_like(y, x), _like(total, x))


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of queries and keys, after a norm of each head where the model has one (Qwen3, Gemma 3).

    Dimension i < R / 2 of a head turns with dimension i + R / 2, as in Llama's `rotate_half`; those from R on pass
    through (the partial rotary embedding of Phi-3). All of it is computed in float32 (float64 for float64 q) and
    rounded once, to q's dtype: closer to the truth than transformers, which in 16 bits rounds the normed head, both
    products and their sum.

    Args:
        q: (N, Hq, D); float64, float32, bfloat16 or float16. Like k it may be a strided view (a slice of a fused
            projection, transposed heads) with a contiguous last dimension.
        k: (N, Hkv, D), q's dtype; no heads (`q[:, :0]`) where only q is wanted.
        cos: (N, R), R even and at most D; any of these dtypes, last dimension contiguous. transformers' tables hold
            their R / 2 angles twice, and rows of both halves are read.
        sin: (N, R).
        q_norm: (D,), any of these dtypes, the gain of an RMSNorm of q's heads; None for no norm.
        k_norm: (D,), the same for k.
        eps: of these norms; above 0.
        gemma: their gains are 1 + q_norm and 1 + k_norm.

    Returns:
        The turned q (N, Hq, D) and k (N, Hkv, D), contiguous, in q's dtype; bits as for `rms_norm`.

    Raises:
        ValueError: a shape, stride, device or eps that does not fit; an input that requires grad while gradients are
            on: the op has none.
        TypeError: a dtype that is not supported, or an argument that is no tensor.
        rmfast.BackendError: a backend asked for by name cannot run.
    """
    if not isinstance(q, Tensor):
        raise TypeError(f"Expected q to be a torch.Tensor, got {type(q).__name__}")
    expect(q.dim() == 3 and q.size(2) >= 2, "q", "of shape (N, Hq, D) with D >= 2", q.shape)
    rows, _, d = q.shape
    _tensor(q, "q", (None, None, d), q)
    _tensor(k, "k", (rows, None, d), q)
    if k.dtype != q.dtype:
        raise TypeError(f"Expected k to have dtype {q.dtype}, that of q, got {k.dtype}")
    _tensor(cos, "cos", (rows, None), q)
    rotated = cos.size(1)
    expect(rotated % 2 == 0 and 2 <= rotated <= d, "cos.size(1)", "even, at least 2 and at most q.size(2)", rotated)
    _tensor(sin, "sin", (rows, rotated), q)
    checked(q_norm, "q_norm", (d,), q)
    checked(k_norm, "k_norm", (d,), q)
    expect_eps(eps)
    expect_no_grad("rotary", q=q, k=k, cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm)
    args = (q, k, cos, sin, _contiguous(q_norm), _contiguous(k_norm), float(eps), flag("gemma", gemma))
    return _rotary(*args) if direct(args) else torch.ops.rmfast.rotary(*args)


def gated_activation(gate: Tensor, up: Tensor, *, kind: str) -> Tensor:
    """act(gate) · up, the middle of a gated MLP.

    Computed in float32 (float64 for float64 gate) and rounded once, to gate's dtype: closer to the truth than
    transformers, which in 16 bits rounds act(gate) before the product. The C++ kernels also take GELU's tail for
    negative gates without the cancellation of 1 + erf or 1 + tanh.

    Args:
        gate: (..., m); float64, float32, bfloat16 or float16, any strides whose last dimension is contiguous (a half of
            a fused projection).
        up: gate's shape and dtype.
        kind: "silu", "gelu" (with erf) or "gelu_tanh" (its approximation; transformers' "gelu_pytorch_tanh" and
            "gelu_new").

    Returns:
        gate's shape and dtype, contiguous; bits as for `rms_norm`.

    Raises:
        ValueError: a shape, stride, device or kind that does not fit; an input that requires grad while gradients are
            on: the op has none.
        TypeError: a dtype that is not supported, or an argument that is no tensor.
        rmfast.BackendError: a backend asked for by name cannot run.
    """
    _rows(gate, "gate", None, gate)
    _rows(up, "up", gate.shape, gate)
    expect(isinstance(kind, str) and kind in _reference.KINDS, "kind", '"silu", "gelu" or "gelu_tanh"', kind)
    expect_no_grad("gated_activation", gate=gate, up=up)
    args = (_flat(gate), _flat(up), _reference.KINDS[kind])
    return _like(_gated_activation(*args) if direct(args) else torch.ops.rmfast.gated_activation(*args), gate)


def _rows(value: Tensor, name: str, shape: torch.Size | None, like: Tensor, wide: bool = False) -> None:
    """One (..., d) argument: the op's first one (shape None), or one of its shape and (but for a `wide` one) dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected {name} to be a torch.Tensor, got {type(value).__name__}")
    if shape is None:
        expect_dtype(value.dtype in FLOATS, name, "float64, float32, bfloat16 or float16", value.dtype)
        got = value.shape
        expect(len(got) > 0 and got[-1] >= 1, name, "of shape (..., d) with d >= 1", got)
    # A message made in vain costs 1 µs of a call's 10.
    elif value.shape != shape:
        raise ValueError(f"Expected {name} to have shape {tuple(shape)}, got {tuple(value.shape)}")
    elif value.dtype != like.dtype and not wide:
        raise TypeError(f"Expected {name} to have dtype {like.dtype}, that of the first argument, got {value.dtype}")
    elif value.device != like.device:
        raise ValueError(f"Expected {name}.device to be that of the first argument, {like.device}, got {value.device}")
    _last_contiguous(value, name)


def _flat(value: Tensor) -> Tensor:
    """(..., d) as (N, d), a copy only where no such view exists."""
    return value if value.dim() == 2 else value.reshape(-1, value.size(-1))


def _like(out: Tensor, value: Tensor) -> Tensor:
    return out if value.dim() == 2 else out.view(value.shape)


def _tensor(value: Tensor, name: str, shape: tuple[int | None, ...], like: Tensor) -> None:
    if value is None:
        raise TypeError(f"Expected {name} to be a torch.Tensor, got None")
    checked(value, name, shape, like)
    _last_contiguous(value, name)


def _last_contiguous(value: Tensor, name: str) -> None:
    if value.stride(-1) != 1:
        expect(value.size(-1) == 1 or value.numel() == 0, f"{name}.stride(-1)", "1", value.stride(-1))


def _contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def _rms_norm(*args):
    x = args[0]
    run = _backends.choose("rms_norm", x.device.type, args)
    return _rms_norm_fake(*args) if x.numel() == 0 else run(*args)


def _rms_norm_fake(*args):
    x, residual = args[0], args[2]
    return x.new_empty(x.shape), x.new_empty(0) if residual is None else residual.new_empty(x.shape)


def _rotary(*args):
    q = args[0]
    run = _backends.choose("rotary", q.device.type)
    return _rotary_fake(*args) if q.size(0) == 0 else run(*args)


def _rotary_fake(*args):
    q, k = args[:2]
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _gated_activation(*args):
    gate = args[0]
    run = _backends.choose("gated_activation", gate.device.type)
    return _gated_activation_fake(*args) if gate.numel() == 0 else run(*args)


def _gated_activation_fake(*args):
    return args[0].new_empty(args[0].shape)


for _name, _run, _fake in (
    ("rms_norm", _rms_norm, _rms_norm_fake),
    ("rotary", _rotary, _rotary_fake),
    ("gated_activation", _gated_activation, _gated_activation_fake),
):
    lib.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rmfast::{_name}", _fake, lib=lib)
    torch.library.register_autograd(f"rmfast::{_name}", no_gradient(_name), lib=lib)
