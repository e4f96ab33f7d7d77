"""`Concept`: a direction of a model's activations, what it tells apart, and what it is held against."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from rmfast import arguments
from rmfast.concepts.activations import checked_site, run
from rmfast.concepts.labels import METHODS, Logistic, MeanDifference, held_out, shuffled_labels, told_right
from rmfast.engine.options import RunOptions, takes
from rmfast.engine.scorer import Scorer
from rmfast.plots import needed
from rmfast.resampling import cluster_means, clusters, drawn, percentiles
from rmfast.texts.pairs import read_pairs

if TYPE_CHECKING:
    from typing_extensions import Unpack

LEAST_PROMPTS = 20
_JSON, _TENSORS = "concept.json", "concept.safetensors"


class Interval(NamedTuple):
    """A figure with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Concept:
    """A concept as a direction, from texts with it and without it.

    Attributes:
        name: of the concept.
        direction: (d,) fp32, of length 1; texts with the concept lie further along it.
        method: "mean_difference" or "logistic".
        site, layer: where it lies (`rmfast.concepts.activations`).
        mean, spread: of the activations' projections on it; spread within the sides (with, and without), pooled: the
            unit of doses.
        gap: how much further along a direction of other prompts' pairs the texts with the concept lie, in spreads
            there; along its own any direction of noise has a gap.
        accuracy: the share of held-out pairs whose text with the concept lies further along the direction of other
            prompts' pairs; a half is chance.
        chance: the mean accuracy under shuffled labels; accuracy − chance is the probe's selectivity.
        p: of so high an accuracy under shuffled labels.
        pairs, prompts: how many.
        shuffled: (S, d) fp32, directions of shuffled labels, of length 1: made as this one, of nothing.
        confidence: of intervals, over prompts, the folds' directions as they are: whether there is anything at all is
            what p says.
        fingerprint: of the model.
    """

    name: str
    direction: Tensor
    method: str
    site: str
    layer: int | None
    mean: float
    spread: float
    gap: Interval
    accuracy: Interval
    chance: float
    p: float
    pairs: int
    prompts: int
    shuffled: Tensor = field(repr=False)
    confidence: float
    fingerprint: str

    @property
    def place(self) -> str:
        return self.site if self.layer is None else f"{self.site} of layer {self.layer}"

    @property
    def selectivity(self) -> float:
        """How much better it tells pairs apart than shuffled labels do (Hewitt and Liang, arXiv 1909.03368)."""
        return self.accuracy.value - self.chance

    def removal(self, strength: float = 1.0) -> dict[str, Any]:
        """The arguments of the `rmfast.DirectionRemoval` that takes it out: `DirectionRemoval(**concept.removal())`.

        Raises:
            ValueError: it lies inside of the layers, where nothing is removed.
        """
        sides = {"final": "before", "normed": "after"}
        if self.site not in sides:
            raise ValueError(
                f'Expected a concept at site "final" or "normed", the sides of the final norm, where directions are '
                f"removed, got {self.place}"
            )
        return {
            "directions": self.direction[None],
            "strength": arguments.number("strength", strength),
            "norm": sides[self.site],
            "fingerprint": self.fingerprint,
        }

    def _figures(self) -> dict[str, Any]:
        names = ("name", "method", "site", "layer", "mean", "spread", "chance", "p", "pairs", "prompts", "confidence")
        return {name: getattr(self, name) for name in names}

    def to_dataframe(self) -> Any:
        """One row of figures, as a pandas DataFrame."""
        ends = {
            f"{name}{end}": value
            for name in ("gap", "accuracy")
            for end, value in zip(("", "_low", "_high"), getattr(self, name))
        }
        return needed("pandas", "to_dataframe").DataFrame([{**self._figures(), **ends}])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes concept.json and concept.safetensors into the folder `path`, made where there is none."""
        folder = arguments.path("path", path)
        folder.mkdir(parents=True, exist_ok=True)
        about = {**self._figures(), "gap": [*self.gap], "accuracy": [*self.accuracy], "fingerprint": self.fingerprint}
        tensors = {"direction": self.direction.contiguous(), "shuffled": self.shuffled.contiguous()}
        safetensors.torch.save_file(tensors, folder / _TENSORS)
        (folder / _JSON).write_text(json.dumps({"format": 1, **about}, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Concept:
        """Reads what `save` wrote; ValueError where the folder holds no concept."""
        folder = arguments.path("path", path)
        try:
            about = json.loads((folder / _JSON).read_text(encoding="utf-8"))
            if about.pop("format") != 1:
                raise ValueError("another format")
            about |= {name: Interval(*about[name]) for name in ("gap", "accuracy")}
            return cls(**about | safetensors.torch.load_file(folder / _TENSORS))
        except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"Expected {path} to hold a concept as save() writes it, got {error}") from error

    def __repr__(self) -> str:
        return (
            f"Concept({self.name!r}, {self.method} at {self.place}, accuracy {self.accuracy} against {self.chance:.3f} "
            f"of shuffled labels, p {self.p:.2g}; {self.pairs} pairs of {self.prompts} prompts)"
        )


@takes(RunOptions)
def fit(
    rm: Scorer,
    pairs: Sequence[Any],
    *,
    name: str = "concept",
    method: str = "mean_difference",
    site: str = "final",
    layer: int | None = None,
    penalty: float = 0.01,
    folds: int = 5,
    shuffles: int = 100,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> Concept:
    """The direction of a concept, from pairs of texts that differ in it, in one pass of the body.

    Args:
        rm: a model that reads its reward at one token.
        pairs: (prompt, with, without) triples, or mappings with keys prompt, chosen (with) and rejected (without)
            (`rmfast.texts.pairs.read_pairs`).
        name: of the concept.
        method: "mean_difference", or "logistic" for the weights of an L2-penalised logistic regression on standardised
            activations (scikit-learn).
        site, layer: as for `activations`.
        penalty: C of the logistic regression; small is strong.
        folds: into which prompts are dealt; a pair is judged by a direction of the other folds' pairs.
        shuffles: how many directions of shuffled labels are made, in the same way.
        confidence, resamples: of intervals, by a bootstrap over prompts, each of which counts once.
        seed: of folds, shuffles and resamples.
        options: max_length, truncation, format, batch_tokens, progress (`rmfast.engine.options`).

    Returns:
        A `Concept`.

    Raises:
        ValueError: as `activations`; fewer than 20 prompts; texts with and without it that have the same activations.
        ImportError: scikit-learn is not there, for method="logistic".
    """
    site, layer = checked_site(rm, site, layer)
    arguments.word("method", method, METHODS)
    arguments.instance("name", name, str)
    penalty = arguments.number("penalty", penalty, 0, above=True)
    folds, shuffles = arguments.whole("folds", folds, 2), arguments.whole("shuffles", shuffles, 1, 1_000_000)
    confidence = arguments.number("confidence", confidence, 0, 1, above=True, below=True)
    resamples, seed = arguments.whole("resamples", resamples, 1), arguments.whole("seed", seed, 0)
    with_, without, of = sides(rm, pairs, site, layer, **options)
    arguments.whole("folds", folds, 2, int(of.max()) + 1)
    if not np.any(with_ != without):
        raise ValueError(f"Expected texts with and without {name!r} of different activations, got the same")
    made = MeanDifference(with_, without) if method == "mean_difference" else Logistic(with_, without, penalty)
    labels = np.concatenate([np.ones((1, len(of))), shuffled_labels(of, shuffles, seed)])
    right = cluster_means(told_right(made, labels, of, folds, seed).T, of)  # (G, 1 + S)
    directions = made.directions(labels, np.arange(len(of)))
    size = np.linalg.norm(directions, axis=1, keepdims=True)
    if not size[0, 0] > 0:
        raise ValueError(
            f"Expected texts with and without {name!r} that differ on average, got means that are the same"
        )
    directions /= np.where(size > 0, size, 1)
    projected = np.stack([with_ @ directions[0], without @ directions[0]])  # (2, n)
    gap = _gap(held_out(made, with_, without, of, folds, seed), of, confidence, resamples, seed)
    accuracy = right.mean(0)
    draws = [weights @ right[:, 0] / weights.sum(1) for weights in drawn(np.arange(len(right)), resamples, seed)]
    return Concept(
        name=name, direction=torch.from_numpy(directions[0]).float(), method=method, site=site, layer=layer,
        mean=float(projected.mean()), spread=float(_in_spreads(projected, of, np.ones((1, len(right))))[1][0]), gap=gap,
        accuracy=Interval(float(accuracy[0]), *map(float, percentiles(np.concatenate(draws), confidence))),
        chance=float(accuracy[1:].mean()),
        p=float((1 + (accuracy[1:] >= accuracy[0] - 1e-12).sum()) / (1 + shuffles)),
        pairs=len(of), prompts=len(right), shuffled=torch.from_numpy(directions[1:]).float(), confidence=confidence,
        fingerprint=rm.fingerprint,
    )  # fmt: skip


def sides(
    rm: Scorer, pairs: Sequence[Any], site: str, layer: int | None, **options: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations (n, d) fp64 of the texts with a concept and of those without, and the pairs' prompts (n,)."""
    arguments.expect_dimension("pairs", pairs)
    read = read_pairs(pairs)
    of = clusters([pair.prompt for pair in read])
    count = int(of.max()) + 1 if len(of) else 0
    if count < LEAST_PROMPTS:
        raise ValueError(f"Expected pairs of at least {LEAST_PROMPTS} prompts, got {count}")
    found = run(rm, [text for pair in read for text in pair.inputs], site, layer, **options).double().numpy()
    if not np.isfinite(found).all():
        raise ValueError(f"Expected finite activations, got {found[~np.isfinite(found)][0]}")
    return found[::2], found[1::2], of


def _in_spreads(projected: np.ndarray, of: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(b,) differences of the sides' means in spreads, and (b,) spreads, of projections (2, n) under weights (b, G)."""
    total = weights.sum(1, keepdims=True)
    mean, square = (weights @ cluster_means(x.T, of) / total for x in (projected, projected**2))
    spread = np.sqrt(np.maximum(square - mean**2, 0).mean(1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (mean[:, 0] - mean[:, 1]) / spread, spread


def _gap(projected: np.ndarray, of: np.ndarray, confidence: float, resamples: int, seed: int) -> Interval:
    count = int(of.max()) + 1
    value = _in_spreads(projected, of, np.ones((1, count)))[0][0]
    draws = [_in_spreads(projected, of, weights)[0] for weights in drawn(np.arange(count), resamples, seed)]
    return Interval(float(value), *map(float, percentiles(np.concatenate(draws), confidence)))
