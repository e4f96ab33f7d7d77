"""What a backend works out of a chunk's index tensors, kept for the calls of the chunk's other layers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Index = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # cu_seqlens, cu_queries, prefix_start, prefix_len

_KEPT = 16  # of a chunk's layers (two windows, all rows or the last ones), of a few threads

_made: OrderedDict[tuple, tuple] = OrderedDict()
_guard = threading.Lock()


def is_capturing(like: Tensor) -> bool:
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def kept(make: Callable[..., T], index: Index, *options: object) -> T:
    """`make(index, *options)`, made once for as long as calls come with the same index tensors, unchanged."""
    if is_capturing(index[0]) or any(each is not None and each.is_inference() for each in index):
        # A graph replays on what the tensors hold then, and a tensor of inference mode does not say when it changes.
        return make(index, *options)
    stream = torch.cuda.current_stream(index[0].device).cuda_stream if index[0].is_cuda else 0
    key = (make, *(id(each) for each in index), *options, stream)
    versions = tuple(None if each is None else each._version for each in index)
    with _guard:
        found = _made.get(key)
        # Kept tensors are alive, so nothing else has their ids.
        if found is not None and found[1] == versions:
            _made.move_to_end(key)
            return found[2]
    made = make(index, *options)
    with _guard:
        _made[key] = (index, versions, made)
        _made.move_to_end(key)
        while len(_made) > _KEPT:
            _made.popitem(last=False)
    return made
