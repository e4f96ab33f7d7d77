"""How far a patched activation is from what the model makes at that place, judged by what it makes of other texts.

A reward that an edit gives says little where the edit puts in what no text ever gives: the layers above then do what
they were never trained for. arXiv 2604.26130 calls such a patch divergent, by its Mahalanobis distance, with a fixed
threshold of 2; but in d dimensions the natural distances lie near √d, so that this flags everything. Here the limits
are quantiles of the distances that held-out texts of the reference have themselves:

- A place is a kind, layer and unit, and one of three sorts of position: the token that is read, the first token (whose
  activations are often a hundred times as large), and all others. Each has a mean and a covariance of its own, shrunk
  as Ledoit and Wolf do (`Gaussian`), from one half of the texts.
- The other half gives the limits. Tokens of a text are not independent, so that every text weighs as much as another
  one, and one more text, of which nothing is known, lies beyond any limit: of new texts as of the reference's, at most
  1 − level of the activations are beyond them on average (split conformal prediction over groups, arXiv 2306.06342).
- Both sides count. Natural activations lie on a shell around the mean, so that the mean itself, or one between two
  clusters, is as unnatural as one far out. Units of few values have no such shell: there the far side counts alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.special import gammaln
from torch import Tensor
from tqdm.auto import tqdm

from rmfast.arguments import number, sequence, whole
from rmfast.binding.session import on_the_host
from rmfast.engine.options import checked_run
from rmfast.engine.planned import planning_windows
from rmfast.engine.scorer import Scorer
from rmfast.patching.pairs import Pair
from rmfast.patching.request import Request
from rmfast.patching.sites import KINDS, Edits, Values
from rmfast.patching.suffix_patcher import SuffixPatcher
from rmfast.texts.inputs import Encoded, inputs_of

SORTS = ("read", "first", "other")  # of positions
_SHELL = 8  # values of a unit from which on the density of distances at 0 is as good as none


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution with a shrunk covariance, for each of U units of W values; fp64.

    The covariance is (1 − s) S + s (tr S / W) I, S that of the n rows it was fitted on and s by Ledoit and Wolf
    (A well-conditioned estimator for large-dimensional covariance matrices, 2004; as scikit-learn's LedoitWolf). It is
    kept as the eigenvectors of S that the rows span, so that nothing (W, W) is made of fewer rows than values.

    Attributes:
        mean: (U, W); NaN where all rows are the same.
        axes: (U, W, R) orthonormal columns, R = min(n, W).
        variances: (U, R), the covariance's along them.
        rest: (U,), that in all other directions.
        shrinkage: (U,), s.
    """

    mean: Tensor
    axes: Tensor
    variances: Tensor
    rest: Tensor
    shrinkage: Tensor

    @classmethod
    def fit(cls, x: Tensor) -> Gaussian:
        """Of rows (n, U, W), n ≥ 2."""
        step = torch.finfo(x.dtype).eps
        x = x.double().transpose(0, 1)
        n, width = x.shape[1:]
        mean = x.mean(1)
        z = x - mean[:, None]
        # Of fewer rows than values S = Q (R Rᵀ / n) Qᵀ: orthonormal however much larger one direction is than another.
        q, r = torch.linalg.qr(z.mT) if n < width else (None, z.mT)
        variances, axes = torch.linalg.eigh(r @ r.mT / n)
        variances, axes = variances.clamp(min=0), axes if q is None else q @ axes
        average, squares = variances.sum(-1) / width, variances.square().sum(-1)
        beta = (z.square().sum(-1).square().mean(1) - squares) / (width * n)
        delta = squares / width - average.square()
        round_off = delta <= 1e-12 * squares / width  # one value, or as much variance in all directions
        shrinkage = torch.where(round_off, 0.0, torch.minimum(beta, delta) / delta).clamp(min=0)
        rest = torch.maximum(shrinkage * average, 1e-12 * variances[:, -1])
        variances = (1 - shrinkage)[:, None] * variances + rest[:, None]
        noise = (8 * step * (mean.abs() + mean.square().median(-1, True).values.sqrt())).square()
        same = (z.square().mean(1) <= noise).all(-1)
        return cls(torch.where(same[:, None], torch.nan, mean), axes, variances, rest, shrinkage)

    def distances(self, x: Tensor) -> Tensor:
        """(n, U): the Mahalanobis distances of rows (n, U, W)."""
        z = x.double().transpose(0, 1) - self.mean[:, None]
        along = z @ self.axes
        squares = (along.square() / self.variances[:, None]).sum(-1)
        if self.axes.size(2) < self.axes.size(1):  # what is left over, and not a difference of two large sums
            left = z - along @ self.axes.mT
            squares = squares + left.square().sum(-1) / self.rest[:, None]
        return squares.sqrt().T


