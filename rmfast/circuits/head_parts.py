"""What a single head adds to the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rmfast.binding.modules import active, is_plain, is_readable
from rmfast.binding.norm_map import NormMap
from rmfast.engine.norms import Norm


def head_part(project: nn.Module, norm: Norm | None, heads: Tensor, head: int) -> Tensor:
    """What one head adds to the stream, of heads' outputs (n, H, D) as the output projection takes them: (n, d).

    The projection's bias is no head's. A norm between projection and stream (Gemma 2 and 3, OLMo 2, GLM-4) is taken as
    the linear map that it is with the scale that it has in the row: the parts of all heads then sum to what attention
    adds, but for biases.
    """
    wide = torch.promote_types(heads.dtype, torch.float32)
    part = _projected(project, heads, head, wide)
    if norm is None:
        return part
    made = NormMap.of(part.dtype, **norm.head_arguments(part.device))
    return made.linear(part) * made.scale(project(heads.flatten(1)).to(wide))


def _projected(project: nn.Module, heads: Tensor, head: int, wide: torch.dtype) -> Tensor:
    """(n, d), without the projection's bias."""
    weight = _weight(project)
    if weight is not None:
        return heads[:, head].to(wide) @ weight.unflatten(0, heads.shape[1:])[head].to(wide)
    alone = torch.zeros_like(heads)  # an adapter, a quantised or a clamped one: by its own forward, other heads at 0
    alone[:, head] = heads[:, head]
    return project(alone.flatten(1)).to(wide) - project(torch.zeros_like(alone[:1]).flatten(1)).to(wide)


def _weight(project: nn.Module) -> Tensor | None:
    """(H · D, d), where the projection is nothing but its weight and bias."""
    module: Any = active(project)
    if not (is_plain(project) and is_plain(module) and is_readable(module)):
        return None
    if type(module) is Conv1D:
        return module.weight
    return module.weight.T if type(module) is nn.Linear else None
