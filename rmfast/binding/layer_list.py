"""The list of a body's layers, which is found by its length."""

from __future__ import annotations

import dataclasses

from torch import nn

from rmfast.binding.binding import Binding


def layered(binding: Binding) -> tuple[Binding, list[nn.Module]]:
    """The body's layers, and the binding with which their streams are read.

    Raises:
        ValueError: the body has no list of its layers.
    """
    name, layers = layer_list(binding)
    if binding.norm_name is not None and binding.norm_name.startswith(f"{binding.body_name}.{name}."):
        # The last layer ends in the final norm (BERT): its output is what the norm gives, so the norm stays.
        binding = dataclasses.replace(binding, norm_name=None)
    return binding, layers


def layer_list(binding: Binding) -> tuple[str, list[nn.Module]]:
    """The body's layers and the name of their list."""
    body, count = binding.body, getattr(binding.config, "num_hidden_layers", None)
    lists = [(name, list(module)) for name, module in body.named_modules() if isinstance(module, nn.ModuleList)]
    for name, modules in sorted(lists, key=lambda item: item[0].count(".")):
        if len(modules) == count == len(set(modules)):
            return name, modules
    seen = ", ".join(f"{name} ({len(modules)})" for name, modules in lists) or "none"
    raise ValueError(
        f"{type(body).__name__} has no list of its layers: rmfast looks for a torch.nn.ModuleList of "
        f"config.num_hidden_layers ({count}) different modules; its lists: {seen}"
    )
