"""`run`: all probes of a suite on a user's own responses, in one packed run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rmfast import arguments
from rmfast.engine.options import Encoding
from rmfast.engine.scorer import Scorer
from rmfast.probes.edits import PROBES
from rmfast.probes.probe import Probe
from rmfast.probes.result import Probed, probed
from rmfast.probes.statistics import spread_within
from rmfast.probes.variants import Variant, responses_of, variants_of
from rmfast.resampling import clusters
from rmfast.texts.pairs import read_pairs

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from rmfast.engine.options import ScoreOptions

LEAST_PROMPTS = 20  # below, a t test at 0.05 / 24 is far off where differences are skewed


def run(
    rm: Scorer,
    pairs: Sequence[Any],
    *,
    probes: Sequence[Probe | str] | None = None,
    most: int = 300,
    level: float = 0.05,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    **options: Unpack[ScoreOptions],
) -> Probed:
    """What edits of one thing do to the reward of a user's own responses.

    Both responses of each pair are edited by each probe. An edit is compared with the unedited response, or, where
    it puts words in, with a neutral text of as many tokens in their place, so that length is no part of it. Edited
    texts, controls and responses are scored in one run, which computes what they share once.

    Args:
        rm: a model of one reward.
        pairs: (prompt, chosen, rejected) triples or mappings (`rmfast.texts.pairs.read_pairs`), some hundreds.
        probes: `Probe`s, or names of those in `PROBES`; None for all of these.
        most: responses at most for each probe, drawn by `seed`.
        level: of the tests, over all probes together (Holm).
        confidence, resamples: of the intervals, by a bootstrap over prompts.
        seed: of the draws. The same seed and pairs give the same edits for any model.
        options: of `RewardModel.score`: batch_tokens, max_length, truncation, format, progress, ...

    Returns:
        A `Probed`. A probe that applies to responses to fewer than 20 prompts is in `skipped`; an edit that is longer
        than the model takes is left out and counted in `too_long`.

    Raises:
        ValueError: two probes of one name, an unknown name, fewer than 20 prompts, a model of several rewards, texts
            that are to be cut (an edit that is cut off has no effect).
        InputError: a response that the model can't take.
    """
    arguments.instance("rm", rm, Scorer)
    if rm.num_labels != 1:
        raise ValueError(f"Expected a model of one reward, got one of {rm.num_labels}")
    if options.get("truncation", "error") != "error":
        raise ValueError(
            f'Expected truncation="error", since an edit that is cut off shows nothing, got {options["truncation"]!r}'
        )
    suite = _suite(probes)
    most = arguments.whole("most", most, 1)
    level = arguments.number("level", level, 0, 1, above=True, below=True)
    confidence = arguments.number("confidence", confidence, 0, 1, above=True, below=True)
    resamples, seed = arguments.whole("resamples", resamples, 1), arguments.whole("seed", seed, 0)
    arguments.expect_dimension("pairs", pairs)
    responses = responses_of(read_pairs(pairs))
    prompts = tuple(response.prompt for response in responses)
    if len(set(prompts)) < LEAST_PROMPTS:
        raise ValueError(f"Expected pairs of at least {LEAST_PROMPTS} prompts, got {len(set(prompts))}")

    encoding = {name: value for name, value in options.items() if name in Encoding.__annotations__}
    made = {probe.name: variants_of(probe, responses, most, seed, _tokens(rm)) for probe in suite}
    variants = {name: _that_fit(rm, found, encoding) for name, found in made.items()}
    too_long = sum(map(len, made.values())) - sum(map(len, variants.values()))
    few = {name: len(found) for name, found in variants.items() if _prompts(found, prompts) < LEAST_PROMPTS}
    kept = [probe for probe in suite if probe.name not in few]
    if not kept:
        raise ValueError(f"Expected probes that apply to responses to {LEAST_PROMPTS} prompts, got none that does")
    texts = [response.input for response in responses]
    for probe in kept:
        texts += [text for variant in variants[probe.name] for text in (variant.edited, variant.control)]
    rewards = rm.score(texts, **options).double().numpy()
    own, start, differences = rewards[: len(responses)], len(responses), {}
    for probe in kept:
        end = start + 2 * len(variants[probe.name])
        edited, control = rewards[start:end].reshape(-1, 2).T
        differences[probe.name], start = edited - control, end
    return probed(
        [(probe.name, probe.axis, float("nan") if probe.dose is None else probe.dose) for probe in kept],
        differences,
        {probe.name: tuple(variant.of for variant in variants[probe.name]) for probe in kept},
        prompts,
        spread_within(own, clusters(prompts)),
        float(np.median(np.abs(own[::2] - own[1::2]))),
        level,
        confidence,
        resamples,
        seed,
        few,
        too_long,
        own,
    )


def _suite(probes: Sequence[Probe | str] | None) -> list[Probe]:
    known = {probe.name: probe for probe in PROBES}
    if probes is None:
        return list(PROBES)
    given = arguments.sequence("probes", probes)
    found = [known[arguments.word("probe", each, known)] if isinstance(each, str) else each for each in given]
    for each in found:
        arguments.instance("each of probes", each, Probe, " or a name")
    names = [probe.name for probe in found]
    if not found or len(set(names)) < len(names):
        raise ValueError(f"Expected probes of different names, got {', '.join(names) or 'none'}")
    return found


def _that_fit(rm: Scorer, variants: list[Variant], encoding: Mapping[str, Any]) -> list[Variant]:
    """Those whose edited text and control the model can take."""
    texts = [text for variant in variants for text in (variant.edited, variant.control)]
    encoded = rm.encode(texts, errors="return", **encoding)
    fits = [not isinstance(each, ValueError) for each in encoded]
    return [variant for variant, *both in zip(variants, fits[::2], fits[1::2]) if all(both)]


def _tokens(rm: Scorer) -> Any:
    """How long a text is in the model's tokens; in words, where it has no tokenizer."""
    if rm.tokenizer is None:
        return lambda text: len(text.split())
    return lambda text: len(rm.tokenizer(text, add_special_tokens=False)["input_ids"])


def _prompts(variants: list[Variant], prompts: Sequence[str]) -> int:
    return len({prompts[variant.of] for variant in variants})
