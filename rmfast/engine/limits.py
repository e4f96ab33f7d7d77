"""How many tokens of a text a model and its tokenizer are made for."""

from __future__ import annotations

from typing import Any

from torch import nn

from rmfast.binding.binding import Binding
from rmfast.binding.modules import modules_of


def position_table(binding: Binding) -> int | None:
    """Most tokens that a table of positions, learned or of biases, has rows for: beyond it the model would crash."""
    rows = []
    parts = (part for module in modules_of(binding.body) for part in module._modules.items())
    for name, module in parts:
        if not isinstance(module, nn.Embedding):
            continue
        if name.endswith("position_embeddings"):
            # RoBERTa counts positions from padding_idx + 1, so its table holds fewer texts' tokens than rows.
            rows.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
        elif name.endswith(("wpe", "embed_positions")):
            rows.append(module.num_embeddings - int(getattr(module, "offset", 0)))  # OPT's table begins at row 2
    if getattr(getattr(binding.config, "attn_config", None), "alibi", False):  # MPT's table of biases
        rows.append(binding.config.max_seq_len)
    return min(rows, default=None)


def longest_text(binding: Binding, tokenizer: Any) -> int | None:
    """The smaller of the model's positions and the tokenizer's limit, where they are stated."""
    limits = [table] if (table := position_table(binding)) is not None else []
    positions = getattr(binding.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions)
    stated = getattr(tokenizer, "model_max_length", None)
    if isinstance(stated, int) and 0 < stated < 10**9:  # unset, it is 10^30
        limits.append(stated)
    return min(limits, default=None)
