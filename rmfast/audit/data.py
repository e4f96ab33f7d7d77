"""What an audit found, as plain data: everything in it is text, numbers, None, lists and mappings, as JSON has them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

_FORMAT, _VERSION = "rmfast.Audit", 1


class Span(TypedDict):
    """A figure and its interval; None where there is nothing to compare."""

    value: float | None
    low: float | None
    high: float | None
    n: int


class Figure(Span):
    """A row of the table by subset (`rmfast.evaluation.Figure`)."""

    subset: str
    measure: str
    prompts: int
    ties: int


class Bin(Span):
    """Accuracy (value, low, high) of the n pairs of |margin| from `start` to `end`.

    `margin` is the mean |margin|, `predicted` the mean of 1 / (1 + exp(−|margin|)), the Bradley–Terry probability that
    the response which the model prefers is the better one.
    """

    start: float
    end: float
    margin: float
    predicted: float


class Bar(TypedDict):
    """Pairs whose margin is from `start` to `end`."""

    start: float
    end: float
    n: int


class Calibration(TypedDict):
    """Margins against accuracy. `error`: Σ_b n_b / n · |accuracy_b − predicted_b| over the bins."""

    bins: list[Bin]
    bars: list[Bar]
    error: float


class Trend(Span):
    """The mean reward (value, low, high) of the n texts of one range of lengths, whose mean is `characters`."""

    characters: float


class Dot(TypedDict):
    characters: int
    reward: float
    side: str


class Lengths(TypedDict):
    """Reward against characters of the response; `dots` are drawn from all `texts`."""

    dots: list[Dot]
    trend: list[Trend]
    texts: int


class Bias(TypedDict):
    """A figure of `rmfast.debias.report` without the clamp and with it (None where there is none)."""

    attribute: str
    measure: str
    before: Span
    after: Span | None


class Clamp(TypedDict):
    """The clamp that was fitted on so many pairs: its neurons, k by attribute, the change of the accuracy on others."""

    neurons: int
    k: dict[str, int]
    fitted: int
    change: Span


class Biases(TypedDict):
    """Of `pairs` pairs. `why` says why there is no clamp."""

    rows: list[Bias]
    pairs: int
    clamp: Clamp | None
    why: str


class Tokens(TypedDict):
    """The reward read at each token, from `start` on; `read` is where the score is read, `total` how many there are."""

    words: list[str]
    values: list[float | None]
    start: int
    total: int
    read: int


class Trajectory(TypedDict):
    """Tokens of both texts, whose first `shared` are the same."""

    shared: int
    chosen: Tokens
    rejected: Tokens


class LensCurve(TypedDict):
    """The reward at the embedding and behind each layer."""

    chosen: list[float | None]
    rejected: list[float | None]


class Map(TypedDict):
    """Effects (layers, groups of tokens) of `run` edits on the reward of a text, `base`; `gap`: the other's less it."""

    side: str
    layers: list[int]
    columns: list[str]
    effect: list[list[float | None]]
    base: float
    gap: float | None
    run: int


class Sweep(TypedDict):
    """What is put in: "denoising", the chosen text's stream into the rejected text's run; or "mean", into either's."""

    mode: str
    maps: list[Map]


class Text(TypedDict):
    """A text's beginning, and how many characters more it has."""

    text: str
    more: int


class Pair(TypedDict):
    """A pair that is shown: "right", "wrong" (most certain) or "close" (least certain); `place` is in the file."""

    kind: str
    place: int
    id: str
    subset: str
    prompt: Text
    chosen: Text
    rejected: Text
    rewards: list[float]
    margin: float
    tokens: Trajectory | None
    lens: LensCurve | None
    sweep: Sweep | None


class Way(TypedDict):
    """A row of `rmfast.evaluation.Parity`."""

    way: str
    largest: float | None
    moved: int
    n: int
    why: str


class Agreement(TypedDict):
    """Scores beside those of other ways to score the same texts; `spread`: the standard deviation of the scores."""

    ways: list[Way]
    spread: float


@dataclass
class Audit:
    """What an audit found. `save` and `load` keep it as JSON, `rmfast.audit.render` makes the page of it.

    Attributes:
        model: its folder or id.
        pairs, prompts, left_out: how many pairs there are, of how many prompts; rows without scores.
        confidence: of the intervals.
        figures: accuracy by subset and over all.
        calibration, lengths, biases: as their classes say.
        shown: the most and least certain pairs.
        parity: None where it was not asked for.
        facts: by heading, names and values by which the run can be repeated.
        missing: by section, why it (or part of it) could not be made.
    """

    model: str
    pairs: int
    prompts: int
    left_out: int
    confidence: float
    figures: list[Figure]
    calibration: Calibration
    lengths: Lengths
    biases: Biases
    shown: list[Pair] = field(default_factory=list)
    parity: Agreement | None = None
    facts: dict[str, list[list[str]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Audit({self.model!r}, {self.pairs} pairs, {len(self.shown)} shown)"

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file."""
        text = json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Audit:
        """What `save` wrote. Raises ValueError for another file or version."""
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        named = {each.name for each in fields(cls)}
        if (
            not isinstance(found, dict)
            or found.pop("format", None) != _FORMAT
            or found.pop("version", None) != _VERSION
        ):
            raise ValueError(f"Expected a file that Audit.save wrote, of version {_VERSION}, got {str(path)!r}")
        if set(found) != named:
            raise ValueError(f"Expected {', '.join(sorted(named))} in {str(path)!r}, got {', '.join(sorted(found))}")
        return cls(**found)


def number(value: Any) -> float | None:
    """A float of seven digits, which fp32 has, short in JSON; None for what is not finite."""
    value = float(value)
    return float(f"{value:.7g}") if math.isfinite(value) else None


def span(value: Any, low: Any, high: Any, n: int) -> Span:
    """A figure with its interval as it is, but for what is not finite."""
    return {"value": finite(value), "low": finite(low), "high": finite(high), "n": int(n)}


def finite(value: Any) -> float | None:
    """The float, or None for one that is not finite, which JSON lacks."""
    return float(value) if math.isfinite(value) else None
