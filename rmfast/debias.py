"""Biases of a reward model: measured on pairs, traced to the neurons that carry them, and clamped away (CIRM).

The method is that of arXiv 2604.27495: neurons whose activation at the last token ranks texts as a spurious attribute
does are set to their median, so that the reward no longer hears of the attribute through them.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from rmfast.ops import neuron_stats
from rmfast.pairs import Pair, read_pairs, text_of

if TYPE_CHECKING:
    from rmfast.interventions import NeuronClamp
    from rmfast.last_token import LastTokenRuns
    from rmfast.scoring import RewardModel

__all__ = ["ATTRIBUTES", "Attributes", "Neurons", "Report", "attributes", "fit", "localise", "plot", "report"]

Attribute = Callable[[str, str], float]

_WORD = re.compile(r"\w+")


def _overlap(prompt: str, response: str) -> float:
    words = set(_WORD.findall(response.lower()))
    return len(words & set(_WORD.findall(prompt.lower()))) / len(words) if words else 0.0


# Of a prompt and a response. overlap: of the response's distinct words (runs of letters, digits and _, lower case) the
# share that is also in the prompt, 0 for a response without words.
ATTRIBUTES: dict[str, Attribute] = {
    "length": lambda prompt, response: len(response),
    "paragraphs": lambda prompt, response: response.count("\n\n"),
    "overlap": _overlap,
    "exclamation": lambda prompt, response: response.count("!"),
    "bold": lambda prompt, response: response.count("**"),
}


@dataclass(frozen=True, eq=False)
class Attributes:
    """Attributes of n texts: `values` (n, a) float64, a column for each of `names`; `[name]` is one column (n,)."""

    names: tuple[str, ...]
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[:, self.names.index(name)]


def attributes(
    prompts: Sequence[Any], responses: Sequence[Any], *, functions: Mapping[str, Attribute] | None = None
) -> Attributes:
    """What a reward should not depend on by itself, counted in each response.

    length (characters), paragraphs (count of a blank line, two newlines), overlap (of the response's distinct words,
    runs of letters, digits and underscores in lower case, the share that the prompt has too), exclamation (count of
    "!") and bold (count of "**").

    Args:
        prompts, responses: n of each; text, or lists of messages, of which the contents are taken.
        functions: further attributes by name: (prompt, response) as texts to a number.

    Returns:
        `Attributes` of the n responses, the five above and then those of `functions`.

    Raises:
        ValueError: as many prompts as responses are not given, or a function gives something that is no finite number.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"Expected as many prompts as responses, got {len(prompts)} and {len(responses)}")
    texts = [(text_of(prompt or ""), text_of(response)) for prompt, response in zip(prompts, responses)]
    return _measure(texts, {**ATTRIBUTES, **(functions or {})})


def _measure(texts: list[tuple[str, str]], functions: Mapping[str, Attribute]) -> Attributes:
    values = np.empty((len(texts), len(functions)))
    for j, (name, function) in enumerate(functions.items()):
        for i, text in enumerate(texts):
            try:
                values[i, j] = function(*text)
            except (TypeError, ValueError) as error:
                raise ValueError(f"attribute {name!r} of text {i} is no number: {error}") from error
        if not np.isfinite(values[:, j]).all():
            raise ValueError(f"attribute {name!r} of text {int((~np.isfinite(values[:, j])).argmax())} is not finite")
    return Attributes(tuple(functions), values)


def _chosen(given: Sequence[str] | Mapping[str, Attribute] | None) -> dict[str, Attribute]:
    """Names, or functions by name, as functions by name."""
    if isinstance(given, Mapping):
        if bad := [name for name, function in given.items() if not callable(function)]:
            raise TypeError(
                f"Expected attributes to map names to functions of (prompt, response), got {bad[0]!r}: none"
            )
        found = dict(given)
    else:
        names = list(ATTRIBUTES) if given is None else [given] if isinstance(given, str) else list(given)
        if unknown := [name for name in names if name not in ATTRIBUTES]:
            raise ValueError(
                f"Expected attributes among {', '.join(ATTRIBUTES)}, or functions by name, got {unknown[0]!r}"
            )
        found = {name: ATTRIBUTES[name] for name in names}
    if not found:
        raise ValueError("Expected at least one attribute, got none")
    return found


