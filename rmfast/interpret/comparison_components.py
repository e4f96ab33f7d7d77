"""Do two models make their rewards in the same places? Overlap of their sites' ranks, over the same texts.

Of each text, or pair of texts, a model's sites are ranked by |effect| (of a sweep) or |contribution| (of an
attribution). Two rankings a and b of the same S sites share X_d sites among the first d of both, and

    Jaccard = X_k / (2k − X_k), of the first k
    RBO     = p^S X_S / S + (1 − p) / p · Σ_{d ≤ S} p^d X_d / d

rank-biased overlap, extrapolated from depth S (RBO_EXT of Webber, Moffat and Zobel, A similarity measure for indefinite
rankings, ACM TOIS 28(4), 2010): 1 for the same order, and the first 1 / (1 − p) sites
have most of the weight. A site is among the first d of both from the larger of its two ranks on, so that both are sums
over sites of a function of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from rmfast import arguments
from rmfast.interpret.attribution import Attribution
from rmfast.interpret.comparison import LEAST_PAIRS, LEAST_SITES, Estimate, mean_of_pairs
from rmfast.patching.grid import PatchSweep
from rmfast.patching.sites import UNITS
from rmfast.plots import axes, needed

Site = tuple[str, int, int]  # kind, layer, unit (0 where there is one)
_AT_ONCE = 1 << 22  # ranks that are shuffled at once, 32 MiB


@dataclass(eq=False, repr=False, kw_only=True)
class ComponentAgreement:
    """How the ranks of two models' sites overlap, taken within each pair (or text) and averaged over pairs.

    Attributes:
        jaccard, rbo: means over the pairs with their bootstrap intervals and n.
        random_jaccard, random_rbo: the same where one model's sites are shuffled (alike in all pairs).
        p_jaccard, p_rbo: one-sided p-values by those shuffles, that two models agree no more than that.
        pooled_jaccard, pooled_rbo: of the two rankings by mean size over the pairs, one for each model.
        shared: sites among the first `top` of both of these.
        each_jaccard, each_rbo: (P,), of each pair.
        sites: (kind, layer, unit) of S sites; layers are the shallower model's.
        sizes: (2, P, S), what each model's sites were ranked by.
        top, persistence: k and p.
        left_out: sites that are NaN in some pair of either model.
        shuffled: within what sites were shuffled.
        confidence: of the intervals.
    """

    jaccard: Estimate
    rbo: Estimate
    random_jaccard: float
    random_rbo: float
    p_jaccard: float
    p_rbo: float
    pooled_jaccard: float
    pooled_rbo: float
    shared: list[Site]
    each_jaccard: np.ndarray = field(repr=False)
    each_rbo: np.ndarray = field(repr=False)
    sites: list[Site] = field(repr=False)
    sizes: np.ndarray = field(repr=False)
    top: int
    persistence: float
    left_out: int
    shuffled: str
    confidence: float

    def __repr__(self) -> str:
        left = f", {self.left_out} left out" if self.left_out else ""
        return (
            f"ComponentAgreement(Jaccard of {self.top} {self.jaccard}, shuffled {self.random_jaccard:.3f}, "
            f"p {self.p_jaccard:.2g}; RBO {self.rbo}, shuffled {self.random_rbo:.3f}, p {self.p_rbo:.2g}; "
            f"{len(self.sites)} sites{left})"
        )

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row for each site: site, layer, unit, and of each model mean size and rank by it.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = needed("pandas", "to_dataframe")
        columns: dict[str, Any] = dict(zip(("site", "layer", "unit"), zip(*self.sites)))
        for name, sizes in zip("ab", self.sizes):
            size = sizes.mean(0)
            columns |= {f"size_{name}": size, f"rank_{name}": (-size).argsort(kind="stable").argsort() + 1}
        return pandas.DataFrame(columns)

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """Scatter plot: mean sizes of one model's sites over the other's, in shares of the largest; shared ones named.

        Args:
            ax: the matplotlib Axes to draw on; default: a new figure.
            options: for `Axes.scatter`.

        Returns:
            The Axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        ax = axes(ax, 5, 4.5)
        x, y = (sizes.mean(0) / (sizes.mean(0).max() or 1.0) for sizes in self.sizes)
        ax.scatter(x, y, **{"s": 12, "alpha": 0.6, "linewidths": 0, **options})
        for i in map(self.sites.index, self.shared):
            kind, layer, unit = self.sites[i]
            ax.annotate(f"{kind} {layer}" + f".{unit}" * (kind in UNITS), (x[i], y[i]), fontsize=7)
        ax.set_xlabel("size in the first model, of its largest")
        ax.set_ylabel("in the second")
        ax.set_title(f"RBO {self.rbo}, shuffled {self.random_rbo:.3f}", fontsize=9)
        return ax


