"""Neurons that carry biases, found and clamped: CIRM.

The method is that of arXiv 2604.27495: neurons whose activation at the last token ranks texts as a spurious attribute
does are set to their median, so that the reward no longer hears of the attribute through them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from rmfast.debias.interventions import NeuronClamp, Positions
from rmfast.debias.measure import Wanted, right
from rmfast.debias.request import K, request
from rmfast.debias.search import CHOICES, Rule, choose
from rmfast.debias.study import NONE
from rmfast.engine.scorer import Scorer


def fit(
    rm: Scorer,
    pairs: Sequence[Any],
    *,
    attributes: Wanted = None,
    k: K = "search",
    rule: Rule = "accuracy",
    folds: int = 1,
    trials: int = 100,
    choices: Sequence[int | float] = CHOICES,
    positions: Positions = "last",
    seed: int = 0,
    progress: bool = False,
    batch_tokens: int | None = None,
    **encoding: Any,
) -> NeuronClamp:
    """The neurons that carry biases, clamped to their medians over the texts of the pairs: CIRM (arXiv 2604.27495).

    All neurons (outputs of the q, k, v, o, gate, up and down projections of every layer) are ranked by the Spearman
    correlation of their activation at the last token with each attribute, over both texts of all pairs; the k highest
    and k lowest of each attribute are clamped. The search tries all settings of k for all attributes at once, or where
    there are more than `trials` those that Optuna's TPE draws; settings drawn again are not run again. With
    positions="last" a trial runs one token of each text on its kept prefix, with "all" whole texts.

    Args:
        rm: a model of one reward; a gated head's (ArmoRM) gate, which reads another token, is left as it is by clamps
            at the last one.
        pairs: (prompt, chosen, rejected) triples, or mappings with these keys, text or messages; the paper takes 500.
            They serve to rank and to choose, so the accuracies kept are optimistic: report on other pairs, or see
            `validate`.
        attributes: names of `ATTRIBUTES`, default all five; names of columns, or functions by name, as for `report`.
        k: neurons of each end of each attribute's ranking: one number, one for each attribute by name (0 leaves it
            alone), or "search" (needs Optuna where there are more settings than trials). A float below 1 is a share of
            the model's neurons, of which each end gives half.
        rule: which of the settings tried is taken: the paper's "accuracy", the one that gets most pairs right, of equal
            ones that with the fewest neurons; or "one_se", the one with the fewest neurons, or none, whose gain is
            less than one standard error below the best one's.
        folds: 1, the paper's: the pairs that rank the neurons choose k too. More: the accuracy of a setting is
            cross-validated, the neurons clamped in a fold ranked on the others.
        trials: settings that the search tries at most.
        choices: what it takes k from, for each attribute; the paper's have no 0. Those above the model's number of
            neurons are left out.
        positions: where neurons are clamped: at the token that is read, "last", or at "all".
        seed: of the search and the folds. The same seed gives the same clamp.
        progress: show progress bars.
        batch_tokens: most rows that run at once; default as for `score`.
        encoding: max_length, truncation, format, chat_template_kwargs and tools, as for `score`.

    Returns:
        A `NeuronClamp`; its `metadata` (which `save` keeps) has k, the number of neurons, the accuracies on the pairs
        without and with the clamp, what was searched, and the seconds of each step. The model as it is competes too:
        where every trial gets fewer pairs right the clamp is empty, and a warning says so.

    Raises:
        ValueError: fewer than 8 pairs to rank by, a pair without both sides, an attribute that is the same in all
            texts, k above the number of neurons, no trials, more folds than prompts, a model of several rewards or
            without a reward of each token.
        ImportError: Optuna is needed and not installed.
    """
    asked = request(
        rm, pairs, attributes=attributes, k=k, rule=rule, folds=folds, trials=trials, choices=choices,
        positions=positions, seed=seed, progress=progress, batch_tokens=batch_tokens,
    )  # fmt: skip
    study = asked.study(encoding, held=int(asked.folds > 1))
    study.rank([NONE, *(left_out for _, left_out in study.inner(NONE))])
    with study.seconds("search" if asked.ks is None else "rewards with the clamp"):
        tried = asked.tried(study, NONE)
    places = study.places()
    before = study.before[places]
    about: dict[str, Any] = {"method": "cirm", "pairs": len(before), "accuracy_before": float(right(before).mean())}
    best = tried[0] if asked.ks is not None else choose(rule, tried, before, study.of[places])
    if asked.ks is None:
        about["search"] = asked.about(len(tried))
        if not best.neurons:
            top = max(each.accuracy for each in tried)
            worse = top < about["accuracy_before"]
            reason = "as many of the pairs right as" if worse else "reliably more pairs right than"
            warnings.warn(
                f"None of {len(tried)} settings gets {reason} the model as it is ({top:.1%}, not "
                f"{about['accuracy_before']:.1%}): the clamp is empty. Give k= to clamp all the same, or more pairs or "
                "trials",
                stacklevel=2,
            )
    return study.clamp(best.ks, **about, accuracy_after=best.accuracy, seconds=dict(study.seconds))
