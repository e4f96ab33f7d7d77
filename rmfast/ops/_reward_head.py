"""`reward_head`: rewards of K heads under I interventions from one read of the hidden states."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from rmfast import backends as _backends
from rmfast.kernels.reward_head import reference as _reference
from rmfast.ops._library import FLOATS, checked, define, direct, expect, expect_dtype, expect_eps, lib

_FORWARD = (
    "(Tensor hidden, Tensor weight, Tensor? bias, int norm, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "Tensor? rows, Tensor? directions, Tensor? strengths, Tensor? targets, Tensor? intervention_index) -> Tensor"
)
_BACKWARD = (
    "(Tensor grad, Tensor hidden, Tensor weight, int norm, Tensor? norm_weight, float eps, Tensor? rows, "
    "bool need_rows, bool need_dots) -> (Tensor, Tensor)"
)

define("reward_head", _FORWARD)
define("reward_head_backward", _BACKWARD)


def _triton(name: str):
    def load():
        from rmfast.kernels.reward_head import triton

        return getattr(triton, name)

    return load


def _native():
    return torch.ops.rmfast_native.reward_head.default


def _flat(load):
    """A backend that takes parameters of any dtype, and hidden in three dimensions."""

    def loaded():
        run = load()
        return lambda hidden, *args: run(_three_dims(hidden), *args)

    return loaded


def _cast(load):
    """A backend that takes the arguments as `_reference` describes them; C++ and Triton cast parameters themselves."""

    def loaded():
        run = load()
        return lambda *args: run(*as_described(*args))

    return loaded


_backends.register(
    "reward_head",
    cuda=_cast(_native),
    triton=_flat(_triton("forward")),
    cpp=_native,
    eager=_cast(lambda: _reference.forward),
)
_backends.register(
    "reward_head_backward",
    triton=_triton("backward"),
    cpp=lambda: torch.ops.rmfast_native.reward_head_backward.default,
    eager=lambda: _reference.backward,
)


def reward_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    rows: Tensor | None = None,
    directions: Tensor | None = None,
    strengths: Tensor | None = None,
    targets: Tensor | None = None,
    intervention_index: Tensor | None = None,
) -> Tensor:
    """Rewards of K heads on the last hidden states: final norm, head and interventions in one read of `hidden`.

    Without interventions row h gives `norm(h) @ weight.T + bias`. Intervention i replaces h, before the norm, by
    `h − Σ_j strengths[i, j] (directions[j]·h − targets[i, j]) directions[j]` (with unit directions and strength 1,
    Mechanistic Reward Shaping, arXiv 2603.03291, placed before the norm). No normalised or changed copy of
    the hidden states is written.

    Args:
        hidden: (..., d), the residual stream before the final norm; float64, float32, bfloat16 or float16, any
            strides whose last dimension is contiguous.
        weight: (K, d), the heads; any of these dtypes, as all floating arguments below.
        bias: (K,) or None.
        norm: None, "rms" (Llama: γ h / rms), "gemma_rms" (1 + γ) or "layer".
        norm_weight: γ (d,) or None for a norm without a gain.
        norm_bias: β (d,) or None; only with norm="layer".
        eps: added to the mean square (variance for "layer"); above 0.
        rows: int64 (M,), indices into the flattened rows of `hidden`, repeats allowed; only these are read.
        directions: (J, d), not necessarily orthonormal; J = 0 changes nothing.
        strengths: (I, J); a row of zeros gives the plain reward.
        targets: (I, J), the projections put in place of those removed; None is 0.
        intervention_index: int64, one for each row read (M,) or hidden's leading shape; −1 leaves the row as it is.

    Returns:
        Rewards in float32 (float64 for float64 `hidden`): (..., K), or (M, K) with `rows`; with interventions and no
        `intervention_index` (..., I, K). Differentiable in hidden, weight, bias, norm_weight and norm_bias.

    Raises:
        ValueError: a shape, device, stride, eps or norm that does not fit; a row or intervention index out of range
            (on CUDA it gives NaN for that row instead, unless RMFAST_CHECK=1); directions, strengths or targets
            that require grad.
        TypeError: a dtype that is not supported, or an argument that is no tensor.
        rmfast.BackendError: a backend asked for by name cannot run.
    """
    if not isinstance(hidden, Tensor):
        raise TypeError(f"Expected hidden to be a torch.Tensor, got {type(hidden).__name__}")
    # Messages are made only where they are raised: in vain they would take a fifth of a small call.
    if hidden.dtype not in FLOATS:
        expect_dtype(False, "hidden", "float64, float32, bfloat16 or float16", hidden.dtype)
    shape = hidden.shape
    if not shape or shape[-1] < 1:
        expect(False, "hidden", "of shape (..., d) with d >= 1", tuple(shape))
    d = shape[-1]
    if hidden.stride(-1) != 1 and d != 1:
        expect(hidden.numel() == 0, "hidden.stride(-1)", "1", hidden.stride(-1))
    checked(weight, "weight", (None, d), hidden)
    if weight is None:
        raise TypeError("Expected weight to be a torch.Tensor, got None")
    heads = weight.size(0)
    if heads < 1:
        expect(False, "weight", f"of shape (K, {d}) with K >= 1", tuple(weight.shape))
    checked(bias, "bias", (heads,), hidden)
    if norm is not None and not (isinstance(norm, str) and norm in _reference.NORMS):
        expect(False, "norm", 'None, "rms", "gemma_rms" or "layer"', repr(norm))
    checked(norm_weight, "norm_weight", (d,), hidden)
    checked(norm_bias, "norm_bias", (d,), hidden)
    if norm is None:
        expect(norm_weight is None, "norm_weight", "None with norm=None", "a tensor")
    if norm_bias is not None and norm != "layer":
        expect(False, "norm_bias", 'None unless norm="layer"', f"a tensor with norm={norm!r}")
    expect_eps(eps)
    checked(rows, "rows", (None,), hidden, index=True)
    lead = shape[:-1] if rows is None else rows.shape
    if directions is None:
        for name, value in (("strengths", strengths), ("targets", targets), ("intervention_index", intervention_index)):
            expect(value is None, name, "None without directions", "a tensor")
    else:
        checked(directions, "directions", (None, d), hidden)
        if strengths is None:
            raise ValueError(f"Expected strengths to be a tensor (I, {directions.size(0)}) with directions, got None")
        checked(strengths, "strengths", (None, directions.size(0)), hidden)
        checked(targets, "targets", tuple(strengths.shape), hidden)
        for name, value in (("directions", directions), ("strengths", strengths), ("targets", targets)):
            if value is not None and value.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"Expected {name} not to require grad: the op has no gradient for it; detach it")
        if intervention_index is not None:
            if not isinstance(intervention_index, Tensor):
                raise TypeError(f"Expected intervention_index to be a tensor, got {type(intervention_index).__name__}")
            checked(intervention_index, "intervention_index", (None,) * intervention_index.dim(), hidden, index=True)
            expect(
                intervention_index.shape in (lead, torch.Size([lead.numel()])),
                "intervention_index", f"of shape {tuple(lead)}", tuple(intervention_index.shape),
            )  # fmt: skip
            intervention_index = intervention_index.reshape(-1).contiguous()

    interventions = None if strengths is None or intervention_index is not None else strengths.size(0)
    if directions is not None and strengths is not None and 0 in (directions.size(0), strengths.size(0)):
        # Nothing is removed: the plain op, with the axis of interventions put back below.
        if not torch.compiler.is_compiling():
            _check_values(hidden, None, strengths, intervention_index)
        directions = strengths = targets = intervention_index = None
    args = (
        hidden if hidden.dim() in (2, 3) else _three_dims(hidden), weight, bias, _reference.NORMS[norm], norm_weight,
        norm_bias, float(eps), None if rows is None else rows.contiguous(), directions, strengths, targets,
        intervention_index,
    )  # fmt: skip
    out = _reward_head(*args) if direct(args) else torch.ops.rmfast.reward_head(*as_described(*args))
    if interventions is not None and directions is None:
        out = out[:, None].repeat(1, interventions, 1)
    return out if len(lead) == 1 else out.reshape(*lead, *out.shape[1:])


def as_described(hidden, weight, bias, norm, norm_weight, norm_bias, eps, rows, directions, strengths, targets, index):
    """The arguments as every backend reads them: hidden in three dimensions, parameters in the accumulation dtype."""
    acc = _accumulation(hidden)

    def cast(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(acc).contiguous()

    return (
        _three_dims(hidden), cast(weight), cast(bias), norm, cast(norm_weight), cast(norm_bias), eps, rows,
        cast(directions), cast(strengths), cast(targets), index,
    )  # fmt: skip


def _accumulation(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _three_dims(hidden: Tensor) -> Tensor:
    """hidden as (B, T, d), the form the kernels read with two strides; a copy only where no such view exists."""
    if hidden.dim() == 3:
        return hidden
    if hidden.dim() == 2:
        return hidden.unsqueeze(0)
    if hidden.dim() == 1:
        return hidden.view(1, 1, -1)
    try:
        return hidden.view(-1, *hidden.shape[-2:])
    except RuntimeError:
        return hidden.reshape(1, -1, hidden.size(-1))


def _check_values(hidden: Tensor, rows: Tensor | None, strengths: Tensor | None, index: Tensor | None) -> None:
    """Checks that read tensors: always on the CPU, on CUDA (where they synchronise) only with RMFAST_CHECK=1."""
    if rows is None and index is None:
        return
    if hidden.device.type != "cpu" and os.environ.get("RMFAST_CHECK") != "1":
        return
    if rows is not None and rows.numel():
        low, high = (int(v) for v in rows.aminmax())
        count = hidden.shape[:-1].numel()
        expect(low >= 0 and high < count, "rows", f"in [0, {count})", low if low < 0 else high)
    if index is not None and strengths is not None and index.numel():
        low, high = (int(v) for v in index.aminmax())
        count = strengths.size(0)
        expect(low >= -1 and high < count, "intervention_index", f"in [-1, {count})", low if low < -1 else high)


def _reward_head(*args):
    hidden, rows = args[0], args[7]
    _check_values(hidden, rows, args[9], args[11])
    run = _backends.choose("reward_head", hidden.device.type)
    return _reward_head_fake(*args) if (hidden if rows is None else rows).numel() == 0 else run(*args)


def _reward_head_fake(*args):
    hidden, weight, rows, strengths, index = (args[i] for i in (0, 1, 7, 9, 11))
    count = hidden.shape[:-1].numel() if rows is None else rows.size(0)
    axis = () if strengths is None or index is not None else (strengths.size(0),)
    return hidden.new_empty((count, *axis, weight.size(0)), dtype=_accumulation(hidden))


def _reward_head_backward(grad, hidden, weight, norm, norm_weight, eps, rows, need_rows, need_dots):
    run = _backends.choose("reward_head_backward", hidden.device.type)
    if grad.size(0) == 0:
        empty = hidden.new_empty((0, hidden.size(-1)) if need_rows else (0,))
        return empty, weight.new_zeros(weight.shape if need_dots else (0,))
    return run(grad, hidden, weight, norm, norm_weight, eps, rows, need_rows, need_dots)


def _reward_head_backward_fake(grad, hidden, weight, norm, norm_weight, eps, rows, need_rows, need_dots):
    count = hidden.size(0) * hidden.size(1) if rows is None else rows.size(0)
    return (
        hidden.new_empty((count, hidden.size(-1)) if need_rows else (0,)),
        weight.new_empty(weight.shape if need_dots else (0,)),
    )


def _setup_context(ctx, inputs, output):
    (hidden, weight, bias, norm, norm_weight, norm_bias, eps, rows, directions, strengths, targets, index) = inputs
    ctx.save_for_backward(hidden, weight, norm_weight, norm_bias, rows, directions, strengths, targets, index)
    ctx.norm, ctx.eps, ctx.bias = norm, eps, bias is not None
    # The backward may run in a thread of autograd's, which does not see this one's choice.
    ctx.backend = _backends.requested()


def _changed_rows(hidden, rows, directions, strengths, targets, index) -> tuple[Tensor, Tensor]:
    """The rows after intervention, (n, d), and the strengths that changed them, (n or 1, J), for the backward."""
    x = _reference.gather(hidden, rows).to(directions.dtype)
    if index is not None:
        on = (index >= 0)[:, None]
        safe = index.clamp(min=0)
        strengths = torch.where(on, strengths[safe], 0)
        targets = None if targets is None else targets[safe]
    shift = x @ directions.T
    if targets is not None:
        shift = shift - targets
    return x - (strengths * shift) @ directions, strengths


def _backward(ctx, grad):
    with torch.autocast(grad.device.type, enabled=False):  # autograd brings the caller's autocast back here
        return _gradients(ctx, grad)


def _gradients(ctx, grad):
    hidden, weight, norm_weight, norm_bias, rows, directions, strengths, targets, index = ctx.saved_tensors
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    need_gain, need_norm_bias = ctx.needs_input_grad[4:6]
    need_dots = need_weight or need_gain
    grad = grad.contiguous()

    def plain(g, h, r):
        return torch.ops.rmfast.reward_head_backward(
            g, h, weight, ctx.norm, norm_weight, ctx.eps, r, need_hidden, need_dots
        )  # fmt: skip

    with _backends.backend(_runnable(ctx.backend, hidden)):
        if directions is None:
            grad_rows, dots = plain(grad, hidden, rows)
            total = grad.sum(0)
        else:
            # Intervention i is the affine map h' = (1 − Pᵀ diag(α_i) P) h + Pᵀ (α_i m_i), whose matrix is
            # symmetric: the plain backward at h', then the same map without its offset.
            grad_rows, dots = 0, 0
            for i in range(1 if index is not None else strengths.size(0)):
                alpha, target = strengths, targets
                if index is None:
                    alpha, target = strengths[i : i + 1], None if targets is None else targets[i : i + 1]
                g = grad if index is not None else grad[:, i].contiguous()
                changed, alpha = _changed_rows(hidden, rows, directions, alpha, target, index)
                part, part_dots = plain(g, changed[None], None)
                if need_hidden:
                    grad_rows = grad_rows + part - (alpha * (part @ directions.T)) @ directions
                dots = dots + part_dots
            total = grad.sum(0) if index is not None else grad.sum((0, 1))
            if need_hidden:
                grad_rows = grad_rows.to(hidden.dtype)

    grad_hidden = grad_weight = grad_gain = grad_norm_bias = None
    if need_hidden:
        grad_hidden = grad_rows.reshape(hidden.shape) if rows is None else _scatter(grad_rows, rows, hidden)
    if need_weight:
        grad_weight = _reference.fold_gain(dots, ctx.norm, norm_weight)
        if norm_bias is not None:
            grad_weight = grad_weight + total[:, None] * norm_bias
    if need_gain:
        grad_gain = (weight * dots).sum(0)
    if need_norm_bias:
        grad_norm_bias = total @ weight
    grad_bias = total if ctx.bias and need_bias else None
    return grad_hidden, grad_weight, grad_bias, None, grad_gain, grad_norm_bias, *[None] * 6


def _runnable(name: str | None, hidden: Tensor) -> str | None:
    """The forward's backend for the backward too, if it has one there (CUDA C++ has not)."""
    if name is None or _backends.why_not("reward_head_backward", name, hidden.device.type) is not None:
        return None
    return name


def _scatter(grad_rows: Tensor, rows: Tensor, hidden: Tensor) -> Tensor:
    out = hidden.new_zeros(hidden.size(0) * hidden.size(1), hidden.size(2))
    # Repeated rows add up in a fixed order: index_put sorts on CUDA, where index_add uses atomics; on the CPU it is the
    # other way round.
    if hidden.device.type == "cuda":
        return out.index_put((rows,), grad_rows, accumulate=True).reshape(hidden.shape)
    return out.index_add(0, rows, grad_rows).reshape(hidden.shape)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("reward_head has no second derivative; use rmfast.kernels.reward_head.reference.forward for one")


lib.impl("reward_head", _reward_head, "CompositeExplicitAutograd")
lib.impl("reward_head_backward", _reward_head_backward, "CompositeExplicitAutograd")
torch.library.register_fake("rmfast::reward_head", _reward_head_fake, lib=lib)
torch.library.register_fake("rmfast::reward_head_backward", _reward_head_backward_fake, lib=lib)
torch.library.register_autograd("rmfast::reward_head", _backward, setup_context=_setup_context, lib=lib)
torch.library.register_autograd("rmfast::reward_head_backward", _no_second_derivative, lib=lib)