def _of_pairs(pairs: list[Pair], functions: Mapping[str, Attribute]) -> Attributes:
    """Of 2n texts: chosen and rejected of each pair in turn."""
    return _measure([(p.prompt, text) for p in pairs for text in (p.chosen, p.rejected)], functions)


class Row(NamedTuple):
    """A figure of a report: `value` with its interval from `low` to `high`, over `n` texts or pairs."""

    attribute: str
    measure: str
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Report:
    """How a reward follows attributes of the texts, and how that shows in which pairs it gets right.

    Attributes:
        rows: a `Row` (attribute, measure, value, low, high, n) each: of attribute "" the "accuracy" on all pairs; of
            each attribute "spearman" (its rank correlation with the reward over all texts, chosen and rejected),
            "accuracy_more" and "accuracy_less" (on the pairs where the chosen text has more, or less, of it). NaN where
            there is nothing to compare: a constant attribute, no such pairs.
        confidence: of the intervals.
    """

    rows: list[Row]
    confidence: float = 0.95

    def __getitem__(self, key: tuple[str, str] | str) -> Row:
        """The row of (attribute, measure), or of "accuracy"."""
        wanted = ("", "accuracy") if key == "accuracy" else key
        for row in self.rows:
            if (row.attribute, row.measure) == wanted:
                return row
        raise KeyError(key)

    @property
    def attributes(self) -> list[str]:
        return list(dict.fromkeys(row.attribute for row in self.rows if row.attribute))

    def to_dataframe(self) -> Any:
        """The rows as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.rows, columns=list(Row._fields))

    def __str__(self) -> str:
        whole = self["accuracy"]
        cells = [["attribute", "Spearman with the reward", "accuracy, chosen has more", "chosen has less"]]
        for name in self.attributes:
            spearman, more, less = (self[name, measure] for measure in _MEASURES)
            cells.append([name, _figure(spearman, "+.3f"), *(f"{_figure(row)}  n {row.n}" for row in (more, less))])
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
        return "\n".join([f"{whole.n} pairs, accuracy {_figure(whole)}, intervals of {self.confidence:.0%}", *lines])

    def plot(self) -> Any:
        """Bars of correlations and accuracies, with their intervals; returns the two matplotlib axes."""
        return plot({"": self})


_MEASURES = ("spearman", "accuracy_more", "accuracy_less")


def _figure(row: Row, spec: str = ".3f") -> str:
    if np.isnan(row.value):
        return "-"
    return f"{row.value:{spec}} [{row.low:{spec}}, {row.high:{spec}}]"


def report(
    rm: RewardModel | None,
    pairs: Sequence[Any],
    *,
    attributes: Sequence[str] | Mapping[str, Attribute] | None = None,
    rewards: Any = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    **scoring: Any,
) -> Report:
    """How the reward follows each attribute, and how often it is right where the attribute points right, or wrong.

    Intervals are percentiles of a bootstrap over pairs (both texts of a pair are drawn together), vectorised in numpy:
    a resample's ranks are cumulated counts, so that nothing is sorted again.

    Args:
        rm: the model; with interventions too (`RewardModel.with_interventions`).
        pairs: (prompt, chosen, rejected) triples, or mappings with these keys; text or messages
            (`rmfast.pairs.read_pairs`).
        attributes: names of `ATTRIBUTES`, default all; or functions by name, (prompt, response) as texts to a number
            (`{**debias.ATTRIBUTES, "questions": lambda prompt, response: response.count("?")}`).
        rewards: (n, 2), of chosen and rejected, where they are known already; `rm` may then be None.
        resamples, confidence, seed: of the bootstrap.
        scoring: arguments of `RewardModel.score`: batch_tokens, max_length, truncation, format, progress, ...

    Returns:
        A `Report`. A tie of both rewards counts as half right. Pairs whose texts have as much of an attribute count in
        the accuracy over all pairs alone.

    Raises:
        ValueError: a pair without both sides, fewer than two pairs, an unknown attribute, a model of several rewards.
    """
    read = _read(pairs, 2)
    found = _of_pairs(read, _chosen(attributes))
    if not (isinstance(resamples, int) and resamples >= 1 and 0 < confidence < 1):
        raise ValueError(f"Expected resamples >= 1 and 0 < confidence < 1, got {resamples} and {confidence}")
    if rewards is None:
        if rm is None:
            raise ValueError("Expected rm, or rewards (n, 2) of chosen and rejected, got neither")
        rewards = _single(rm).score([text for pair in read for text in pair.inputs], **scoring).reshape(-1, 2)
    scored = (
        rewards.detach().double().cpu().numpy() if isinstance(rewards, torch.Tensor) else np.asarray(rewards, float)
    )
    if scored.shape != (len(read), 2) or not np.isfinite(scored).all():
        raise ValueError(f"Expected finite rewards of shape ({len(read)}, 2), got {scored.shape}")
    return _reported(scored, found, resamples, confidence, seed)


def _read(pairs: Sequence[Any], least: int) -> list[Pair]:
    read = read_pairs(pairs)
    if len(read) < least:
        hint = ": fewer find noise alone, and the paper takes 500" if least > 2 else ""
        raise ValueError(f"Expected at least {least} pairs, got {len(read)}{hint}")
    return read


def _single(rm: RewardModel) -> RewardModel:
    if rm.num_labels != 1:
        raise ValueError(
            f"Expected a model of one reward, got one of {rm.num_labels}: pairs have no order under several"
        )
    return rm


def _right(rewards: np.ndarray) -> np.ndarray:
    """(n,): 1 where the chosen text has the higher reward, a half for a tie."""
    margin = rewards[:, 0] - rewards[:, 1]
    return (margin > 0) + 0.5 * (margin == 0)


def _reported(rewards: np.ndarray, found: Attributes, resamples: int, confidence: float, seed: int) -> Report:
    n, right, rng = len(rewards), _right(rewards), np.random.default_rng(seed)
    more = {name: np.diff(found[name].reshape(n, 2)[:, ::-1])[:, 0] for name in found.names}
    ranked = {name: _RankCorrelation(rewards.ravel(), found[name]) for name in found.names}

    def figures(weights: np.ndarray) -> np.ndarray:
        """(B, figures) under weights (B, n) of the pairs."""
        columns = [_mean(right, weights)]
        for name in found.names:
            columns.append(ranked[name](np.repeat(weights, 2, axis=1)))
            columns += [_mean(right, weights * (sign * more[name] > 0)) for sign in (1, -1)]
        return np.stack(columns, axis=1)

    value = figures(np.ones((1, n)))[0]
    size = max(1, 2**20 // n)  # resamples at a time: 16 MB for each array over the texts
    drawn = [
        figures(rng.multinomial(n, np.full(n, 1 / n), size=min(size, resamples - start)).astype(np.float64))
        for start in range(0, resamples, size)
    ]
    tail = (1 - confidence) / 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All-NaN slice")
        low, high = np.nanquantile(np.concatenate(drawn), [tail, 1 - tail], axis=0)
    labels = [("", "accuracy", n)]
    for name in found.names:
        counts = 2 * n, int((more[name] > 0).sum()), int((more[name] < 0).sum())
        labels += [(name, measure, count) for measure, count in zip(_MEASURES, counts)]
    rows = [
        Row(name, measure, float(v), float(a), float(b), count)
        for (name, measure, count), v, a, b in zip(labels, value, low, high)
    ]
    return Report(rows, confidence)


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B,): means of values (n,) under weights (B, n); NaN where all are 0."""
    with np.errstate(invalid="ignore"):
        return weights @ values / weights.sum(axis=1)


