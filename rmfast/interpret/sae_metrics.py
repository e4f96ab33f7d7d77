"""How well a sparse autoencoder carries the rows that it was made for, and the rewards that a model makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from rmfast.arguments import instance, shown, whole, word
from rmfast.engine.options import checked_run
from rmfast.engine.scorer import Scorer
from rmfast.interpret.sae import SAE
from rmfast.interpret.sae_attribution import place_of
from rmfast.patching.activations import Activations, collect
from rmfast.patching.patcher import patcher_of
from rmfast.patching.sites import KINDS, Edits
from rmfast.patching.suffix_patcher import SuffixPatcher
from rmfast.patching.sweep import row_budget
from rmfast.texts.inputs import Encoded

_ROWS = 4096  # that are reconstructed at once


@dataclass(frozen=True, kw_only=True)
class SAEMetrics:
    """Of held-out rows.

    Attributes:
        rows: N.
        explained_variance: 1 − Σ‖x̂ − x‖² / Σ‖x − mean‖², all rows' sums; 1 less the normalised MSE.
        l0: mean number of activations above 0.
        dead: share of features that are above 0 in none of the rows.
    """

    rows: int
    explained_variance: float
    l0: float
    dead: float


def sae_metrics(sae: SAE, activations: Activations | Tensor) -> SAEMetrics:
    """Reconstructs rows that the autoencoder was not trained on and says how well.

    Args:
        sae: of their width.
        activations: of `rmfast.patching.activations.collect`, or rows (N, d) of any float dtype.

    Raises:
        ValueError: rows of another width, that are not finite, or that are all the same.
    """
    instance("sae", sae, SAE)
    rows = activations.rows if isinstance(activations, Activations) else instance("activations", activations, Tensor)
    d = sae.W_enc.size(0)
    if rows.dim() != 2 or not len(rows) or rows.size(1) != d or not rows.is_floating_point() or rows.is_meta:
        raise ValueError(f"Expected activations to be rows (N, {d}) of floats, got {shown(rows)} of {rows.dtype}")
    device, n = sae.W_enc.device, len(rows)
    active = torch.zeros(sae.W_enc.size(1), dtype=torch.int64, device=device)
    off, spread = 0.0, _Spread(rows.size(1))
    for some in rows.split(_ROWS):
        found, used = sae.reconstruct(some.to(device))
        off += float((found.cpu().double() - some.cpu().double()).square().sum())
        spread.add(some.cpu().double())
        active += used
    if not (math.isfinite(off) and 0 < spread.total < math.inf):
        raise ValueError(f"Expected activations to be finite rows that differ, got a spread of {spread.total}")
    return SAEMetrics(
        rows=n,
        explained_variance=1 - off / spread.total,
        l0=int(active.sum()) / n,
        dead=float((active == 0).double().mean()),
    )


class _Spread:
    """Σ‖x − mean‖² of rows that come some at a time."""

    def __init__(self, d: int) -> None:
        self.n, self.mean, self.total = 0, torch.zeros(d, dtype=torch.float64), 0.0

    def add(self, rows: Tensor) -> None:
        mean, n = rows.mean(0), self.n + len(rows)
        between = self.n * len(rows) / n * float((mean - self.mean).square().sum())
        self.total += float((rows - mean).square().sum()) + between
        self.mean += (mean - self.mean) * (len(rows) / n)
        self.n = n


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class RewardRecovery:
    """Rewards of a model whose stream is replaced by a sparse autoencoder's reconstruction of it.

    Attributes:
        rewards: (N, K), the model's own.
        reconstructed: (N, K), with the reconstruction in the site's place.
        ablated: (N, K), with the mean of the site's rows over all texts in its place.
        recovered: (K,), 1 − Σ (reconstructed − rewards)² / Σ (ablated − rewards)²: 1 where no reward moves, 0 where the
            reconstruction is worth no more than the mean.
        layer, site, positions: what was replaced.
    """

    rewards: Tensor
    reconstructed: Tensor
    ablated: Tensor
    layer: int
    site: str
    positions: str

    @property
    def recovered(self) -> Tensor:
        moved = [(x.double() - self.rewards.double()).square().sum(0) for x in (self.reconstructed, self.ablated)]
        return 1 - moved[0] / moved[1]

    def __repr__(self) -> str:
        numbers = ", ".join(f"{x:.4f}" for x in self.recovered.tolist())
        return (
            f"RewardRecovery({numbers} of {len(self.rewards)} rewards' change under a mean, {self.site} of layer "
            f"{self.layer} at {self.positions} positions)"
        )


def reward_recovered(
    rm: Scorer,
    inputs: Sequence[Any],
    sae: SAE,
    *,
    layer: int | None = None,
    site: str | None = None,
    positions: Literal["all", "last"] = "all",
    batch_tokens: int | None = None,
    progress: bool = False,
    **encoding: Any,
) -> RewardRecovery:
    """Runs texts with the autoencoder's reconstruction in its site's place, exactly, as a patching sweep's edits run.

    Args:
        rm, inputs, encoding: as for `RewardModel.score`.
        sae: of the model's width.
        layer, site: where; default what the SAE's hook_name says.
        positions: whether rows of "all" tokens are replaced, or of the "last", at which the reward is read.
        batch_tokens: as for `RewardModel.patch_sweep`.
        progress: whether to show a bar.

    Raises:
        ValueError: no layer is named; the model lacks the layer or site; an SAE of another width; fewer than 2 texts.
    """
    instance("rm", rm, Scorer)
    batch_tokens = checked_run(batch_tokens, progress)
    layer, site = place_of(instance("sae", sae, SAE), None if layer is None else whole("layer", layer, 0), site)
    word("positions", positions, ("all", "last"))
    texts = rm.encode(inputs, **encoding)
    if len(texts) < 2:
        raise ValueError(f"Expected inputs to be at least 2 texts, got {len(texts)}")
    rows = collect(rm, texts, layer=layer, site=site, positions=positions, batch_tokens=batch_tokens).rows
    if sae.W_enc.size(0) != rows.size(1):
        raise ValueError(f"Expected an SAE of the site's width, {rows.size(1)}, got one of {sae.W_enc.size(0)} (d_in)")
    mean = rows.double().mean(0)
    runs = _Replaced(rm, layer, site, positions, batch_tokens)
    found = []
    for text, read in zip(tqdm(texts, unit="text", disable=not progress), rm.positions(texts)):
        found.append(runs.rewards(text, read, lambda x: sae.reconstruct(x)[0], lambda x: mean.expand(len(x), -1)))
    rewards, reconstructed, ablated = (torch.stack(each).clone() for each in zip(*found))
    return RewardRecovery(
        rewards=rewards, reconstructed=reconstructed, ablated=ablated, layer=layer, site=site, positions=positions
    )


class _Replaced:
    """Runs of a text with one site's rows replaced."""

    def __init__(self, rm: Scorer, layer: int, site: str, positions: str, batch_tokens: int | None) -> None:
        self.rm, self.layer, self.site, self.batch_tokens = rm, layer, site, batch_tokens
        self.where, self.every, self.patcher = (site, layer), positions == "all", patcher_of(rm)
        # Tails of the MLP start from the stream before it.
        self.recorded = {site, "resid_mid"} if isinstance(self.patcher, SuffixPatcher) else {site}

    def rewards(self, text: Encoded, read: int, *made: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Rewards (K,): the model's own, and with what each of `made` makes of the rows (T, d) in their place."""
        session = self.rm.binding.session
        with session():
            base = self.patcher.record(text, read, self.recorded, [self.layer])
        at = np.ones(len(base.ids), bool) if self.every else np.arange(len(base.ids)) == base.read
        zero = np.zeros(1, np.int32)
        edits = Edits(np.array([KINDS.index(self.site)], np.int8), zero + self.layer, zero, zero, at[None])
        budget, rows = row_budget(self.rm, self.patcher, base, edits, self.batch_tokens), base.activations(*self.where)
        found = [base.reward]
        for make in made:
            new = make(rows[:, 0])[:, None].to(rows)  # not in a session: one in fp32 would not let 16 bits be
            with session():
                self.patcher.rewards(
                    base, edits, lambda *_, new=new: new, budget, lambda _, out: found.append(out[0]), np.zeros(1, bool)
                )
        return found
