"""What reads what in a decoder layer, found by following the tensors of one run through its modules.

A norm stands before attention if attention is given what it gives, behind it if it is given what attention gives;
attention and MLP are parallel if the MLP's norm is given what enters the layer. Names of norms say none of this alone:
`post_attention_layernorm` stands before the MLP in Llama and behind attention in OLMo 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.binding.session import of_this_thread
from rmfast.engine.norms import Norm


@dataclass
class Seen:
    """A module's first call in a run: the tensors that it was given and gave, copies of them, and all else."""

    given: Tensor
    result: Tensor
    given_copy: Tensor
    result_copy: Tensor
    args: tuple
    kwargs: dict[str, Any]
    returned: Any


@dataclass
class Wiring:
    """The norms of a layer by where they stand, and whether its attention and MLP read the same stream."""

    before_attn: Norm | None
    after_attn: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    parallel: bool


@contextmanager
def seen_in(modules: list[nn.Module]) -> Iterator[dict[nn.Module, Seen]]:
    """First calls of modules by this thread, noted as they end."""
    seen: dict[nn.Module, Seen] = {}
    entered: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        if module not in entered and isinstance(x, Tensor):
            entered[module] = x, x.clone()

    def leave(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        result = out[0] if isinstance(out, tuple | list) else out
        if module in entered and module not in seen and isinstance(result, Tensor):
            given, copy = entered[module]
            seen[module] = Seen(given, result, copy, result.clone(), args, kwargs, out)

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(of_this_thread(enter), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(of_this_thread(leave), with_kwargs=True).remove)
        yield seen


def wiring(
    seen: dict[nn.Module, Seen], layer: nn.Module, attn: nn.Module, mlp: tuple[nn.Module, nn.Module], norms: list[Norm]
) -> Wiring | str:
    """How a layer's parts are wired, or what of it is not as in any layer that rmfast knows.

    Args: a run, the layer, its attention, the modules that the MLP begins and ends with, and all norms beside them.
    """
    missing = [type(module).__name__ for module in (layer, attn, *mlp) if module not in seen]
    if missing:
        return f"its {missing[0]} is not called"
    entered, leaving = seen[layer], seen[layer].result_copy
    called = [norm for norm in norms if norm.module in seen]

    def one(which: Callable[[Seen], bool]) -> Norm | None:
        return next((norm for norm in called if which(seen[norm.module])), None)

    before_attn = one(lambda call: _reads(seen[attn], call))
    if before_attn is None and not _same(seen[attn], entered):
        return "its attention is given neither its stream nor a norm of it"
    if before_attn is not None and not _same(seen[before_attn.module], entered):
        return f"the {type(before_attn.module).__name__} before its attention is not given its stream"
    after_attn = one(lambda call: _reads(call, seen[attn]))
    before_mlp = one(lambda call: _reads(seen[mlp[0]], call))
    after_mlp = one(lambda call: _reads(call, seen[mlp[1]]))
    roles = (before_attn, after_attn, before_mlp, after_mlp)
    if others := [norm for norm in norms if norm not in roles]:
        return f"its {type(others[0].module).__name__} stands at none of the places where layers have norms"
    parallel = before_mlp is not None and _same(seen[before_mlp.module], entered)
    added = [
        seen[module if norm is None else norm.module].result_copy
        for module, norm in ((attn, after_attn), (mlp[1], after_mlp))
    ]
    if not _adds(leaving, seen[layer].given_copy, *added):
        return "its stream is not the sum of what entered, attention and MLP"
    return Wiring(*roles, parallel)


def _same(a: Seen, b: Seen) -> bool:
    """Whether two calls are given the same values in memory."""
    return _one(a.given, b.given) and _equal(a.given_copy, b.given_copy)


def _reads(call: Seen, made: Seen) -> bool:
    """Whether a call is given what another gave, unchanged."""
    return _one(call.given, made.result) and _equal(call.given_copy, made.result_copy)


def _one(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.dtype == b.dtype


def _equal(a: Tensor, b: Tensor) -> bool:
    """In whichever shape; what is in one place in memory may have been added to between two calls."""
    return torch.equal(a.reshape(-1), b.reshape(-1))


def _adds(total: Tensor, x: Tensor, *parts: Tensor) -> bool:
    """A part that is left out or scaled is off by its own size; rounding by that of the sum."""
    wide = [part.double().reshape(total.shape) for part in (x, *parts)]
    error, least = (total.double() - sum(wide)).norm(), min(part.norm() for part in wide[1:])
    return bool(error <= 0.02 * least + torch.finfo(total.dtype).eps * total.double().norm())
