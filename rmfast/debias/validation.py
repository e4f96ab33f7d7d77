"""What a clamp gains on pairs that it was not fitted on: by nested cross-validation, or on other pairs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from rmfast import arguments
from rmfast.arguments import number, whole
from rmfast.debias.apply import intervened
from rmfast.debias.gain import gains, over_random
from rmfast.debias.interventions import NeuronClamp, Positions
from rmfast.debias.last_token import LastTokenRuns
from rmfast.debias.measure import Row, Wanted, attributes_of_pairs, figure, read_some
from rmfast.debias.neurons import Neurons
from rmfast.debias.request import K, Request, request
from rmfast.debias.search import RULES, SHARES, Rule, Tried, choose
from rmfast.debias.study import NONE, Study, prompts_of
from rmfast.engine.scorer import Scorer
from rmfast.plots import axes, shown_table
from rmfast.resampling import as_json
from rmfast.texts.pairs import Pair

_AT_ONCE = 512  # texts of `test` whose keys and values are held: 1.4 GB of SmolLM2's for 60 tokens each


@dataclass(frozen=True, eq=False)
class Validation:
    """A clamp, and what clamps found in the same way gain and cost on pairs that they were not fitted on.

    Attributes:
        clamp: fitted on all pairs; empty where the rule took none. Its metadata is that of `fit`.
        rows: a `Row` (attribute, measure, value, low, high, n) each. Of attribute "" the "gain", the change of the
            share of pairs that the reward gets right; "gain_random", that of as many random neurons of the same
            projections, and "gain_over_random". Of each attribute "gain_more", "gain_less" and "gain_same", the gain
            where the chosen text has more of it, less, or as much (within a tenth of the standard deviation of the
            differences); there also "shift_same", the mean change of the rewards in their standard deviations, and
            "moved_same", the mean size of the change of a pair's margin in the margins' standard deviations.
        rules: the gain by each rule that chooses k; of a given k none.
        chosen: k by each rule, in each fold and last with all pairs.
        curve: (k, neurons, cross-validated accuracy) of all settings that were tried with all pairs.
        neurons: as all pairs rank them.
        before, after: (n, 2) rewards of the pairs that `rows` are of, without and with the clamps.
        folds: of the cross-validation; 0 where other pairs were given.
        confidence: of the intervals.
    """

    clamp: NeuronClamp
    rows: list[Row]
    rules: dict[str, Row]
    chosen: dict[str, list[dict[str, int]]]
    curve: list[tuple[dict[str, int], int, float]]
    neurons: Neurons
    before: np.ndarray
    after: np.ndarray
    folds: int
    confidence: float

    def __getitem__(self, key: tuple[str, str] | str) -> Row:
        """The row of (attribute, measure), or of a measure of attribute ""."""
        wanted = ("", key) if isinstance(key, str) else key
        for row in self.rows:
            if (row.attribute, row.measure) == wanted:
                return row
        raise KeyError(key)

    @property
    def reliable(self) -> bool:
        """Whether the interval of the held-out gain lies above 0."""
        return self["gain"].low > 0

    @property
    def attributes(self) -> list[str]:
        return list(dict.fromkeys(row.attribute for row in self.rows if row.attribute))

    def _repr_html_(self) -> str:
        """For notebooks: the rows as a table."""
        return shown_table(Row._fields, self.rows, f"{self.verdict}; intervals of {self.confidence:.0%}")

    @property
    def verdict(self) -> str:
        """What the held-out gain allows to say."""
        gain = self["gain"]
        said = "held-out gain" if self.reliable else "worse" if gain.high < 0 else "no reliable gain"
        return f"{said}: {figure(gain, '+.3f')} on {gain.n} held-out pairs"

    def __str__(self) -> str:
        how = f"each under a clamp fitted without it ({self.folds} folds)" if self.folds else "not fitted on"
        lines = [self.verdict, f"pairs {how}; changes of accuracy, intervals of {self.confidence:.0%}"]
        for rule, row in self.rules.items():
            *folds, last = (f"{_total(ks):,}" for ks in self.chosen[rule])
            within = f" with all pairs, in the folds {' '.join(folds)}" if folds else ""
            lines.append(f"k by {rule}: {figure(row, '+.3f')}  k of all attributes: {last}{within}")
        if any(row.measure == "gain_random" for row in self.rows):
            random, over = (figure(self[name], "+.3f") for name in ("gain_random", "gain_over_random"))
            lines.append(f"as many random neurons: {random}  gain over these: {over}")
        cells = [["attribute", "chosen has more", "chosen has less", "as much", "margins moved there, in SD"]]
        for name in self.attributes:
            three = [self[name, f"gain_{side}"] for side in ("more", "less", "same")]
            moved = figure(self[name, "moved_same"])
            cells.append([name, *(f"{figure(row, '+.3f')}  n {row.n}" for row in three), moved])
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
        return "\n".join(lines)

    def to_dataframe(self) -> Any:
        """The rows as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.rows, columns=list(Row._fields))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Rows, rules, choices of k and the curve over k as JSON; the clamp has a `save` of its own."""
        out = {
            "verdict": self.verdict, "reliable": self.reliable, "folds": self.folds, "confidence": self.confidence,
            "rows": [as_json(row) for row in self.rows],
            "rules": {rule: as_json(row) for rule, row in self.rules.items()}, "chosen": self.chosen,
            "curve": [{"k": ks, "neurons": count, "accuracy": float(accuracy)} for ks, count, accuracy in self.curve],
        }  # fmt: skip
        text = json.dumps(out, indent=2, allow_nan=False)
        arguments.path("path", path).write_text(text + "\n", encoding="utf-8")

    def plot(self, ax: Any = None) -> Any:
        """The changes of the accuracy with their intervals: by rule, of random neurons, and by side of each attribute.

        Returns:
            The matplotlib Axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        rows = {f"k by {rule}": row for rule, row in self.rules.items()} or {"gain": self["gain"]}
        rows |= {_SHOWN[row.measure]: row for row in self.rows if row.measure in _SHOWN}
        for name in self.attributes:
            for side, said in (("more", "chosen has more"), ("less", "chosen has less"), ("same", "as much")):
                rows[f"{name}: {said}"] = self[name, f"gain_{side}"]
        ax = axes(ax, 6.5, 1.2 + 0.3 * len(rows))
        at = np.arange(len(rows))[::-1]
        value, low, high = np.array([[row.value, row.low, row.high] for row in rows.values()]).T
        ax.errorbar(value, at, xerr=np.clip([value - low, high - value], 0, None), fmt="o", markersize=4, linewidth=1)
        ax.axvline(0, color="0.5", linewidth=0.8)
        ax.set_yticks(at, [f"{name} (n {row.n})" for name, row in rows.items()], fontsize=8)
        ax.set_xlabel("change of the share of pairs that are right")
        ax.set_title(self.verdict, fontsize=9)
        return ax


