"""Neurons that carry biases, found and clamped: CIRM.

The method is that of arXiv 2604.27495: neurons whose activation at the last token ranks texts as a spurious attribute
does are set to their median, so that the reward no longer hears of the attribute through them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from rmfast.arguments import whole, wholes, word
from rmfast.debias.apply import intervened, projections
from rmfast.debias.interventions import NeuronClamp
from rmfast.debias.last_token import LastTokenRuns
from rmfast.debias.measure import Attribute, right
from rmfast.debias.neurons import fitting, k_of_each, localised
from rmfast.engine.options import checked_run
from rmfast.engine.scorer import Scorer

CHOICES = (50, 100, 200, 500, 1000, 2000, 5000)  # the paper's k, from each end of an attribute's ranking


def fit(
    rm: Scorer,
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
        encoding: max_length, truncation, format, chat_template_kwargs and tools, as for `score`.

    Returns:
        A `NeuronClamp`; its `metadata` (which `save` keeps) has k, the number of neurons, the accuracies on the pairs
        without and with the clamp, what was searched, and the seconds of each step. The model as it is competes too:
        where every trial gets fewer pairs right the clamp is empty, and a warning says so.

    Raises:
        ValueError: fewer than 8 pairs, a pair without both sides, an attribute that is the same in all texts, k above
            the number of neurons, no trials, a model of several rewards or without a reward of each token.
        ImportError: Optuna is not installed.
    """
    word("positions", positions, ("last", "all"))
    if isinstance(k, str) and k != "search":
        raise ValueError(f'Expected k to be "search", an int, or one for each attribute, got {k!r}')
    searched = isinstance(k, str)
    trials, seed = whole("trials", trials, 1), whole("seed", seed, 0, 2**32 - 1)
    choices = wholes("choices", choices, least=0)  # a setting is kept as JSON, which has no numbers of numpy
    batch_tokens = checked_run(batch_tokens, progress)
    seconds = _Stopwatch()
    with seconds("attributes and tokens"):
        read, found = fitting(rm, pairs, attributes)
        most = sum(projections(rm).values())
        # What is wrong with these is said before the model runs for minutes.
        some = _choices(choices, most) if searched else []
        ks = {} if searched else k_of_each(k, found.names, most)
        encoded = rm.encode([text for pair in read for text in pair.inputs], **encoding)
    running: dict[str, Any] = {"batch_tokens": batch_tokens, "max_length": encoding.get("max_length")}
    with seconds("prefixes"):
        runs = LastTokenRuns(rm, encoded, progress=progress, **running)
    with seconds("localisation"):
        neurons = localised(rm, runs, found)
    with seconds("rewards without the clamp"):
        before = _accuracy(runs.rewards())

    def accuracy(ks: Mapping[str, int]) -> float:
        clamp = neurons.clamp(ks, positions)
        rewards = runs.rewards(clamp) if positions == "last" else intervened(rm, [clamp]).score(encoded, **running)
        return _accuracy(rewards)

    about: dict[str, Any] = {"method": "cirm", "pairs": len(read), "accuracy_before": before}
    if searched:
        with seconds("search"):
            tried = _search(accuracy, found.names, some, trials, seed, progress)
        about["search"] = {"trials": trials, "settings": len(tried), "choices": some, "seed": seed}
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


def _choices(every: list[int], most: int) -> list[int]:
    """Those of the choices of k that a model of so many neurons has, where there is Optuna to choose."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'the search for k needs Optuna (pip install "rmfast[debias]"), or give k=: {error}'
        ) from error

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
    return float(right(rewards.double().numpy().reshape(-1, 2)).mean())


class _Stopwatch(dict[str, float]):
    """Seconds of each named step."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self[name] = round(time.perf_counter() - start, 3)
