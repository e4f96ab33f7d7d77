"""Patches that lie outside of what the model makes, and have an effect all the same: how many, and of how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rmfast import arguments
from rmfast.interpret.comparison import LEAST_PAIRS, Estimate, mean_of_pairs
from rmfast.patching.grid import PatchSweep


@dataclass(frozen=True, kw_only=True)
class Pernicious:
    """Counts over the sites of one or several sweeps that were judged by a reference (`rmfast.patching.divergence`).

    Attributes:
        share: of the gap, above which an effect counts as strong.
        judged: sites that were run and could be told.
        divergent: of these, what is put in lies outside of what the model makes there.
        expected: as many of them would be so were all of it natural, (1 − level) · judged.
        strong: of the judged, |effect| > share · |gap|.
        pernicious: both.
        of_strong: in the mean over pairs the share of strong sites that are divergent, with its interval; None for
            fewer than 10 pairs that have strong sites. Sites of one pair are not independent, so that one pair gives
            counts and no interval.
        each: (P,), that share of each pair; NaN where it has no strong site.
    """

    share: float
    judged: int
    divergent: int
    expected: float
    strong: int
    pernicious: int
    of_strong: Estimate | None
    each: np.ndarray = field(repr=False)

    def __str__(self) -> str:
        interval = "" if self.of_strong is None else f", {self.of_strong} of a pair's"
        return (
            f"{self.pernicious} of {self.strong} strong sites are divergent{interval}; of all {self.judged} judged "
            f"{self.divergent} (by chance {self.expected:.4g})"
        )


def pernicious(
    sweeps: PatchSweep | Sequence[PatchSweep], *, share: float = 0.1, gap: Any = None, confidence: float = 0.95,
    seed: int = 0,
) -> Pernicious:  # fmt: skip
    """How many patches are pernicious: divergent, and of an effect above a share of the gap (arXiv 2604.26130).

    Args:
        sweeps: one, or one for each pair, that were given a reference and have one reward (`select` a label).
        share: of the gap between the two runs' rewards; 0.1 in the paper.
        gap: in its place a number, for all sweeps or for each, where there is one run alone ("zero", "mean", ...).
        confidence, seed: of the bootstrap over pairs.

    Raises:
        ValueError: a sweep has no reference or several labels; there is no gap and none is given; references of
            different levels.
    """
    given = [sweeps] if isinstance(sweeps, PatchSweep) else arguments.sequence("sweeps", sweeps, "PatchSweeps")
    several = [arguments.instance(f"sweeps[{i}]", sweep, PatchSweep) for i, sweep in enumerate(given)]
    if not several:
        raise ValueError("Expected sweeps to hold at least one")
    if any("label" in sweep.axes for sweep in several):
        raise ValueError("Expected sweeps of one reward, got several labels: select(label=) one")
    arguments.number("share", share, 0)
    arguments.number("confidence", confidence, 0, 1, above=True, below=True)
    arguments.whole("seed", seed, 0)
    if gap is None:
        gaps = _gaps(several)
    elif isinstance(gap, int | float | np.number):
        gaps = [arguments.number("gap", gap)] * len(several)
    else:
        each_gap = arguments.sequence("gap", gap, f"a number, or one for each of {len(several)} sweeps", len(several))
        gaps = [arguments.number(f"gap[{i}]", width) for i, width in enumerate(each_gap)]
    levels = {sweep.reference["level"] for sweep in several if sweep.reference is not None}
    if len(levels) != 1 or any(sweep.reference is None for sweep in several):
        raise ValueError("Expected sweeps that were all given references of one level: patch_sweep(..., reference=)")
    counts, each = np.zeros(4, np.int64), np.full(len(several), np.nan)
    for i, (sweep, width) in enumerate(zip(several, gaps)):
        assert sweep.divergence is not None
        effect, divergence = (x.double().numpy().ravel() for x in (sweep.effect, sweep.divergence))
        judged = np.isfinite(effect) & ~np.isnan(divergence)
        divergent, strong = judged & (abs(divergence) > 1), judged & (abs(effect) > share * abs(width))
        counts += [x.sum() for x in (judged, divergent, strong, divergent & strong)]
        each[i] = (divergent & strong).sum() / strong.sum() if strong.any() else np.nan
    known = np.isfinite(each).sum() >= LEAST_PAIRS
    all_judged, all_divergent, all_strong, both = map(int, counts)
    return Pernicious(
        share=share, judged=all_judged, divergent=all_divergent, expected=(1 - levels.pop()) * all_judged,
        strong=all_strong, pernicious=both, each=each,
        of_strong=mean_of_pairs(each, confidence=confidence, seed=seed) if known else None,
    )  # fmt: skip


def _gaps(sweeps: list[PatchSweep]) -> list[float]:
    found = []
    for sweep in sweeps:
        if sweep.other_reward is None:
            raise ValueError(f"Expected gap, a number, for mode {sweep.mode!r}, which has one run")
        found.append(float(sweep.other_reward - sweep.base_reward))
    return found
