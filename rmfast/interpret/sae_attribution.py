"""Sparse autoencoders: what each of their features adds to a reward.

An SAE writes a stream h as features: x̂ = Σ_i f_i W_dec,i + b_dec. The reward reads the final stream linearly, but for
the final norm's scale, and a layer's stream is a part of the final one (`rmfast.interpret.attribution`). So the direct
contribution of layer l's stream is a sum over features, with s and a = γ⊙w as there:

    s · a·h_l = Σ_i s f_i (W_dec a)_i  +  s a·b_dec  +  s a·(h_l − x̂)

W_dec a is made once; nothing is decoded, and of a TopK SAE's features only the k largest ever exist (`topk_encode`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rmfast.arguments import whole, word
from rmfast.binding.compute import outside
from rmfast.engine.scorer import Scorer
from rmfast.interpret.components import Components
from rmfast.interpret.sae import SAE
from rmfast.ops import reward_head
from rmfast.patching.sites import STREAM_KINDS
from rmfast.patching.watched import SiteRows
from rmfast.plots import axes, figure_size, heat_map, needed
from rmfast.texts.inputs import Encoded, several, words

_HOOKS = (
    (r"blocks\.(\d+)\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)", None),
    (r"blocks\.(\d+)\.hook_in", "resid_pre"),
    (r"blocks\.(\d+)\.hook_out", "resid_post"),
    (r"(?:.*\.)?(?:layers|h)\.(\d+)", "resid_post"),  # a layer's own name in transformers
)

# Features of a token that are kept where all of them may be active.
_TOP = 64

# Features of all rows that exist at once, where not only the k largest do.
_ELEMENTS = {"cpu": 1 << 22}
_ELEMENTS_ACCELERATOR = 1 << 27


@dataclass(eq=False, repr=False, kw_only=True)
class SAEAttribution:
    """The direct contribution of one layer's stream to the reward of one text, as a sum over an SAE's features.

    The contributions, `rest`, `b_dec` and `error` add up to `total`, s · a·h: what the stream there adds to the reward
    by itself. With `constant` that is the frozen lens (`RewardModel.lens`) at this place, and after the last layer the
    reward; what later layers add to the reward is in no term.

    Attributes:
        features: ([T,] m) int64, the features of a token of largest contribution, |·|, largest first.
        activations: ([T,] m), f; 0 where fewer than m are active.
        contributions: ([T,] m[, K]), CPU, fp32 (fp64 for an fp64 model).
        rest: ([T] + [K]), of all other active features.
        b_dec: ([T] + [K]), of the SAE's output bias (and of the mean that "layer_norm" gives back).
        error: ([T] + [K]), of what the SAE does not reconstruct, h − x̂.
        total: ([T] + [K]), of the stream.
        constant: () or (K,), what belongs to no stream: the head's bias, and a final layer norm's β·w.
        rewards: ([T] + [K]), the model's own.
        norm: "frozen", or "raw" for contributions that leave the final norm out.
        layer, site: of the stream, a word of `rmfast.patching.sites`.
        read: the token where the reward is read.
        tokens, token_ids: of the text.
    """

    features: Tensor
    activations: Tensor
    contributions: Tensor
    rest: Tensor
    b_dec: Tensor
    error: Tensor
    total: Tensor
    constant: Tensor
    rewards: Tensor
    norm: str
    layer: int
    site: str
    read: int
    tokens: list[str]
    token_ids: list[int]

    def __repr__(self) -> str:
        at = "every token" if self._every else f"token {self.read} {self.tokens[self.read]!r}"
        return (
            f"SAEAttribution({self.features.size(-1)} features of {self.site} of layer {self.layer}, norm "
            f"{self.norm!r}, at {at} of {len(self.tokens)})"
        )

    @property
    def _every(self) -> bool:
        return self.features.dim() > 1

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row for each token, active feature (and label, for K > 1).

        Columns: position, token, feature, activation, (label,) contribution.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = needed("pandas", "to_dataframe")
        labels = self.constant.numel()
        features, activations = (x.reshape(-1, x.size(-1)).numpy() for x in (self.features, self.activations))
        contributions = self.contributions.reshape(*features.shape, labels).numpy()
        row, slot = np.nonzero(activations)
        position = row if self._every else np.full_like(row, self.read)
        frame = pandas.DataFrame({
            "position": position, "token": np.array(self.tokens, object)[position],
            "feature": features[row, slot], "activation": activations[row, slot],
        })  # fmt: skip
        values = contributions[row, slot]
        if not self.constant.dim():
            return frame.assign(contribution=values[:, 0])
        frame = frame.loc[frame.index.repeat(labels)].reset_index(drop=True)
        return frame.assign(label=np.tile(np.arange(labels), len(row)), contribution=values.ravel())

    def plot(self, *, top: int = 20, label: int = 0, ax: Any = None) -> Any:
        """Bars of the features of largest contribution; for every token a map of features by tokens.

        Args:
            top: how many features; for every token those of largest mean |contribution|.
            label: which reward of K.
            ax: the matplotlib Axes to draw on; default: a new figure.

        Returns:
            The Axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        whole("top", top, 1)
        whole("label", label, 0, self.constant.numel() - 1)
        values = (self.contributions[..., label] if self.constant.dim() else self.contributions).double().numpy()
        features = self.features.numpy()
        where = f"{self.site} of layer {self.layer}"
        if self._every:
            ids, slot = np.unique(features, return_inverse=True)
            grid = np.zeros((len(ids), len(values)))
            grid[slot.reshape(features.shape), np.arange(len(values))[:, None]] = values
            best = np.argsort(-np.abs(grid).sum(1), kind="stable")[:top][::-1]
            ax = axes(ax, *figure_size(len(best), len(values)))
            words = [f"{i} {token!r}" for i, token in enumerate(self.tokens)]
            heat_map(ax, grid[best], list(map(str, ids[best])), words, f"contribution, norm {self.norm}")
            ax.set_xlabel("token")
        else:
            best = np.argsort(-np.abs(values), kind="stable")[:top][::-1]
            ax = axes(ax, 6, 1 + 0.22 * max(len(best), 4))
            ax.barh(np.arange(len(best)), values[best], tick_label=list(map(str, features[best])))
            ax.axvline(0, color="0.5", linewidth=0.8)
            ax.set_xlabel(f"contribution, norm {self.norm}, at token {self.read} {self.tokens[self.read]!r}")
        ax.set_ylabel("feature")
        ax.set_title(where)
        return ax