@dataclass(frozen=True)
class Place:
    """One sort of position at a kind and layer: a distribution, and what held-out texts' distances from it are.

    Attributes:
        fitted: on the texts that are not held out.
        middle, low, high: (U,), the median of the held-out distances and the limits; NaN where they can't be told.
    """

    fitted: Gaussian
    middle: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, fitted: Gaussian, distances: Tensor, weights: Tensor, level: float, shell: bool) -> Place:
        """From held-out distances (n, U) and weights (n,) that add up to M / (M + 1) for M texts."""
        tail = (1 - level) / 2 if shell else 1 - level
        high, low = _least(distances, weights, 1 - tail), -_least(-distances, weights, 1 - tail)
        middle = _least(distances, weights, float(weights.sum()) / 2)
        return cls(fitted, middle, low if shell else torch.zeros_like(low), high)

    def scores(self, x: Tensor) -> Tensor:
        """(n, U) of rows (n, U, W): 0 at the middle, 1 at the upper limit and −1 at the lower one."""
        return self._scaled(self.fitted.distances(x))

    def _scaled(self, distances: Tensor) -> Tensor:
        off = distances - self.middle
        scale = torch.where(off > 0, self.high - self.middle, self.middle - self.low)
        known = self.high.isfinite() & self.low.isfinite() & (scale > 0)
        return torch.where(known, off / scale, torch.nan)


