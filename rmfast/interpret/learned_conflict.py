"""Conflict of terms that are learned from pairs: the mean difference of the streams of two responses, term by term.

    u_t = mean over prompts of D_t(prompt)    D_t = stream of the response that is better in term t − that of the worse

The cosine of two such means of n differences is off by noise: |u_t|² holds the differences' own variance over n, and
items that two terms share put theirs in u_s·u_t. So all products are taken between different prompts,

    u_s·u_t ≈ Σ_{i≠j} D_s(i)·D_t(j) / (n (n − 1))

which is right on average for any n. cos = u_s·u_t / √(u_s·u_s · u_t·u_t) has no value where a term's own product is not
above 0, that is where its pairs have no direction in common. Only products of prompts (n × n) are held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rmfast import arguments
from rmfast.engine.scorer import Scorer
from rmfast.interpret.pairwise import Pairwise, adjusted, checked, expect_prompts
from rmfast.patching.watched import run_watched
from rmfast.resampling import cluster_means, clusters, drawn, percentiles
from rmfast.texts.items import read_named_pairs
from rmfast.texts.pairs import join, text_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from rmfast.engine.options import RunOptions

_AT_ONCE = 1 << 20


class LearnedPair(NamedTuple):
    """The cosine of two learned directions with its interval; p of directions at a right angle, or of none, by signs at
    random, and corrected for all pairs of terms. NaN where it has no value."""

    first: str
    second: str
    value: float
    low: float
    high: float
    p: float
    p_all: float


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LearnedConflict(Pairwise):
    """How directions of the stream that are learned from pairs stand to each other.

    Attributes:
        rows: a `LearnedPair` of each two.
        lengths: of each direction, |u_t|; NaN where its pairs have no direction in common.
        directions: (T, d) fp32, the plain means.
        norm: the side of the final norm on which streams are read.
    """

    measure: ClassVar[str] = "value"
    lengths: dict[str, float]
    directions: Tensor
    norm: str

    def _head(self) -> list[str]:
        return [
            f"cosines of mean differences {self.norm} the norm, {self.prompts} prompts, intervals of "
            f"{self.confidence:.0%}",
            "lengths: " + ", ".join(f"{name} {value:.3g}" for name, value in self.lengths.items()),
        ]

    def _about(self) -> dict[str, Any]:
        lengths = {name: None if np.isnan(value) else value for name, value in self.lengths.items()}
        return {"norm": self.norm, "lengths": lengths}


def learned_conflict(
    rm: Scorer,
    items: Sequence[tuple[Any, Mapping[str, tuple[Any, Any]]]],
    *,
    norm: Literal["before", "after"] = "after",
    confidence: float = 0.95,
    resamples: int = 1000,
    permutations: int = 1000,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> LearnedConflict:
    """Cosines of the directions in which pairs that differ in one term each move the stream, over the same prompts.

    Args:
        rm: a model whose reward is read at one token.
        items: (prompt, {term: (better, worse)}) each, of texts or messages; all have the same terms.
        norm: "after" the final norm, what the head reads, or "before" it.
        confidence, resamples, permutations, seed: of intervals (bootstrap over prompts) and tests.
        options: max_length, truncation, format, batch_tokens, progress (`rmfast.engine.options`).

    Returns:
        A `LearnedConflict`.

    Raises:
        ValueError: items of another form or of different terms, fewer than two terms or 20 prompts; a model that pools
            by itself; norm="before" where there is no final norm to leave out; interventions beside clamps.
    """
    arguments.instance("rm", rm, Scorer)
    confidence, resamples, permutations, seed = checked(confidence, resamples, permutations, seed)
    arguments.word("norm", norm, ("before", "after"))
    rm.expect_clamps_alone()
    if rm.pools:
        raise ValueError(f"{type(rm.binding.root).__name__} pools by itself: no stream of a token makes its reward")
    if norm == "before" and not rm.binding.leaves_norm_out:
        raise ValueError('Expected norm="after": the model has no final norm, or one with hooks')
    names, texts, of = _texts(items)
    streams = _streams(rm, texts, norm, **options).reshape(len(of), len(names), 2, -1)
    apart = cluster_means((streams[:, :, 0] - streams[:, :, 1]).double().numpy(), of)
    return compared(names, apart, norm, confidence, resamples, permutations, seed)


def compared(
    names: list[str], each: np.ndarray, norm: str, confidence: float, resamples: int, permutations: int, seed: int
) -> LearnedConflict:
    """Of differences of streams (G, T, d), of each prompt and term."""
    count, terms = each.shape[:2]
    flat = each.transpose(1, 0, 2).reshape(terms * count, -1)
    gram = (flat @ flat.T).reshape(terms, count, terms, count).transpose(0, 2, 1, 3).copy()  # (T, T, G, G)
    gram[:, :, np.arange(count), np.arange(count)] = 0
    first, second = np.triu_indices(terms, 1)

    products = _products(gram, np.ones((1, count)))
    value = _cosines(products, first, second)[0]
    draws = np.concatenate(
        [_cosines(_products(gram, weights), first, second) for weights in drawn(np.arange(count), resamples, seed)]
    )
    low, high = percentiles(draws, confidence)
    undefined = np.isnan(value)
    p, p_all = _tested(gram, first, second, permutations, seed)
    own = np.einsum("tt->t", products[0])
    table = np.column_stack([value, low, high, p, p_all])
    table[undefined] = np.nan
    return LearnedConflict(
        names=names, prompts=count, confidence=confidence, norm=norm,
        rows=[LearnedPair(names[i], names[j], *row) for i, j, row in zip(first, second, table.tolist())],
        lengths={name: float(np.sqrt(x)) if x > 0 else float("nan") for name, x in zip(names, own)},
        directions=torch.from_numpy(each.mean(0)).float(),
    )  # fmt: skip


def _texts(items: Any) -> tuple[list[str], list[Any], np.ndarray]:
    """Names of the terms, the texts (item by item, term by term, better and worse), and the items' prompts."""
    read = read_named_pairs(items, "term", ("better", "worse"))
    names = list(read[0][1]) if read else []
    for i, (_, terms) in enumerate(read):
        if set(terms) != set(names) or len(names) < 2:
            raise ValueError(f"Expected at least two terms, the same in all items, got {', '.join(terms)} in item {i}")
    of = clusters([text_of(prompt) for prompt, _ in read])
    expect_prompts("items", int(of.max()) + 1 if len(of) else 0)
    return names, [join(prompt, side) for prompt, terms in read for name in names for side in terms[name]], of


