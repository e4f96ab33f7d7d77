"""Conflict of a reward's terms: a multi-objective head's attributes, as directions and as numbers of the same pairs.

A head of A attributes makes a reward Σ_a m_a r_a, r_a = w_a·norm(h) + b_a, with weights m_a that a gate makes of the
prompt (ArmoRM). What a small change of the stream h does to term a is its gradient, the gate held where it is:

    g_a = m_a s (u_a − (u_a·h) s² h / d)     u_a = γ⊙w_a, s the norm's scale on h; of a layer norm both less their mean

Two terms conflict where their gradients point apart: cos(g_a, g_b) < 0. It is a local angle, and not that of the rows:
the norm's gain and the derivative of its scale are in it, and the sign with which a gate or transform takes a term in.
No gradient is ever made: g_a·g_b = m_a m_b s² (u_a·u_b − z_a z_b (1 + eps s²) / d) needs z_a = s u_a·h alone.

Whether two terms conflict on real responses is another question, which the same pairs answer: the correlation of what
the terms add to the difference of a pair's two rewards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from rmfast import arguments
from rmfast.engine.scorer import Scorer
from rmfast.interpret.frozen_head import FrozenHead, linear_head
from rmfast.interpret.pairwise import Pairwise, adjusted, checked, expect_prompts
from rmfast.ops import reward_head
from rmfast.patching.watched import run_watched
from rmfast.resampling import cluster_means, clusters, drawn, percentiles
from rmfast.texts.pairs import read_pairs

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from rmfast.engine.options import RunOptions

_AT_ONCE = 1 << 20


class TermPair(NamedTuple):
    """Two terms: the mean cosine of their gradients; the correlation of what they add to the difference of a pair's
    rewards, about 0 (whichever response comes first); the share of pairs in which the two pull apart; p of no
    correlation by sign flips, alone and corrected for all pairs of terms."""

    first: str
    second: str
    cosine: float
    cosine_low: float
    cosine_high: float
    correlation: float
    low: float
    high: float
    opposed: float
    p: float
    p_all: float


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TermConflict(Pairwise):
    """How the terms of a reward stand to each other.

    Attributes:
        rows: a `TermPair` of each two.
        weights: by name, the mean weight m_a with which a term is in the reward.
        chance: the |cosine| that one in twenty of two random directions of this width exceed.
        contributions: (2n, A) fp64, what each term adds to the reward of each response (chosen and rejected in turn).
    """

    measure: ClassVar[str] = "cosine"
    weights: dict[str, float]
    chance: float
    contributions: np.ndarray

    def _head(self) -> list[str]:
        return [
            f"{len(self.names)} terms over {self.prompts} prompts, intervals of {self.confidence:.0%}",
            f"cosines of gradients, of random directions below {self.chance:.2f} in 19 of 20; correlations over pairs",
            "mean weights: " + ", ".join(f"{name} {value:.3g}" for name, value in self.weights.items()),
        ]

    def _about(self) -> dict[str, Any]:
        return {"weights": self.weights, "chance": self.chance}


def term_conflict(
    rm: Scorer,
    pairs: Sequence[Any],
    *,
    names: Sequence[str] | None = None,
    weights: Any = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    permutations: int = 1000,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> TermConflict:
    """The conflict of a multi-objective head's terms, over the same pairs.

    Args:
        rm: a model whose head has several attributes, each linear in one token's stream: one with a gate (ArmoRM, QRM,
            URM), or several labels.
        pairs: (prompt, chosen, rejected) triples or mappings (`rmfast.texts.pairs.read_pairs`).
        names: of the terms; default the head's own, else their numbers.
        weights: (A,) of several labels in the reward that they make, default 1 each; a gate has its own.
        confidence, resamples, permutations, seed: of intervals (bootstrap over prompts, each counting once) and tests
            (all of a prompt's differences of one term take the other sign).
        options: max_length, truncation, format, batch_tokens, progress (`rmfast.engine.options`).

    Returns:
        A `TermConflict`.

    Raises:
        ValueError: a head of one attribute, or one that is not linear in one token's stream but for its gate; a term
            without a direction, a weight, or differences between responses, which then has no angle; fewer than 20
            prompts; interventions beside clamps at all positions.
    """
    arguments.instance("rm", rm, Scorer)
    confidence, resamples, permutations, seed = checked(confidence, resamples, permutations, seed)
    rm.expect_clamps_alone(("all",))
    linear_head(rm.binding)  # refused before anything runs
    head = FrozenHead.of(rm.binding, "frozen")
    count, width = head.direction.shape
    if count < 2:
        raise ValueError(f"Expected a head of several attributes, got one: {type(rm.binding.root).__name__}")
    program = rm.binding.program
    mixes = program is not None and program.mixes
    if weights is not None and mixes:
        raise ValueError(f"Expected no weights: {program.kind} makes its own of each prompt")
    given = np.ones(count) if weights is None else arguments.finite("weights", weights, count)
    if names is None:
        own = () if program is None else program.names
        names = list(own) if len(own) == count else list(map(str, range(count)))
    names = arguments.sequence("names", names, "a name for each term", count)
    for name in names:
        arguments.instance("each of names", name, str)
    if len(set(names)) < count:
        raise ValueError("Expected names of terms to be different, got one twice")
    arguments.expect_dimension("pairs", pairs)
    read = read_pairs(pairs)
    of = clusters([pair.prompt for pair in read])
    expect_prompts("pairs", int(of.max()) + 1 if len(of) else 0)

    z, scale, mixed = _read(rm, head, [text for pair in read for text in pair.inputs], mixes, **options)
    mixed = np.broadcast_to(given, z.shape) if mixed is None else mixed
    direction = head.direction.double().cpu().numpy()
    for name, row, some in zip(names, direction, mixed.T):
        if not np.any(row) or not np.any(some):
            raise ValueError(f"Expected terms with a direction, and weights that are not 0, got {name!r} without")
    first, second = np.triu_indices(count, 1)
    cosines = _cosines(direction, z, scale, head, width)[:, first, second] * np.sign(mixed[:, first] * mixed[:, second])
    contributions = mixed * (z + head.constant.double().cpu().numpy())
    apart = contributions[::2] - contributions[1::2]
    for name, some in zip(names, apart.T):
        if not np.any(some):
            raise ValueError(
                f"Expected responses that {name!r} tells apart, got the same numbers for both of each pair"
            )
    # Of each prompt once.
    angle = cluster_means(cosines.reshape(len(read), 2, -1).mean(1), of)
    products = cluster_means(apart[:, :, None] * apart[:, None, :], of)
    figures = figures_of(angle, products, first, second, confidence, resamples, permutations, seed)
    figures["opposed"] = cluster_means((apart[:, first] * apart[:, second] < 0).astype(np.float64), of).mean(0)
    rows = [
        TermPair(names[i], names[j], **{figure: float(values[n]) for figure, values in figures.items()})
        for n, (i, j) in enumerate(zip(first, second))
    ]
    return TermConflict(
        names=names, rows=rows, prompts=len(angle), confidence=confidence,
        weights=dict(zip(names, mixed.mean(0).tolist())), contributions=contributions,
        chance=float(np.sqrt(stats.beta.ppf(0.95, 0.5, (width - 1) / 2))),
    )  # fmt: skip


def _read(
    rm: Scorer, head: FrozenHead, inputs: list[Any], mixes: bool, batch_tokens: int | None = None,
    progress: bool = False, **encoding: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:  # fmt: skip
    """z (n, A), the norm's scales (n, 1), and of a head that mixes attributes its weights of them (n, A)."""
    bound, count = rm.binding, len(head.direction)

    def read(hidden: Tensor, rows: Tensor) -> Tensor:
        stream = hidden.reshape(-1, hidden.size(-1))[rows]
        scale = head.scale(stream)
        dots = reward_head(stream, head.direction.to(stream.device)).to(scale) * scale
        own = [bound.row_values(hidden, rows).to(scale)] if mixes else []
        return torch.cat([*own, dots, scale], 1)

    texts = rm.encode(inputs, **encoding)
    at = [np.array([i]) for i in rm.positions(texts)]
    found = run_watched(rm, bound, [], texts, at, read, batch_tokens, progress)
    values = torch.cat([value for value, _ in found])
    kept = values.size(1) - count - 1
    own, z, scale = values.split([kept, count, 1], 1)
    mixed = None
    if mixes:
        gates = [gate[:, :kept] for _, gate in found if gate is not None]
        weights = bound.program.mixed(own, torch.cat(gates) if gates else None)
        assert weights is not None
        mixed = weights[:, 0].double().numpy()
    return z.double().numpy(), scale.double().numpy(), mixed


def _cosines(direction: np.ndarray, z: np.ndarray, scale: np.ndarray, head: FrozenHead, width: int) -> np.ndarray:
    """(n, A, A) of the gradients at each text."""
    gram = np.broadcast_to(direction @ direction.T, (len(z), *[len(direction)] * 2))
    if head.norm.eps is not None:
        radial = (1 + head.norm.eps * scale**2) / width
        gram = gram - radial[:, :, None] * z[:, :, None] * z[:, None, :]
    size = np.sqrt(np.einsum("nii->ni", gram))
    return gram / (size[:, :, None] * size[:, None, :])


def figures_of(
    angle: np.ndarray, products: np.ndarray, first: np.ndarray, second: np.ndarray, confidence: float, resamples: int,
    permutations: int, seed: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Cosines and correlations with their ends, and p values, (pairs of terms,) each; of a prompt's mean cosines
    (G, pairs of terms) and products of differences (G, A, A)."""
    count = len(angle)
    flat = np.ascontiguousarray(products[:, first, second])
    squares = np.einsum("gii->gi", products)

    def both(weights: np.ndarray) -> np.ndarray:
        size = weights @ squares
        with np.errstate(invalid="ignore"):
            correlation = weights @ flat / np.sqrt(size[:, first] * size[:, second])
        return np.stack([weights @ angle / weights.sum(1, keepdims=True), correlation], 1)

    cosine, correlation = both(np.ones((1, count)))[0]
    draws = np.concatenate([both(weights) for weights in drawn(np.arange(count), resamples, seed)])
    low, high = percentiles(draws, confidence)
    whole = squares.sum(0)
    size = np.sqrt(whole[first] * whole[second])

    def flipped() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        some = max(1, _AT_ONCE // flat.size)
        for start in range(0, permutations, some):
            signs = rng.choice([-1.0, 1.0], (min(some, permutations - start), count, squares.shape[1]))
            yield np.einsum("bgp,gp->bp", signs[:, :, first] * signs[:, :, second], flat) / size

    p, p_all = adjusted(correlation, flipped())
    return {
        "cosine": cosine, "cosine_low": low[0], "cosine_high": high[0], "correlation": correlation, "low": low[1],
        "high": high[1], "p": p, "p_all": p_all,
    }  # fmt: skip
