"""Attributes that a reward should not depend on, and how far it does, measured on pairs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rmfast import arguments
from rmfast.plots import shown_table
from rmfast.texts.pairs import Pair, read_pairs, text_of

if TYPE_CHECKING:
    from rmfast.engine.scorer import Scorer

Attribute = Callable[[str, str], float]
Wanted = Sequence[str] | Mapping[str, Attribute | str] | None  # names; functions, or names of columns, by name
_SIDES = ("chosen", "rejected")
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
        return self.values[:, self.names.index(arguments.word("name", name, self.names))]


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
    sides = [_texts(name, given) for name, given in (("prompts", prompts), ("responses", responses))]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"Expected as many prompts as responses, got {len(sides[0])} and {len(sides[1])}")
    more = {} if functions is None else _functions("functions", functions)
    return _measure(len(sides[0]), _of_texts(list(zip(*sides)), {**ATTRIBUTES, **more}))


def _texts(name: str, given: Any) -> list[str]:
    found = []
    for i, each in enumerate(arguments.sequence(name, given, "a sequence of texts or lists of messages")):
        messages = isinstance(each, list | tuple) and all(isinstance(message, Mapping) for message in each)
        if not (messages or isinstance(each, str) or (each is None and name == "prompts")):
            raise TypeError(f"Expected {name}[{i}] to be a text or a list of messages, got {arguments.shown(each)}")
        found.append(text_of(each or ""))
    return found


def _functions(name: str, given: Any) -> dict[str, Attribute]:
    expected = f"Expected {name} to map names to functions of (prompt, response)"
    if not isinstance(given, Mapping):
        raise TypeError(f"{expected}, got {arguments.shown(given)}")
    for key, function in given.items():
        if not isinstance(key, str) or not callable(function):
            raise TypeError(f"{expected}, got {arguments.shown(function)} for {arguments.shown(key)}")
    return dict(given)


def _of_texts(texts: list[tuple[str, str]], functions: Mapping[str, Attribute]) -> dict[str, Callable[[int], Any]]:
    """Each attribute of the i-th text."""

    def reading(function: Attribute) -> Callable[[int], Any]:
        return lambda i: function(*texts[i])

    return {name: reading(function) for name, function in functions.items()}


def _measure(count: int, of: Mapping[str, Callable[[int], Any]]) -> Attributes:
    values = np.empty((count, len(of)))
    for j, (name, read) in enumerate(of.items()):
        for i in range(count):
            try:
                value = read(i)
                values[i, j] = float(value if isinstance(value, bool | np.bool_) else arguments.array("it", value))
            except (TypeError, ValueError) as error:
                raise ValueError(f"attribute {name!r} of text {i} is no number: {error}") from error
        if not np.isfinite(values[:, j]).all():
            raise ValueError(f"attribute {name!r} of text {int((~np.isfinite(values[:, j])).argmax())} is not finite")
    return Attributes(tuple(of), values)


def attributes_of_pairs(pairs: list[Pair], wanted: Wanted) -> Attributes:
    """Of 2n texts: chosen and rejected of each pair in turn.

    Raises:
        ValueError: a name that is none of `ATTRIBUTES` and of no two columns of all pairs, NAME_chosen and
            NAME_rejected; something that is no finite number.
    """
    texts = [(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    named = _named(wanted, pairs)
    functions = {name: of for name, of in named.items() if callable(of)}
    cells = {
        name: lambda i, of=of: _cell(pairs[i // 2].row[f"{of}_{_SIDES[i % 2]}"])
        for name, of in named.items()
        if isinstance(of, str)
    }
    readers = {**_of_texts(texts, functions), **cells}
    return _measure(len(texts), {name: readers[name] for name in named})


def _named(wanted: Wanted, pairs: list[Pair]) -> dict[str, Attribute | str]:
    """Functions, or names of columns of the pairs, by name."""
    if wanted is None:
        return dict(ATTRIBUTES)
    columns = [
        name
        for key in pairs[0].row
        if isinstance(key, str) and (name := key.removesuffix("_chosen")) != key
        and all(pair.row.get(f"{name}_{side}") is not None for pair in pairs for side in _SIDES)
    ]  # fmt: skip
    if not isinstance(wanted, Mapping):
        known = [*ATTRIBUTES, *(name for name in columns if name not in ATTRIBUTES)]
        names = arguments.words("attributes, where they are no functions by name,", wanted, known)
        return {name: ATTRIBUTES.get(name, name) for name in names}
    if not wanted:
        raise ValueError("Expected attributes to hold at least one, got none")
    of_columns = {name: of for name, of in wanted.items() if isinstance(of, str)}
    for of in of_columns.values():
        if of not in columns:
            raise ValueError(f"Expected all pairs to have columns {of}_chosen and {of}_rejected, for an attribute")
    functions = _functions("attributes", {name: of for name, of in wanted.items() if name not in of_columns})
    return {name: of_columns.get(name) or functions[name] for name in wanted}


def _cell(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value  # CSV has no numbers


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

    def _repr_html_(self) -> str:
        """For notebooks: the rows as a table."""
        return shown_table(Row._fields, self.rows, f"intervals of {self.confidence:.0%}")

    def to_dataframe(self) -> Any:
        """The rows as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.rows, columns=list(Row._fields))

    def __str__(self) -> str:
        whole = self["accuracy"]
        cells = [["attribute", "Spearman with the reward", "accuracy, chosen has more", "chosen has less"]]
        for name in self.attributes:
            spearman, more, less = (self[name, measure] for measure in _MEASURES)
            cells.append([name, figure(spearman, "+.3f"), *(f"{figure(row)}  n {row.n}" for row in (more, less))])
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
        return "\n".join([f"{whole.n} pairs, accuracy {figure(whole)}, intervals of {self.confidence:.0%}", *lines])

    def plot(self) -> Any:
        """Bars of correlations and accuracies, with their intervals; returns the two matplotlib axes."""
        return plot({"": self})


