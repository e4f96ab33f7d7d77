"""Norms, known by the formula that reproduces what they give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.binding.modules import active, is_readable


@dataclass
class Call:
    """One module's call during the probe."""

    name: str
    module: nn.Module
    given: Any
    result: Any


def gain_of(norm: nn.Module) -> Tensor | None:
    """A norm's weight, or None."""
    return getattr(norm, "weight", None)


def eps_of(norm: nn.Module) -> float:
    """A norm's eps, by the names that transformers and torch give it."""
    for name in ("variance_epsilon", "eps", "epsilon", "norm_eps"):
        value = getattr(norm, name, None)
        if isinstance(value, int | float):
            return float(value)
    weight = gain_of(norm)
    return torch.finfo(torch.float32 if weight is None else weight.dtype).eps  # torch.nn.RMSNorm(eps=None)


def norm_kind(call: Call) -> str | None:
    """The formula that reproduces the norm's output, on the rows it was given and on rows small enough to show eps."""
    norm, seen = active(call.module), call.given
    eps = eps_of(norm)
    if not is_readable(norm) or not eps > 0:
        return None
    noise = torch.randn(seen.shape, generator=torch.Generator().manual_seed(0)).to(seen)
    tests = [seen, noise, noise * eps**0.5, noise + 3]
    atol = 1e-4 if seen.dtype in (torch.float32, torch.float64) else 0.05
    wide = [x.double() for x in tests]
    outs = [norm(x).double() for x in tests]
    weight, bias = (None if p is None else p.double() for p in (gain_of(norm), getattr(norm, "bias", None)))
    gain = 1.0 if weight is None else weight
    offset = 0.0 if bias is None else bias

    def rms(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    formulas: dict[str, Callable[[Tensor], Tensor]] = {
        "layer": lambda x: rms(x - x.mean(-1, keepdim=True)) * gain + offset
    }
    if bias is None:
        formulas["rms"] = lambda x: rms(x) * gain
        if weight is not None:
            formulas["gemma_rms"] = lambda x: rms(x) * (1 + weight)
    for kind, formula in formulas.items():
        wanted = [formula(x) for x in wide]
        if all(torch.allclose(a, b, rtol=atol, atol=atol * float(b.abs().max())) for a, b in zip(outs, wanted)):
            return kind
    return None