def sae_attribution(
    rm: Scorer,
    inputs: Any,
    sae: SAE,
    *,
    layer: int | None = None,
    site: str | None = None,
    positions: Literal["last", "all"] = "last",
    norm: Literal["frozen", "raw"] = "frozen",
    top: int | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
    **encoding: Any,
) -> SAEAttribution | list[SAEAttribution]:
    """See `RewardModel.sae_attribution`."""
    rm.expect_clamps_alone(("all",))
    if not isinstance(sae, SAE):
        raise TypeError(f"Expected sae to be a rmfast.SAE (rmfast.SAE.load(folder)), got {type(sae).__name__}")
    word("positions", positions, ("last", "all"))
    word("norm", norm, ("frozen", "raw"))
    top = None if top is None else whole("top", top, 1)
    layer = None if layer is None else whole("layer", layer)
    at = place_of(sae, layer, site)
    many = several(inputs)
    texts = rm.encode(inputs if many else [inputs], **encoding)
    features = _Features(rm, sae, *at, norm, top, batch_tokens, progress)
    results = features.attributions(texts, positions == "all")
    return results if many else results[0]


def place_of(sae: SAE, layer: int | None, site: str | None) -> tuple[int, str]:
    """The layer and site that are asked for, else those of the SAE's hook."""
    found: tuple[int, str] | None = None
    for pattern, kind in _HOOKS:
        if sae.hook_name and (match := re.fullmatch(pattern, sae.hook_name)):
            found = int(match[1]), kind or match[2]
            break
    if site is not None:
        word("site", site, STREAM_KINDS)
    if layer is None and found is None:
        raise ValueError(
            f"Expected layer, since the SAE's hook_name, {sae.hook_name!r}, names none that rmfast knows: "
            "blocks.L.hook_resid_pre, _resid_mid, _resid_post, _attn_out or _mlp_out, or a layer, model.layers.L"
        )
    if site is None and found is None and sae.hook_name:
        raise ValueError(
            f"Expected site, one of {', '.join(STREAM_KINDS)}, since the SAE's hook_name, {sae.hook_name!r}, names none"
        )
    layer = found[0] if layer is None and found is not None else layer
    assert layer is not None
    return layer, site or ("resid_post" if found is None else found[1])