_MEASURES = ("spearman", "accuracy_more", "accuracy_less")


def figure(row: Row, spec: str = ".3f") -> str:
    """Its value and interval, or - for none."""
    if np.isnan(row.value):
        return "-"
    return f"{row.value:{spec}} [{row.low:{spec}}, {row.high:{spec}}]"


def report(
    rm: Scorer | None,
    pairs: Sequence[Any],
    *,
    attributes: Wanted = None,
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
            (`rmfast.texts.pairs.read_pairs`).
        attributes: names of `ATTRIBUTES`, default all, or of columns of the pairs ("toxicity" is toxicity_chosen and
            toxicity_rejected); or by name functions, (prompt, response) as texts to a number, and names of columns
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
    read = read_some(pairs, 2)
    found = attributes_of_pairs(read, attributes)
    resamples = arguments.whole("resamples", resamples, 1)
    arguments.number("confidence", confidence, 0, 1, above=True, below=True)
    arguments.whole("seed", seed, 0)
    if rm is not None:
        _expect_scorer(rm)
    if rewards is None:
        if rm is None:
            raise ValueError("Expected rm, or rewards (n, 2) of chosen and rejected, got neither")
        rewards = of_one_reward(rm).score([text for pair in read for text in pair.inputs], **scoring).reshape(-1, 2)
    return _reported(arguments.finite("rewards", rewards, len(read), 2), found, resamples, confidence, seed)


def read_some(pairs: Sequence[Any], least: int) -> list[Pair]:
    """The pairs, read; ValueError for fewer than `least`."""
    arguments.expect_dimension("pairs", pairs)
    read = read_pairs(pairs)
    if len(read) < least:
        hint = ": fewer find noise alone, and the paper takes 500" if least > 2 else ""
        raise ValueError(f"Expected at least {least} pairs, got {len(read)}{hint}")
    return read


def _expect_scorer(rm: Any) -> None:
    from rmfast.engine.scorer import Scorer  # not before a model is there

    arguments.instance("rm", rm, Scorer)


def of_one_reward(rm: Scorer) -> Scorer:
    """The model; ValueError for one of several rewards."""
    _expect_scorer(rm)
    if rm.num_labels != 1:
        raise ValueError(
            f"Expected a model of one reward, got one of {rm.num_labels}: pairs have no order under several"
        )
    return rm


def right(rewards: np.ndarray) -> np.ndarray:
    """(n,): 1 where the chosen text has the higher reward, a half for a tie."""
    margin = rewards[:, 0] - rewards[:, 1]
    return (margin > 0) + 0.5 * (margin == 0)


def _reported(rewards: np.ndarray, found: Attributes, resamples: int, confidence: float, seed: int) -> Report:
    n, rights, rng = len(rewards), right(rewards), np.random.default_rng(seed)
    more = {name: np.diff(found[name].reshape(n, 2)[:, ::-1])[:, 0] for name in found.names}
    ranked = {name: _RankCorrelation(rewards.ravel(), found[name]) for name in found.names}

    def figures(weights: np.ndarray) -> np.ndarray:
        """(B, figures) under weights (B, n) of the pairs."""
        columns = [_mean(rights, weights)]
        for name in found.names:
            columns.append(ranked[name](np.repeat(weights, 2, axis=1)))
            columns += [_mean(rights, weights * (sign * more[name] > 0)) for sign in (1, -1)]
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

    if not isinstance(reports, Mapping) or not reports:
        raise TypeError(f"Expected reports to be a mapping of names to reports, got {arguments.shown(reports)}")
    names = arguments.instance("each of reports", next(iter(reports.values())), Report).attributes
    for label, each in reports.items():
        if arguments.instance("each of reports", each, Report).attributes != names or not isinstance(label, str):
            raise ValueError(
                f"Expected reports of the same attributes by names, got {', '.join(each.attributes)} of "
                f"{arguments.shown(label)} beside {', '.join(names)}"
            )
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