def compare_components(
    a: Sequence[Any],
    b: Sequence[Any],
    *,
    top: int = 10,
    persistence: float = 0.9,
    shuffle: Literal["all", "layer", "site"] = "all",
    shuffles: int = 999,
    confidence: float = 0.95,
    seed: int = 0,
) -> ComponentAgreement:
    """Do two models make their rewards in the same places?

    Args:
        a, b: of each model, for the same texts or pairs in one order: `PatchSweep`s, `Attribution`s at the read token,
            or (with the same sites) arrays or tensors of one shape. Of sweeps over several positions a site has the
            largest |effect| of any. Models of one family and depth are compared site by site. Of other depths the
            deeper one's layers are brought to the shallower one's by relative depth, l · L / L': contributions of
            layers that fall together are added, of effects the largest counts. Heads and neurons of such models do not
            correspond, and are refused; those of models from one checkpoint do.
        top: k of Jaccard's index.
        persistence: p of the overlap.
        shuffle: what the null keeps. "all": nothing. "layer" shuffles sites within a layer, "site" within a kind, so
            that what most models share (large effects late, in MLPs) counts for nothing.
        shuffles: how many.
        confidence, seed: of the bootstrap over pairs; the seed is also that of the shuffles, and breaks ties of equal
            sizes, of each model for itself.

    Raises:
        ValueError: fewer than 10 pairs or 4 sites, as many sites as `top` or fewer, or models whose sites do not
            correspond.
        TypeError: items of another kind.
    """
    named = [(name, arguments.sequence(name, side)) for name, side in (("a", a), ("b", b))]
    counts = [len(side) for _, side in named]
    if counts[0] != counts[1]:
        raise ValueError(f"Expected a and b for the same texts, got {counts[0]} and {counts[1]}")
    if counts[0] < LEAST_PAIRS:
        raise ValueError(f"Expected a and b of at least {LEAST_PAIRS} texts or pairs, got {counts[0]}")
    arguments.number("persistence", persistence, 0, 1, above=True, below=True)
    arguments.word("shuffle", shuffle, ("all", "layer", "site"))
    arguments.whole("shuffles", shuffles, 1, 1_000_000)
    arguments.whole("seed", seed, 0)
    sides = [[_sized(f"{name}[{i}]", item) for i, item in enumerate(side)] for name, side in named]
    sites, values = _aligned(*sides)
    sizes = abs(values)
    known = ~np.isnan(sizes).any((0, 1))
    sites, sizes = [site for site, there in zip(sites, known) if there], sizes[..., known]
    if len(sites) < LEAST_SITES:
        raise ValueError(f"Expected at least {LEAST_SITES} sites to rank, got {len(sites)}")
    if not arguments.whole("top", top, 1) < len(sites):
        raise ValueError(f"Expected top to be fewer than the {len(sites)} sites, got {top}")
    rng = np.random.default_rng(seed)
    weights = np.stack([(np.arange(1, len(sites) + 1) <= top) * 1.0, rbo_weights(len(sites), persistence)])
    pooled = [_ranks(side.mean(0)[None], rng) for side in sizes]
    ranks = [_ranks(side, rng) for side in sizes]
    each, both = (_overlaps(first, second, weights, top) for first, second in (ranks, pooled))
    null = _shuffled(ranks, weights, top, _groups(sites, shuffle), shuffles, rng)
    estimates = [mean_of_pairs(values, confidence=confidence, seed=seed) for values in each]
    p = (1 + (null >= each.mean(1)[:, None] - 1e-12).sum(1)) / (shuffles + 1)
    both_first = np.flatnonzero(np.maximum(*pooled)[0] <= top)
    return ComponentAgreement(
        jaccard=estimates[0], rbo=estimates[1], random_jaccard=float(null[0].mean()), random_rbo=float(null[1].mean()),
        p_jaccard=float(p[0]), p_rbo=float(p[1]), pooled_jaccard=float(both[0, 0]), pooled_rbo=float(both[1, 0]),
        shared=[sites[i] for i in both_first], each_jaccard=each[0], each_rbo=each[1], sites=sites, sizes=sizes,
        top=top, persistence=persistence, left_out=int((~known).sum()), shuffled=shuffle, confidence=confidence,
    )  # fmt: skip