class _Features:
    """An SAE's features as directions in a model's reward; made once for any number of texts."""

    def __init__(
        self, rm: Scorer, sae: SAE, layer: int, site: str, norm: Literal["frozen", "raw"], top: int | None,
        batch_tokens: int | None, progress: bool,
    ):  # fmt: skip
        self.sae, self.layer, self.site, self.norm = sae, layer, site, norm
        self.parts = parts = Components(rm, [], norm, batch_tokens, progress, packed=site.startswith("resid_p"))
        if parts.mixes:
            raise ValueError(
                f"Expected a head of one direction for all texts, got {parts.binding.program.kind}, which mixes "
                "attributes, each text in its own way"
            )
        self.site_rows = SiteRows(parts.patcher, layer, site)
        width = parts.direction.size(-1)
        if sae.W_enc.size(0) != width:
            raise ValueError(
                f"Expected an SAE of the model's width, {width} (hidden_size of {type(rm.binding.root).__name__}), got "
                f"one of width {sae.W_enc.size(0)} (d_in)"
            )
        most = sae.W_enc.size(1) if sae.k is None else sae.k
        self.top = min(most, top or (_TOP if sae.k is None else sae.k))
        device = sae.W_enc.device
        self.dtype = parts.dtype
        self.direction = parts.direction.to(device, self.dtype)
        with torch.no_grad():
            self.projected = reward_head(sae.W_dec.contiguous(), self.direction).to(self.dtype)  # (F, K): W_dec a
            self.bias = self.direction @ sae.b_dec.to(self.dtype)  # (K,)

    def attributions(self, texts: list[Encoded], every: bool) -> list[SAEAttribution]:
        read = self.parts.rm.positions(texts)
        rows = [np.arange(len(text)) if every else np.array([at]) for text, at in zip(texts, read)]
        labels, m = len(self.direction), self.top
        sizes = [m, m, m * labels, *[labels] * 5]
        constant = self.parts.constant.cpu()
        found = []
        for text, at, values in zip(texts, read, self.parts.run(texts, rows, self._terms, self.site_rows.taps)):
            values = values if every else values[0]
            features, activations, kept, *each = values.split(sizes, -1)
            if labels > 1:
                kept = kept.unflatten(-1, (m, labels))
            else:
                each = [x.squeeze(-1) for x in each]
            # Copies: views would keep the numbers of all texts.
            kept, activations, *each = (x.to(self.dtype, copy=True) for x in (kept, activations, *each))
            rest, b_dec, error, total, rewards = each
            ids = text.ids.tolist()
            found.append(
                SAEAttribution(
                    features=features.long(),
                    activations=activations,
                    contributions=kept,
                    rest=rest,
                    b_dec=b_dec,
                    error=error,
                    total=total,
                    constant=(constant[0] if labels == 1 else constant).clone(),
                    rewards=rewards,
                    norm=self.norm,
                    layer=self.layer,
                    site=self.site,
                    read=at,
                    tokens=words(self.parts.rm.tokenizer, ids),
                    token_ids=ids,
                )
            )
        return found

    def _terms(self, stream: Tensor, scale: Tensor, rewards: Tensor) -> Tensor:
        """(m, C) in fp64, which holds the numbers of features: they, f, their terms, the rest's, b_dec's, the error's,
        the total and the rewards."""
        h = self.site_rows.rows(stream).to(self.direction.device)
        scale = scale.to(self.direction)  # (m, 1)
        with outside():
            features, activations, kept, rest, b_dec = self._features(h)
        total = reward_head(h, self.direction).to(self.dtype)  # (m, K)
        error = (total.double() - kept.double().sum(1) - rest.double() - b_dec.double()).to(self.dtype)
        terms = [kept.flatten(1), rest, b_dec, error, total]
        columns = [features, activations, *(x * scale for x in terms), rewards]
        return torch.cat([x.to(scale.device, torch.float64) for x in columns], 1)

    def _features(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of rows (n, d), without the final norm's scale: features (n, m), f (n, m), their part (n, m, K), that of all
        others and that of b_dec, (n, K)."""
        x, *affine = self.sae._given(h)
        factor, summand = (part.to(self.dtype) for part in affine)
        b_dec = factor * self.bias + summand * self.direction.sum(-1)
        if self.sae.architecture == "topk":
            values, indices = self.sae._largest(x)
            slots, *parts = self._largest(values, self.projected[indices], factor)
            return indices.gather(1, slots), *parts, b_dec  # type: ignore[return-value]
        rows = max(1, _ELEMENTS.get(x.device.type, _ELEMENTS_ACCELERATOR) // self.projected.numel())
        pieces = [
            self._largest(self.sae._all(some), self.projected, by)
            for some, by in zip(x.split(rows), factor.split(rows))
        ]
        return *map(torch.cat, zip(*pieces)), b_dec  # type: ignore[return-value]

    def _largest(self, values: Tensor, projected: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of features (n, F), with their directions (n, F, K) or (F, K), those of largest contribution."""
        values = values.to(self.dtype)
        parts = values[..., None] * projected * factor[..., None]  # (n, F, K)
        _, slots = parts.abs().amax(-1).topk(self.top)
        kept = parts.gather(1, slots[..., None].expand(-1, -1, parts.size(-1)))
        rest = parts.double().sum(1) - kept.double().sum(1)
        if self.top == values.size(1):
            rest = torch.zeros_like(rest)
        return slots, values.gather(1, slots), kept, rest.to(self.dtype)