_SHOWN = {"gain_random": "as many random neurons", "gain_over_random": "gain over these"}


def _total(ks: Mapping[str, int]) -> int:
    return sum(ks.values())


def validate(
    rm: Scorer,
    pairs: Sequence[Any],
    *,
    test: Sequence[Any] | None = None,
    attributes: Wanted = None,
    k: K = "search",
    rule: Rule = "one_se",
    folds: int = 5,
    trials: int = 30,
    choices: Sequence[int | float] = SHARES,
    controls: int = 5,
    positions: Positions = "last",
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = False,
    batch_tokens: int | None = None,
    **encoding: Any,
) -> Validation:
    """A clamp as `fit` makes it, and what it gains on pairs that it was not fitted on.

    Without `test`, by nested cross-validation: for each fold neurons are ranked and k is chosen on the others, by
    cross-validation among these (the neurons ranked without the fold that is predicted, too), and the clamp is judged
    on the fold. So every pair is judged once, under a clamp that knows nothing of it. Texts are run once; a setting
    then takes one token of each text for each of the `folds` choices of k.

    With `test`, k is chosen by cross-validation over `pairs`, and the clamp of all of them is judged on `test`.

    Args:
        rm, pairs, attributes, k, rule, trials, choices, positions, seed, progress, batch_tokens, encoding: as for
            `fit`. The default choices are shares of the model's neurons, from 0.03% to 12% for each attribute.
        test: pairs to judge on, in the forms of `pairs`; 512 texts at a time are held.
        folds: at least 3, or with `test` or a given k 2. Pairs of one prompt are in one fold.
        controls: draws of as many random neurons of each projection, for comparison; 0 for none.
        confidence: of the intervals, which go by prompts (`rmfast.debias.gain.interval`).

    Returns:
        A `Validation`.

    Raises:
        ValueError: as for `fit`; pairs of `test` have no columns that attributes are of; too few pairs for the folds.
    """
    asked = request(
        rm, pairs, attributes=attributes, k=k, rule=rule, folds=folds, trials=trials, choices=choices,
        positions=positions, seed=seed, progress=progress, batch_tokens=batch_tokens,
    )  # fmt: skip
    nested = test is None
    whole("folds", asked.folds, 3 if nested and asked.ks is None else 2)
    controls = whole("controls", controls, 0, 1000)
    number("confidence", confidence, 0, 1, above=True, below=True)
    other = None if test is None else _read(test)
    judged = asked.found if other is None else attributes_of_pairs(other, attributes)
    study = asked.study(encoding, held=int(nested) + int(asked.ks is None))
    outer = [frozenset({part}) for part in range(asked.folds)] if nested else []
    inner = [left_out for each in [*outer, NONE] for _, left_out in study.inner(each)] if asked.ks is None else []
    study.rank([NONE, *outer, *inner])
    with study.seconds("search"):
        choices_of = [_chosen(asked, study, without) for without in [*outer, NONE]]
    with study.seconds("held-out rewards"):
        if other is None:
            of, before, after, randoms = study.of, study.before, *_across(asked, study, outer, choices_of, controls)
        else:
            of = prompts_of(other)
            before, after, randoms = _on(asked, study, other, choices_of[-1][0], controls, encoding)
    rules = {name: gains(before, found, judged, of, confidence)[0] for name, found in after.items()}
    ks, tried = choices_of[-1]
    best = ks[asked.rule]
    own = after[asked.rule]
    about: dict[str, Any] = {"method": "cirm", "pairs": len(asked.pairs)}
    if asked.ks is None:
        about["search"] = asked.about(len(tried))
    rows = [*gains(before, own, judged, of, confidence), *over_random(before, own, randoms, of, confidence)]
    about["held_out"] = {row.measure: list(row[2:]) for row in rows if not row.attribute}
    return Validation(
        clamp=study.clamp(best, **about, seconds=dict(study.seconds)),
        rows=rows,
        rules=rules if asked.ks is None else {},
        chosen={name: [each[name] for each, _ in choices_of] for name in rules} if asked.ks is None else {},
        curve=[(each.ks, each.neurons, each.accuracy) for each in tried],
        neurons=study.neurons(),
        before=before,
        after=own,
        folds=asked.folds if nested else 0,
        confidence=confidence,
    )


