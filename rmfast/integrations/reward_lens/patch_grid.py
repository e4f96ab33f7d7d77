"""PatchGrid.measure: all patches of a grid in one run, their evidence by PatchGrid's own code."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmfast.binding.modules import active, plain_linear
from rmfast.engine.scorer import Scorer
from rmfast.integrations.reward_lens.bound import bound_model
from rmfast.integrations.reward_lens.patched import Cell, check_places, component_cells, head_cells, patched_rewards
from rmfast.integrations.reward_lens.theirs import Outside, submodule, token_ids


class _Known:
    """Stands for a patch whose rewards, by the text that is patched, are known."""

    def __init__(self, rewards: dict[Any, float]):
        self.rewards = rewards

    def compile(self, signal: Any) -> _Known:
        return self


def known_or(original: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """run_patched_scores that looks known rewards up, and is the original for any other patch."""

    @functools.wraps(original)
    def run_patched_scores(signal: Any, compiled: Any, view: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        if isinstance(compiled, _Known):
            return np.array([compiled.rewards[item] for item in view], np.float32)
        return original(signal, compiled, view, *args, **kwargs)

    return run_patched_scores


def measure(original: Callable[..., Any], self: Any, ctx: Any) -> Any:
    """Runs all patches, then has PatchGrid's own code read their rewards and make its evidence of them."""
    patch, classifier = submodule("measure.battery.patch"), submodule("signals.classifier")
    signal = ctx.signal
    if type(self) is not patch.PatchGrid or type(signal) is not classifier.ClassifierRM:
        raise Outside(f"{type(self).__name__} of {type(signal).__name__}")
    if signal._interventions:
        raise Outside("interventions on the signal")
    if iter(ctx.view) is ctx.view:
        raise Outside("a view that can be read once only")
    runtime, layers, heads = signal.runtime, int(signal.meta.n_layers), int(signal.meta.n_heads or 0)
    rm = bound_model(runtime)
    by_head = self.granularity == "head"
    cells = head_cells(layers, heads) if by_head else component_cells(layers)
    check_places(rm, _places(runtime, cells), heads if by_head else None)
    weights = _readout(rm, runtime, signal.policy, signal.readout(ctx.readout))

    scores: dict[Any, float] = {}
    grids: dict[Any, dict[Any, list[float]]] = {}  # by the rejected text, then by the chosen one
    tokenize = lru_cache(maxsize=None)(lambda item: token_ids(signal.tokenize(item)))
    for chosen, rejected in zip(*patch.pair_sides(ctx.view)):
        ids, other = tokenize(chosen), tokenize(rejected)
        if not len(ids) or not len(other):
            raise Outside("an empty text")
        span = slice(0, min(len(ids), len(other)))
        *two, rewards = patched_rewards(rm, (ids, len(ids) - 1), (other, len(other) - 1), cells, span)
        scores[chosen], scores[rejected] = (float(x.double() @ weights) for x in two)  # type: ignore[union-attr]
        grids.setdefault(rejected, {})[chosen] = (rewards.double() @ weights).tolist()

    def score(signal: Any, items: list[Any], readout: str) -> np.ndarray:
        return np.array([scores[item] for item in items], np.float32)

    def patches(signal: Any, rejected: Any, n_layers: int, n_heads: int) -> list[_Known]:
        each = grids[rejected]
        return [_Known({chosen: rewards[j] for chosen, rewards in each.items()}) for j in range(len(cells))]

    served = copy.copy(self)
    served._score, served._patches = score, patches
    return original(served, ctx)


def _places(runtime: Any, cells: list[Cell]) -> list[tuple[str, int, Any]]:
    hooks, site = submodule("runtime.hooks"), submodule("core.types").Site
    places = []
    for kind, layer in dict.fromkeys(cell[:2] for cell in cells):
        at = site(layer, kind, None) if kind == "head_out" else site(layer, kind)
        if at not in runtime.site_map.module_paths:
            raise Outside(f"no {kind} in layer {layer}")
        places.append((kind, layer, hooks.resolve_module(runtime.model, runtime.site_map.resolve(at))))
    return places


def _readout(rm: Scorer, runtime: Any, policy: Any, readout: Any) -> Tensor:
    """(K,) fp64: the readout as a sum over the head's labels."""
    linear = plain_linear(rm.binding.head)
    if linear is None or linear is not active(runtime.head_module):
        raise Outside("the head is not one readable Linear")
    if type(policy) is not submodule("runtime.precision").NumericsPolicy or policy.head_dtype != "float32":
        raise Outside("a numerics policy of its own")
    weight = linear.weight.detach().float()
    labels, row = weight.size(0), readout.meta.get("row")
    weights = torch.full((labels,), 1 / labels, dtype=torch.float64)
    if row is not None:
        weights = torch.nn.functional.one_hot(torch.tensor(row), labels).double()
    bias = 0.0 if linear.bias is None else float(linear.bias.detach().double().cpu() @ weights)
    vector, at = readout.vector.to(weight), readout.meta.get("bias", 0.0)
    if not torch.allclose(weights.to(weight) @ weight, vector, rtol=1e-5, atol=1e-6 * float(vector.abs().max())):
        raise Outside("a readout that is neither a row of the head nor their mean")
    if abs(bias - at) > 1e-6 * max(1.0, abs(bias)):
        raise Outside("a readout with another bias than the head's")
    return weights
