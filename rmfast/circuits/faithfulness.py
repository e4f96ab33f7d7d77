"""How much of a model's reward a circuit carries, and how much is left without it, with intervals over pairs of texts.

A circuit's edges carry what the clean run writes; all other edges what the corrupted run writes (resample ablation), or
what senders write in the mean over baseline tokens (mean ablation). With m the metric of a run so made, summed over
pairs, and none the run with no edges:

    faithfulness = (m(circuit) − m(none)) / (m(model) − m(none))        1: the circuit does all of it
    left         = (m(all but the circuit) − m(none)) / (m(model) − m(none))        0: the circuit is complete
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from rmfast import arguments
from rmfast.circuits.ablation import Ablation
from rmfast.circuits.circuit import Circuit
from rmfast.circuits.edges import aligned_sent, checked_metric, measured
from rmfast.circuits.parts import Parts, Sent
from rmfast.engine.options import Encoding, takes
from rmfast.engine.scorer import Scorer
from rmfast.patching.pairs import Align, Pair
from rmfast.patching.request import Metric, Request
from rmfast.plots import axes, needed, shown_figure
from rmfast.resampling import as_json, clusters, drawn

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ROUNDING = 1e-6  # of metrics in fp32, relative


class Share(NamedTuple):
    """Of one circuit: its size, its share of what the model does, and the share that is left without it, each with the
    ends of its interval. Shares are NaN where the model's metric is that of no edges, as far as fp32 tells; intervals
    where it is so in one of their draws."""

    edges: int
    nodes: int
    faithfulness: float
    low: float
    high: float
    left: float
    left_low: float
    left_high: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Faithfulness:
    """The shares of circuits over pairs of texts.

    Attributes:
        shares: for each circuit, in the order given.
        circuit: (S, n) the metric of each pair with the circuit alone.
        rest: (S, n) with all edges but the circuit's.
        model: (n,) with all edges: the model's own.
        none: (n,) with none.
        ablation: "resample" or "mean".
        confidence, resamples, seed: of the intervals.
    """

    shares: list[Share]
    circuit: np.ndarray
    rest: np.ndarray
    model: np.ndarray
    none: np.ndarray
    ablation: str
    confidence: float
    resamples: int
    seed: int

    def __str__(self) -> str:
        gap = f"metric {self.none.mean():.4g} with no edges, {self.model.mean():.4g} with all"
        head = f"{self.ablation} ablation, {len(self.model)} pairs, {gap}; intervals of {self.confidence:.0%}"
        cells = [["edges", "nodes", "faithfulness", "left without it"]]
        for share in self.shares:
            both = [f"{x:.3f} [{low:.3f}, {high:.3f}]" for x, low, high in (share[2:5], share[5:])]
            cells.append([str(share.edges), str(share.nodes), *both])
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells]
        return "\n".join([head, *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """For notebooks: `plot`."""
        return shown_figure(self.plot, str(self))

    def to_dataframe(self) -> Any:
        """The shares as a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        return needed("pandas", "to_dataframe").DataFrame(self.shares, columns=list(Share._fields))

    def plot(self, ax: Any = None) -> Any:
        """Both shares by the number of edges, with their intervals.

        Returns:
            The Axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        ax = axes(ax, 6, 3.5)
        by_size = np.array(sorted(self.shares))
        for first, name in ((2, "faithfulness"), (5, "left without the circuit")):
            ax.plot(by_size[:, 0], by_size[:, first], "o-", markersize=3, label=name)
            ax.fill_between(by_size[:, 0], by_size[:, first + 1], by_size[:, first + 2], alpha=0.2)
        for level in (0, 1):
            ax.axhline(level, color="0.5", linewidth=0.8)
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlabel("edges")
        ax.set_ylabel("share of the model's metric")
        ax.legend()
        return ax

    def save(self, path: str | Path) -> None:
        """Shares, numbers of all pairs and levels as JSON."""
        about = {name: getattr(self, name) for name in ("ablation", "confidence", "resamples", "seed")}
        numbers = {name: getattr(self, name).tolist() for name in ("circuit", "rest", "model", "none")}
        shares = [as_json(share) for share in self.shares]
        text = json.dumps({**about, "shares": shares, **numbers}, indent=1)
        arguments.path("path", path).write_text(text + "\n", encoding="utf-8")


@takes(Encoding)
def faithfulness(
    rm: Scorer,
    circuits: Circuit | Sequence[Circuit],
    clean: Any,
    corrupted: Any = None,
    *,
    ablation: Literal["resample", "mean"] = "resample",
    baseline: Sequence[Any] | None = None,
    align: Align = "auto",
    metric: Metric | None = None,
    prompts: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    **options: Unpack[Encoding],
) -> Faithfulness:
    """The shares of circuits, of a faithfulness curve for instance: `[circuit(scores, n) for n in (10, 100, 1000)]`.

    All circuits of a pair run as one batch. A model stored in 16 bits runs in fp32.

    Args:
        rm: a `rmfast.RewardModel` of a decoder.
        circuits: of this model.
        clean: one text, in any form that `score` takes, or a list.
        corrupted: as many texts, for "resample".
        ablation: what all other edges carry: "resample", what the corrupted run writes at the tokens that correspond;
            "mean", the mean over all tokens of `baseline`.
        baseline: texts, for "mean".
        align, metric: as for `edge_attribution`.
        prompts: of each pair; pairs of one prompt are drawn together for the intervals. Default each by itself.
        confidence, resamples, seed: of the bootstrap. An interval of one pair has no width.
        options: max_length, truncation, format, ... (`rmfast.engine.options.Encoding`).

    Returns:
        `Faithfulness`.

    Raises:
        ValueError, TypeError: as `edge_attribution`; edges that the model lacks.
    """
    arguments.word("ablation", ablation, ("resample", "mean"))
    confidence = arguments.number("confidence", confidence, 0, 1, above=True, below=True)
    arguments.whole("resamples", resamples, 1)
    arguments.whole("seed", seed, 0)
    given = [circuits] if isinstance(circuits, Circuit) else arguments.sequence("circuits", circuits)
    chosen = [arguments.instance("circuits", each, Circuit, " or several") for each in given]
    if not chosen:
        raise ValueError("Expected circuits to hold at least one")
    mode = "noising" if ablation == "resample" else "mean"
    request = Request(rm, mode=mode, align=align, baseline=baseline, seed=seed, **options)
    metric = checked_metric(rm, metric)
    pairs, _ = request.pairs(clean, corrupted)
    of = np.arange(len(pairs))
    if prompts is not None:
        of = clusters([str(each) for each in arguments.sequence("prompts", prompts, "a prompt for each pair", len(of))])
    parts = Parts(rm)
    masks = torch.stack([each.mask(parts.senders, parts.receivers) for each in chosen])
    for _, row, column in (masks & ~parts.edges()).nonzero().tolist():
        edge = f"{parts.senders[row]} -> {parts.receivers[column]}"
        raise ValueError(f"Expected circuits of edges that there are, got {edge}, which does not read it")
    kept = torch.cat([masks, ~masks, torch.zeros_like(masks[:1])]).to(parts.device)
    numbers = np.zeros((len(kept) + 1, len(pairs)))
    with parts.binding.session(grad=True), torch.no_grad():
        mean = None if request.baseline is None else _mean(parts, rm, request.baseline)
        for i, pair in enumerate(pairs):
            numbers[:, i] = _of_pair(parts, pair, kept, mean, metric)
    circuit, rest = numbers[: len(masks)], numbers[len(masks) : 2 * len(masks)]
    none, model = numbers[-2], numbers[-1]
    weights = np.concatenate(list(drawn(of, resamples, seed)))
    shares = [
        Share(len(each), len(each.nodes), *_share(circuit[i], none, model, weights, confidence),
              *_share(rest[i], none, model, weights, confidence))
        for i, each in enumerate(chosen)
    ]  # fmt: skip
    return Faithfulness(
        shares=shares, circuit=circuit, rest=rest, model=model, none=none, ablation=ablation, confidence=confidence,
        resamples=resamples, seed=seed,
    )  # fmt: skip


def _of_pair(parts: Parts, pair: Pair, kept: torch.Tensor, mean: Sent | None, metric: Metric) -> list[float]:
    """The metric of each circuit, and of the model's own run."""
    seen, rewards = parts.run(pair.base, pair.base_read)
    own, tokens = parts.sent(seen), len(pair.base)
    if mean is not None:
        other = mean.mapped(lambda x: x.expand(tokens, *x.shape[1:]))
    else:
        assert pair.other is not None
        other = aligned_sent(parts, own, parts.sent(parts.run(pair.other, pair.other_read)[0]), pair)
    ablated = Ablation(parts, pair.base, pair.base_read, own, other).rewards(kept)
    return [float(measured(metric, each)) for each in (*ablated, rewards[0].cpu())]