def _streams(
    rm: Scorer, inputs: list[Any], norm: str, batch_tokens: int | None = None, progress: bool = False, **encoding: Any
) -> Tensor:
    """(n, d) where `score` reads, on one side of the final norm."""

    def read(hidden: Tensor, rows: Tensor) -> Tensor:
        return hidden.reshape(-1, hidden.size(-1))[rows] if norm == "before" else rm.binding.normed(hidden, rows)[0]

    texts = rm.encode(inputs, **encoding)
    at = [np.array([i]) for i in rm.positions(texts)]
    return torch.cat([values for values, _ in run_watched(rm, rm.binding, [], texts, at, read, batch_tokens, progress)])


def _products(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(b, T, T) mean products between different prompts, of products (T, T, G, G) under weights (b, G)."""
    pairs = weights.sum(1) ** 2 - (weights**2).sum(1)
    out = np.empty((len(weights), *gram.shape[:2]))
    for s, t in np.ndindex(gram.shape[:2]):
        out[:, s, t] = ((weights @ gram[s, t]) * weights).sum(1) / pairs
    return out


def _cosines(products: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(b, pairs); NaN where a term has no direction."""
    own = np.einsum("btt->bt", products)
    own = np.where(own > 0, own, np.nan)
    return products[:, first, second] / np.sqrt(own[:, first] * own[:, second])


def _tested(
    gram: np.ndarray, first: np.ndarray, second: np.ndarray, permutations: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """p values (pairs,) of products that are 0 on average, by a sign at random for each prompt.

    What a prompt gives, g_i = Σ_j k_ij, is its products with all others, in both roles, since both means are estimates.
    Of the sum T = Σ_{i<j} k_ij the variance is Σ_i g_i² − Σ_{i<j} k_ij², in which two prompts' own product counts once.
    """
    both = gram[first, second] + gram[second, first]  # k, (pairs, G, G)
    given = both.sum(1)
    square = (given**2).sum(1)
    size = np.sqrt(np.where(square > 0, square, 1))
    spread = np.sqrt(np.where(square > 0, np.maximum(square - (both**2).sum((1, 2)) / 2, square / 2), 1))

    def signed() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        some = max(1, _AT_ONCE // given.size)
        for start in range(0, permutations, some):
            signs = rng.choice([-1.0, 1.0], (min(some, permutations - start), given.shape[1]))
            yield signs @ given.T / size

    return adjusted(given.sum(1) / 2 / spread, signed())
