"""Rotary embeddings whose frequencies depend on the longest text of a batch: every text gets those it has alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a configuration: one, or one for each layer type."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)] if isinstance(found, dict) else []
    return nested or ([found] if isinstance(found, dict) else [])


def length_group(config: Any, length: int) -> tuple[int, ...]:
    """Equal for lengths of texts that get the same rotary frequencies."""
    key = []
    for parameters in _rope_parameters(config):
        kind = parameters.get("rope_type") or parameters.get("type") or ""
        if kind in ("longrope", "su"):  # two sets of frequencies
            limit = parameters.get("original_max_position_embeddings") or config.original_max_position_embeddings
            key.append(int(length > limit))
        elif "dynamic" in kind:  # a set for each length above the limit
            key.append(length if length > config.max_position_embeddings else 0)
    return tuple(key)


def rope_modules(body: nn.Module) -> list[nn.Module]:
    """Dynamic-NTK modules: they keep the frequencies of the longest text seen so far."""
    return [module for module in body.modules() if _dynamic_prefixes(module)]


def _dynamic_prefixes(module: nn.Module) -> list[str]:
    kind = getattr(module, "rope_type", None)
    if isinstance(kind, dict):
        return [f"{layer}_" for layer, name in kind.items() if "dynamic" in name]
    return [""] if isinstance(kind, str) and "dynamic" in kind else []


def fresh_rope(modules: list[nn.Module]) -> None:
    """Forget earlier texts, as if the model had just been loaded."""
    for module in modules:
        for prefix in _dynamic_prefixes(module):
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


@contextmanager
def kept_rope(modules: list[nn.Module]) -> Iterator[None]:
    """Puts the frequencies that dynamic-NTK modules had back at the end."""
    names = ("inv_freq", "original_inv_freq", "max_seq_len_cached")
    saved = [
        (module, prefix + name, getattr(module, prefix + name))
        for module in modules
        for prefix in _dynamic_prefixes(module)
        for name in names
        if hasattr(module, prefix + name)
    ]
    try:
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)
