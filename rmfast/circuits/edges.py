"""Edge attribution patching: what a patch of each edge would do to the reward, all edges from one backward.

The score of sender u and receiver v is (z'_u − z_u) · ∇_v L: what u would write in the corrupted run less what it
writes in the clean one, times the gradient of the reward L in what v reads (Syed, Rager and Conmy 2023, arXiv
2310.10348). EAP-IG takes the mean gradient over runs whose embeddings lie between those of both texts (Hanna,
Pezzelle and Belinkov 2024, arXiv 2403.17806; the variant of inputs). Both are sums over tokens of products of all
senders with all receivers of a layer, some tokens at a time, so that no array is of edges by tokens by d.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from rmfast import arguments
from rmfast.circuits.parts import Parts, Seen, Sent
from rmfast.circuits.scores import EdgeScores
from rmfast.engine.options import Encoding, takes
from rmfast.engine.scorer import Scorer
from rmfast.patching.pairs import Align, Pair
from rmfast.patching.request import Metric, Request
from rmfast.texts.inputs import words

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ELEMENTS = 1 << 26  # of what senders write, at once: 256 MiB
_ROWS = 3072  # tokens of the runs that go backward together


@takes(Encoding)
def edge_attribution(
    rm: Scorer,
    clean: Any,
    corrupted: Any,
    *,
    steps: int | None = None,
    rule: Literal["midpoint", "left"] = "midpoint",
    positions: Literal["joint", "all"] = "joint",
    align: Align = "auto",
    metric: Metric | None = None,
    weights: Sequence[float] | None = None,
    **options: Unpack[Encoding],
) -> EdgeScores:
    """Estimates for every edge what its part of the corrupted run would do to the clean run's reward.

    Two forwards and a backward for a pair of texts, or with `steps` n forwards and backwards beside the two. The scores
    of edges from the embedding add up to about what the reward changes by if the embeddings alone are exchanged
    (EAP-IG; exactly, as steps grow). A model stored in 16 bits runs in fp32.

    Args:
        rm: a `rmfast.RewardModel` of a decoder.
        clean, corrupted: one text each, in any form that `score` takes, or lists of as many texts, of which scores are
            the mean.
        steps: None for the gradient at the clean run (EAP); else that of EAP-IG, at so many runs.
        rule: where on the way between the embeddings these lie: "midpoint", (k − ½) / n, or "left", (k − 1) / n
            from the clean text, which is the paper's.
        positions: "joint", the sum over tokens, or "all", each token's part (of one pair).
        align: as for `patch_sweep`. A token of the clean text without a partner keeps what it has.
        metric: a function of the rewards (K,) that gives a tensor of one number, L; needed for K > 1.
        weights: of each pair, in place of 1 / n. For the margin of a chosen and a rejected text, each with a corrupted
            text of its own, 1 and −1.
        options: max_length, truncation, format, ... (`rmfast.engine.options.Encoding`).

    Returns:
        `EdgeScores`.

    Raises:
        ValueError, TypeError: an argument is wrong, texts do not differ, or the model is no decoder whose layers rmfast
            takes apart into heads and MLPs.
    """
    steps = steps if steps is None else arguments.whole("steps", steps, 1, 1_000_000)
    arguments.word("rule", rule, ("midpoint", "left"))
    every = arguments.word("positions", positions, ("joint", "all")) == "all"
    request = Request(rm, mode="noising", align=align, **options)
    metric = checked_metric(rm, metric)
    pairs, _ = request.pairs(clean, corrupted)
    if every and len(pairs) > 1:
        raise ValueError(f'Expected one pair with positions="all", whose tokens others do not share, got {len(pairs)}')
    share = np.full(len(pairs), 1 / len(pairs))
    if weights is not None:
        share = arguments.finite("weights", weights, len(pairs))
    parts = Parts(rm)
    total = squares = None
    rewards = np.zeros((len(pairs), 2))
    with parts.binding.session(grad=True):
        for i, pair in enumerate(pairs):
            found, rewards[i] = _of_pair(parts, pair, metric, _way(steps, rule), every)
            total = found * share[i] if total is None else total + found * share[i]
            squares = found.square() if squares is None else squares + found.square()
    assert total is not None and squares is not None
    error = None
    if len(pairs) > 1 and weights is None:
        variance = (squares / len(pairs) - total.square()).clamp(min=0) / (len(pairs) - 1)
        error = variance.sqrt().cpu()
    none = ~parts.edges()
    first = pairs[0]
    return EdgeScores(
        scores=total.cpu().masked_fill(none, torch.nan),
        error=None if error is None else error.masked_fill(none, torch.nan),
        senders=parts.senders,
        receivers=parts.receivers,
        method="EAP" if steps is None else "EAP-IG",
        steps=steps or 1,
        rule="clean" if steps is None else rule,
        clean=float(share @ rewards[:, 0]),
        corrupted=float(share @ rewards[:, 1]),
        pairs=len(pairs),
        tokens=words(rm.tokenizer, first.base.ids.tolist()) if every else None,
        dtype=str(parts.dtype).removeprefix("torch."),
    )


def checked_metric(rm: Scorer, metric: Metric | None) -> Metric:
    """The function of rewards (K,) that is asked for, by default the one reward there is."""
    if metric is not None:
        return arguments.function("metric", metric, "the rewards (K,)")
    if rm.num_labels != 1:
        raise ValueError(f"Expected metric, a number of the {rm.num_labels} rewards of this model, got none")
    return lambda rewards: rewards[0]


def measured(metric: Metric, rewards: Tensor) -> Tensor:
    """() of rewards (K,)."""
    value = metric(rewards)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"Expected metric to return a tensor of one number, got {got}")
    return value.reshape(())


def aligned_sent(parts: Parts, own: Sent, other: Sent, pair: Pair) -> Sent:
    """What the other run's senders wrote, at the tokens of the base run; what has no partner there stays its own.

    Raises:
        ValueError: no token that counts has one.
    """
    partner = torch.from_numpy(pair.partner).to(parts.device)
    paired = partner >= 0
    if not paired[: pair.base_read + 1].any():
        raise ValueError("Expected align to give a token of the clean text a partner, up to the one read, got none")

    def placed(own: Tensor, other: Tensor) -> Tensor:
        return torch.where(paired.view(-1, *[1] * (own.dim() - 1)), other[partner.clamp(min=0)], own)

    return own.mapped(placed, other)


def _way(steps: int | None, rule: str) -> np.ndarray:
    """(n,) from 0, the clean text's embedding, to 1."""
    if steps is None:
        return np.zeros(1)
    return (np.arange(steps) + (0.5 if rule == "midpoint" else 0.0)) / steps


