"""How strong a preference is, by the margins that several reward models give it (Secrets of RLHF II)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from rmfast.arguments import instance, sequence
from rmfast.engine.options import ScoreOptions, takes
from rmfast.rewards.ensemble import Ensemble, moments
from rmfast.texts.pairs import read_pairs

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Strength(NamedTuple):
    """What `strength` gives for N pairs and M models, on the CPU.

    Attributes:
        mean: μ̂ (N,), of the models' margins r_i(chosen) − r_i(rejected). Below 0 they think the label wrong.
        std: σ̂ (N,), their standard deviation (of M models by M).
        margins: (M, N), each model's.
    """

    mean: Tensor
    std: Tensor
    margins: Tensor


@takes(ScoreOptions)
def strength(ensemble: Ensemble, pairs: Iterable[Any], **options: Unpack[ScoreOptions]) -> Strength:
    """The strength of preferences (arXiv 2401.06080): mean and spread of each pair's margin over an ensemble.

    `mean` is a margin for `rmfast.losses.bradley_terry`, and as the column "margin" for `RewardTrainer`.

    Args:
        ensemble: of at least two members; its `reduce` plays no part.
        pairs: (prompt, chosen, rejected), or mappings with these keys.
        options: as for `RewardModel.score`.

    Raises:
        InputError, ValueError, TypeError: as `RewardModel.score`; a pair lacks a side.
    """
    instance("ensemble", ensemble, Ensemble)
    if ensemble.size < 2:
        raise ValueError(f"Expected an ensemble of at least two members, got {ensemble.size}")
    both = [side for pair in read_pairs(sequence("pairs", pairs, "a sequence of pairs")) for side in pair.inputs]
    members = ensemble.score(both, **options).members
    margins = members[:, ::2].double() - members[:, 1::2].double()
    mean, variance = moments(margins)
    return Strength(mean.to(members), variance.sqrt().to(members), margins.to(members))
