"""Norms, known by the formula that reproduces what they give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.binding.modules import active, is_readable, is_untouched


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


_EPS = ("variance_epsilon", "eps", "epsilon", "norm_eps")


def eps_of(norm: nn.Module) -> float:
    """A norm's eps, by the names that transformers and torch give it; where it has none, `layer_norm`'s own (OLMo)."""
    for name in _EPS:
        value = getattr(norm, name, None)
        if isinstance(value, int | float):
            return float(value)
    if not any(hasattr(norm, name) for name in _EPS):
        return 1e-5
    weight = gain_of(norm)
    return torch.finfo(torch.float32 if weight is None else weight.dtype).eps  # torch.nn.RMSNorm(eps=None)


def gain(norm: nn.Module, kind: str) -> Tensor | None:
    """What a norm multiplies by: its weight; for "layer_1p" (Nemotron) 1 + weight, rounded to its dtype as there, but
    not in a session that runs in fp32."""
    weight = gain_of(norm)
    return weight + 1 if weight is not None and kind == "layer_1p" else weight


def head_arguments(norm: nn.Module, kind: str, device: torch.device) -> dict[str, Any]:
    """`reward_head`'s norm arguments for a norm of a kind, read from it now."""
    weight, bias = gain(norm, kind), getattr(norm, "bias", None)
    layer = kind in ("layer", "layer_1p")
    return {
        "norm": "layer" if layer else kind,
        "norm_weight": None if weight is None else weight.to(device),
        "norm_bias": bias.to(device) if layer and bias is not None else None,
        "eps": eps_of(norm),
    }


def known_kind(norm: nn.Module, width: int, dtype: torch.dtype) -> str | None:
    """`norm_kind` of a norm of rows (d,) in dtype, without any that it was given."""
    held = next(norm.parameters(), torch.empty(0))
    device = torch.device("cpu") if held.is_meta else held.device
    rows = torch.linspace(-2, 3, 4 * width, dtype=torch.float32, device=device).reshape(1, 4, width)
    return norm_kind(Call("", norm, rows.to(dtype), None))


def norm_kind(call: Call) -> str | None:
    """The formula that reproduces the norm's output, on the rows it was given and on rows that show more: small enough
    for eps, off centre, and with one coordinate far beyond the others, as models have them.

    None for a module with others inside: which of them runs may change without a trace.
    """
    norm, seen = active(call.module), call.given
    eps = eps_of(norm)
    if any(True for _ in norm.children()) or not is_untouched(norm) or not is_readable(norm) or not eps > 0:
        return None
    noise = torch.randn(seen.shape, generator=torch.Generator().manual_seed(0)).to(seen)
    massive = noise.clone()
    massive[..., 0] = 3000  # whose square an fp16 norm must not take in fp16
    seen = seen.reshape(-1, seen.size(-1))
    tests = [seen[seen.isfinite().all(-1)], noise, noise * eps**0.5, noise + 3, massive]
    atol = 1e-4 if seen.dtype in (torch.float32, torch.float64) else 0.05
    wide = [x.double() for x in tests]
    outs = [norm(x).double() for x in tests]
    weight, bias = (None if p is None else p.double() for p in (gain_of(norm), getattr(norm, "bias", None)))
    offset = 0.0 if bias is None else bias

    def rms(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def centred(x: Tensor) -> Tensor:
        return rms(x - x.mean(-1, keepdim=True))

    own = 1.0 if weight is None else weight
    formulas: dict[str, Callable[[Tensor], Tensor]] = {"layer": lambda x: centred(x) * own + offset}
    if weight is not None:
        formulas["layer_1p"] = lambda x: centred(x) * gain(norm, "layer_1p").double() + offset  # type: ignore[union-attr]
    if bias is None:
        formulas["rms"] = lambda x: rms(x) * own
        if weight is not None:
            formulas["gemma_rms"] = lambda x: rms(x) * (1 + weight)
    for kind, formula in formulas.items():
        wanted = [formula(x) for x in wide]
        if all(torch.allclose(a, b, rtol=atol, atol=atol * _largest(b)) for a, b in zip(outs, wanted)):
            return kind
    return None


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
