"""The reward lens: what the head makes of the residual stream after each layer, streamed during one forward pass.

    r_l = head(norm(h_l)), l = 0 (the embedding), 1, ..., L (the reward itself)

The form of arXiv 2604.26130 leaves the final norm out (norm="raw", w·h_l + b), so its last layer is not the reward.
A layer's stream is read where the layer after it is given it, at the rows that are read alone, by `reward_head`; packed
runs and padded ones are those of `score`. No activation is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from rmfast.arguments import flag, instance, whole, word
from rmfast.binding.binding import Binding
from rmfast.binding.layer_list import layered
from rmfast.binding.session import replaced_forward
from rmfast.engine.attention import entering
from rmfast.engine.scorer import Scorer
from rmfast.interpret.frozen_head import FrozenHead, check_norm
from rmfast.ops import reward_head
from rmfast.patching.points import Point
from rmfast.patching.watched import run_watched
from rmfast.plots import axes, figure_size, heat_map, needed, shown_figure
from rmfast.texts.inputs import words

if TYPE_CHECKING:
    from rmfast.interpret.comparison import Estimate

NormUse = Literal["final", "frozen", "raw"]


@dataclass(eq=False, repr=False, kw_only=True)
class Lens:
    """The reward of N texts at every layer: 0 is the embedding, l what layer l − 1 gives, the last one the score.

    Attributes:
        rewards: (N, L + 1), or (N, L + 1, K) for K > 1; with positions="all" a list of (L + 1, T[, K]). CPU, fp32 (fp64
            for an fp64 model).
        scores: (N,) or (N, K), or a list of (T[, K]): the model's own. They are the last layer of `rewards`, but for
            norm="raw".
        layers: L.
        norm: "final", "frozen" or "raw".
        positions: "last" or "all".
        read: (N,), the token at which each text is scored.
        token_ids: of each text.
    """

    rewards: Any
    scores: Any
    layers: int
    norm: str
    positions: str
    read: list[int]
    token_ids: list[list[int]]
    _decode: Callable[[list[int]], list[str]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.read)

    def __repr__(self) -> str:
        at = "the read token" if self.positions == "last" else "every token"
        return f"Lens({len(self)} texts, {self.layers} layers and the embedding, at {at}, norm {self.norm!r})"

    def _repr_html_(self) -> str:
        """For notebooks: `plot`."""
        return shown_figure(self.plot, repr(self)) if len(self) else f"<pre>{escape(repr(self))}</pre>"

    @property
    def _labels(self) -> int:
        """K; 1 where there is no text to tell."""
        scores = self.scores if self.positions == "last" else self.scores[0] if len(self) else torch.empty(0)
        return 1 if scores.dim() == 1 else scores.size(-1)

    def tokens(self, text: int) -> list[str]:
        """The tokens of a text."""
        return self._decode(self.token_ids[whole("text", text, -len(self), len(self) - 1)])

    @property
    def margins(self) -> Tensor:
        """(N / 2, L + 1[, K]): rewards of texts 0, 2, ... (chosen) less those of 1, 3, ... (rejected).

        Raises:
            ValueError: an odd number of texts, or rewards at every token.
        """
        if self.positions != "last":
            raise ValueError('Expected rewards at the read token (positions="last") for pairs, got every token\'s')
        if len(self) % 2 or not len(self):
            raise ValueError(f"Expected chosen and rejected texts alternately, an even number, got {len(self)}")
        return self.rewards[0::2] - self.rewards[1::2]

    def crystallisation(self, signed: bool = False) -> Tensor:
        """(N / 2[, K]) int64: for each pair the first layer l whose margin is half of the last one's, |Δ_l| ≥ ½|Δ_L|.

        −1 where the last margin is 0 or not finite. arXiv 2604.26130's definition.

        Args:
            signed: also ask for the last one's sign.

        Raises:
            ValueError: as for `margins`.
        """
        flag("signed", signed)
        margins = self.margins
        last = margins[:, -1:]
        reached = margins * last.sign() >= last.abs() / 2 if signed else margins.abs() >= last.abs() / 2
        defined = (last != 0) & last.isfinite()
        return torch.where(defined[:, 0], reached.int().argmax(1), -1)

    def compare(self, other: Lens, *, confidence: float = 0.95, seed: int = 0) -> Estimate:
        """How alike two models of any depth come to the margins of the same pairs: Pearson's r of their curves.

        A pair's curves Δ_l / Δ_L are taken over relative depth l / L, the shorter interpolated linearly to the layers
        of the longer (arXiv 2604.26130). Pairs whose curve is flat, or whose last margin is 0, are left out.

        Args:
            other: of the same pairs, in the same order; K = 1, as for this one.
            confidence, seed: of the bootstrap over pairs.

        Returns:
            The mean over pairs with its interval and the number of pairs.

        Raises:
            ValueError: as for `margins`; different norms or numbers of pairs, fewer than 10 of them, or K > 1.
        """
        from rmfast.interpret.comparison import mean_of_pairs

        instance("other", other, Lens)
        if self.norm != other.norm:
            raise ValueError(f"Expected lenses of one norm, got {self.norm!r} and {other.norm!r}")
        curves = [lens._curves() for lens in (self, other)]
        if len(curves[0]) != len(curves[1]):
            raise ValueError(f"Expected lenses of the same pairs, got {len(curves[0])} and {len(curves[1])} of them")
        depth = np.linspace(0, 1, max(curve.shape[1] for curve in curves))
        a, b = (
            np.stack([np.interp(depth, np.linspace(0, 1, len(curve)), curve) for curve in some]) if len(some) else some
            for some in curves
        )
        a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
        with np.errstate(all="ignore"):
            return mean_of_pairs(
                (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1)), confidence=confidence, seed=seed
            )

    def _curves(self) -> np.ndarray:
        """(P, L + 1), margins over the last one."""
        margins = self.margins.double().numpy()
        if margins.ndim > 2:
            raise ValueError(f"Expected lenses of one reward, K = 1, got {margins.shape[2]}")
        with np.errstate(all="ignore"):
            return margins / margins[:, -1:]

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row for each text, layer (and position, with its token) and label (for K > 1).

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = needed("pandas", "to_dataframe")
        frames = [pandas.DataFrame(columns=["text", "layer", "position", "token", "reward"])] if not len(self) else []
        for i, rewards in enumerate(self.rewards):
            axes = ["layer", *(["position"] if self.positions == "all" else [])]
            axes += ["label"] if rewards.dim() > len(axes) else []
            index = np.indices(rewards.shape).reshape(len(axes), -1)
            columns: dict[str, Any] = {"text": i, **dict(zip(axes, index))}
            columns.setdefault("position", self.read[i])
            columns["token"] = np.array(self.tokens(i), object)[columns["position"]]
            frames.append(pandas.DataFrame({**columns, "reward": rewards.numpy().ravel()}))
        return pandas.concat(frames, ignore_index=True)

    def plot(self, *, pairs: bool = False, text: int | None = None, label: int = 0, ax: Any = None) -> Any:
        """Rewards by layer: a line for each text, or with `pairs` for each pair's margin, and their mean.

        With 10 pairs or more the mean has its 95% bootstrap interval. With positions="all" a map of layers by tokens
        of one text.

        Args:
            pairs: margins in place of rewards, with the median crystallisation layer.
            text: which one, for positions="all" (default the first); else only this one's line.
            label: which reward of K.
            ax: the matplotlib Axes to draw on; default: a new figure.

        Returns:
            The Axes.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: as for `margins`, with `pairs`.
        """
        from rmfast.interpret.comparison import LEAST_PAIRS, mean_of_pairs

        flag("pairs", pairs)
        if text is not None:
            whole("text", text, -len(self), len(self) - 1)
        whole("label", label, 0, self._labels - 1)
        if self.positions == "all" and not pairs:
            return self._map(0 if text is None else text, label, ax)
        curves = self.margins if pairs else self.rewards if text is None else self.rewards[[text]]
        curves = (curves[..., label] if curves.dim() > 2 else curves).double().numpy()
        ax = axes(ax, 7, 4)
        layers = np.arange(curves.shape[1])
        ax.plot(layers, curves.T, color="0.6", linewidth=0.6, alpha=0.6)
        curves = curves[np.isfinite(curves).all(1)]  # of a pair that is not there is no mean
        name = f"mean of {len(curves)} {'pairs' if pairs else 'texts'}"
        if pairs and len(curves) >= LEAST_PAIRS:
            means = [mean_of_pairs(curves[:, layer]) for layer in layers]
            ax.fill_between(layers, [m.low for m in means], [m.high for m in means], alpha=0.3)
            name += ", 95% interval"
        if len(curves):
            ax.plot(layers, curves.mean(0), label=name)
        if pairs:
            found = self.crystallisation()
            layer = (found[:, label] if found.dim() > 1 else found).numpy()
            layer = layer[layer >= 0]
            if len(layer):
                middle, extent = float(np.median(layer)), ""
                if len(layer) >= LEAST_PAIRS:
                    estimate = mean_of_pairs(layer, statistic=np.median)
                    extent = f"[{estimate.low:g}, {estimate.high:g}] "
                name = f"median crystallisation {middle:g} {extent}(n {len(layer)})"
                ax.axvline(middle, linestyle=":", color="0.3", label=name)
        ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        ax.set_xlabel("layer (0: embedding)")
        ax.set_ylabel(f"{'margin' if pairs else 'reward'}, norm {self.norm}")
        ax.legend()
        return ax

    def _map(self, text: int, label: int, ax: Any) -> Any:
        rewards = self.rewards[text]
        rewards = (rewards[..., label] if rewards.dim() > 2 else rewards).double().numpy()
        words = [f"{i} {word!r}" for i, word in enumerate(self.tokens(text))]
        ax = axes(ax, *figure_size(*rewards.shape))
        heat_map(ax, rewards, list(map(str, range(len(rewards)))), words, f"reward, norm {self.norm}")
        ax.set_xlabel("token")
        ax.set_ylabel("layer (0: embedding)")
        return ax


def lens(
    rm: Scorer,
    inputs: Sequence[Any],
    *,
    positions: Literal["last", "all"] = "last",
    norm: NormUse = "final",
    batch_tokens: int | None = None,
    progress: bool = False,
    **encoding: Any,
) -> Lens:
    """See `RewardModel.lens`."""
    word("positions", positions, ("last", "all"))
    word("norm", norm, ("final", "frozen", "raw"))
    if rm.pools:
        raise ValueError(
            f"{type(rm.binding.root).__name__} pools by itself: lens needs a head that reads one token's stream"
        )
    if rm.interventions is not None and rm.interventions.lengths:
        raise ValueError(
            f"Expected a model without corrections by length, which no layer makes, got {rm.interventions}"
        )
    bound, layers = layered(rm.binding)
    check_norm(bound, "raw")
    linear = None if norm == "final" else FrozenHead.of(bound, norm)
    texts = rm.encode(inputs, **encoding)
    read = rm.positions(texts)
    every = positions == "all"
    rows = [np.arange(len(text)) if every else np.array([at]) for text, at in zip(texts, read)]
    mixes = bound.program is not None and (rm.gated or (bound.program.mixes and linear is not None))
    streams = (_MixedStreams if mixes else _Streams)(bound, layers, linear, norm == "frozen")
    found = run_watched(rm, bound, streams.taps, texts, rows, streams.read, batch_tokens, progress)
    finished = [streams.finished(*values) for values in found]
    squeezed = [value[..., 0] if rm.num_labels == 1 else value for value in finished]  # (reads, L + 2[, K])
    layered_rewards, scores = [value[:, :-1] for value in squeezed], [value[:, -1] for value in squeezed]
    shape = (0, len(layers) + 1, *([] if rm.num_labels == 1 else [rm.num_labels]))
    return Lens(
        rewards=[value.transpose(0, 1) for value in layered_rewards]
        if every
        else torch.cat([torch.empty(shape), *layered_rewards]),
        layers=len(layers),
        scores=scores if every else torch.cat([torch.empty(shape)[:, 0], *scores]),
        norm=norm,
        positions=positions,
        read=read,
        token_ids=[text.ids.tolist() for text in texts],
        _decode=partial(words, rm.tokenizer),
    )


class _Streams:
    """What the head makes of each layer's stream in a run, at the rows that are read."""

    def __init__(self, bound: Binding, layers: list[nn.Module], linear: FrozenHead | None, frozen: bool) -> None:
        self.bound, self.layers, self.linear, self.frozen = bound, layers, linear, frozen
        self.seen: dict[int, Tensor] = {}
        self.taps = [(Point(layer, "in"), partial(self._see, index)) for index, layer in enumerate(layers)]
        # While the body runs, the norm gives back what it is given.
        self.own_norm = None if bound.norm is None else bound.norm.forward

    def _see(self, index: int, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.size(-1) != self.bound.width:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                self._expected(index, f"to be given (B, T, {self.bound.width}), as the head is, got {got}")
            )
        self.seen[index] = self._rewards(entering(x))

    def _expected(self, index: int, what: str) -> str:
        return (
            f"Expected layer {index} of {type(self.bound.body).__name__} ({type(self.layers[index]).__name__}) {what}: "
            "the head reads no stream of its"
        )

    def _rewards(self, stream: Tensor) -> Tensor:
        """(m, d) -> (m, K); for "frozen" and "raw" without scale and constant."""
        if self.linear is not None:
            return reward_head(stream, self.linear.direction.to(stream.device))
        with ExitStack() as stack:
            if self.bound.norm is not None and self.bound.leaves_norm_out:
                stack.enter_context(replaced_forward(self.bound.norm, cast(Callable, self.own_norm)))
            return self._made(stream[None], torch.arange(stream.size(0), device=stream.device))

    def _made(self, hidden: Tensor, rows: Tensor) -> Tensor:
        return self.bound.rewards(hidden, rows)

    def _taken(self, device: torch.device) -> list[Tensor]:
        """What has been seen of each layer, once."""
        if absent := set(range(len(self.taps))) - set(self.seen):
            raise ValueError(self._expected(min(absent), "to be called as a module, which hooks see, got no call"))
        seen = [self.seen[index].to(device) for index in range(len(self.taps))]
        self.seen = {}
        return seen

    def read(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """(M, L + 2, K): the reward at every layer, and the model's own; what `Scorer.run` takes as head."""
        scores = self.bound.rewards(hidden, rows)
        last, seen = scores, self._taken(scores.device)
        if self.linear is not None:
            stream = hidden.reshape(-1, hidden.size(-1))[rows]
            scale, constant = self.linear.scale(stream), self.linear.constant.to(scores.device)
            seen = [value * scale + constant for value in seen]
            last = scores if self.frozen else self._rewards(stream) + constant
        return torch.stack([*seen, last, scores], 1)

    def finished(self, values: Tensor, gates: Tensor | None) -> Tensor:
        """(n, L + 2, K) of what `read` has made of a text's rows."""
        return values


class _MixedStreams(_Streams):
    """The same of a head whose rewards are a mixture of attributes: its gate is what it is in the last layer."""

    width = 0  # of a row's values

    def _made(self, hidden: Tensor, rows: Tensor) -> Tensor:
        return self.bound.row_values(hidden, rows)

    def read(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """(M, (L + 1) · n + V): of every layer the row's values or, with a linear map, attributes; the row's values."""
        own = self._made(hidden, rows)
        self.width, seen = own.size(1), self._taken(own.device)
        if self.linear is None:
            return torch.cat([*seen, own, own], 1)
        stream = hidden.reshape(-1, hidden.size(-1))[rows]
        scale, constant = self.linear.scale(stream), self.linear.constant.to(own.device)
        return torch.cat([*(value * scale + constant for value in [*seen, self._rewards(stream)]), own], 1)

    def finished(self, values: Tensor, gates: Tensor | None) -> Tensor:
        program, layers = self.bound.program, len(self.taps) + 1
        every, own = values.split([values.size(1) - self.width, self.width], 1)
        gate = None if gates is None else gates[:, -self.width :]
        scores = program.rewards(own, gate)[:, None]
        every = every.unflatten(1, (layers, -1))
        if self.linear is not None:
            rewards = program.mix(every, own, gate)
        else:
            rewards = program.rewards(every.flatten(0, 1), gate).unflatten(0, (-1, layers))
        if self.linear is None or self.frozen:
            rewards = torch.cat([rewards[:, :-1], scores], 1)  # which they are but for rounding
        return torch.cat([rewards, scores], 1)
