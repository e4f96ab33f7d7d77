"""Activation patching over every site of a grid: which activations make a reward, exactly, in one call.

`patch_sweep` encodes and aligns the texts, lists the edits of the grid, leaves out those that provably change nothing,
and has the others run by a patcher: `SuffixPatcher` (suffixes over the base run's K and V) for causal models whose
layers are known by structure, `LayersPatcher` (layer reuse, the model's own forward) for all others.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import tqdm

from rmfast.arguments import array, instance, path, whole, word
from rmfast.engine.options import checked_run
from rmfast.engine.scorer import Scorer
from rmfast.patching.checkpoint import Checkpoint
from rmfast.patching.divergence import Reference
from rmfast.patching.grid import PatchSweep
from rmfast.patching.pairs import Grid, Pair
from rmfast.patching.request import Request
from rmfast.patching.sites import SITES, Edits, Patcher, Record


def patch_sweep(
    rm: Scorer,
    clean: Any,
    corrupted: Any = None,
    *,
    screen: Literal["atp"] | None = None,
    top: int | None = None,
    batch_tokens: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    reference: Reference | None = None,
    progress: bool = False,
    **asked: Any,
) -> PatchSweep | list[PatchSweep]:
    """See `RewardModel.patch_sweep`; `asked` are `Request`'s arguments."""
    request = Request(rm, **asked)
    rm.expect_invariance(getattr(request.patcher, "engine", None))
    if screen is not None:
        word("screen", screen, ("atp",))
    if (screen is None) != (top is None):
        raise ValueError("Expected screen and top together: the sites that AtP ranks among the first `top` are run")
    top = None if top is None else whole("top", top, 1)
    batch_tokens = checked_run(batch_tokens, progress)
    file = None if checkpoint is None else path("checkpoint", checkpoint)
    if reference is not None:
        instance("reference", reference, Reference).expect(request)
    pairs, many = request.pairs(clean, corrupted)
    saved = None if file is None else Checkpoint(file, request.fingerprint(pairs, batch_tokens, top))
    results = []
    try:
        with tqdm(unit="site", disable=not progress) as bar:
            for number, pair in enumerate(pairs):
                screened = None if top is None else (top, _estimate(request, pair))
                results.append(swept(request, pair, batch_tokens, bar, saved, number, screened, reference))
    finally:
        if saved is not None:
            saved.write()
    return results if many else results[0]


def attribution_patch(rm: Scorer, clean: Any, corrupted: Any = None, **asked: Any) -> PatchSweep | list[PatchSweep]:
    """See `RewardModel.attribution_patch`; `asked` are `Request`'s arguments."""
    request = Request(rm, **asked)
    pairs, many = request.pairs(clean, corrupted)
    results = [_estimate(request, pair) for pair in pairs]
    return results if many else results[0]


def swept(
    request: Request, pair: Pair, batch_tokens: int | None, bar: tqdm, saved: Checkpoint | None = None, number: int = 0,
    screen: tuple[int, PatchSweep] | None = None, reference: Reference | None = None,
) -> PatchSweep:  # fmt: skip
    """The sweep of one pair, what `request` makes of it."""
    grid, patcher = request.grid(pair), request.patcher
    chosen = np.arange(len(grid.edits))
    if screen is not None:
        size = _cells(screen[1].effect, grid).abs().amax(1)[grid.cells]
        chosen = np.sort(np.argsort(-size.numpy(), kind="stable")[: screen[0]])
    cells = grid.cells[torch.from_numpy(chosen)]
    with request.binding.session():
        base = patcher.record(pair.base, pair.base_read, request.recorded, request.layers)
        other = None
        if pair.other is not None:
            other = patcher.record(pair.other, pair.other_read, set(request.kinds), request.layers, base=False)
        edits = grid.edits[chosen]
        edits = replace(edits, groups=edits.groups[:, : len(base.ids)])
        budget = row_budget(request.rm, patcher, base, edits, batch_tokens)
        flat = torch.full((math.prod(grid.shape), len(base.reward)), torch.nan, dtype=base.reward.dtype)
        flat[grid.same] = base.reward
        done = np.zeros(len(edits), bool)
        if saved is not None:
            runs = torch.stack([base.reward, base.reward if other is None else other.reward])
            done, rewards, budget = saved.of(number, cells, runs, budget)
            flat[cells[torch.from_numpy(done)]] = rewards[torch.from_numpy(done)]

        def finish(some: np.ndarray, rewards: Tensor) -> None:
            flat[cells[torch.from_numpy(some)]] = rewards.to(flat.dtype)
            bar.update(len(some))
            if saved is not None:
                saved.add(number, some, rewards)

        bar.total = (bar.total or 0) + len(edits)
        bar.update(int(done.sum()))
        judged: np.ndarray | None = None
        if reference is not None or not done.all():
            values = request.values(pair, base, other)
            patcher.rewards(base, edits, values, budget, finish, done)
            judged = None if reference is None else reference.judge(request, pair, edits, values)
    more: dict[str, Any] = {}
    if reference is not None and judged is not None:
        divergence = torch.full((math.prod(grid.shape),), torch.nan)
        divergence[cells] = torch.from_numpy(judged).to(divergence.dtype)
        more = {"divergence": divergence.reshape(grid.shape), "reference": reference.facts}
    flat = flat.clone()  # outside of inference mode: an ordinary tensor
    two = [None if record is None else request.measured(record.reward.clone()[None])[0] for record in (base, other)]
    result = request.result(
        pair, grid, request.measured(flat), *two, run=len(edits), method="patching", screen=None, **more  # type: ignore[arg-type]
    )  # fmt: skip
    if screen is not None:
        exact, linear = (_cells(x.effect, grid)[cells].flatten().numpy() for x in (result, screen[1]))
        agreement = float(spearmanr(exact, linear).statistic) if len(exact) > 1 else math.nan
        result.screen = {"method": "atp", "top": screen[0], "n": len(edits), "spearman": agreement}
    return result


