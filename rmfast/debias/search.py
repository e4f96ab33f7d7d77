"""Settings of k to try, and which of those tried to take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from tqdm.auto import tqdm

from rmfast.debias.gain import standard_error
from rmfast.debias.measure import right

Rule = Literal["accuracy", "one_se"]
RULES: tuple[Rule, ...] = ("accuracy", "one_se")

CHOICES = (50, 100, 200, 500, 1000, 2000, 5000)  # the paper's k, from each end of an attribute's ranking
# Of all neurons, for both ends of one attribute. The paper clamped 0.085% and 1.7% for five attributes together.
SHARES = (0.0003, 0.001, 0.003, 0.01, 0.017, 0.03, 0.06, 0.12)


@dataclass(frozen=True, eq=False)
class Tried:
    """k of each attribute, how many neurons that clamps, and rewards (n, 2) under that clamp."""

    ks: dict[str, int]
    neurons: int
    rewards: np.ndarray

    @property
    def accuracy(self) -> float:
        return float(right(self.rewards).mean())


def needs_optuna(names: Sequence[str], choices: Sequence[int], trials: int) -> bool:
    """Whether there are more settings than trials; ImportError where Optuna, which then draws them, is missing."""
    if len(choices) ** len(names) <= trials:
        return False
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'the search for k needs Optuna (pip install "rmfast[debias]"), or give k=: {error}'
        ) from error
    return True


def search(
    attempt: Callable[[Mapping[str, int]], Tried],
    names: Sequence[str],
    choices: Sequence[int],
    trials: int,
    seed: int,
    progress: bool,
) -> list[Tried]:
    """What each setting gave: all of them, or where there are more than trials those that TPE draws for accuracy."""
    tried: dict[tuple[int, ...], Tried] = {}
    if not needs_optuna(names, choices, trials):
        every = list(product(choices, repeat=len(names)))
        return [attempt(dict(zip(names, each))) for each in tqdm(every, unit="trial", disable=not progress)]
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it logs a line for each trial
    try:
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        bar = tqdm(range(trials), unit="trial", disable=not progress)
        for _ in bar:
            trial = study.ask()
            setting = tuple(trial.suggest_categorical(name, choices) for name in names)
            if setting not in tried:  # one that is drawn again is not run again
                tried[setting] = attempt(dict(zip(names, setting)))
            study.tell(trial, tried[setting].accuracy)
            bar.set_postfix(best=f"{max(each.accuracy for each in tried.values()):.3f}")
    finally:
        optuna.logging.set_verbosity(level)
    return list(tried.values())


def choose(rule: Rule, tried: Sequence[Tried], before: np.ndarray, of: np.ndarray) -> Tried:
    """The setting that a rule takes, or none (k of 0) where the model as it is, of rewards `before`, does better.

    "accuracy" takes the one that gets most pairs right, of equal ones that with the fewest neurons. "one_se" takes the
    one with the fewest neurons, or none, whose gain over the model as it is is less than one standard error below the
    best one's; the error is that of the best gain, between clusters `of` (n,) of pairs.
    """
    none = Tried(dict.fromkeys(tried[0].ks, 0), 0, before)
    best = max(tried, key=lambda each: (each.accuracy, -each.neurons))
    if best.accuracy < none.accuracy:
        return none
    if rule == "accuracy":
        return best
    error = standard_error(right(best.rewards) - right(before), of)
    near = [each for each in [none, *tried] if each.accuracy >= best.accuracy - error]
    return min(near, key=lambda each: (each.neurons, -each.accuracy))