@dataclass(eq=False, repr=False)
class Reference:
    """What a model makes at some places, of a set of texts; `fit` makes one, and `patch_sweep` takes it.

    Attributes:
        level: the share of natural activations that lie within the limits.
        texts, held_out: how many there were, and how many of them give the limits.
        layers, units: that there are places of; units by kind.
        fingerprint: of the model.
        places: by kind, layer and sort of position; a sort is left out of which there were too few.
    """

    level: float
    texts: int
    held_out: int
    layers: list[int]
    units: dict[str, list[int]]
    fingerprint: str
    places: dict[tuple[str, int, str], Place]
    _worst: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    _limits: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        kinds = ", ".join(self.units)
        return f"Reference({kinds} of {len(self.layers)} layers, {self.texts} texts, level {self.level:g})"

    @property
    def facts(self) -> dict[str, Any]:
        """What a sweep keeps of it."""
        return {"level": self.level, "texts": self.texts, "held_out": self.held_out}

    def expect(self, request: Request) -> None:
        """ValueError where it is of another model, or has not all of a sweep's kinds, layers and units."""
        if request.binding.fingerprint != self.fingerprint:
            raise ValueError("Expected a reference of this very model, got one of another, or of other weights")
        of: list[tuple[str, Sequence[Any], Sequence[Any]]] = [
            ("sites", request.kinds, [*self.units]),
            ("layers", request.layers, self.layers),
        ]
        of += [(f"units of {kind}", request.units[kind], self.units.get(kind, [])) for kind in request.kinds]
        for name, asked, there in of:
            if absent := [each for each in asked if each not in there]:
                raise ValueError(f"Expected a reference of all {name} that are swept, got one without {absent[0]}")

    def judge(self, request: Request, pair: Pair, edits: Edits, values: Values) -> np.ndarray:
        """(E,) float64, the divergence of what each edit puts in; of several positions that of the furthest.

        NaN where the reference can't tell: it has too few texts with such a position, or they are all the same there.
        """
        out = np.full(len(edits), np.nan)
        tokens = edits.groups.shape[1]
        sorts = _sorts(tokens, pair.base_read)
        sizes = edits.groups.sum(1)
        for code, layer in sorted(set(zip(edits.kind.tolist(), edits.layer.tolist()))):
            here = np.flatnonzero((edits.kind == code) & (edits.layer == layer))
            kind = KINDS[code]
            columns = {unit: i for i, unit in enumerate(self.units[kind])}
            unit = np.array([columns[u] for u in edits.unit[here].tolist()])
            x = values(kind, layer)[:tokens][:, self.units[kind]]
            scores = torch.full(x.shape[:2], torch.nan, dtype=torch.float64)
            for sort in SORTS:
                at = np.flatnonzero(sorts == sort)
                if (kind, layer, sort) in self.places and len(at):
                    rows = torch.from_numpy(at)
                    scores[rows] = self.places[kind, layer, sort].scores(x[rows.to(x.device)]).cpu()
            judged = scores.numpy()
            for group in np.unique(edits.group[here]):
                some = edits.group[here] == group
                part = judged[edits.groups[group]]  # (positions, units)
                size = np.where(np.isnan(part), -1, abs(part)).argmax(0)
                furthest = np.take_along_axis(part, size[None], 0)[0]
                if sizes[group] > 1:
                    furthest = furthest / self._limit(kind, layer, int(sizes[group]))
                out[here[some]] = furthest[unit[some]]
        return out

    def _limit(self, kind: str, layer: int, size: int) -> np.ndarray:
        """(U,), what the largest |score| of `size` tokens of a text stays below, drawn at random from each text."""
        key = kind, layer, size
        if key not in self._limits:
            texts = self._worst[kind, layer]
            weights = torch.cat([_of_largest(len(each), size) for each in texts]) / (len(texts) + 1)
            self._limits[key] = _least(torch.cat(texts), weights, self.level)
        return self._limits[key].numpy()


