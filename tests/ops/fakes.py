"""Fake CUDA tensors, also where PyTorch is built without CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode() as mode:
        if not torch.backends.cuda.is_built():
            # These set the device in C++ before they ask for an op, and a build without CUDA has none to set.
            patch.setattr(FakeTensor, "contiguous", _contiguous)
            patch.setattr(FakeTensor, "__invert__", lambda x: torch.ops.aten.bitwise_not(x))
            patch.setattr(FakeTensor, "__getitem__", _part)
            patch.setattr(FakeTensor, "__setitem__", _set_part)
        yield mode


def on_gpu(tensors: list[Tensor], device: str = "cuda:0") -> list[Tensor]:
    """Fake ones of the same shapes, strides and dtypes."""
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) for x in tensors]


def looks(result: object) -> list[tuple | None]:
    """What tensors are, but for their numbers and device."""
    return [
        None if x is None else (tuple(x.shape), x.dtype, x.stride() if x.numel() else None) for x in tree_leaves(result)
    ]


def devices(result: object) -> set[torch.device]:
    return {x.device for x in tree_leaves(result) if x is not None}


def _contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def _part(x: Tensor, index: Any) -> Tensor:
    """x[index] of numbers, slices, None, and a tensor at most."""
    dim = 0
    for i in index if isinstance(index, tuple) else (index,):
        if i is None:
            x = x.unsqueeze(dim)
        elif isinstance(i, int):
            x, dim = x.select(dim, i), dim - 1
        elif isinstance(i, slice):
            x = torch.ops.aten.slice(x, dim, i.start, i.stop, i.step or 1)
        else:
            assert isinstance(i, Tensor), i
            x = torch.ops.aten.index(x, [None] * dim + [i])
        dim += 1
    return x


def _set_part(x: Tensor, index: Any, value: Tensor | float) -> None:
    part = _part(x, index)
    if isinstance(value, Tensor):
        torch.ops.aten.copy_(part, value)
    else:
        part.fill_(value)
