"""How two ways to rank the sites of a model agree, over many pairs of texts; statistics with their n and interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

from rmfast import arguments
from rmfast.engine.scorer import Scorer
from rmfast.interpret.attribution import Attribution, attribute
from rmfast.patching.grid import PatchSweep
from rmfast.patching.sweep import patch_sweep
from rmfast.plots import axes, needed
from rmfast.texts.inputs import listed, several

# An interval from fewer pairs says nothing, nor does a rank among fewer sites: of 4 there are 24 orders.
LEAST_PAIRS = 10
LEAST_SITES = 4
SITES = ("attn_out", "head_out", "mlp_out", "mlp_neuron")  # what both attribution and patching have
_RESAMPLES = 9999
_AT_ONCE = 1 << 20  # values that are resampled at once, 16 MiB: all resamples of 10,000 pairs would be 1.6 GB


class Estimate(NamedTuple):
    """A mean over n pairs with its bootstrap interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n {self.n})"


@dataclass(eq=False, repr=False, kw_only=True)
class Comparison:
    """Rank correlations of predicted with measured effects of sites, taken within each pair and averaged over pairs.

    Attributes:
        spearman, kendall: means over the pairs (Kendall's τ_b) with their intervals and n.
        each_spearman, each_kendall: (P,) float64, of each pair; NaN where a pair is left out: all its predictions, or
            all its measurements, are equal.
        predicted, measured: of each pair, arrays of one shape; NaN where a site is left out.
        confidence: of the intervals.
    """

    spearman: Estimate
    kendall: Estimate
    each_spearman: np.ndarray = field(repr=False)
    each_kendall: np.ndarray = field(repr=False)
    predicted: list[np.ndarray] = field(repr=False)
    measured: list[np.ndarray] = field(repr=False)
    confidence: float

    def __repr__(self) -> str:
        left = len(self.predicted) - self.spearman.n
        more = f", {left} pairs left out" if left else ""
        return f"Comparison(Spearman {self.spearman}, Kendall {self.kendall}{more}, {self._sites} sites of each pair)"

    @property
    def _sites(self) -> str:
        counts = [int((~np.isnan(x + y)).sum()) for x, y in zip(self.predicted, self.measured)]
        low, high = min(counts), max(counts)
        return str(low) if low == high else f"{low} to {high}"

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row for each pair and site (in the order of the flattened arrays).

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = needed("pandas", "to_dataframe")
        frames = [
            pandas.DataFrame({"pair": i, "site": np.arange(x.size), "predicted": x.ravel(), "measured": y.ravel()})
            for i, (x, y) in enumerate(zip(self.predicted, self.measured))
        ]
        return pandas.concat(frames, ignore_index=True)

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """Scatter plot: measured over predicted effects of all sites of all pairs, and the line where they are equal.

        Args:
            ax: the matplotlib Axes to draw on; default: a new figure.
            options: for `Axes.scatter`.

        Returns:
            The Axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        ax = axes(ax, 5, 4.5)
        x, y = (np.concatenate([part.ravel() for part in side]) for side in (self.predicted, self.measured))
        ax.scatter(x, y, **{"s": 5, "alpha": 0.3, "linewidths": 0, "rasterized": len(x) > 5000, **options})
        ax.axline((0, 0), slope=1, color="0.5", linewidth=0.8, linestyle=":")
        ax.set_xlabel("predicted effect")
        ax.set_ylabel("measured effect")
        ax.set_title(f"Spearman within a pair: mean {self.spearman}", fontsize=9)
        return ax


def mean_of_pairs(
    values: Any, *, statistic: Callable[..., Any] = np.mean, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """The mean over pairs and its bootstrap interval (percentiles of 9,999 resamples of the pairs).

    Args:
        values: (P,) one number for each pair; those that are not finite are left out, and not counted in n.
        statistic: np.median in its place.
        confidence: of the interval, in (0, 1).
        seed: of the resampling.

    Raises:
        ValueError: fewer than 10 pairs have a number, or confidence is out of range.
    """
    values = arguments.array("values", values, "P")
    values = values[np.isfinite(values)]
    arguments.function("statistic", statistic, "the values")
    arguments.whole("seed", seed, 0)
    _check_pairs("values", len(values), "a mean with an interval")
    arguments.number("confidence", confidence, 0, 1, above=True, below=True)
    value = arguments.number("what statistic returns", statistic(values))
    # Percentiles, since BCa has no interval where values are equal (a perfect correlation in every pair).
    found = stats.bootstrap(
        (values,), statistic, n_resamples=_RESAMPLES, confidence_level=confidence, method="percentile",
        batch=max(1, _AT_ONCE // len(values)), rng=np.random.default_rng(seed),
    )  # fmt: skip
    low, high = map(float, found.confidence_interval)
    return Estimate(value, low, high, len(values))


def compare(
    predicted: Sequence[Any], measured: Sequence[Any], *, confidence: float = 0.95, seed: int = 0
) -> Comparison:
    """Do predicted effects rank the sites of a model as measured ones do?

    Spearman's ρ and Kendall's τ_b over the sites of each pair of texts; their means over the pairs with bootstrap
    intervals over the pairs.

    Args:
        predicted, measured: for each pair an array (or tensor) over its sites, or a `PatchSweep`, whose effects are
            taken; both of one shape. Sites that are NaN in either are left out.
        confidence: of the intervals, in (0, 1).
        seed: of the resampling.

    Raises:
        ValueError: fewer than 10 pairs, fewer than 4 sites of a pair, or shapes that do not match.
        TypeError: an `Attribution`, of one text, in place of a pair's effects.
    """
    named = (("predicted", predicted), ("measured", measured))
    sides = [
        [_effects(f"{name}[{i}]", x) for i, x in enumerate(arguments.sequence(name, side))] for name, side in named
    ]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"Expected predicted and measured for the same pairs, got {len(sides[0])} and {len(sides[1])}")
    _check_pairs("predicted and measured", len(sides[0]))
    each = np.full((2, len(sides[0])), np.nan)
    for i, (x, y) in enumerate(zip(*sides)):
        if x.shape != y.shape:
            raise ValueError(f"Expected predicted and measured of pair {i} of one shape, got {x.shape} and {y.shape}")
        both = ~np.isnan(x + y)
        if both.sum() < LEAST_SITES:
            raise ValueError(
                f"Expected predicted and measured of at least {LEAST_SITES} sites of each pair to rank, got "
                f"{both.sum()} in pair {i}"
            )
        a, b = x[both], y[both]
        if np.ptp(a) > 0 and np.ptp(b) > 0:
            each[:, i] = stats.spearmanr(a, b).statistic, stats.kendalltau(a, b).statistic
    known = int(np.isfinite(each[0]).sum())
    _check_pairs("predicted and measured that differ between sites,", known, "a mean with an interval")
    spearman, kendall = (mean_of_pairs(values, confidence=confidence, seed=seed) for values in each)
    return Comparison(
        spearman=spearman, kendall=kendall, each_spearman=each[0], each_kendall=each[1], predicted=sides[0],
        measured=sides[1], confidence=confidence,
    )  # fmt: skip


def compare_attribution(
    rm: Scorer,
    clean: Sequence[Any],
    corrupted: Sequence[Any],
    *,
    sites: str | Sequence[str],
    mode: Literal["noising", "denoising"],
    norm: Literal["frozen", "raw"],
    label: int | None,
    confidence: float,
    seed: int,
    layers: Any = None,
    heads: Any = None,
    neurons: Any = None,
    align: Any = "auto",
    batch_tokens: int | None = None,
    progress: bool = False,
    **encoding: Any,
) -> Comparison:
    """See `RewardModel.compare`."""
    rm.expect_clamps_alone(("all",))
    arguments.word("mode", mode, ("noising", "denoising"))
    if not several(clean) or not several(corrupted):
        raise TypeError("Expected clean and corrupted to be lists of texts")
    clean, corrupted = listed(clean), listed(corrupted)
    _check_pairs("clean and corrupted", len(clean))
    arguments.number("confidence", confidence, 0, 1, above=True, below=True)
    arguments.whole("seed", seed, 0)
    arguments.words("sites", sites, SITES)
    if label is not None:
        arguments.whole("label", label, 0, rm.num_labels - 1)
    elif rm.num_labels > 1:
        raise ValueError(f"Expected label, the reward to compare of this model's {rm.num_labels}, got None")
    sweeps: Any = patch_sweep(
        rm, clean, corrupted, mode=mode, sites=sites, layers=layers, positions="joint", heads=heads, neurons=neurons,
        align=align, batch_tokens=batch_tokens, progress=progress, **encoding,
    )  # fmt: skip
    if rm.num_labels > 1:
        sweeps = [sweep.select(label=label) for sweep in sweeps]
    base, other = (clean, corrupted) if mode == "noising" else (corrupted, clean)
    parts: list[Any] = [
        attribute(rm, texts, components=sites, norm=norm, batch_tokens=batch_tokens, **encoding)
        for texts in (base, other)
    ]
    predicted = [after.like(sweep) - before.like(sweep) for before, after, sweep in zip(*parts, sweeps)]
    return compare(predicted, sweeps, confidence=confidence, seed=seed)


def _effects(name: str, item: Any) -> np.ndarray:
    if isinstance(item, Attribution):
        raise TypeError(
            "Expected effects of each pair, arrays or PatchSweeps, got an Attribution of one text: give the difference "
            "of two of them in a sweep's layout, after.like(sweep) - before.like(sweep)"
        )
    return arguments.array(name, item.effect if isinstance(item, PatchSweep) else item)


def _check_pairs(name: str, count: int, of: str = "a correlation over pairs") -> None:
    if count < LEAST_PAIRS:
        raise ValueError(f"Expected {name} of at least {LEAST_PAIRS} pairs for {of}, got {count}")