def rbo_weights(sites: int, p: float) -> np.ndarray:
    """(S,): what a site adds to the overlap of two rankings of S sites, by the larger of its two ranks."""
    depth = np.arange(1, sites + 1)
    terms = (1 - p) * p ** (depth - 1) / depth
    return np.cumsum(terms[::-1])[::-1] + p**sites / sites


def _ranks(sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(P, S): ranks from 1 of sizes (P, S), the largest first; of equal ones in a random order."""
    order = np.lexsort((rng.random(sizes.shape), -sizes), axis=1)
    return order.argsort(1) + 1


def _overlaps(a: np.ndarray, b: np.ndarray, weights: np.ndarray, top: int) -> np.ndarray:
    """(2, ...): Jaccard's index and RBO of ranks (..., S)."""
    common, rbo = weights[:, np.maximum(a, b) - 1].sum(-1)
    return np.stack([common / (2 * top - common), rbo])


def _shuffled(
    ranks: list[np.ndarray], weights: np.ndarray, top: int, groups: np.ndarray, shuffles: int, rng: np.random.Generator
) -> np.ndarray:
    """(2, n): the two means over pairs where sites of the second model are shuffled within their groups."""
    found = []
    order = np.argsort(groups, kind="stable")
    for start in range(0, shuffles, size := max(1, _AT_ONCE // ranks[0].size)):
        drawn = rng.random((min(size, shuffles - start), len(groups)))
        to = np.lexsort((drawn, np.broadcast_to(groups, drawn.shape)), axis=1)
        moved = np.empty_like(to)
        moved[:, order] = to
        found.append(_overlaps(ranks[0][:, None], ranks[1][:, moved], weights, top).mean(1))
    return np.concatenate(found, 1)


def _groups(sites: list[Site], shuffle: str) -> np.ndarray:
    """(S,): sites of one number are shuffled among themselves."""
    keys = [{"all": "", "layer": str(site[1]), "site": site[0]}[shuffle] for site in sites]
    return np.unique(keys, return_inverse=True)[1].ravel()


@dataclass(frozen=True)
class _Sized:
    """Effects of one text's sites: by kind (layers, units), with the layers' and the units' numbers."""

    kinds: dict[str, np.ndarray]
    layers: list[int]
    units: dict[str, list[int]]
    adds: bool  # whether those of several layers may be added


def _sized(name: str, item: Any) -> _Sized:
    if isinstance(item, PatchSweep):
        return _of_sweep(name, item)
    if isinstance(item, Attribution):
        return _of_attribution(name, item)
    flat = arguments.array(name, item).ravel()
    return _Sized({"site": flat[:, None]}, list(range(len(flat))), {"site": [0]}, False)


def _of_sweep(name: str, sweep: PatchSweep) -> _Sized:
    if "label" in sweep.axes:
        raise ValueError(f"Expected {name} to be a sweep of one reward: select(label=) one")
    unit = next((axis for axis in ("head", "neuron", "unit") if axis in sweep.coords), "unit")
    sizes = dict(zip(sweep.axes, sweep.effect.shape))
    grid = sweep.effect.double().numpy().reshape([sizes.get(axis, 1) for axis in ("site", "layer", "position", unit)])
    units = sweep.coords.get(unit, [0])
    kinds = {}
    for kind, part in zip(sweep.coords["site"], grid):
        part = part if kind in UNITS else part[..., :1]
        kinds[kind] = _strongest(part, 1)
    return _Sized(kinds, sweep.coords["layer"], {kind: units if kind in UNITS else [0] for kind in kinds}, False)


def _of_attribution(name: str, item: Attribution) -> _Sized:
    if any("position" in of for of in item.axes.values()):
        raise ValueError(f'Expected {name} to be an attribution at the read token (positions="last")')
    if item.constant.dim():
        raise ValueError(f"Expected {name} to be an attribution of one reward, got {item.constant.numel()}")
    kept = [kind for kind in item.contributions if "layer" in item.axes[kind] and not kind.endswith("_bias")]
    kinds = {kind: item.contributions[kind].double().numpy() for kind in kept}
    kinds = {kind: values if values.ndim > 1 else values[:, None] for kind, values in kinds.items()}
    layers = len(next(iter(kinds.values()), ()))
    return _Sized(kinds, list(range(layers)), {kind: list(range(v.shape[1])) for kind, v in kinds.items()}, True)


def _strongest(values: np.ndarray, axis: int) -> np.ndarray:
    """The value of largest size along an axis; NaN where all are."""
    at = np.where(np.isnan(values), -1, abs(values)).argmax(axis)
    return np.take_along_axis(values, np.expand_dims(at, axis), axis).squeeze(axis)


def _aligned(a: list[_Sized], b: list[_Sized]) -> tuple[list[Site], np.ndarray]:
    """The sites of both models, and their values (2, P, S)."""
    first = (a[0], b[0])
    for name, side in zip("ab", (a, b)):
        for i, item in enumerate(side):
            if (item.layers, item.units, item.adds) != (side[0].layers, side[0].units, side[0].adds):
                raise ValueError(f"Expected {name} of the same sites for each text, got others in {name}[{i}]")
    if list(first[0].kinds) != list(first[1].kinds) or first[0].adds != first[1].adds:
        got = " and ".join(", ".join(each.kinds) or "none" for each in first)
        raise ValueError(f"Expected a and b of the same kinds of sites, both attributions or both sweeps, got {got}")
    depth = min(len(each.layers) for each in first)
    if len(first[0].layers) == len(first[1].layers):
        if (first[0].layers, first[0].units) != (first[1].layers, first[1].units):
            raise ValueError("Expected a and b of the same layers and units, for models of one depth")
        layers = first[0].layers
    else:
        layers = list(range(depth))
        for name, each in zip("ab", first):
            if each.layers != list(range(len(each.layers))):
                raise ValueError(f"Expected all layers of models of different depths, got {name} of some")
            if units := [kind for kind in each.kinds if kind in UNITS or kind == "site"]:
                raise ValueError(f"Expected whole components of models of different depths, got {', '.join(units)}")
    kinds = first[0].units
    sites = [(kind, layer, unit) for kind, units in kinds.items() for layer in layers for unit in units]
    values = [
        [np.concatenate([_at_depth(each.kinds[kind], depth, each.adds).ravel() for kind in kinds]) for each in side]
        for side in (a, b)
    ]
    return sites, np.array(values)


def _at_depth(values: np.ndarray, depth: int, adds: bool) -> np.ndarray:
    """(layers, units) -> (depth, units): layers that fall together by relative depth."""
    if len(values) == depth:
        return values
    cuts = np.flatnonzero(np.diff(np.arange(len(values)) * depth // len(values))) + 1
    return np.stack([part.sum(0) if adds else _strongest(part, 0) for part in np.split(values, cuts)])
