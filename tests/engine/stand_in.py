"""A stand-in for torch.cuda's graphs on the CPU: what was launched runs again, on the memory that it had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What waits for the device, or has a size that depends on values.
_READS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "is_nonzero",
    "repeat_interleave.Tensor",
    "equal",
)


class Graph:
    """torch.cuda.CUDAGraph: calls with the tensors that they had, and not what led to them."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, outs in self.calls:
            for out, was in zip(tree_leaves(function(*args, **kwargs)), outs, strict=True):
                # A view, or what was written in place, lies where it lay.
                if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != was.untyped_storage().data_ptr():
                    assert out.shape == was.shape and out.dtype == was.dtype
                    was.copy_(out)


class Capture(TorchDispatchMode):
    """torch.cuda.graph."""

    under_way = 0
    stream = 0  # the thread's

    def __init__(self, graph: Graph, pool: object, stream: object, capture_error_mode: str):
        super().__init__()
        assert (pool, stream, capture_error_mode) == ("pool", "stream", "thread_local")
        self.graph = graph

    def __enter__(self) -> Capture:
        Capture.under_way += 1
        Capture.stream = 1
        return super().__enter__()

    def __exit__(self, *error) -> None:
        Capture.under_way -= 1
        super().__exit__(*error)
        Capture.stream = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        name = str(function)
        masked = "aten.index" in name and any(x.dtype == torch.bool for x in tree_leaves(args[1:2]) if x is not None)
        if any(read in name for read in _READS) or masked:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        if "lift_fresh" in name and tensors[0].dim():
            raise RuntimeError(f"{name}: memory of the host that is not pinned")
        outs = function(*args, **kwargs)
        self.graph.calls.append((function, args, kwargs, tree_leaves(outs)))
        return outs


@contextmanager
def on_stream(stream: SimpleNamespace) -> Iterator[None]:
    """torch.cuda.stream, of the stream that is the thread's already."""
    assert Capture.stream == stream.cuda_stream
    try:
        yield
    finally:
        Capture.stream = stream.cuda_stream


def on_the_cpu(monkeypatch) -> list[Graph]:
    """Has rmfast capture runs of models on the CPU; the graphs that it makes, in order."""
    made: list[Graph] = []

    def graph() -> Graph:
        made.append(Graph())
        return made[-1]

    monkeypatch.setattr("rmfast.engine.graphs._DEVICE", "cpu")
    for name, stands in {
        "CUDAGraph": graph,
        "graph": Capture,
        "graph_pool_handle": lambda: "pool",
        "Stream": lambda device: "stream",
        "device": lambda device: nullcontext(),
        "current_stream": lambda device: SimpleNamespace(cuda_stream=Capture.stream),
        "stream": on_stream,
        "is_current_stream_capturing": lambda: Capture.under_way > 0,
        "synchronize": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stands)
    return made
