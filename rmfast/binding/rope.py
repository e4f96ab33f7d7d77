"""Rotary embeddings whose frequencies depend on the longest text of a batch: every text gets those it has alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rmfast.binding.modules import modules_of, own_attribute


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a configuration: one, or one for each layer type."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)] if isinstance(found, dict) else []
    return nested or ([found] if isinstance(found, dict) else [])


def length_groups(body: nn.Module, config: Any) -> Callable[[int], tuple[int, ...]]:
    """A function of a text's length, equal for lengths of texts that get the same rotary frequencies.

    By the body's rotary modules as they are now, each of which has a configuration, and by the model's own.
    """
    switches: set[int] = set()  # beyond each of these lengths another set of frequencies
    grows: set[int] = set()  # beyond each a set for each length
    rotary = [module for module in modules_of(body) if own_attribute(module, "rope_type") is not None]
    for held in (config, *(getattr(module, "config", config) for module in rotary)):
        for parameters in _rope_parameters(held):
            kind = parameters.get("rope_type") or parameters.get("type") or ""
            if kind in ("longrope", "su"):
                limit = parameters.get("original_max_position_embeddings")
                switches.add(limit or held.original_max_position_embeddings)
            elif "dynamic" in kind:
                grows.add(held.max_position_embeddings)
    grows.update(int(module.original_max_seq_len) for module in rope_modules(body))  # type: ignore[arg-type]
    return lambda length: (
        *(int(length > limit) for limit in sorted(switches)),
        *(length if length > limit else 0 for limit in sorted(grows)),
    )


def rope_modules(body: nn.Module) -> list[nn.Module]:
    """Dynamic-NTK modules: they keep the frequencies of the longest text seen so far."""
    return [module for module in modules_of(body) if _dynamic_prefixes(module)]


def _dynamic_prefixes(module: nn.Module) -> list[str]:
    kind = own_attribute(module, "rope_type")
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
