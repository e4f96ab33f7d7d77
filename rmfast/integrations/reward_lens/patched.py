"""Rewards of a text with one cell of a grid replaced at once: what all grids of reward-lens are made of."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmfast.engine.scorer import Scorer
from rmfast.integrations.reward_lens.theirs import Outside
from rmfast.patching.patcher import patcher_of
from rmfast.patching.sites import KINDS, Edits
from rmfast.patching.suffix_patcher import SuffixPatcher
from rmfast.patching.sweep import row_budget
from rmfast.texts.inputs import Encoded

Cell = tuple[str, int, int]  # kind, layer, unit


def component_cells(layers: int) -> list[Cell]:
    """Attention and MLP of every layer, in reward-lens' order."""
    return [(kind, layer, 0) for layer in range(layers) for kind in ("attn_out", "mlp_out")]


def head_cells(layers: int, heads: int) -> list[Cell]:
    """Every head of every layer, in reward-lens' order."""
    return [("head_out", layer, head) for layer in range(layers) for head in range(heads)]


def check_places(rm: Scorer, places: list[tuple[str, int, Any]], heads: int | None = None) -> None:
    """Outside unless reward-lens' modules for kinds and layers are those at which rmfast has them."""
    patcher = patcher_of(rm)
    for kind, layer, module in places:
        if isinstance(patcher, SuffixPatcher):
            fused = patcher.engine.layers[layer][1]
            same = module is {"attn_out": fused.attn, "mlp_out": fused.mlp, "head_out": fused.o_proj}[kind]
        else:
            point = patcher.points[layer].get(kind)
            same = (
                point is not None and point.module is module and point.side == ("in" if kind == "head_out" else "out")
            )
        if not same:
            raise Outside(f"{kind} of layer {layer} is another place in rmfast")
    if heads is not None and patcher.units("head_out")[0] != heads:
        raise Outside(f"{patcher.units('head_out')[0]} heads, which reward-lens takes for {heads}")


def patched_rewards(
    rm: Scorer,
    base_text: tuple[np.ndarray, int],
    other_text: tuple[np.ndarray, int] | None,
    cells: list[Cell],
    replaced: int | slice,
    values: dict[tuple[str, int], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rewards of the base text with one cell replaced at once, at the same positions in each.

    Args:
        base_text, other_text: token ids and the position at which the reward is read.
        replaced: the positions that are replaced, of the base text.
        values: by kind and layer (width,), what is put in. Without them the other text's activations at the same
            positions, and zeros behind its end (everywhere, where there is no other text).

    Returns:
        Rewards of the base text (K,); of the other text (K,), or None where it is run beyond its read position; and of
        the cells (n, K).
    """
    texts = [text for text in (base_text, other_text) if text is not None]
    group_of = rm.binding.length_group
    if any(any(group_of(len(ids))) for ids, _ in texts):
        raise Outside("rotary frequencies that depend on a text's length")
    patcher, (ids, read) = patcher_of(rm), base_text
    groups = np.zeros((1, len(ids)), bool)
    groups[0, replaced] = True
    groups[:, read + 1 :] = False  # has no part in the reward
    known = True
    if other_text is not None:  # before the texts first differ, the values put in are those that stand there
        shared = min(len(ids), len(other_text[0]))
        groups[:, : int(np.append(ids[:shared] == other_text[0][:shared], False).argmin())] = False
        known = not groups[0, other_text[1] + 1 : shared].any()
        if not known:  # it must run beyond where its reward is read
            other_text = (other_text[0], len(other_text[0]) - 1)
    kinds, layers, units = (np.array(column) for column in zip(*cells))
    effect = groups.any() & ((layers < patcher.layers - 1) | groups[0, read])
    names = set(kinds.tolist())
    with rm.binding.session():
        recorded = names | ({"resid_mid"} if isinstance(patcher, SuffixPatcher) else set())
        base = patcher.record(Encoded(ids), read, recorded)
        other = None if other_text is None else patcher.record(Encoded(other_text[0]), other_text[1], names, base=False)

        @lru_cache(4)
        def rows(kind: str, layer: int) -> Tensor:
            like = base.activations(kind, layer)
            if values is not None:
                return values[kind, layer].to(like).expand_as(like)
            out = torch.zeros_like(like)
            if other is not None:
                new = other.activations(kind, layer)[: len(out)]
                out[: len(new)] = new
            return out

        where = np.flatnonzero(effect)
        rewards = base.reward.repeat(len(cells), 1)
        if len(where):
            code = np.array([KINDS.index(kind) for kind in kinds[where]], np.int8)
            layer, unit = (column[where].astype(np.int32) for column in (layers, units))
            edits = Edits(code, layer, np.zeros_like(layer), unit, groups[:, : len(base.ids)])

            def done(some: np.ndarray, found: Tensor) -> None:
                rewards[torch.from_numpy(where[some])] = found.to(rewards)

            budget = row_budget(rm, patcher, base, edits, None)
            patcher.rewards(base, edits, rows, budget, done, np.zeros(len(edits), bool))
    return base.reward.clone(), other.reward.clone() if other is not None and known else None, rewards.clone()