class _RankCorrelation:
    """Spearman's correlation of x and y (N,), ties averaged, of samples with whole-number weights (B, N)."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.orders = [(np.argsort(v, kind="stable"), *np.unique(v, return_inverse=True, return_counts=True)[1:])
                       for v in (x, y)]  # fmt: skip

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        centre = (weights.sum(axis=1, keepdims=True) + 1) / 2
        x, y = (self._ranks(weights, *order) - centre for order in self.orders)
        with np.errstate(invalid="ignore"):
            spread = np.sqrt((weights * x * x).sum(1) * (weights * y * y).sum(1))
            return (weights * x * y).sum(1) / spread

    @staticmethod
    def _ranks(weights: np.ndarray, order: np.ndarray, inverse: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """(B, N): a value's rank is the count of smaller ones and half of the count of its equals, and a half."""
        upto = np.cumsum(weights[:, order], axis=1)[:, np.cumsum(counts) - 1]
        below = np.pad(upto[:, :-1], ((0, 0), (1, 0)))
        return ((below + upto + 1) / 2)[:, inverse]


def plot(reports: Mapping[str, Report]) -> Any:
    """Bars of several reports side by side, by name (before and after, say); returns the two matplotlib axes.

    Left the correlation of the reward with each attribute, right the accuracies where the chosen text has more and
    less of it (hatched), dashed the accuracy on all pairs; whiskers are the intervals. Needs matplotlib.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(f'plots need matplotlib (pip install "rmfast[plot]"): {error}') from error

    names = next(iter(reports.values())).attributes
    figure, axes = pyplot.subplots(
        1, 2, figsize=(6 + len(names) * max(1.2, 0.5 * len(reports)), 4.2), width_ratios=[1, 1.6]
    )
    figure.set_layout_engine("constrained")
    colors = pyplot.rcParams["axes.prop_cycle"].by_key()["color"]

    def bars(axis: Any, where: np.ndarray, rows: list[Row], width: float, **style: Any) -> None:
        values, low, high = np.array([[row.value, row.low, row.high] for row in rows]).T
        reach = np.nan_to_num(np.clip([values - low, high - values], 0, None))
        axis.bar(where, np.nan_to_num(values), width, yerr=reach, error_kw={"linewidth": 1, "capsize": 2}, **style)

    for i, (label, each) in enumerate(reports.items()):
        color, width = colors[i % len(colors)], 0.8 / len(reports)
        at = np.arange(len(names)) - 0.4 + width * (i + 0.5)
        spearman, more, less = ([each[name, measure] for name in names] for measure in _MEASURES)
        bars(axes[0], at, spearman, width, color=color, label=label)
        bars(axes[1], at - width / 4, more, width / 2, color=color, label=label)
        bars(axes[1], at + width / 4, less, width / 2, color=color, alpha=0.5, hatch="///")
        axes[1].axhline(each["accuracy"].value, color=color, linewidth=1, linestyle="--")
    for axis, title in zip(axes, ("Spearman of reward and attribute", "accuracy: chosen has more, less (hatched)")):
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(names)), names, rotation=20)
    axes[0].axhline(0, color="0.5", linewidth=1)
    if any(reports):
        axes[0].legend(fontsize=8)
    return axes


CHOICES = (50, 100, 200, 500, 1000, 2000, 5000)  # the paper's k, from each end of an attribute's ranking
_LEAST_PAIRS = 8  # among 16 texts a correlation of 0.5 is still chance (5%)


@dataclass(frozen=True, eq=False)
class Neurons:
    """How each neuron (an output of a q, k, v, o, gate, up or down projection) ranks texts, beside their attributes.

    Attributes:
        attributes: names of the a attributes.
        sizes: module name: its number of neurons; m in all, in the model's order.
        spearman: (m, a) float32, rank correlation of activation at the last token and attribute; 0 for a neuron that is
            constant.
        median: (m,) float32, of the activations.
        fingerprint: of the model they belong to.
    """

    attributes: tuple[str, ...]
    sizes: dict[str, int]
    spearman: np.ndarray
    median: np.ndarray
    fingerprint: Any = None
    _orders: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.median)

    def top(self, attribute: str, n: int = 10) -> list[tuple[str, int, float, float]]:
        """(module name, neuron, correlation, median) of the n neurons with the strongest correlations."""
        column = self.spearman[:, self.attributes.index(attribute)]
        found = np.argsort(-abs(column), kind="stable")[:n]
        return [(*self._named(i), float(column[i]), float(self.median[i])) for i in found]

    def ends(self, attribute: str, k: int) -> np.ndarray:
        """(2k,) or fewer: the neurons that rank highest and lowest over all layers, k of each."""
        if attribute not in self._orders:
            column = self.spearman[:, self.attributes.index(attribute)]
            self._orders[attribute] = np.argsort(column, kind="stable").astype(np.int32)
        order = self._orders[attribute]
        return np.union1d(order[:k], order[len(order) - k :])

    def clamp(
        self, k: int | Mapping[str, int], positions: Literal["last", "all"] = "last", **metadata: Any
    ) -> NeuronClamp:
        """The clamp of the k highest- and lowest-ranking neurons of each attribute to their medians.

        Args:
            k: one for all attributes, or of each by name (0: the attribute is left alone).
            positions: the tokens at which neurons are clamped.
            metadata: kept with the clamp.

        Raises:
            ValueError: k is negative or above the number of neurons, or is not given for exactly these attributes.
        """
        from rmfast.interventions import NeuronClamp

        ks = _each(k, self.attributes, len(self))
        found = np.unique(np.concatenate([self.ends(name, each) for name, each in ks.items()]))
        edges = np.cumsum([0, *self.sizes.values()])
        cuts = np.searchsorted(found, edges)
        neurons = {
            name: (torch.from_numpy(found[a:b] - start), torch.from_numpy(self.median[found[a:b]]))
            for name, start, a, b in zip(self.sizes, edges, cuts, cuts[1:])
            if b > a
        }
        return NeuronClamp(neurons, positions, self.fingerprint, {"k": ks, "neurons": len(found), **metadata})

    def _named(self, index: int) -> tuple[str, int]:
        edges = np.cumsum([0, *self.sizes.values()])
        module = int(np.searchsorted(edges, index, side="right")) - 1
        return list(self.sizes)[module], int(index - edges[module])


def _each(k: Any, names: Sequence[str], most: int) -> dict[str, int]:
    ks = dict(k) if isinstance(k, Mapping) else dict.fromkeys(names, k)
    if set(ks) != set(names):
        raise ValueError(f"Expected k of each attribute ({', '.join(names)}; 0 leaves one alone), got {', '.join(ks)}")
    for name, each in ks.items():
        if isinstance(each, bool) or not isinstance(each, int | np.integer):
            raise TypeError(f'Expected k to be "search", a whole number, or one for each attribute, got {each!r}')
        if not 0 <= each <= most:
            raise ValueError(
                f"Expected k of {name} to be at least 0 and at most the model's {most} neurons, got {each}"
            )
    return {name: int(ks[name]) for name in names}


def localise(
    rm: RewardModel,
    pairs: Sequence[Any],
    *,
    attributes: Sequence[str] | Mapping[str, Attribute] | None = None,
    **encoding: Any,
) -> Neurons:
    """Rank correlations of all neurons with attributes of the texts, and the neurons' medians: what `fit` chooses from.

    Arguments and errors are those of `fit`; `encoding` are max_length, truncation and format, as for `score`.
    """
    from rmfast.last_token import LastTokenRuns

    read, found = _fitting(rm, pairs, attributes)
    return _localise(rm, LastTokenRuns(rm, [text for pair in read for text in pair.inputs], **encoding), found)


def _fitting(rm: RewardModel, pairs: Any, attributes: Any) -> tuple[list[Pair], Attributes]:
    """The pairs, read, and attributes of their 2n texts, checked to have something to find."""
    functions = _chosen(attributes)
    read = _read(pairs, _LEAST_PAIRS)
    found = _of_pairs(read, functions)
    _single(rm)
    constant = [name for name, column in zip(found.names, found.values.T) if (column == column[0]).all()]
    if constant:
        rest = [name for name in found.names if name not in constant]
        raise ValueError(
            f"Expected attributes that differ between the texts, but {', '.join(constant)} is the same in all "
            f"{len(found)}: give texts that have it, or attributes={rest} without it"
        )
    return read, found


def _localise(rm: RewardModel, runs: LastTokenRuns, found: Attributes) -> Neurons:
    values = torch.from_numpy(found.values)
    sizes, spearman, median = {}, [], []
    for name, outputs in runs.projections():  # no more of them is held than the runs hold
        rho, middle = neuron_stats(outputs, values.to(outputs.device))
        sizes[name] = len(middle)
        spearman.append(rho.float().cpu().nan_to_num(0.0))  # NaN: of a neuron that overflows
        median.append(middle.float().cpu())
    return Neurons(found.names, sizes, torch.cat(spearman).numpy(), torch.cat(median).numpy(), rm.fingerprint)


def fit(
    rm: RewardModel,
    pairs: Sequence[Any],
    *,
    attributes: Sequence[str] | Mapping[str, Attribute] | None = None,
    k: int | Mapping[str, int] | Literal["search"] = "search",
    trials: int = 100,
    choices: Sequence[int] = CHOICES,
    positions: Literal["last", "all"] = "last",
    seed: int = 0,
    progress: bool = False,
    batch_tokens: int | None = None,
    **encoding: Any,
) -> NeuronClamp:
    """The neurons that carry biases, clamped to their medians over the texts of the pairs: CIRM (arXiv 2604.27495).

    All neurons (outputs of the q, k, v, o, gate, up and down projections of every layer) are ranked by the Spearman
    correlation of their activation at the last token with each attribute, over both texts of all pairs; the k highest
    and k lowest of each attribute are clamped. The search draws k for all attributes at once with Optuna's TPE and
    takes the trial that gets most pairs right, of equal ones that with the fewest neurons; settings drawn again are not
    run again. With positions="last" a trial runs one token of each text on its kept prefix, with "all" whole texts.

    Args:
        rm: a model of one reward.
        pairs: (prompt, chosen, rejected) triples, or mappings with these keys, text or messages; the paper takes 500.
            They serve to rank and to choose, so the accuracies kept are optimistic: report on other pairs.
        attributes: names of `ATTRIBUTES`, default all five; or functions by name, as for `report`.
        k: neurons of each end of each attribute's ranking: one number, one for each attribute by name (0 leaves it
            alone), or "search" (needs Optuna).
        trials: settings that the search draws.
        choices: what it draws k from, for each attribute; the paper's have no 0. Those above the model's number of
            neurons are left out.
        positions: where neurons are clamped: at the token that is read, "last", or at "all".
        seed: of the search. The same seed gives the same clamp.
        progress: show progress bars.
        batch_tokens: most rows that run at once; default as for `score`.
        encoding: max_length, truncation and format, as for `score`.

    Returns:
        A `NeuronClamp`; its `metadata` (which `save` keeps) has k, the number of neurons, the accuracies on the pairs
        without and with the clamp, what was searched, and the seconds of each step. The model as it is competes too:
        where every trial gets fewer pairs right the clamp is empty, and a warning says so.

    Raises:
        ValueError: fewer than 8 pairs, a pair without both sides, an attribute that is the same in all texts, k above
            the number of neurons, no trials, a model of several rewards or without a reward of each token.
        ImportError: Optuna is not installed.
    """
    from rmfast.interventions import projections
    from rmfast.last_token import LastTokenRuns

    if positions not in ("last", "all"):
        raise ValueError(f'Expected positions to be "last" or "all", got {positions!r}')
    if isinstance(k, str) and k != "search":
        raise ValueError(f'Expected k to be "search", a whole number, or one for each attribute, got {k!r}')
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise ValueError(f"Expected trials to be a whole number of at least 1, got {trials!r}")
    seconds = _Stopwatch()
    with seconds("attributes and tokens"):
        read, found = _fitting(rm, pairs, attributes)
        most = sum(projections(rm).values())
        # What is wrong with these is said before the model runs for minutes.
        some = _choices(choices, most) if k == "search" else []
        ks = {} if k == "search" else _each(k, found.names, most)
        encoded = rm.encode([text for pair in read for text in pair.inputs], **encoding)
    running: dict[str, Any] = {"batch_tokens": batch_tokens, "max_length": encoding.get("max_length")}
    with seconds("prefixes"):
        runs = LastTokenRuns(rm, encoded, progress=progress, **running)
    with seconds("localisation"):
        neurons = _localise(rm, runs, found)
    with seconds("rewards without the clamp"):
        before = _accuracy(runs.rewards())

    def accuracy(ks: Mapping[str, int]) -> float:
        clamp = neurons.clamp(ks, positions)
        rewards = runs.rewards(clamp) if positions == "last" else rm.with_interventions(clamp).score(encoded, **running)
        return _accuracy(rewards)

    about: dict[str, Any] = {"method": "cirm", "pairs": len(read), "accuracy_before": before}
    if k == "search":
        with seconds("search"):
            tried = _search(accuracy, found.names, some, trials, seed, progress)
        about["search"] = {"trials": trials, "settings": len(tried), "choices": some, "seed": int(seed)}
        after = max(tried.values())
        equal = (dict(setting) for setting, got in tried.items() if got == after)
        ks = min(equal, key=lambda setting: len(neurons.clamp(setting)))
        if after < before:
            warnings.warn(
                f"None of {len(tried)} settings gets as many of the pairs right as the model as it is ({after:.1%}, not"
                f" {before:.1%}): the clamp is empty. Give k= to clamp all the same, or more pairs or trials",
                stacklevel=2,
            )
            ks, after = dict.fromkeys(neurons.attributes, 0), before
    else:
        with seconds("rewards with the clamp"):
            after = accuracy(ks)
    return neurons.clamp(ks, positions, **about, accuracy_after=after, seconds=dict(seconds))


def _choices(given: Any, most: int) -> list[int]:
    """Those of the choices of k that a model of so many neurons has, where there is Optuna to choose."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'the search for k needs Optuna (pip install "rmfast[debias]"), or give k=: {error}'
        ) from error

    every = np.asarray(given).tolist()  # a setting is kept as JSON, which has no numbers of numpy
    if not isinstance(every, list) or not all(type(k) is int and k >= 0 for k in every):
        raise ValueError(f"Expected choices to be whole numbers of at least 0, got {given!r}")
    if not (some := [k for k in every if k <= most]):
        raise ValueError(f"Expected choices at most the model's {most} neurons, got {every}")
    return some


def _search(
    accuracy: Callable[[Mapping[str, int]], float],
    names: Sequence[str],
    choices: list[int],
    trials: int,
    seed: int,
    progress: bool,
) -> dict[tuple[tuple[str, int], ...], float]:
    """Accuracy of each setting, (name, k) of all attributes, that TPE drew in so many trials."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it logs a line for each trial
    try:
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        tried: dict[tuple[tuple[str, int], ...], float] = {}
        bar = tqdm(range(trials), unit="trial", disable=not progress)
        for _ in bar:
            trial = study.ask()
            setting = tuple((name, trial.suggest_categorical(name, choices)) for name in names)
            if setting not in tried:
                tried[setting] = accuracy(dict(setting))
            study.tell(trial, tried[setting])
            bar.set_postfix(best=f"{max(tried.values()):.3f}")
    finally:
        optuna.logging.set_verbosity(level)
    return tried


def _accuracy(rewards: torch.Tensor) -> float:
    return float(_right(rewards.double().numpy().reshape(-1, 2)).mean())


class _Stopwatch(dict[str, float]):
    """Seconds of each named step."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self[name] = round(time.perf_counter() - start, 3)