def _mean(parts: Parts, rm: Scorer, texts: list[Any]) -> Sent:
    """What senders write in the mean over all tokens of some texts up to those that are read, (1, ...)."""
    total, tokens = None, 0
    for text, read in zip(texts, rm.positions(texts)):
        sent = parts.sent(parts.run(text, read)[0]).mapped(lambda x, n=read + 1: x[:n].double().sum(0, keepdim=True))
        total = sent if total is None else total.mapped(torch.add, sent)
        tokens += read + 1
    assert total is not None
    return total.mapped(lambda x: (x / tokens).to(parts.like))


def _share(
    part: np.ndarray, none: np.ndarray, model: np.ndarray, weights: np.ndarray, confidence: float
) -> tuple[float, float, float]:
    """A share of the whole, over all pairs, and the ends of its interval, by percentiles of draws (b, n).

    NaN where the whole is no more than what rounding makes of the metrics, and an interval of which a draw is.
    """

    def ratio(weights: np.ndarray) -> np.ndarray:
        whole, size = weights @ (model - none), weights @ (abs(model) + abs(none))
        return weights @ (part - none) / np.where(abs(whole) > _ROUNDING * size, whole, np.nan)

    tail = (1 - confidence) / 2
    low, high = np.quantile(ratio(weights), [tail, 1 - tail])
    return float(ratio(np.ones(len(part)))), float(low), float(high)
