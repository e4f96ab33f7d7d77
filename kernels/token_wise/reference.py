"""The token-wise ops in eager PyTorch: the contract of all backends, and what runs where none is built."""

from __future__ import annotations

import torch
from torch import Tensor

SILU, GELU, GELU_TANH = range(3)
KINDS = {"silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _normed(x: Tensor, weight: Tensor | None, eps: float, gemma: bool) -> Tensor:
    wide = x.to(accumulator(x.dtype))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return wide.to(x.dtype)
    if gemma:
        return (wide * (1 + weight.to(wide.dtype))).to(x.dtype)
    return (wide.to(x.dtype) * weight.to(wide.dtype)).to(x.dtype)


def rms_norm(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, post_weight: Tensor | None, eps: float, gemma: bool
) -> tuple[Tensor, Tensor]:
    """y and sum, both (N, d); sum is empty without a residual."""
    if residual is None:
        return _normed(x, weight, eps, gemma), x.new_empty(0)
    added = x if post_weight is None else _normed(x.to(residual.dtype), post_weight, eps, gemma)
    total = added + residual
    return _normed(total, weight, eps, gemma).to(x.dtype), total


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, gemma: bool) -> Tensor:
    acc = accumulator(x.dtype)
    wide, cos, sin = x.to(acc), cos.to(acc)[:, None], sin.to(acc)[:, None]
    if weight is not None:
        wide = _normed(wide, weight, eps, gemma)
    low, high, rest = wide.tensor_split((cos.size(-1) // 2, cos.size(-1)), -1)
    turned = torch.cat((low, high), -1) * cos + torch.cat((-high, low), -1) * sin
    return torch.cat((turned, rest), -1).to(x.dtype)


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    gemma: bool,
) -> tuple[Tensor, Tensor]:
    return _rotated(q, cos, sin, q_norm, eps, gemma), _rotated(k, cos, sin, k_norm, eps, gemma)


def gated_activation(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    acc = accumulator(gate.dtype)
    wide = gate.to(acc)
    if kind == SILU:
        wide = torch.nn.functional.silu(wide)
    else:
        wide = torch.nn.functional.gelu(wide, approximate="tanh" if kind == GELU_TANH else "none")
    return (wide * up.to(acc)).to(gate.dtype)