def fit(
    rm: Scorer,
    texts: Sequence[Any],
    *,
    sites: str | Sequence[str] = "resid_post",
    layers: int | Iterable[int] | None = None,
    heads: int | Iterable[int] | None = None,
    neurons: int | Iterable[int] | None = None,
    level: float = 0.95,
    rows: int = 1024,
    seed: int = 0,
    batch_tokens: int | None = None,
    progress: bool = False,
    **encoding: Any,
) -> Reference:
    """What a model makes at some places, from one forward of each text, for `patch_sweep(..., reference=)`.

    Args:
        rm: a `RewardModel`.
        texts: what a natural activation is an activation of: like the texts of the sweeps, and not those themselves.
            Half of them, drawn by `seed`, give the limits.
        sites, layers, heads, neurons: as for `patch_sweep`, which then sweeps these or fewer.
        level: the share of natural activations within the limits; the rest is flagged though it is natural. The higher,
            the more texts it needs: half of them at least 2 / (1 − level) − 1.
        rows: tokens, beside the first and the read one of each text, that a covariance is fitted on; drawn by `seed`.
            Their activations at all places are held at once.
        seed: of the split and of the tokens.
        batch_tokens, progress, encoding: as for `patch_sweep`.

    Raises:
        ValueError: too few texts for the level; errors of `patch_sweep`'s arguments.
    """
    with on_the_host():
        level = number("level", level, 0, 1, above=True, below=True)
        whole("rows", rows, 2)
        batch_tokens = checked_run(batch_tokens, progress)
        request = Request(
            rm, mode="zero", sites=sites, layers=layers, heads=heads, neurons=neurons, seed=seed, **encoding
        )
        with inputs_of("texts"):
            encoded = rm.encode(sequence("texts", texts, "a sequence of texts"), **encoding)
        least = int(np.ceil(2 / (1 - level) - 1 - 1e-9))
        if len(encoded) // 2 < least:
            raise ValueError(f"Expected at least {2 * least} texts for level {level:g}, got {len(encoded)}")
        read = rm.positions(encoded) if rm.binding.reads_rows else [0] * len(encoded)
        budget = batch_tokens or rm.default_batch_tokens(getattr(request.patcher, "engine", None))
        order = np.random.default_rng(seed).permutation(len(encoded))
        held = len(encoded) // 2
        with request.binding.session(), tqdm(total=len(encoded), unit="text", disable=not progress) as bar:
            runs = [
                _runs(request, [encoded[i] for i in some], [read[i] for i in some], budget, bar)
                for some in (order[held:], order[:held])
            ]
            fitted = _fitted(request, runs[0], -(-rows // (len(encoded) - held)), seed)
            places, worst = _limited(request, fitted, runs[1], level)
        return Reference(
            level, len(encoded), held, request.layers, request.units, request.binding.fingerprint, places, worst
        )


# A run of texts: of each its tokens that count and their sorts, all flat; and the activations (tokens, U, W).
_Run = tuple[list[np.ndarray], Values]


def _runs(request: Request, texts: list[Encoded], read: list[int], budget: int, bar: tqdm) -> Iterator[_Run]:
    """Texts run, several at once on the suffix engine."""
    patcher, kinds = request.patcher, set(request.kinds)
    sorts = [_sorts(len(text), at) for text, at in zip(texts, read)]
    if request.causal:  # what lies behind the token that is read has no part in a reward
        sorts = [each[: at + 1] for each, at in zip(sorts, read)]
    if not isinstance(patcher, SuffixPatcher):
        for text, at, each in zip(texts, read, sorts):
            record = patcher.record(text, at, kinds, request.layers, base=False)
            yield [each], _chosen(request, record.activations, [np.arange(len(each))])
            bar.update()
        return
    for todo, _ in planning_windows(request.binding, texts):
        ends = np.cumsum([len(texts[i]) for i in todo])
        cuts = np.flatnonzero(np.diff((ends - 1) // min(budget, int(ends[-1])))) + 1
        for part in np.split(np.array(todo), cuts):
            bounds = np.cumsum([0, *(len(texts[i]) for i in part)])
            ids = np.concatenate([texts[i].ids for i in part])
            run = patcher.record(Encoded(ids), len(ids) - 1, kinds, request.layers, base=False, bounds=bounds)
            rows = [start + np.arange(len(sorts[i])) for start, i in zip(bounds, part)]
            yield [sorts[i] for i in part], _chosen(request, run.activations, rows)
            bar.update(len(part))


def _chosen(request: Request, activations: Values, rows: list[np.ndarray]) -> Values:
    """Activations at these rows, of the units that were asked for."""
    at = torch.from_numpy(np.concatenate(rows))

    def chosen(kind: str, layer: int) -> Tensor:
        x = activations(kind, layer)
        return x[at.to(x.device)][:, request.units[kind]]

    return chosen


def _fitted(request: Request, runs: Iterable[_Run], each: int, seed: int) -> dict[tuple[str, int, str], Gaussian]:
    """A distribution for each place, of `each` other tokens of a text beside the first and the read one."""
    rng = np.random.default_rng(seed)
    rows: dict[tuple[str, int, str], list[Tensor]] = {}
    for sorts, activations in runs:
        starts = np.cumsum([0, *map(len, sorts)])
        drawn = []
        for start, of in zip(starts, sorts):
            others = np.flatnonzero(of == "other")
            drawn.append(start + np.sort(rng.choice(others, min(each, len(others)), replace=False)))
        every = np.concatenate(sorts)
        at = {sort: np.flatnonzero(every == sort) for sort in ("read", "first")} | {"other": np.concatenate(drawn)}
        for kind in request.kinds:
            for layer in request.layers:
                x = activations(kind, layer)
                for sort, some in at.items():
                    rows.setdefault((kind, layer, sort), []).append(x[torch.from_numpy(some).to(x.device)])
    found = {}
    while rows:  # each is let go of once it is fitted
        key, parts = rows.popitem()
        if (x := torch.cat(parts)).size(0) > 1:
            found[key] = Gaussian.fit(x)
    return found


def _limited(
    request: Request, fitted: dict[tuple[str, int, str], Gaussian], runs: Iterable[_Run], level: float
) -> tuple[dict[tuple[str, int, str], Place], dict[tuple[str, int], list[Tensor]]]:
    """The places with their limits, and of each held-out text |scores| in rising order."""
    sorts: list[np.ndarray] = []
    seen: dict[tuple[str, int, str], list[Tensor]] = {key: [] for key in fitted}
    for each, activations in runs:
        sorts += each
        every = np.concatenate(each)
        at = {sort: torch.from_numpy(np.flatnonzero(every == sort)) for sort in SORTS}
        for kind, layer, sort in fitted:
            x = activations(kind, layer)
            seen[kind, layer, sort].append(fitted[kind, layer, sort].distances(x[at[sort].to(x.device)]).cpu())
    counts = {sort: np.array([(of == sort).sum() for of in sorts]) for sort in SORTS}
    owner = {sort: np.repeat(np.arange(len(sorts)), counts[sort]) for sort in SORTS}
    places = {}
    parts: dict[tuple[str, int], list[tuple[np.ndarray, Tensor]]] = {}
    for (kind, layer, sort), distances in seen.items():
        texts = int((counts[sort] > 0).sum())
        if not texts:
            continue
        weights = torch.from_numpy(1 / (counts[sort][owner[sort]] * (texts + 1)))
        gaussian, shell = fitted[kind, layer, sort], fitted[kind, layer, sort].mean.size(1) >= _SHELL
        place = Place.of(_on_cpu(gaussian), torch.cat(distances), weights, level, shell)
        parts.setdefault((kind, layer), []).append((owner[sort], place._scaled(torch.cat(distances))))
        places[kind, layer, sort] = place
    return places, {key: _by_text(some, len(sorts)) for key, some in parts.items()}


def _by_text(parts: list[tuple[np.ndarray, Tensor]], texts: int) -> list[Tensor]:
    """Of each text its |scores| (tokens, U) in rising order; one that can't be told is never the largest."""
    owner = np.concatenate([of for of, _ in parts])
    sizes = torch.cat([scores for _, scores in parts]).abs().nan_to_num(0)
    order = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=texts).tolist()
    return [each.sort(0).values for each in sizes[torch.from_numpy(order)].split(counts)]


def _on_cpu(gaussian: Gaussian) -> Gaussian:
    return Gaussian(*(getattr(gaussian, name).cpu() for name in Gaussian.__dataclass_fields__))


def _sorts(tokens: int, read: int) -> np.ndarray:
    """(T,) of `SORTS`, each position's."""
    sorts = np.full(tokens, "other")
    sorts[0] = "first"
    if read < tokens:
        sorts[read] = "read"
    return sorts


def _least(values: Tensor, weights: Tensor, share: float) -> Tensor:
    """(U,), for each column of values (n, U) the least one up to which the weights (n,) add up to `share`; else inf."""
    ordered, order = values.sort(0)
    reached = weights[order].cumsum(0) >= share - 1e-9
    found = ordered.gather(0, reached.int().argmax(0, keepdim=True))[0]
    return torch.where(reached.any(0), found, torch.inf)


def _of_largest(tokens: int, size: int) -> Tensor:
    """(tokens,), how likely each, in rising order, is the largest of `size` that are drawn of them, without return."""
    size, rank = min(size, tokens), np.arange(1, tokens + 1)
    drawn = np.maximum(rank - size, 0)  # C(rank − 1, size − 1) / C(tokens, size)
    log = gammaln(rank) - gammaln(drawn + 1) - gammaln(size)
    log -= gammaln(tokens + 1) - gammaln(size + 1) - gammaln(tokens - size + 1)
    return torch.from_numpy(np.where(rank >= size, np.exp(log), 0.0))
