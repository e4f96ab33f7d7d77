"""Cosines and sines of packed runs: those that a model's rotary modules make for rows that lie flat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.binding.session import replaced_forward


def rotary_modules(body: nn.Module) -> list[nn.Module]:
    return [module for module in body.modules() if hasattr(module, "original_inv_freq") or hasattr(module, "rope_type")]


@contextmanager
def longest_text(rotary: Sequence[nn.Module], longest: int) -> Iterator[None]:
    """Rotary embeddings as they are beside a text of `longest` tokens: one more position, taken off again."""
    with ExitStack() as stack:
        for module in rotary:
            original = module.forward

            def longer(x: Tensor, position_ids: Tensor, *args: Any, original: Any = original, **kw: Any) -> Any:
                more = torch.cat([position_ids, position_ids.new_full((position_ids.size(0), 1), longest - 1)], dim=1)
                return tuple(t[:, :-1] for t in original(x, more, *args, **kw))

            stack.enter_context(replaced_forward(module, longer))
        yield


@contextmanager
def unrounded(rotary: Sequence[nn.Module]) -> Iterator[None]:
    """Rotary embeddings in fp32: modules round them to the dtype of the rows that they are given."""
    with ExitStack() as stack:
        for module in rotary:
            original = module.forward

            def wide(x: Tensor, *args: Any, original: Any = original, **kw: Any) -> Any:
                return original(x.float(), *args, **kw)

            stack.enter_context(replaced_forward(module, wide))
        yield
