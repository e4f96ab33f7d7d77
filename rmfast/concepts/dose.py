"""Dose response: what a concept's direction does to the reward, more of it and less, beside directions of nothing.

A dose is in spreads of the concept (`Concept.spread`). The stream h before the final norm, where the reward is read,
becomes

    way="add"   h + dose · spread · p                    steering
    way="set"   h with p·h = mean + dose · spread        the same level of the concept in all texts

for all doses in one call of `rmfast.ops.reward_head`, whose interventions h − α (p·h − t) p with targets t are the
second. Adding x is going, at the strength of one rounding step ε, towards a target of x/ε: −ε (p·h − x/ε) is x, but for
ε p·h, which rounding would lose as well.

Any long enough push moves a reward. So the same doses, of the same length, go along random directions and along those
of shuffled labels, which lie where the activations vary by themselves: what the concept does beyond them is its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rmfast import arguments
from rmfast.concepts.concept import LEAST_PROMPTS, Concept, Interval
from rmfast.concepts.erasure import Erasure
from rmfast.concepts.readout import Readout
from rmfast.engine.options import RunOptions, takes
from rmfast.engine.scorer import Scorer
from rmfast.plots import axes, needed
from rmfast.resampling import as_json, cluster_means, clusters, drawn, percentiles

if TYPE_CHECKING:
    from typing_extensions import Unpack

_TOGETHER = 8  # directions of nothing in one call: of more, the products of all with all would be most of the work


class Dose(NamedTuple):
    """The mean change of the reward at a dose, a prompt counting once, with its interval."""

    dose: float
    change: float
    low: float
    high: float


class Selectivity(NamedTuple):
    """The concept's slope against those of other directions.

    against: "random" or "shuffled labels"; typical: their root mean square slope; ratio: |the concept's| over it, with
    its interval; p: of a slope as steep among them.
    """

    against: str
    directions: int
    typical: float
    ratio: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DoseResponse:
    """What a concept does to the reward.

    Attributes:
        concept: its name.
        way: "add" or "set".
        doses: a `Dose` each.
        slope: of the reward over the dose (least squares), in reward per spread of the concept.
        selectivity: a `Selectivity` against random directions and against those of shuffled labels.
        rewards: (N, D) fp64, of each text under each dose.
        plain: (N,) fp64, the model's own rewards.
        prompts: how many, each of which counts once.
        confidence: of the intervals.
        slopes: (1 + R + S, N) of each text along each direction: the concept, random ones, shuffled labels.
    """

    concept: str
    way: str
    doses: list[Dose]
    slope: Interval
    selectivity: list[Selectivity]
    rewards: np.ndarray = field(repr=False)
    plain: np.ndarray = field(repr=False)
    prompts: int
    confidence: float
    slopes: np.ndarray = field(repr=False)

    def __repr__(self) -> str:
        lines = [
            f"Dose response of {self.concept!r} ({self.way}), {len(self.plain)} texts of {self.prompts} prompts, "
            f"intervals of {self.confidence:.0%}",
            *(f"  {d.dose:+6.2f}  {d.change:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" for d in self.doses),
            f"slope {self.slope}",
            *(
                f"{s.ratio:.2f} [{s.low:.2f}, {s.high:.2f}] times that of {s.directions} directions, {s.against}, "
                f"p {s.p:.2g}"
                for s in self.selectivity
            ),
        ]
        return "\n".join(lines)

    def to_dataframe(self) -> Any:
        """The doses as a pandas DataFrame."""
        return needed("pandas", "to_dataframe").DataFrame(self.doses, columns=list(Dose._fields))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Doses, slope and selectivity as JSON."""
        about = {name: getattr(self, name) for name in ("concept", "way", "prompts", "confidence")}
        rows = {"doses": [as_json(d) for d in self.doses], "selectivity": [as_json(s) for s in self.selectivity]}
        out = {**about, "texts": len(self.plain), "slope": as_json(self.slope), **rows}
        arguments.path("path", path).write_text(json.dumps(out, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def plot(self, ax: Any = None) -> Any:
        """The mean change over the dose with its interval, and the slopes of 19 in 20 directions of nothing as a band;
        returns the axes."""
        ax = axes(ax, 5, 3.5)
        dose, change, low, high = np.array(self.doses).T
        ax.errorbar(
            dose, change, np.clip([change - low, high - change], 0, None), marker="o", capsize=2, label=self.concept
        )
        start = 1
        for color, each in zip(("0.8", "C1"), self.selectivity):
            reach = np.quantile(np.abs(self.slopes[start : start + each.directions].mean(1)), 0.95)
            ax.fill_between(dose, -reach * dose, reach * dose, color=color, alpha=0.4, label=each.against)
            start += each.directions
        ax.axhline(0, color="0.5", linewidth=0.8)
        ax.set_xlabel(f"dose ({self.way}), in spreads of the concept")
        ax.set_ylabel("change of the reward")
        ax.legend(fontsize=8)
        return ax


@takes(RunOptions)
def dose_response(
    rm: Scorer,
    concept: Concept,
    inputs: Sequence[Any],
    *,
    doses: Sequence[float] = (-2.0, -1.0, 0.0, 1.0, 2.0),
    way: Literal["add", "set"] = "add",
    random: int = 200,
    prompts: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> DoseResponse:
    """What more or less of a concept does to the reward, beside random directions and those of shuffled labels.

    The body runs once; all doses along a direction are one call of `rmfast.ops.reward_head` on its final streams.

    Args:
        rm: the model that the concept was fit on, of one reward.
        concept: at site "final".
        inputs: texts as for `RewardModel.score`; better not those that the concept was fit on.
        doses: two different ones at least, in spreads of the concept.
        way: "add" or "set". Set levels of other directions are in their own spreads about their own means.
        random: how many random directions.
        prompts: of each text, by which they are drawn together and counted once; None: each text has its own.
        confidence, resamples, seed: of intervals, by a bootstrap over prompts, and random directions.
        options: max_length, truncation, format, batch_tokens, progress (`rmfast.engine.options`).

    Returns:
        A `DoseResponse`.

    Raises:
        ValueError: a concept of another model or site, or without a spread; a model of several rewards, or whose head
            is not linear in the stream but for its norm and a gate at another token; fewer than 20 prompts.
    """
    arguments.instance("rm", rm, Scorer)
    arguments.instance("concept", concept, Concept)
    arguments.word("way", way, ("add", "set"))
    random = arguments.whole("random", random, 1, 1_000_000)
    confidence = arguments.number("confidence", confidence, 0, 1, above=True, below=True)
    resamples, seed = arguments.whole("resamples", resamples, 1), arguments.whole("seed", seed, 0)
    levels = arguments.finite("doses", doses, "D")
    if len(levels) < 2 or not np.ptp(levels) > 0:
        raise ValueError(f"Expected doses to be two different ones at least, got {levels.tolist()}")
    _expect(rm, concept.site, concept.fingerprint, concept.place)
    if rm.num_labels != 1:
        raise ValueError(f"Expected a model of one reward, got one of {rm.num_labels}")
    if not (np.isfinite(concept.spread) and concept.spread > 0):
        raise ValueError(f"Expected a concept of some spread, which is the unit of doses, got {concept.spread}")
    inputs = arguments.sequence("inputs", inputs, "a sequence of texts")
    of = np.arange(len(inputs))
    if prompts is not None:
        of = clusters(
            arguments.hashable(
                "prompts", arguments.sequence("prompts", prompts, "a prompt for each of inputs", len(inputs))
            )
        )
    count = int(of.max()) + 1 if len(of) else 0
    if count < LEAST_PROMPTS:
        raise ValueError(f"Expected texts of at least {LEAST_PROMPTS} prompts, got {count}")

    readout = Readout(rm, inputs, **options)
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=(random, len(concept.direction)))).float()
    nothing = torch.cat([noise / noise.norm(dim=1, keepdim=True), concept.shuffled])
    rewards = _rewards(readout, concept.direction[None], levels, way, (concept.mean, concept.spread))[:, 0]  # (N, D)
    controls = [
        _slopes(_rewards(readout, some, levels, way, None if way == "set" else (0.0, concept.spread)), levels)
        for some in nothing.split(_TOGETHER)
    ]
    slopes = np.concatenate([_slopes(rewards[:, None], levels), *controls])
    plain = readout.rewards[:, 0].double().numpy()
    changes = cluster_means(rewards - plain[:, None], of)  # (G, D)
    steep = cluster_means(slopes.T, of)  # (G, 1 + R + S)
    parts = [(weights @ changes, weights @ steep) for weights in drawn(np.arange(count), resamples, seed)]
    moved, tilted = (np.concatenate(some) / count for some in zip(*parts))
    low, high = percentiles(moved, confidence)
    whole = steep.mean(0)
    ends = {"random": slice(1, 1 + random), "shuffled labels": slice(1 + random, None)}
    return DoseResponse(
        concept=concept.name, way=way, prompts=count, confidence=confidence, rewards=rewards, plain=plain,
        slopes=slopes,
        doses=[Dose(*map(float, row)) for row in zip(levels, changes.mean(0), low, high)],
        slope=Interval(float(whole[0]), *map(float, percentiles(tilted[:, 0], confidence))),
        selectivity=[_selectivity(name, whole, tilted, some, confidence) for name, some in ends.items()],
    )  # fmt: skip


def erased(rm: Scorer, erasure: Erasure, inputs: Sequence[Any], **options: Any) -> Tensor:
    """(N,) or (N, K) rewards of the texts with a concept erased from their final streams (`Erasure` at site "final").

    Any head; options as for `dose_response`.

    Raises:
        ValueError: an erasure of another model or site.
    """
    arguments.instance("rm", rm, Scorer)
    arguments.instance("erasure", erasure, Erasure)
    _expect(rm, erasure.site, erasure.fingerprint, str(erasure.site))
    readout = Readout(rm, arguments.sequence("inputs", inputs, "a sequence of texts"), **options)
    rewards = readout.of(erasure(readout.streams))
    return rewards[:, 0] if rm.num_labels == 1 else rewards


def _expect(rm: Scorer, site: str | None, fingerprint: str | None, place: str) -> None:
    if site != "final":
        raise ValueError(f'Expected site "final", the stream that the norm and head read, got {place}')
    rm.expect_clamps_alone()
    if fingerprint != rm.fingerprint:
        raise ValueError("Expected what was fitted on this model, got that of a model with another fingerprint")
    if not rm.binding.leaves_norm_out:
        raise ValueError("Expected a model with a final norm that nothing is put on, got one without")


def _rewards(
    readout: Readout, directions: Tensor, levels: np.ndarray, way: str, scale: tuple[float, float] | None
) -> np.ndarray:
    """(N, J, D) under doses along each direction (J, d), by itself; mean and spread of theirs where none is given."""
    streams = readout.streams
    count = len(directions)
    doses = torch.from_numpy(levels)
    if scale is None:
        along = streams.double() @ directions.double().T
        mean, spread = along.mean(0), along.std(0)
    else:
        mean, spread = (torch.full((count,), x, dtype=torch.float64) for x in scale)
    alone = torch.eye(count, dtype=torch.float64)[:, None]  # (J, 1, J)
    if way == "set":
        strengths, wanted = alone.expand(-1, len(doses), -1), mean[:, None] + spread[:, None] * doses
    else:
        step = torch.finfo(streams.dtype).eps
        strengths, wanted = step * alone.expand(-1, len(doses), -1), spread[:, None] * doses / step
    targets = alone * wanted[..., None]
    out = readout.under(directions, strengths.reshape(-1, count), targets.reshape(-1, count))
    return out[..., 0].double().numpy().reshape(len(streams), count, len(doses))


def _slopes(rewards: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """(J, N) least squares over the doses, of rewards (N, J, D)."""
    centred = levels - levels.mean()
    return (rewards @ centred / (centred @ centred)).T


def _selectivity(name: str, whole: np.ndarray, tilted: np.ndarray, some: slice, confidence: float) -> Selectivity:
    typical = float(np.sqrt((whole[some] ** 2).mean()))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.abs(whole[0]) / np.sqrt((whole[some] ** 2).mean())
        draws = np.abs(tilted[:, 0]) / np.sqrt((tilted[:, some] ** 2).mean(1))
    steep = np.abs(whole[some]) >= abs(whole[0]) * (1 - 1e-9)
    low, high = map(float, percentiles(draws, confidence))
    return Selectivity(name, len(steep), typical, float(ratio), low, high, float((1 + steep.sum()) / (1 + len(steep))))