def _read(test: Any) -> list[Pair]:
    try:
        return read_some(test, 2)
    except (TypeError, ValueError) as error:
        raise type(error)(f"test: {error}") from error


Choices = tuple[dict[str, dict[str, int]], list[Tried]]  # k by each rule, and what was tried


def _chosen(asked: Request, study: Study, without: frozenset[int]) -> Choices:
    """On all folds but some."""
    if asked.ks is not None:
        return {asked.rule: asked.ks}, []
    tried, places = asked.tried(study, without), study.places(without)
    before, of = study.before[places], study.of[places]
    return {rule: choose(rule, tried, before, of).ks for rule in RULES}, tried


def _across(
    asked: Request, study: Study, outer: Sequence[frozenset[int]], choices: Sequence[Choices], controls: int
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """(n, 2) rewards by each rule, each fold's under the clamp of the others, and of as many random neurons."""
    after = {
        rule: study.joined([study.under(ks[rule], part, outer[part]) for part, (ks, _) in enumerate(choices[:-1])])
        for rule in choices[0][0]
    }
    randoms = []
    for draw in range(controls):
        each = []
        for part, (ks, _) in enumerate(choices[:-1]):
            like = study.clamp(ks[asked.rule], outer[part])
            each.append(study.rewards(part, study.neurons(outer[part]).random(like, draw)))
        randoms.append(study.joined(each))
    return after, randoms


def _on(
    asked: Request, study: Study, other: Sequence[Pair], ks: dict[str, dict[str, int]], controls: int,
    encoding: Mapping[str, Any],
) -> tuple[np.ndarray, dict[str, np.ndarray], list[np.ndarray]]:  # fmt: skip
    """(n, 2) rewards of other pairs as they are, by each rule, and under as many random neurons."""
    clamps = [study.clamp(each) for each in ks.values()]
    own = clamps[list(ks).index(asked.rule)]
    clamps += [study.neurons().random(own, draw) for draw in range(controls)]
    found = np.concatenate([*_rewards(asked, other, clamps, encoding)], axis=1)
    before, after, randoms = found[0], found[1 : 1 + len(ks)], found[1 + len(ks) :]
    return before, dict(zip(ks, after)), list(randoms)


def _rewards(
    asked: Request, other: Sequence[Pair], clamps: Sequence[NeuronClamp], encoding: Mapping[str, Any]
) -> Iterator[np.ndarray]:
    """(1 + clamps, m, 2) of some pairs at a time."""
    running: dict[str, Any] = {"batch_tokens": asked.batch_tokens}
    for start in range(0, len(other), _AT_ONCE // 2):
        texts = [text for pair in other[start : start + _AT_ONCE // 2] for text in pair.inputs]
        if asked.positions == "last":
            runs = LastTokenRuns(asked.rm, texts, progress=asked.progress, **running, **encoding)
            found = [runs.rewards(), *map(runs.rewards, clamps)]
        else:
            models = [asked.rm, *(intervened(asked.rm, [clamp]) for clamp in clamps)]
            found = [model.score(texts, **running, **encoding) for model in models]
        yield np.stack([cast(Any, rewards).double().numpy().reshape(-1, 2) for rewards in found])