def _of_pair(parts: Parts, pair: Pair, metric: Metric, way: np.ndarray, every: bool) -> tuple[Tensor, np.ndarray]:
    """Scores (U, V), or (T, U, V), in fp64, and the numbers of the clean and the corrupted run."""
    assert pair.other is not None
    with torch.no_grad():
        seen, rewards = parts.run(pair.other, pair.other_read)
        other, corrupted = parts.sent(seen), measured(metric, rewards[0])
    at_clean = not way.any()
    with torch.set_grad_enabled(at_clean):
        seen, rewards = parts.run(pair.base, pair.base_read)
    own, clean = parts.sent(seen), measured(metric, rewards[0])
    other = aligned_sent(parts, own, other, pair)
    change = own.mapped(lambda own, other: other - own, other)
    span = slice(pair.first, pair.base_read + 1)  # before it nothing changes, and what is behind it is not read
    total = parts.like.new_zeros(len(pair.base) if every else 1, len(parts.senders), len(parts.receivers)).double()
    size = max(1, _ROWS // len(pair.base))
    for some in np.split(way, list(range(size, len(way), size))):
        if not at_clean:
            between = torch.from_numpy(some).to(parts.like)[:, None, None]
            seen, rewards = parts.run(pair.base, pair.base_read, own.embedding + between * change.embedding)
        slopes = _slopes(parts, seen, torch.stack([measured(metric, each) for each in rewards]).sum() / len(way))
        del seen
        for at in _some_tokens(span, max(1, _ELEMENTS // (len(parts.senders) * parts.width))):
            _add_scores(parts, change, slopes, at, total[at] if every else total)
    return total if every else total[0], np.array([float(clean.detach()), float(corrupted)])


def _some_tokens(span: slice, count: int) -> Iterator[slice]:
    for start in range(span.start, span.stop, count):
        yield slice(start, min(start + count, span.stop))


@dataclass(eq=False)
class _Slopes:
    """The metric's gradient, summed over n runs, in what receivers of one layer read.

    Of q, k and v heads it is W_v (head_slopes) − Σ_n inward · stream, the second of the norm's scale; it is made for
    some tokens at a time, since it is (V, T, d).

    Attributes:
        heads: (T, V, D), times the norm's scale.
        inward: (n, T, V), or None without a norm.
        streams: (n, T, d), less their means where the norm takes them off.
        mlp: (T, d).
    """

    heads: Tensor
    inward: Tensor | None
    streams: Tensor
    mlp: Tensor

    def of_heads(self, weight: Tensor, at: slice) -> Tensor:
        """(V, t, d) at some tokens, of `Parts.reads`."""
        out = torch.bmm(self.heads[at].transpose(0, 1), weight)
        if self.inward is None:
            return out
        return out - torch.bmm(self.inward[:, at].permute(1, 2, 0), self.streams[:, at].transpose(0, 1)).transpose(0, 1)


def _slopes(parts: Parts, seen: Seen, output: Tensor) -> tuple[list[_Slopes], Tensor]:
    """By layer, and (T, d) of the reward."""
    if not output.requires_grad:
        raise ValueError("Expected metric to return a number that depends on the rewards")
    keys = [key for key in seen if key[0].startswith(("projected", "mlp_in", "end"))]
    tensors = [x for key in keys for x in seen[key]]
    # A receiver that the reward does not depend on: of rows that are not read, in the last layer.
    grads = torch.autograd.grad(output, tensors, allow_unused=True)
    found = iter(torch.zeros_like(x) if grad is None else grad for x, grad in zip(tensors, grads))
    slopes = {key: [next(found) for _ in seen[key]] for key in keys}
    layers = []
    with torch.no_grad():
        for index, layer in enumerate(parts.layers):
            heads = layer.projections
            norm, stream = parts.norm(index, "before_attn"), parts.rows(seen, "stream", index)

            def split(some: Seen, index: int = index, stream: Tensor = stream, heads: Any = heads) -> Tensor:
                """(n, T, V, D)."""
                made = (some[f"projected {which}", index][0] for which in range(len(heads.modules)))
                flat = [x.detach().reshape(-1, x.size(-1)).to(stream) for x in made]
                return torch.cat(heads.parted(flat), 1).unflatten(0, stream.shape[:2])

            slope, scale = split(slopes), norm.scale(stream)
            inward = None
            if norm.eps is not None:
                unbiased = split(seen) - parts.offset(index)
                inward = scale.square() / parts.width * (slope * unbiased).sum(-1)
            given = torch.stack([x.detach().to(stream).reshape(stream.shape) for x in slopes["mlp_in", index]]).sum(0)
            mlp = parts.norm(index, "before_mlp").back(parts.mlp_stream(seen, index), given)
            layers.append(_Slopes((scale[..., None] * slope).sum(0), inward, norm.centre(stream), mlp.sum(0)))
        end = slopes["end", 0][0].detach().to(parts.like)
    return layers, end.sum(0)


def _add_scores(parts: Parts, change: Sent, slopes: tuple[list[_Slopes], Tensor], at: slice, total: Tensor) -> None:
    """Adds the part of some tokens to total (1 or t, U, V)."""
    layers, end = slopes
    written = parts.written(change, at)
    _check_sum(written, change.streams[-1][at])

    def add(start: int, *slopes: Tensor) -> None:  # (v, t, d) of receivers from the start on
        slope = torch.cat(slopes)
        columns = slice(start, start + len(slope))
        some = written[: parts.sees[columns.stop - 1]]
        into = total[:, : len(some), columns]
        if len(total) == 1:
            into[0] += some.flatten(1) @ slope.flatten(1).T
        else:
            into += torch.bmm(some.transpose(0, 1), slope.permute(1, 2, 0))

    # An MLP goes with the next layer's heads, so that what senders write is read once; with itself it has no edge.
    mlp: list[Tensor] = []
    for index, each in enumerate(layers):
        add(parts.receivers_of(index)[0].start - len(mlp), *mlp, each.of_heads(parts.reads(index), at))
        mlp = [each.mlp[None, at]]
    add(len(parts.receivers) - 2, *mlp, end[None, at])


def _check_sum(written: Tensor, stream: Tensor) -> None:
    """What the senders write adds up to the stream."""
    error = (written.sum(0) - stream).norm()
    if not error <= 1e-3 * max(float(written.norm()), float(stream.norm())):
        raise ValueError(
            "Expected heads and MLPs whose outputs add up to the residual stream, got a difference of "
            f"{float(error):.2e} for a stream of norm {float(stream.norm()):.2e}: layers have other parts"
        )
