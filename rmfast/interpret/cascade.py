"""Misalignment cascade: do a reward model's failures of several kinds come together, on the same items?

    Δ_k(item) = reward of the response that fails in kind k, less that of its control

A prompt counts once (the mean of its items). Each two kinds are correlated over the prompts that all of them have, with
intervals by a bootstrap over prompts, and tested by permutations of the prompts. Kinds of other items, cut to the same
number and correlated in the order in which they come (arXiv 2604.26130's library), have no correlation to speak of.

What is permuted is each correlation over its own standard error, Σ x y / √(Σ x² y²) (DiCiccio and Romano, JASA 2017).
Of the correlation itself permutations test independence: where rewards of some prompts are all further apart than those
of others, uncorrelated kinds would be found correlated.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from scipy import stats

from rmfast import arguments
from rmfast.engine.scorer import Scorer
from rmfast.interpret.pairwise import Pairwise, adjusted, checked, expect_prompts
from rmfast.resampling import as_json, cluster_means, clusters, drawn, percentiles
from rmfast.texts.items import read_named_pairs
from rmfast.texts.pairs import join, text_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from rmfast.engine.options import ScoreOptions

Method = Literal["pearson", "spearman"]
_AT_ONCE = 1 << 20


class Correlation(NamedTuple):
    """The correlation of two kinds with its interval; p of 0 by permutations, and corrected for all pairs of kinds."""

    first: str
    second: str
    value: float
    low: float
    high: float
    p: float
    p_all: float


class Mean(NamedTuple):
    """The mean of something with its interval and, where it is tested, p of 0."""

    name: str
    value: float
    low: float
    high: float
    p: float = float("nan")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Cascade(Pairwise):
    """How the failures of a reward model hang together.

    Attributes:
        names: of the kinds.
        rows: a `Correlation` of each two.
        together: the mean correlation over all pairs of kinds, and p: are they correlated on the whole?
        means: of each kind, the mean difference in reward; above 0 the model prefers the failure.
        method: "pearson" or "spearman" (of the ranks among all prompts).
        held: whether a number of each item was held fixed (partial correlations).
    """

    together: Mean
    means: list[Mean]
    method: str
    held: bool

    def _head(self) -> list[str]:
        t = self.together
        what = f"{'partial ' if self.held else ''}{self.method} correlations"
        return [
            f"{what} over {self.prompts} prompts, intervals of {self.confidence:.0%}",
            f"mean of all pairs {t.value:+.3f} [{t.low:+.3f}, {t.high:+.3f}], p {t.p:.2g}",
            "preferred to the control: "
            + ", ".join(f"{m.name} {m.value:+.3f} [{m.low:+.3f}, {m.high:+.3f}]" for m in self.means),
        ]

    def _about(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "held": self.held,
            "together": as_json(self.together),
            "means": [{"name": m.name, "value": m.value, "low": m.low, "high": m.high} for m in self.means],
        }


def cascade(
    differences: Mapping[str, Any],
    *,
    items: Mapping[str, Sequence[Hashable]] | None = None,
    prompts: Any = None,
    hold: Any = None,
    method: Method = "pearson",
    confidence: float = 0.95,
    resamples: int = 2000,
    permutations: int = 2000,
    seed: int = 0,
) -> Cascade:
    """Correlations of differences in reward of several kinds, over the same items.

    Args:
        differences: for each kind, (n,) numbers.
        items: for each kind, which item each of its numbers is of; None: number i of each is of item i. A `Probed` has
            them: `cascade(found.differences, items=found.of, prompts=found.prompts)`.
        prompts: the prompt of each item, by item (a mapping, or a sequence where items are ints); None: each has its
            own.
        hold: a number of each item, as prompts are given, that is held fixed: correlations are partial. What
            differences from one control share is not to be held fixed by its reward: that is the prompt's too.
        method: "pearson", or "spearman" for that of the ranks.
        confidence, resamples, permutations, seed: of intervals and tests.

    Returns:
        A `Cascade`, over the prompts that have all kinds.

    Raises:
        ValueError: fewer than two kinds or 20 prompts, an item twice, numbers that are not finite, a kind whose
            differences are all equal (or, with hold, a function of it), so that it has no correlation.
    """
    confidence, resamples, permutations, seed = checked(confidence, resamples, permutations, seed)
    arguments.word("method", method, ("pearson", "spearman"))
    names, values, known = _matched(differences, items)
    count = len(known) if items is None else None
    of = np.arange(len(known))
    if prompts is not None:
        of = clusters(arguments.hashable("prompts", _looked_up("prompts", prompts, known, count)))
    expect_prompts("items", int(of.max()) + 1 if len(of) else 0)
    each = cluster_means(values, of)  # (G, D)
    columns = each
    if hold is not None:
        held = arguments.finite("hold", _looked_up("hold", hold, known, count), len(known))
        columns = np.column_stack([each, cluster_means(held, of)])
    if method == "spearman":
        columns = stats.rankdata(columns, axis=0)
    for name, column in zip([*names, "hold"], columns.T):
        if np.ptp(column) <= 1e-12 * np.abs(column).max():
            raise ValueError(f"Expected differences of {name!r} that differ between prompts, got the same for all")
    columns = columns - columns.mean(0)
    columns /= np.abs(columns).max(0)  # no product overflows
    return _correlated(names, each, columns, method, confidence, resamples, permutations, seed, held=hold is not None)


def misalignment_cascade(
    rm: Scorer,
    items: Sequence[tuple[Any, Mapping[str, tuple[Any, Any]]]],
    *,
    method: Method = "pearson",
    confidence: float = 0.95,
    resamples: int = 2000,
    permutations: int = 2000,
    seed: int = 0,
    **options: Unpack[ScoreOptions],
) -> Cascade:
    """`cascade` of a model's rewards: each item is a prompt with responses that fail in some kind, and their controls.

    Args:
        rm: a model of one reward.
        items: (prompt, {kind: (control, failing)}) each, of texts or messages; an item counts where it has all kinds.
        method, confidence, resamples, permutations, seed: as for `cascade`.
        options: of `RewardModel.score`.

    Raises:
        ValueError: as `cascade`; a model of several rewards; items of another form; one response for two kinds of a
            prompt. What its reward is off by is in both differences: one control for all correlates them by about 0.5.
    """
    arguments.instance("rm", rm, Scorer)
    if rm.num_labels != 1:
        raise ValueError(f"Expected a model of one reward, got one of {rm.num_labels}")
    read = read_named_pairs(items, "kind", ("control", "failing"))
    _expect_own_responses(read)
    texts = [join(prompt, side) for prompt, kinds in read for two in kinds.values() for side in two]
    rewards = iter(rm.score(texts, **options).double().reshape(-1, 2).tolist()) if texts else iter([])
    differences: dict[str, list[float]] = {}
    of: dict[str, list[int]] = {}
    for i, (_, kinds) in enumerate(read):
        for kind in kinds:
            control, failing = next(rewards)
            differences.setdefault(kind, []).append(failing - control)
            of.setdefault(kind, []).append(i)
    return cascade(
        differences, items=of, prompts=[text_of(prompt) for prompt, _ in read], method=method, confidence=confidence,
        resamples=resamples, permutations=permutations, seed=seed,
    )  # fmt: skip


def _expect_own_responses(items: Sequence[tuple[Any, Mapping[str, tuple[Any, Any]]]]) -> None:
    kind_of: dict[tuple[str, str], str] = {}
    for i, (prompt, kinds) in enumerate(items):
        for kind, sides in kinds.items():
            for side in sides:
                other = kind_of.setdefault((text_of(prompt), text_of(side)), kind)
                if other != kind:
                    raise ValueError(
                        f"Expected responses of its own for each kind of a prompt, got one for {other!r} and {kind!r} "
                        f"in item {i}: what its reward is off by is in both differences, and correlates them"
                    )


def _matched(differences: Any, items: Any) -> tuple[list[str], np.ndarray, list[Hashable]]:
    """Names, numbers (n, D) of the items that all kinds have, and these items."""
    if not isinstance(differences, Mapping) or len(differences) < 2:
        raise ValueError(f"Expected differences of at least two kinds, got {arguments.shown(differences)}")
    names = [arguments.instance("each kind of differences", name, str) for name in differences]
    arrays = [arguments.finite(f"differences of {name!r}", differences[name], "n") for name in names]
    if items is None:
        if len(set(map(len, arrays))) > 1:
            raise ValueError("Expected items, since the kinds have different numbers of differences")
        return names, np.column_stack(arrays), list(range(len(arrays[0])))
    if not isinstance(items, Mapping):
        raise TypeError(f"Expected items to be a mapping of kinds to items, got {arguments.shown(items)}")
    found: list[dict[Hashable, float]] = []
    for name, numbers in zip(names, arrays):
        if name not in items:
            raise ValueError(f"Expected items of {name!r}, got those of {', '.join(map(str, items))}")
        given = arguments.sequence(f"items of {name!r}", items[name], "an item for each difference", len(numbers))
        of = arguments.hashable(f"items of {name!r}", given)
        found.append(dict(zip(of, numbers)))
        if len(found[-1]) < len(of):
            raise ValueError(f"Expected items of {name!r} to be different, got one twice")
    shared = [item for item in found[0] if all(item in other for other in found[1:])]
    return names, np.array([[each[item] for each in found] for item in shared]).reshape(-1, len(names)), shared


def _looked_up(name: str, given: Any, known: Sequence[Any], count: int | None) -> list[Any]:
    """What is given for each of the items; of a sequence its length, where that is known."""
    if not isinstance(given, Mapping):
        given = dict(enumerate(arguments.sequence(name, given, "one for each item", count)))
    missing = [item for item in known if item not in given]
    if missing:
        raise ValueError(f"Expected {name} of every item, by item, got none of {arguments.shown(missing[0])}")
    return [given[item] for item in known]


def _correlated(
    names: list[str], each: np.ndarray, columns: np.ndarray, method: str, confidence: float, resamples: int,
    permutations: int, seed: int, held: bool,
) -> Cascade:  # fmt: skip
    count, kinds = each.shape
    first, second = np.triu_indices(kinds, 1)
    alone = columns[:, :kinds] if not held else _residuals(columns[:, :kinds], columns[:, kinds])
    for name, column, whole in zip(names, alone.T, columns.T):
        if held and column.std() <= 1e-9 * whole.std():
            raise ValueError(f"Expected differences of {name!r} that are no linear function of what is held fixed")
    scaled = (alone - alone.mean(0)) / alone.std(0)

    def correlations(weights: np.ndarray) -> np.ndarray:
        """(b, pairs) under weights (b, G)."""
        return _correlations(columns, weights, held)[:, first, second]

    value = correlations(np.ones((1, count)))[0]
    draws, means = [], []
    for weights in drawn(np.arange(count), resamples, seed):
        draws.append(correlations(weights))
        means.append(weights @ each / weights.sum(1, keepdims=True))
    sampled = np.concatenate(draws)
    (low, high), mean_bounds = percentiles(sampled, confidence), percentiles(np.concatenate(means), confidence)

    def tested(some: np.ndarray) -> np.ndarray:
        """(b, pairs + 1) correlations over their errors, and the mean of these, of kinds (b, G, D)."""
        squares = some**2
        products, errors = (x.transpose(0, 2, 1) @ x for x in (some, squares))
        found = np.divide(products, np.sqrt(errors), out=np.zeros_like(products), where=errors > 0)[:, first, second]
        return np.column_stack([found, found.mean(1)])

    def shuffled() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        size = max(1, _AT_ONCE // scaled.size)
        for start in range(0, permutations, size):
            some = np.broadcast_to(scaled, (min(size, permutations - start), *scaled.shape))
            yield tested(rng.permuted(some, axis=1))

    (observed,), parts = tested(scaled[None]), list(shuffled())
    p, p_all = adjusted(observed[:-1], (part[:, :-1] for part in parts))
    p_mean, _ = adjusted(observed[-1:], (part[:, -1:] for part in parts))
    rows = [
        Correlation(names[i], names[j], *map(float, figures))
        for i, j, *figures in zip(first, second, value, low, high, p, p_all)
    ]
    usable = ~np.isnan(sampled).all(1)
    averages = np.nanmean(sampled[usable], axis=1) if usable.any() else np.full(1, np.nan)
    start, end = map(float, percentiles(averages, confidence))
    return Cascade(
        names=names, rows=rows, prompts=count, confidence=confidence, method=method, held=held,
        together=Mean("together", float(value.mean()), start, end, float(p_mean[0])),
        means=[Mean(name, *map(float, figures)) for name, *figures in zip(names, each.mean(0), *mean_bounds)],
    )  # fmt: skip


def _residuals(columns: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Columns (G, D) less their least squares on a number (G,)."""
    x = held - held.mean()
    centred = columns - columns.mean(0)
    return centred - np.outer(x, x @ centred / (x @ x))


def _correlations(columns: np.ndarray, weights: np.ndarray, held: bool) -> np.ndarray:
    """(b, D, D) Pearson's correlations of columns (G, D) under weights (b, G); with `held` given the last column."""
    total = weights.sum(1)[:, None, None]
    centred = columns - columns.mean(0)
    products = (centred[:, :, None] * centred[:, None, :]).reshape(len(columns), -1)
    mean = weights @ centred / total[:, 0]
    moments = (weights @ products).reshape(len(weights), *[columns.shape[1]] * 2) / total
    covariance = moments - mean[:, :, None] * mean[:, None, :]
    variance = np.maximum(np.einsum("bii->bi", covariance), 0)
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample in which all prompts are alike
        found = covariance / np.sqrt(variance[:, :, None] * variance[:, None, :])
        if not held:
            return found
        with_held = found[:, :-1, -1]
        left = np.maximum(1 - with_held**2, 0)
        return (found[:, :-1, :-1] - with_held[:, :, None] * with_held[:, None, :]) / np.sqrt(
            left[:, :, None] * left[:, None, :]
        )
