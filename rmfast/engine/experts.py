"""Mixtures of experts in packed runs: a token's bits do not depend on which experts the tokens beside it chose.

transformers multiplies by each expert as many rows as chose it, and how many those are depends on the batch, by which a
BLAS may add in another order. Here every expert's rows are filled up to whole tiles (`rmfast.engine.invariance`), and a
token's shares are added in the order in which its router gives them. Routers see each token alone.

Experts are known by structure, that of transformers' `use_experts_implementation`: stacked weights, and what is between
them as a function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.binding.compute import holds, is_ours
from rmfast.binding.modules import is_plain, is_readable, is_transformers, modules_of
from rmfast.binding.session import replaced_forward
from rmfast.ops import linear

_FLAGS = ("has_gate", "has_bias", "is_transposed")


def experts_of(body: nn.Module) -> list[nn.Module]:
    """The mixtures' experts of a body."""
    return [module for module in modules_of(body) if is_experts(module)]


def unknown_experts(body: nn.Module) -> str | None:
    """The class of a module with stacked weights, (experts, rows, columns), that is none of these, or with a list of
    experts; None: no such."""
    for module in body.modules():
        stacked = any(p.dim() == 3 for p in module.parameters(recurse=False))
        listed = isinstance(getattr(module, "experts", None), nn.ModuleList)
        if listed or (stacked and not isinstance(module, nn.Conv1d) and not is_experts(module)):
            return type(module).__name__
    return None


def of_first_expert(module: Any) -> list[tuple[Tensor, Tensor | None]]:
    """The matrices and biases of one expert."""
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    return [_parameters(module, name, 0) for name in names]


def is_experts(module: Any) -> bool:
    """Whether a module holds experts' stacked weights and is run here."""
    if not all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS) or module.__dict__.get("forward"):
        return False
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    weights = [getattr(module, name, None) for name in names]
    if module.has_bias:
        weights += [getattr(module, f"{name}_bias", None) for name in names]
    own = list(module.parameters(recurse=False))
    known = all(isinstance(weight, nn.Parameter) for weight in weights) and len(own) == len(weights)
    # A class that overrides a part may do more than what is known here.
    return (
        known
        and is_transformers(module)
        and is_plain(module)
        and is_readable(module)
        and not getattr(module, "_is_expert_parallel", False)
    )


@contextmanager
def in_tiles(modules: list[nn.Module], tile: int) -> Iterator[None]:
    """Runs these modules, for this thread, with each expert's rows in multiples of `tile`."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(replaced_forward(module, partial(mixed, module, tile)))
        yield


def mixed(module: Any, tile: int, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts add up to, (n, d), of rows (n, d), the k experts of each and their weights, (n, k)."""
    n, k = top_k_index.shape
    chosen = top_k_index.reshape(-1)
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=module.num_experts).tolist()
    out = hidden_states.new_empty(n * k, hidden_states.size(-1))
    for expert, rows in enumerate(order.split(counts)):
        if len(rows):
            x = hidden_states[rows // k]
            x = nn.functional.pad(x, (0, 0, 0, -len(x) % tile)) if len(x) % tile else x
            out[rows] = _one(module, expert, x)[: len(rows)]
    shares, wide = out.view(n, k, out.size(-1)), torch.promote_types(out.dtype, torch.float32)
    total = shares[:, 0].to(wide) * top_k_weights[:, :1]
    for i in range(1, k):
        total += shares[:, i].to(wide) * top_k_weights[:, i : i + 1]
    return total.to(hidden_states.dtype)


def _one(module: Any, expert: int, x: Tensor) -> Tensor:
    if module.has_gate:
        y = module._apply_gate(_product(module, "gate_up_proj", expert, x))
    else:
        y = module.act_fn(_product(module, "up_proj", expert, x))
    y = _product(module, "down_proj", expert, y)
    return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y


def _product(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    return product(x, *_parameters(module, name, expert), module.is_transposed)


def _parameters(module: Any, name: str, expert: int) -> tuple[Tensor, Tensor | None]:
    return getattr(module, name)[expert], getattr(module, f"{name}_bias")[expert] if module.has_bias else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None, across: bool) -> Tensor:
    """x (n, c) by weight (m, c), or (c, m) if across."""
    if holds() and is_ours(weight):
        return linear(x, weight, bias, across=across)
    if across and bias is not None:
        return torch.addmm(bias, x, weight)
    return nn.functional.linear(x, weight.T if across else weight, bias)
