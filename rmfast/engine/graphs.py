"""Runs of the body as CUDA graphs, for models so small that the GPU would wait for the host to launch their kernels.

A graph is what one run launched, at the addresses that it had then: replaying it costs the host one call, whatever the
number of layers. Chunks differ, so theirs are padded to one of few shapes (`Shape.rounded`), and their index arrays
copied to where the graph reads them. Nothing else of a chunk takes part: K and V that one chunk keeps for the next are
not captured, and plans for graphs keep none.

The first chunk of a shape runs as without graphs, which compiles its kernels; the second is captured.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rmfast import backends as _backends
from rmfast.binding.binding import Binding
from rmfast.binding.find import input_embedding
from rmfast.binding.modules import active
from rmfast.engine.layers import Layer
from rmfast.engine.memory import out_of_memory
from rmfast.engine.shapes import Shape
from rmfast.engine.uploads import Buffer

_DEVICE = "cuda"
_one_at_a_time = threading.Lock()  # captures in a process, whatever their devices
_MOST = 64  # graphs, of one budget's chunks and of single texts of up to 2,000 tokens


@dataclass
class _Held:
    buffer: Buffer
    replay: Callable[[], Tensor] | None = None


class Graphs:
    """The graphs of one engine, which is made anew where modules or settings change.

    Args:
        modules: the body's.
        problem: why their runs can't be captured, or None: `unfit`.
        beside: those of the modules that are no part of a layer (rotary tables, embedding), whose forwards a graph
            holds as they were: what they are set to makes another engine.
    """

    def __init__(self, modules: Sequence[nn.Module], problem: str | None = None, beside: Sequence[nn.Module] = ()):
        self._modules, self._problem, self.beside = modules, problem, beside
        self._held: OrderedDict[Shape, _Held] = OrderedDict()
        self._of: tuple = ()  # what the graphs were captured of
        self._where: tuple[Any, Any] | None = None  # their memory, and the stream on which they are captured

    def __getstate__(self) -> dict[str, Any]:
        """Without what is captured, for copies and other processes."""
        return {**self.__dict__, "_held": OrderedDict(), "_of": (), "_where": None}

    def why_not(self, binding: Binding) -> str | None:
        """Why a run can't be captured now; None where it can."""
        device = binding.device
        if device.type != _DEVICE:
            return f"CUDA graphs are for CUDA devices, and the model is on {device}"
        if any(t.device != device for t in self._weights()):
            return "the model lies on several devices"
        if binding.clamps:
            return "clamps set values inside of its layers, where they are not folded into weights"
        if os.environ.get("RMFAST_CHECK") == "1":
            return "RMFAST_CHECK=1 reads values on the host"
        if _backends.runs("suffix_attention", _DEVICE) == "varlen":
            return "torch's varlen_attn is given lengths that are read on the host"
        if any(module._compiled_call_impl is not None for module in self._modules):
            return "it is compiled (model.compile()), and what that makes anew in a run can't be captured"
        return self._problem

    def renewed(self, binding: Binding) -> Graphs:
        """These, without graphs of what has changed since: weights that lie elsewhere, arithmetic, backend, stream."""
        now = self._captured_of(binding)
        if now != self._of:
            self.clear(binding.device)
            self._of = now
        return self

    def clear(self, device: torch.device) -> None:
        if self._held:
            torch.cuda.synchronize(device)  # a replay may be under way
        self._held.clear()
        self._where = None

    def run(
        self, shape: Shape, arrays: Sequence[np.ndarray], device: torch.device, body: Callable[[list[Tensor]], Tensor]
    ) -> Tensor:
        """`body` of a chunk's arrays on the device; good until the next run.

        Args:
            arrays: of a length for each shape, and all that `body` goes by.

        Raises:
            RuntimeError: `body` does what a graph can't hold, like reading a value on the host; or memory ran out.
        """
        held = self._held.get(shape)
        try:
            if held is None:
                self._make_room(device)
                held = _Held(Buffer(arrays, device))
                out = body(held.buffer.tensors)
                self._held[shape] = held  # whose kernels are compiled: it ran to its end
                return out
            self._held.move_to_end(shape)
            held.buffer.fill(arrays)
            if held.replay is None:
                if self._where is None:
                    # A stream of its own: torch's default one is of the device on which it was first used.
                    self._where = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
                tensors = held.buffer.tensors
                held.replay = _captured(lambda: body(tensors), device, *self._where)
            return held.replay()
        except RuntimeError as error:
            if out_of_memory(error):  # the batch is halved
                self.clear(device)
            raise

    def _weights(self) -> Iterator[Tensor]:
        """Parameters and buffers; in a tenth of the time that `nn.Module.parameters` takes to go through a model."""
        for module in self._modules:
            for held in (module._parameters, module._buffers):
                yield from (t for t in held.values() if t is not None)

    def _captured_of(self, binding: Binding) -> tuple:
        """What a graph has taken up that a run without one looks up anew, beside what makes another engine."""
        weights = tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in self._weights())
        matmul = torch.backends.cuda.matmul
        arithmetic = (
            binding.in_fp32, torch.get_float32_matmul_precision(), matmul.allow_bf16_reduced_precision_reduction,
            matmul.allow_fp16_reduced_precision_reduction, torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        stream = torch.cuda.current_stream(binding.device).cuda_stream
        return weights, arithmetic, _backends.requested(), binding.device, stream

    def _make_room(self, device: torch.device) -> None:
        if len(self._held) >= _MOST:
            torch.cuda.synchronize(device)
            self._held.popitem(last=False)


def _captured(run: Callable[[], Tensor], device: torch.device, pool: Any, stream: Any) -> Callable[[], Tensor]:
    """What `run` launches, as a graph: a function that launches it again, and gives what `run` gave.

    Graphs of one pool may lie on each other's memory, but for what they give: they never run at once, and each writes
    all that it reads beside its buffer.
    """
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads' GPUs may do what can't be captured meanwhile.
    where = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
    # Where the end of a capture fails, torch leaves the thread on the capture's stream.
    before = torch.cuda.stream(torch.cuda.current_stream(device))
    inside: RuntimeError | None = None
    try:
        with _one_at_a_time, torch.cuda.device(device), before, torch.cuda.graph(graph, **where):
            try:
                out = run()
            except RuntimeError as error:
                inside = error
                raise
    except RuntimeError as error:
        for each in (inside, error):  # the end of a capture in which memory ran out fails in its turn
            if each is not None and out_of_memory(each):
                raise each from None
        raise RuntimeError(f"Expected cuda_graphs=False: a run can't be captured in a graph: {error}") from error

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def unfit(binding: Binding, layers: Sequence[tuple[nn.Module, Layer]], reason: str | None) -> str | None:
    """Why the runs of a model can't be captured, as its modules are; None where they can. reason: why its layers are
    not fused, where there are none."""
    if not layers:
        return f"its layers run as the model's own modules, which may read values on the host ({reason})"
    if any(binding.length_group(1 << 40)):
        return "its rotary embeddings, or its batches, go by the length of a text"
    embedding = input_embedding(binding.body)
    if not isinstance(embedding, nn.Embedding):
        return f"its embedding is a {type(embedding).__name__}, whose runs may differ (adapters)"
    return next((problem for _, layer in layers if (problem := _variable(layer)) is not None), None)


def _variable(layer: Layer) -> str | None:
    """Which part of a layer may run otherwise the next time: experts by their tokens, adapters by which are active."""
    if layer.inner is None:
        return f"its {type(layer.mlp).__name__} runs as the module that it is, which may read values on the host"
    first = [getattr(layer.inner.module, name) for name in layer.inner.first]
    for module in (*layer.projections.modules, layer.o_proj, *first, layer.inner.down_proj):
        if type(module) not in (nn.Linear, Conv1D) or type(module.weight) is not nn.Parameter:
            kind = f"{type(module).__module__.split('.')[0]}'s {type(module).__name__}"
            return f"a projection is {kind}, whose runs may differ (adapters, quantised weights)"
    norms = [*(norm.module for norm in layer.norms), *layer.projections.norm_modules]
    if any(active(norm) is not norm for norm in norms):
        return "a norm is one of several, of which another may become active"
    return None
