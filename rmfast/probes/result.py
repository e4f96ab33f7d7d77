"""`Probed`: what a suite found, as a table, a plot and differences to another model's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmfast import arguments
from rmfast.plots import axes
from rmfast.probes.statistics import Effect, by_prompt, detectable, holm, intervals, standardised, t_test
from rmfast.resampling import as_json, clusters


@dataclass(frozen=True, eq=False, kw_only=True)
class Probed:
    """What edits of one thing do to the reward.

    Attributes:
        effects: an `Effect` for each probe that applied to responses to two prompts at least, in the suite's order.
        differences: by probe, reward of the edited less of its control, (n,) fp64.
        of: by probe, the place of each among the responses (chosen and rejected of each pair in turn).
        prompts: of each response.
        rewards: of each response as it is, (n,) fp64; None for a difference of two models.
        spread: the standard deviation of rewards of responses to one prompt.
        margin: the median of |chosen − rejected|: a typical preference margin.
        level: of the tests, over all probes together.
        confidence, resamples, seed: of the intervals.
        skipped: probes that applied to responses to too few prompts, with the number of responses to which they did.
        too_long: edits and controls that were left out, since the model can't take texts of their length.
    """

    effects: list[Effect]
    differences: Mapping[str, np.ndarray]
    of: Mapping[str, tuple[int, ...]]
    prompts: tuple[str, ...]
    spread: float
    margin: float
    level: float
    confidence: float
    resamples: int
    seed: int
    skipped: Mapping[str, int]
    too_long: int = 0
    rewards: np.ndarray | None = None

    def __getitem__(self, probe: str) -> Effect:
        return next(effect for effect in self.effects if effect.probe == arguments.word("probe", probe, self.names))

    @property
    def names(self) -> list[str]:
        return [effect.probe for effect in self.effects]

    @property
    def found(self) -> list[Effect]:
        """The effects that are significant after Holm's correction, the largest first."""
        certain = [effect for effect in self.effects if effect.p_holm < self.level]
        return sorted(certain, key=lambda effect: -abs(effect.mean))

    def minus(self, other: Probed) -> Probed:
        """The paired differences of two models' effects, or of one before and after an intervention.

        Each model's are in units of its own spread, since two models' rewards have no common scale. Both must be of the
        same pairs, probes and seed.

        Raises:
            ValueError: they are of other responses or probes.
        """
        arguments.instance("other", other, Probed)
        if (self.prompts, dict(self.of), self.seed) != (other.prompts, dict(other.of), other.seed):
            raise ValueError("Expected effects of the same pairs, probes and seed, got others")
        apart = {
            name: self.differences[name] / self.spread - other.differences[name] / other.spread for name in self.of
        }
        margin = max(self.margin / self.spread, other.margin / other.spread)
        return probed(
            [(e.probe, e.axis, e.dose) for e in self.effects], apart, self.of, self.prompts, 1.0, margin, self.level,
            min(self.confidence, other.confidence), min(self.resamples, other.resamples), self.seed, self.skipped,
            self.too_long,
        )  # fmt: skip

    def to_dataframe(self) -> Any:
        """The effects as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.effects, columns=list(Effect._fields))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Effects, spread, margin and levels as JSON."""
        about = {name: getattr(self, name) for name in ("spread", "margin", "level", "confidence", "resamples", "seed")}
        rows = [as_json(effect) for effect in self.effects]
        out = {**about, "skipped": dict(self.skipped), "too_long": self.too_long, "effects": rows}
        Path(path).write_text(json.dumps(out, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @property
    def apart(self) -> bool:
        """Whether it is a difference of two models."""
        return self.rewards is None

    def __str__(self) -> str:
        cells = [["axis", "probe", "n", *(["difference"] if self.apart else ["reward", "spreads"]), "d", "moved",
                  "p (Holm)", "detects"]]  # fmt: skip
        for e in self.effects:
            mean, d = f"{e.mean:+.3f} [{e.low:+.3f}, {e.high:+.3f}]", f"{e.d:+.2f} [{e.d_low:+.2f}, {e.d_high:+.2f}]"
            star = " *" if e.p_holm < self.level else ""
            cells.append([e.axis, e.probe, f"{e.n}", mean, *([] if self.apart else [f"{e.spreads:+.2f}"]), d,
                          f"{e.moved:.0%}", f"{e.p_holm:.2g}{star}", f"{e.detectable:.3f}"])  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
        scale = (
            f"one model less another, each in its own spread between responses, typical margin {self.margin:.3f}"
            if self.apart
            else f"spread between responses {self.spread:.3f}, typical margin {self.margin:.3f}"
        )
        head = f"{scale}; intervals of {self.confidence:.0%}; * significant at {self.level:g} over all probes together"
        few = [f"too few prompts: {', '.join(f'{k} ({v})' for k, v in self.skipped.items())}"] if self.skipped else []
        long = [f"left out as too long: {self.too_long} edits"] if self.too_long else []
        return "\n".join([head, *lines, *few, *long])

    def plot(self, ax: Any = None) -> Any:
        """Effects in units of the spread with their intervals, filled where significant; returns the axes."""
        ax = axes(ax, 7, 1.5 + 0.28 * len(self.effects))
        at = np.arange(len(self.effects))[::-1]
        value, low, high = np.array([[e.mean, e.low, e.high] for e in self.effects]).T / self.spread
        ax.errorbar(
            value, at, xerr=np.clip([value - low, high - value], 0, None), fmt="none", ecolor="0.5", linewidth=1
        )
        certain = np.array([e.p_holm < self.level for e in self.effects])
        for those, face in ((certain, "C0"), (~certain, "white")):
            ax.plot(value[those], at[those], "o", color="C0", markerfacecolor=face, markersize=5)
        ax.axvline(0, color="0.5", linewidth=0.8)
        ax.set_yticks(at, [e.probe for e in self.effects], fontsize=8)
        what = "difference of two models' changes" if self.apart else "change of the reward"
        ax.set_xlabel(f"{what}, in spreads between responses to a prompt")
        return ax


def probed(
    probes: Sequence[tuple[str, str, float]],
    differences: Mapping[str, np.ndarray],
    of: Mapping[str, tuple[int, ...]],
    prompts: tuple[str, ...],
    spread: float,
    margin: float,
    level: float,
    confidence: float,
    resamples: int,
    seed: int,
    skipped: Mapping[str, int],
    too_long: int = 0,
    rewards: np.ndarray | None = None,
) -> Probed:
    """The effects of probes (name, axis, dose) from their paired differences."""
    groups = {name: clusters([prompts[i] for i in of[name]]) for name, _, _ in probes}
    means = {name: by_prompt(differences[name], groups[name]) for name, _, _ in probes}
    tests = {name: t_test(means[name]) for name, _, _ in probes}
    corrected = holm(np.array([tests[name].p for name, _, _ in probes]))
    effects = []
    for (name, axis, dose), p_holm in zip(probes, corrected):
        values, each, test = differences[name], means[name], tests[name]
        (low, high), (d_low, d_high) = intervals(each, resamples, confidence, seed)
        mean = float(each.mean())
        effects.append(
            Effect(
                probe=name, axis=axis, dose=dose, n=len(values), prompts=len(each), mean=mean, low=float(low),
                high=float(high), spreads=mean / spread if spread else float("nan"),
                d=float(standardised(each, np.ones((1, len(each))))[0]), d_low=float(d_low), d_high=float(d_high),
                moved=float((np.abs(values) > margin).mean()), p=test.p, p_holm=float(p_holm),
                detectable=detectable(test, level / len(probes)),
            )
        )  # fmt: skip
    return Probed(
        effects=effects, differences=dict(differences), of=dict(of), prompts=prompts, spread=spread, margin=margin,
        level=level, confidence=confidence, resamples=resamples, seed=seed, skipped=dict(skipped),
        too_long=too_long, rewards=rewards,
    )  # fmt: skip
