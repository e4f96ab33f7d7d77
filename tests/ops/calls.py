"""A call of every public op, of tensors that hold numbers or none, and its gradients."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rmfast import ops


class Maker(Protocol):
    """Gives the tensors of a call, in order."""

    def floats(self, *shape: int, dtype: torch.dtype = ...) -> Tensor: ...

    def integers(self, values: Iterable[int], dtype: torch.dtype = ...) -> Tensor: ...


class Numbers:
    """Random ones on the CPU, kept in `made`."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []
        self._random = torch.Generator().manual_seed(0)

    def floats(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return self._keep(torch.randn(shape, generator=self._random).to(dtype))

    def integers(self, values: Iterable[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return self._keep(torch.tensor(list(values), dtype=dtype))

    def _keep(self, value: Tensor) -> Tensor:
        self.made.append(value)
        return value


class Given:
    """Those that are handed over, in the order in which `Numbers` made them."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._next: Iterator[Tensor] = iter(tensors)

    def floats(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return next(self._next)

    def integers(self, values: Iterable[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return next(self._next)


def _head(t: Maker, heads: int, directions: int = 0, index: bool = False, rows: bool = False, **options):
    hidden = t.floats(2, 5, 64)
    given = {"weight": t.floats(heads, 64), "bias": t.floats(heads), "norm_weight": t.floats(64)}
    if directions:
        given |= {"directions": t.floats(directions, 64), "strengths": t.floats(3, directions)}
    if index:
        given["intervention_index"] = t.integers([-1, 0, 1, 2, 0, 0, 1, 1, 2, -1])
    if rows:
        given["rows"] = t.integers([9, 0, 9])
    return ops.reward_head(hidden, **given, **options)


def _attention(t: Maker, d: int = 64, own: bool = False, **options):
    q, k, v = t.floats(5, 4, d), t.floats(5, 2, d), t.floats(5, 2, d)
    ends = t.integers([0, 2, 5], torch.int32)
    if own:
        return ops.suffix_attention(q, k, v, ends, **options)
    pool = t.floats(7, 2, d), t.floats(7, 2, d), t.integers([0, 0], torch.int32), t.integers([7, 4], torch.int32)
    return ops.suffix_attention(q, k, v, ends, *pool, sinks=t.floats(4), **options)


def _rotary(t: Maker):
    q, k, cos, sin = t.floats(5, 4, 32), t.floats(5, 2, 32), t.floats(5, 16), t.floats(5, 16)
    return ops.rotary(q, k, cos, sin, q_norm=t.floats(32), k_norm=t.floats(32))


# The public op, and a call of it.
CALLS: dict[str, tuple[str, Callable[[Maker], object]]] = {
    "reward_head": ("reward_head", lambda t: _head(t, 1, norm="rms")),
    "reward_head, layer norm": ("reward_head", lambda t: _head(t, 3, norm="layer", norm_bias=t.floats(64))),
    "reward_head, many": ("reward_head", lambda t: _head(t, 19, norm="gemma_rms")),
    "reward_head, rows": ("reward_head", lambda t: _head(t, 2, norm="rms", rows=True)),
    "reward_head, interventions": ("reward_head", lambda t: _head(t, 1, 3, norm="rms")),
    "reward_head, an intervention each": ("reward_head", lambda t: _head(t, 2, 9, index=True, norm="rms")),
    "suffix_attention": ("suffix_attention", _attention),
    "suffix_attention, causal only": ("suffix_attention", lambda t: _attention(t, 128, own=True, window=3)),
    "suffix_attention, last rows": (
        "suffix_attention",
        lambda t: ops.suffix_attention(
            t.floats(2, 4, 64), t.floats(5, 2, 64), t.floats(5, 2, 64), t.integers([0, 2, 5], torch.int32),
            cu_queries=t.integers([0, 1, 2], torch.int32), softcap=20.0,
        ),
    ),
    "rms_norm": ("rms_norm", lambda t: ops.rms_norm(t.floats(2, 5, 64), t.floats(64), eps=1e-5)),
    "rms_norm, residual": (
        "rms_norm",
        lambda t: ops.rms_norm(t.floats(5, 64), t.floats(64), residual=t.floats(5, 64), eps=1e-5, gemma=True),
    ),
    "rotary": ("rotary", _rotary),
    "gated_activation": (
        "gated_activation", lambda t: ops.gated_activation(t.floats(2, 5, 64), t.floats(2, 5, 64), kind="silu")
    ),
    "patch_rows": (
        "patch_rows",
        lambda t: ops.patch_rows(
            t.floats(5, 64), t.floats(3, 64), t.integers([0, 4, 2]), t.integers([-1, 0, 2]), t.floats(64)
        ),
    ),
    "neuron_stats": ("neuron_stats", lambda t: ops.neuron_stats(t.floats(9, 7), t.floats(9, 2))),
    "topk_encode": ("topk_encode", lambda t: ops.topk_encode(t.floats(5, 64), t.floats(64, 256), t.floats(256), 8)),
    "tcrm": (
        "tcrm",
        lambda t: ops.tcrm(
            t.floats(9), t.floats(9), t.integers([0, 4, 4, 9, 0, 3, 2, 9]).view(4, 2), margin=t.floats(2)
        ),
    ),
    "binned_mmd": (
        "binned_mmd", lambda t: ops.binned_mmd(t.floats(8), t.integers([0, 0, 1, 1] * 2), bandwidths=[0.5, 2.0])
    ),
    "binned_mmd, representations": (
        "binned_mmd", lambda t: ops.binned_mmd(t.floats(8, 6), t.integers([0, 0, 1, 1] * 2), t.integers([0, 1] * 4))
    ),
    "linear": (
        "linear", lambda t: ops.linear(t.floats(5, 64, dtype=torch.float32), t.floats(7, 64), t.floats(7))
    ),
}  # fmt: skip

DIFFERENTIABLE = [name for name, (op, _) in CALLS.items() if op in ("reward_head", "tcrm", "binned_mmd", "linear")]


def numbers_of(call: Callable[[Maker], object]) -> list[Tensor]:
    """The tensors of a call, on the CPU."""
    with unset_fake_temporarily():
        numbers = Numbers()
        call(numbers)
    return numbers.made


def module_of(op: str) -> ModuleType:
    """Where an op's own functions are: its kernel's choice and fake, and its gradient's two halves."""
    name = "token_wise" if op in ("rms_norm", "rotary", "gated_activation") else op
    return importlib.import_module(f"rmfast.ops._{name}")


class Recorded(TorchDispatchMode):
    """Keeps each call of one of our ops as the dispatcher has it: name, inputs, outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple, object]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        library, _, name = function.name().partition("::")
        if library == "rmfast":
            schema = function._schema.arguments
            given = dict(zip((x.name for x in schema), args)) | (kwargs or {})
            self.calls.append((name, tuple(given.get(x.name, x.default_value) for x in schema), out))
        return out


class _Context:
    """What autograd hands to the two halves of a gradient."""

    def __init__(self, inputs: tuple) -> None:
        self.needs_input_grad = tuple(isinstance(x, Tensor) and x.is_floating_point() for x in inputs)
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass


def gradients(name: str, tensors: list[Tensor]) -> tuple[tuple, tuple]:
    """The op's inputs, and the gradient of each: by its own formula, since autograd's engine needs a real device."""
    op, call = CALLS[name]
    with Recorded() as recorded:
        call(Given(tensors))
    ((_, inputs, out),) = recorded.calls
    if op == "binned_mmd":
        inputs = (*inputs[:-1], True)  # need_grad, which asks whether x requires one
        out = torch.ops.rmfast.binned_mmd(*inputs)
    context = _Context(inputs)
    module_of(op)._setup_context(context, inputs, out)
    return inputs, module_of(op)._backward(context, *[torch.ones_like(x) for x in tree_leaves(out)])