def _cells(values: Tensor, grid: Grid) -> Tensor:
    """A result's grid as (cells, labels)."""
    return values.reshape(math.prod(grid.shape), -1)


def _estimate(request: Request, pair: Pair) -> PatchSweep:
    """The linear estimate of every site: the reward's gradient at the base run times what a patch would change."""
    if request.patterns == "frozen":
        raise ValueError('Expected patterns="own" with attribution, whose gradients go through the patterns too')
    grid, kinds = request.grid(pair), set(request.kinds)
    hooked = request.hooked
    metric = request.metric and (lambda rewards: _number(request.metric(rewards)))  # type: ignore[misc]
    base, slopes = hooked.gradients(pair.base, pair.base_read, kinds, metric)
    with request.binding.session():
        other = None if pair.other is None else hooked.record(pair.other, pair.other_read, kinds, request.layers)
        values = request.values(pair, base, other)
        edits = grid.edits
        two = [None if record is None else request.measured(record.reward[None])[0] for record in (base, other)]
        assert two[0] is not None
        flat = torch.full((math.prod(grid.shape), len(two[0])), torch.nan, dtype=two[0].dtype)
        flat[grid.same] = two[0]
        groups = torch.from_numpy(edits.groups[:, : len(base.ids)])
        for kind in request.kinds:
            for layer in request.layers:
                here = np.flatnonzero((edits.kind == SITES.index(kind)) & (edits.layer == layer))
                if not len(here):
                    continue
                change = values(kind, layer).double() - base.activations(kind, layer).double()
                slope = slopes(kind, layer).double()
                linear = (slope.unflatten(0, (-1, len(base.ids))) if slope.dim() == 3 else slope) * change
                by_group = torch.einsum("gt,ktu->kgu", groups.to(linear), linear.sum(-1)).cpu()
                effect = by_group[
                    :, torch.from_numpy(edits.group[here]).long(), torch.from_numpy(edits.unit[here]).long()
                ]
                flat[grid.cells[torch.from_numpy(here)]] = (two[0] + effect.T).to(flat.dtype)
    return request.result(pair, grid, flat, *two, run=0, method="attribution", screen=None)  # type: ignore[arg-type]


def _number(value: Any) -> Tensor:
    """What a metric returns; where it is no tensor the gradient's error says so."""
    return value if isinstance(value, Tensor) else torch.from_numpy(array("what metric returns", value))


def row_budget(rm: Scorer, patcher: Patcher, base: Record, edits: Edits, asked: int | None) -> int:
    """Rows that run at once: as asked, at least those of the longest edit, else what pays and fits into memory."""
    least = patcher.least_tokens(base, edits)
    if asked is not None and asked < least:
        raise ValueError(
            f"Expected batch_tokens to be at least {least}, the rows of the longest edited run, got {asked}"
        )
    # Rows of edits carry less beside them than texts do; twice as many take 2% (fp32) to 7% (bf16) less time.
    return max(least, 2 * rm.default_batch_tokens(getattr(patcher, "engine", None)) if asked is None else asked)
