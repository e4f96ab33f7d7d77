"""The pairs that are shown one by one: which, and for each its tokens, its lens and its sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rmfast.audit.biases import pairs_of
from rmfast.audit.data import LensCurve, Map, Pair, Sweep, Text, Tokens, Trajectory, number
from rmfast.audit.measures import rewards_of
from rmfast.binding.layer_list import layered
from rmfast.evaluation.layout import Item
from rmfast.evaluation.result import Evaluation
from rmfast.patching.pairs import aligned
from rmfast.texts.inputs import words

if TYPE_CHECKING:
    from rmfast.patching.grid import PatchSweep
    from rmfast.reward_model import RewardModel
    from rmfast.texts.inputs import Encoded

_CHARACTERS = 4000  # of a text that are shown
_TOKENS, _BEFORE = 600, 24  # of a text that are stepped through, and of those that both texts begin with
_COLUMNS, _LAYERS = 32, 24  # cells of a map: their number is what a sweep costs
_SWEPT = 512  # tokens of a text that is swept at most: a sweep takes about the square of them


def chosen_pairs(found: Evaluation, count: int) -> list[Pair]:
    """Of right, wrong and close pairs `count` each: the largest margins of either sign, and the smallest."""
    rewards = rewards_of(found)
    margins = rewards[:, 0] - rewards[:, 1]
    order = np.argsort(-margins, kind="stable")
    right = [i for i in order if margins[i] > 0][:count]
    wrong = [i for i in order[::-1] if margins[i] < 0][:count]
    close = [i for i in np.argsort(np.abs(margins), kind="stable") if i not in {*right, *wrong}][:count]
    kinds = [("wrong", i) for i in wrong] + [("right", i) for i in right] + [("close", i) for i in close]
    texts = pairs_of([found.items[i] for _, i in kinds])
    return [
        {
            "kind": kind, "place": int(found.places[i]), "id": _id(found.items[i]), "subset": found.items[i].subset,
            "prompt": _text(pair.prompt), "chosen": _text(pair.chosen), "rejected": _text(pair.rejected),
            "rewards": [float(x) for x in rewards[i]], "margin": float(margins[i]),
            "tokens": None, "lens": None, "sweep": None,
        }
        for (kind, i), pair in zip(kinds, texts)
    ]  # fmt: skip


def inputs_of(found: Evaluation, pairs: Sequence[Pair]) -> list[Any]:
    """The texts of pairs as they were scored, chosen and rejected in turn."""
    at = {int(place): i for i, place in enumerate(found.places)}
    return [text for pair in pairs for text in found.items[at[pair["place"]]].inputs]


def _id(item: Item) -> str:
    return "" if item.id is None else str(item.id)


def _text(text: str) -> Text:
    return {"text": text[:_CHARACTERS], "more": max(0, len(text) - _CHARACTERS)}


def trajectories(
    rm: RewardModel, inputs: Sequence[Any], running: Mapping[str, Any], encoding: Mapping[str, Any]
) -> list[Trajectory]:
    """The reward at every token of each pair's texts. Raises ValueError for a model that pools by itself."""
    encoded = rm.encode(inputs, **encoding)
    values = rm.token_values(encoded, max_length=encoding.get("max_length"), **running)
    read = rm.positions(encoded)
    found: list[Trajectory] = []
    for i in range(0, len(encoded), 2):
        shared = _shared(*encoded[i : i + 2])
        chosen, rejected = (_tokens(rm, encoded[j], values[j], read[j], shared) for j in (i, i + 1))
        found.append({"shared": shared, "chosen": chosen, "rejected": rejected})
    return found


def _tokens(rm: RewardModel, text: Encoded, values: Any, read: int, shared: int) -> Tokens:
    start = max(0, shared - _BEFORE)
    some = slice(start, start + _TOKENS)
    return {
        "words": words(rm.tokenizer, text.ids[some].tolist()),
        "values": [number(value) for value in values[some]],
        "start": start,
        "total": len(text),
        "read": int(read),
    }


def _shared(first: Encoded, second: Encoded) -> int:
    """How many tokens both texts begin with."""
    least = min(len(first), len(second))
    same = first.ids[:least] == second.ids[:least]
    return least if same.all() else int(same.argmin())


def lenses(
    rm: RewardModel, inputs: Sequence[Any], running: Mapping[str, Any], encoding: Mapping[str, Any]
) -> list[LensCurve]:
    """The reward at every layer of each pair's texts. Raises ValueError for a model without a lens."""
    rewards = rm.lens(inputs, **running, **encoding).rewards
    curves = [[number(value) for value in curve] for curve in rewards]
    return [{"chosen": first, "rejected": second} for first, second in zip(curves[0::2], curves[1::2])]


def can_be_swept(rm: RewardModel, inputs: Sequence[Any], encoding: Mapping[str, Any]) -> list[bool]:
    """For each pair whether its texts are short enough, and differ."""
    encoded = rm.encode(inputs, **encoding)
    return [
        max(len(first), len(second)) <= _SWEPT and not np.array_equal(first.ids, second.ids)
        for first, second in zip(encoded[0::2], encoded[1::2])
    ]


def sweep(
    rm: RewardModel, pair: Sequence[Any], baseline: Sequence[Any],
    running: Mapping[str, Any], encoding: Mapping[str, Any],
) -> Sweep:  # fmt: skip
    """What the stream at each layer, and at a few tokens of a text at a time, does to the reward.

    Where at least half of the rejected text's own tokens have a partner in the chosen one, that one's stream is put
    into its run; else into both runs the mean over all tokens of `baseline`. Tokens that both texts begin with are left
    out; groups and layers are as many as a map shows. Raises ValueError as `RewardModel.patch_sweep`.
    """
    chosen, rejected = rm.encode(pair, **encoding)
    shared = _shared(chosen, rejected) if rm.binding.causal else 0
    partner = aligned(rejected.ids, chosen.ids, "auto", False)[min(shared, len(rejected) - 1) :]
    if (partner >= 0).mean() >= 0.5:
        result = rm.patch_sweep(pair[0], pair[1], **_grid(rm, rejected, shared), **running, **encoding)
        return {"mode": "denoising", "maps": [_map(rm, "rejected", result)]}
    maps = []
    for side, text, ids in zip(("chosen", "rejected"), pair, (chosen, rejected)):
        grid = _grid(rm, ids, shared)
        result = rm.patch_sweep(text, mode="mean", baseline=baseline, **grid, **running, **encoding)
        maps.append(_map(rm, side, result))
    return {"mode": "mean", "maps": maps}


def _grid(rm: RewardModel, text: Encoded, shared: int) -> dict[str, Any]:
    """The layers, and the groups of a text's own tokens."""
    start = min(shared, len(text) - 1)
    size = -(-(len(text) - start) // _COLUMNS)
    groups = [list(range(at, min(at + size, len(text)))) for at in range(start, len(text), size)]
    depth = len(layered(rm.binding)[1])
    step = -(-depth // _LAYERS)
    return {"positions": groups, "layers": sorted(range(depth - 1, -1, -step))}


def _map(rm: RewardModel, side: str, result: PatchSweep) -> Map:
    layers, groups = result.coords["layer"], result.coords["position"]
    gap = None if result.other_reward is None else float(result.other_reward - result.base_reward)
    return {
        "side": side,
        "layers": layers,
        "columns": ["".join(result.tokens[at] for at in group) for group in groups],
        "effect": [[number(value) for value in row] for row in result.effect.reshape(len(layers), len(groups))],
        "base": float(result.base_reward),
        "gap": gap,
        "run": int(result.run),
    }
