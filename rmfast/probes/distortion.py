"""The distortion index: how far edits that leave the content as it is move a reward, in its spread between responses.

    s_p = mean effect of probe p / spread of rewards between responses to one prompt
    D_a² = mean over the probes of axis a of (s_p² − the sampling variance of s_p)
    D² = mean over the axes of D_a²

D is 0 for a reward that no such edit moves, and 1 where an edit typically moves it as far as another response does.
Without the sampling variance taken off, noise alone would give a D, and a larger one with fewer prompts. The form of
arXiv 2604.26130 scales each model's margins to their own minimum and maximum: an axis is then 0 and another 1 in any
model, and two models have no common scale.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from rmfast import arguments
from rmfast.plots import axes as axes_of
from rmfast.plots import needed, shown_table
from rmfast.probes.result import Probed
from rmfast.resampling import as_json, clusters, drawn, percentiles

WHOLE = "all"
# No part of the index: what no taste looks like; what takes content away; what makes a response worse.
LEFT_OUT = ("placebo", "truncation", "typos")


class AxisDistortion(NamedTuple):
    """D of an axis, over so many of its probes, with its interval; in spreads. `axis` "all" is the index itself."""

    axis: str
    probes: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Distortion:
    """The distortion index of one model, or (`minus`) how far apart two are.

    Attributes:
        rows: an `AxisDistortion` for "all" and for each axis.
        draws: of each of them its resamples, (B,).
        confidence: of the intervals.
        prompts: how many were resampled.
        difference: whether it is one of two models.
    """

    rows: list[AxisDistortion]
    draws: Mapping[str, np.ndarray] = field(repr=False)
    confidence: float
    prompts: int
    difference: bool = False
    made_of: tuple = ()  # what another model's must share for a difference

    def __getitem__(self, axis: str) -> AxisDistortion:
        names = [row.axis for row in self.rows]
        return self.rows[names.index(arguments.word("axis", axis, names))]

    def minus(self, other: Distortion) -> Distortion:
        """This model's less another's, on the same edits of the same responses, drawn together.

        Each is in units of its own reward's spread between responses to a prompt, which is what the two have in common.

        Raises:
            ValueError: they are of other pairs, probes, axes, seeds or numbers of resamples; or differences already.
        """
        arguments.instance("other", other, Distortion)
        if self.made_of != other.made_of or self.difference or other.difference:
            raise ValueError("Expected distortions of two models on the same pairs, probes, axes and seed, got others")
        draws = {name: self.draws[name] - other.draws[name] for name in self.draws}
        confidence = min(self.confidence, other.confidence)
        rows = [
            AxisDistortion(
                row.axis, row.probes, row.value - other[row.axis].value, *bounds(draws[row.axis], confidence)
            )
            for row in self.rows
        ]
        return Distortion(
            rows=rows, draws=draws, confidence=confidence, prompts=self.prompts, difference=True, made_of=self.made_of
        )

    def to_dataframe(self) -> Any:
        """The rows as a pandas DataFrame."""
        return needed("pandas", "to_dataframe").DataFrame(self.rows, columns=list(AxisDistortion._fields))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Rows, confidence and number of prompts as JSON."""
        about = {"confidence": self.confidence, "prompts": self.prompts, "difference": self.difference}
        out = {**about, "rows": [as_json(row) for row in self.rows]}
        arguments.path("path", path).write_text(json.dumps(out, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def __repr__(self) -> str:
        sign = "+" if self.difference else ""
        width = max(len(row.axis) for row in self.rows)
        lines = [
            f"{row.axis:<{width}}  {row.value:{sign}.3f} [{row.low:{sign}.3f}, {row.high:{sign}.3f}]  "
            f"{row.probes} {'probe' if row.probes == 1 else 'probes'}"
            for row in self.rows
        ]
        what = "Difference of two distortion indices" if self.difference else "Distortion index"
        return "\n".join([f"{what}, in spreads; {self.prompts} prompts, intervals of {self.confidence:.0%}", *lines])

    def _repr_html_(self) -> str:
        """For notebooks: the rows as a table."""
        return shown_table(AxisDistortion._fields, self.rows, f"in spreads; intervals of {self.confidence:.0%}")

    def plot(self, ax: Any = None) -> Any:
        """D of each axis with its interval; returns the axes."""
        ax = axes_of(ax, 6, 1.5 + 0.28 * len(self.rows))
        at = np.arange(len(self.rows))[::-1]
        value, low, high = np.array([[row.value, row.low, row.high] for row in self.rows]).T
        ax.barh(at, value, xerr=np.clip([value - low, high - value], 0, None), error_kw={"linewidth": 1, "capsize": 2})
        ax.axvline(0, color="0.5", linewidth=0.8)
        ax.set_yticks(at, [row.axis for row in self.rows], fontsize=8)
        ax.set_xlabel("distortion, in spreads between responses to a prompt")
        return ax


def distortion(found: Probed, *, axes: Sequence[str] | None = None) -> Distortion:
    """How far edits that leave the content as it is move the reward, over the axes of a suite.

    Args:
        found: what `rmfast.probes.run` gave.
        axes: the axes that count, each as much as another; default all of the suite but placebo, truncation and typos.

    Returns:
        A `Distortion`. Intervals are percentiles of a bootstrap over prompts, in which the responses of a prompt, their
        edits by all probes and the spread are drawn together; the resamples' own noise is taken off as well.

    Raises:
        ValueError: an axis that the suite has not, no axis, a difference of two models, or rewards of no spread.
    """
    arguments.instance("found", found, Probed, " of rmfast.probes.run")
    if found.rewards is None:
        raise ValueError("Expected what run found of one model, got a difference of two: see Distortion.minus")
    known = list(dict.fromkeys(effect.axis for effect in found.effects))
    chosen = [name for name in known if name not in LEFT_OUT] if axes is None else arguments.words("axes", axes, known)
    if not chosen:
        raise ValueError(f"Expected axes beside {', '.join(LEFT_OUT)}, got {', '.join(known)}")
    if not found.spread > 0:
        raise ValueError(f"Expected rewards that differ between responses to a prompt, got a spread of {found.spread}")
    of = clusters(found.prompts)
    index = {name: [i for i, e in enumerate(found.effects) if e.axis == name] for name in chosen}
    squares = _Squares(found, of)
    value = _indices(squares(np.ones((1, squares.count)), 1), index)
    parts = [
        _indices(squares(weights, 2), index) for weights in drawn(np.arange(squares.count), found.resamples, found.seed)
    ]
    draws = {name: np.concatenate([part[name] for part in parts]) for name in value}
    counts = {WHOLE: sum(map(len, index.values())), **{name: len(some) for name, some in index.items()}}
    rows = [
        AxisDistortion(name, counts[name], float(value[name][0]), *bounds(draws[name], found.confidence))
        for name in value
    ]
    same = (found.prompts, tuple(found.of.items()), found.seed, found.resamples, tuple(chosen))
    return Distortion(rows=rows, draws=draws, confidence=found.confidence, prompts=squares.count, made_of=same)


def bounds(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = percentiles(draws, confidence)
    return float(low), float(high)


class _Squares:
    """Squares of the probes' effects in spreads, less their sampling variance, under weights of the prompts."""

    def __init__(self, found: Probed, of: np.ndarray) -> None:
        assert found.rewards is not None
        self.count = int(of.max()) + 1
        shape = len(found.effects), self.count
        sums, self.there = np.zeros(shape), np.zeros(shape)
        for i, name in enumerate(found.names):
            at = of[list(found.of[name])]
            np.add.at(sums[i], at, found.differences[name])
            np.add.at(self.there[i], at, 1)
        self.means = np.divide(sums, self.there, out=sums, where=self.there > 0)  # of each prompt
        self.there = (self.there > 0).astype(np.float64)
        each = np.bincount(of)
        centre = (np.bincount(of, weights=found.rewards) / each)[of]
        self.within = np.bincount(of, weights=(found.rewards - centre) ** 2)
        self.degrees = each - 1.0

    def __call__(self, weights: np.ndarray, times: int) -> np.ndarray:
        """(b, probes) under weights (b, prompts), the sampling variance taken off so many times.

        A resample has the noise of the sample and, once more, its own: 2 times.
        """
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample without a probe's prompts
            total = weights @ self.there.T
            mean = weights @ self.means.T / total
            variance = np.maximum(weights @ (self.means**2).T / total - mean**2, 0) / (total - 1)
            spread = (weights @ self.within / (weights @ self.degrees))[:, None]
            return (mean**2 - times * variance) / spread


def _indices(squares: np.ndarray, index: Mapping[str, list[int]]) -> dict[str, np.ndarray]:
    """(b,) the index and that of each axis, of squares (b, probes)."""
    each = {name: squares[:, some].mean(1) for name, some in index.items()}
    found = {WHOLE: np.mean([*each.values()], axis=0), **each}
    return {name: np.sqrt(np.maximum(square, 0)) for name, square in found.items()}
