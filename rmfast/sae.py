"""Sparse autoencoders: what each of their features adds to a reward.

An SAE writes a stream h as features: x̂ = Σ_i f_i W_dec,i + b_dec. The reward reads the final stream linearly, but for
the final norm's scale, and a layer's stream is a part of the final one (`rmfast.attribution`). So the direct
contribution of layer l's stream is a sum over features, with s and a = γ⊙w as there:

    s · a·h_l = Σ_i s f_i (W_dec a)_i  +  s a·b_dec  +  s a·(h_l − x̂)

W_dec a is made once; nothing is decoded, and of a TopK SAE's features only the k largest ever exist (`topk_encode`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from rmfast.attribution import _Parts
from rmfast.engine import entering, of_rows_read
from rmfast.grids import figure_size, heat_map, needed
from rmfast.hooks import Point
from rmfast.inputs import Encoded, several, words
from rmfast.ops import reward_head, topk_encode

if TYPE_CHECKING:
    from rmfast.scoring import RewardModel

__all__ = ["SAE", "SAEAttribution", "sae_attribution"]

ARCHITECTURES = ("standard", "topk", "jumprelu")
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")

_DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
# Names of before SAELens 6, and what their values were by default.
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
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


@dataclass(eq=False, kw_only=True)
class SAE:
    """A sparse autoencoder of a model's stream.

    f = act((n(x) − b_dec) W_enc + b_enc), x̂ = n⁻¹(f W_dec + b_dec), where b_dec is left out of the encoder without
    apply_b_dec_to_input, and n is the identity or a norm of each row. act: ReLU ("standard"), ReLU of the k largest
    ("topk", arXiv 2406.04093), or ReLU where it is above a threshold ("jumprelu", arXiv 2407.14435).

    Attributes:
        architecture: one of those.
        W_enc, b_enc, W_dec, b_dec: (d, F), (F,), (F, d) and (d,), of one dtype and device.
        threshold: (F,), of "jumprelu".
        k: of "topk".
        apply_b_dec_to_input: whether the encoder subtracts b_dec.
        normalize: "none"; "layer_norm" (x less its mean, over its standard deviation) or "constant_norm_rescale" (to
            norm √d), as SAELens has them.
        hook_name: where it was trained, in the names of TransformerLens or transformers, or None.
    """

    architecture: str
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    k: int | None = None
    apply_b_dec_to_input: bool = True
    normalize: str = "none"
    hook_name: str | None = None

    def __post_init__(self) -> None:
        one_of("architecture", self.architecture, ARCHITECTURES)
        one_of("normalize_activations", self.normalize, ("none", "layer_norm", "constant_norm_rescale"))
        if self.W_enc.dim() != 2:
            raise ValueError(f"Expected W_enc to have shape (d, F), got {tuple(self.W_enc.shape)}")
        d, features = self.W_enc.shape
        shapes = {"b_enc": (features,), "W_dec": (features, d), "b_dec": (d,)}
        if self.architecture == "jumprelu":
            shapes["threshold"] = (features,)
        for name, shape in shapes.items():
            x = getattr(self, name)
            if x is None or tuple(x.shape) != shape:
                raise ValueError(f"Expected {name} to have shape {shape}, got {None if x is None else tuple(x.shape)}")
        if self.architecture == "topk":
            if not is_int(self.k) or not 1 <= self.k <= features:  # type: ignore[operator]
                raise ValueError(f"Expected k to be from 1 to the number of features, {features}, got {self.k!r}")
            self.k = int(self.k)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        d, features = self.W_enc.shape
        what = f"topk {self.k}" if self.architecture == "topk" else self.architecture
        return f"SAE({what}, {d} -> {features}, {str(self.W_enc.dtype)[6:]}, hook_name={self.hook_name!r})"

    @classmethod
    def load(cls, folder: Any, *, dtype: torch.dtype | str | None = None, device: Any = "cpu") -> SAE:
        """Loads a folder as SAELens saves it: cfg.json and sae_weights.safetensors, of version 6 or before.

        Decoder norms of rescale_acts_by_decoder_norm are folded into the weights: W_dec's rows have norm 1 then.

        Args:
            folder: the path.
            dtype: a torch dtype or its name; default the configuration's own.
            device: where the weights go.

        Raises:
            FileNotFoundError: one of the files is not there.
            ValueError: an architecture or option that is not supported, or weights that do not fit; it is named.
        """
        folder = Path(folder)
        paths = folder / "cfg.json", folder / "sae_weights.safetensors"
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{folder} is no SAE that SAELens saved: it has no {path.name}")
        try:
            config = json.loads(paths[0].read_text())
        except ValueError as error:
            raise ValueError(f"{paths[0]} is no JSON: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"Expected {paths[0]} to hold an object, got {type(config).__name__}")
        options = _options(config)
        stored = options.get("dtype", "float32") if dtype is None else dtype
        if not isinstance(stored, torch.dtype):
            name = str(stored).removeprefix("torch.")
            one_of("dtype", name, tuple(_DTYPES))
            stored = _DTYPES[name]
        tensors = {name: x.to(device, stored) for name, x in load_file(paths[1]).items()}
        if "log_threshold" in tensors:
            tensors["threshold"] = tensors.pop("log_threshold").exp()
        if "scaling_factor" in tensors and bool((tensors["scaling_factor"] == 1).all()):
            del tensors["scaling_factor"]
        names = ["W_enc", "b_enc", "W_dec", "b_dec"] + ["threshold"] * (options["architecture"] == "jumprelu")
        if set(tensors) != set(names):
            raise ValueError(
                f"Expected {paths[1].name} of a {options['architecture']} SAE to hold {', '.join(names)}, got "
                f"{', '.join(sorted(tensors))}"
            )
        d, features = (options.get(name) for name in ("d_in", "d_sae"))
        if (d, features) != tuple(tensors["W_enc"].shape):
            raise ValueError(f"Expected W_enc to have shape (d_in, d_sae) = ({d}, {features}) of cfg.json, got "
                             f"{tuple(tensors['W_enc'].shape)}")  # fmt: skip
        if options.get("rescale_acts_by_decoder_norm", False):
            norm = tensors["W_dec"].norm(dim=1).clamp(min=1e-8)
            tensors["W_dec"] = tensors["W_dec"] / norm[:, None]
            tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norm, tensors["b_enc"] * norm
        return cls(
            architecture=options["architecture"],
            k=options.get("k") if options["architecture"] == "topk" else None,
            apply_b_dec_to_input=bool(options.get("apply_b_dec_to_input", True)),
            normalize=options["normalize_activations"],
            hook_name=options.get("hook_name"),
            **tensors,
        )

    def encode(self, x: Tensor) -> Tensor:
        """Features (N, F), in the SAE's dtype (those of "topk" in fp32 for 16 bits), of rows (N, d) of any dtype."""
        x = self._given(x)[0]
        if self.architecture == "topk":
            values, indices = self._largest(x)
            return values.new_zeros(x.size(0), self.W_enc.size(1)).scatter_(1, indices, values)
        return self._all(x)

    def _given(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the encoder gets of rows, less b_dec for it to subtract, and n⁻¹ as a factor and a summand, (N, 1)."""
        x = x.to(self.W_enc)
        one, zero = x.new_ones(x.size(0), 1), x.new_zeros(x.size(0), 1)
        if self.normalize == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            x = x - mean
            deviation = x.std(-1, keepdim=True)
            return x / (deviation + 1e-5), deviation, mean
        if self.normalize == "constant_norm_rescale":
            factor = x.size(-1) ** 0.5 / x.norm(dim=-1, keepdim=True)
            return x * factor, 1 / factor, zero
        return x, one, zero

    @property
    def _before(self) -> Tensor | None:
        return self.b_dec if self.apply_b_dec_to_input else None

    def _largest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.k is not None
        with torch.no_grad():
            return topk_encode(x, self.W_enc, self.b_enc, self.k, b_dec=self._before)

    def _all(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            pre = torch.addmm(self.b_enc, x if self._before is None else x - self._before, self.W_enc)
            return pre.relu() if self.threshold is None else torch.where(pre > self.threshold, pre.relu(), 0)


def is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"Expected {name} of an SAE to be one of {', '.join(known)}, got {value!r}")


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """cfg.json with the names of SAELens 6, its metadata among them; ValueError for what is not supported."""
    options = {_OLD_NAMES.get(name, name): value for name, value in config.items()}
    options |= {name: value for name, value in (options.pop("metadata", None) or {}).items() if name not in options}
    options.setdefault("architecture", "standard")
    activation = options.get("activation_fn", "relu")
    if activation == "topk" and (options.get("activation_fn_kwargs") or {}).get("k") is not None:
        options |= {"architecture": "topk", "k": options["activation_fn_kwargs"]["k"], "activation_fn": "relu"}
    normalize = options.get("normalize_activations")
    if isinstance(normalize, bool) or normalize is None:
        normalize = "expected_average_only_in" if normalize else "none"
    options["normalize_activations"] = normalize
    one_of("architecture", options["architecture"], ARCHITECTURES)
    if normalize in ("expected_average_only_in", "covariance_whitening"):
        raise ValueError(
            f"Expected normalize_activations {normalize!r} to be folded into the weights: cfg.json does not hold the "
            "numbers; SAELens folds them when it loads a released SAE, and saves what it has loaded"
        )
    one_of("activation_fn", options.get("activation_fn", "relu"), ("relu",))
    one_of("reshape_activations", options.get("reshape_activations", "none"), ("none",))
    for name in ("finetuning_scaling_factor", "hook_head_index"):
        if options.get(name) is not None and options[name] is not False:  # 0 is a head
            raise ValueError(f"Expected an SAE without {name}, got {options[name]!r}")
    return options


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
        rest: ([T] [K]), of all other active features.
        b_dec: ([T] [K]), of the SAE's output bias (and of the mean that "layer_norm" gives back).
        error: ([T] [K]), of what the SAE does not reconstruct, h − x̂.
        total: ([T] [K]), of the stream.
        constant: () or (K,), what belongs to no stream: the head's bias, and a final layer norm's β·w.
        rewards: ([T] [K]), the model's own.
        norm: "frozen", or "raw" for contributions that leave the final norm out.
        layer, site: of the stream, a word of `rmfast.sites`.
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
        pyplot = needed("matplotlib.pyplot", "plot")
        values = (self.contributions[..., label] if self.constant.dim() else self.contributions).double().numpy()
        features = self.features.numpy()
        where = f"{self.site} of layer {self.layer}"
        if self._every:
            ids, slot = np.unique(features, return_inverse=True)
            grid = np.zeros((len(ids), len(values)))
            grid[slot.reshape(features.shape), np.arange(len(values))[:, None]] = values
            best = np.argsort(-np.abs(grid).sum(1), kind="stable")[:top][::-1]
            if ax is None:
                ax = pyplot.subplots(figsize=figure_size(len(best), len(values)), layout="constrained")[1]
            words = [f"{i} {token!r}" for i, token in enumerate(self.tokens)]
            heat_map(ax, grid[best], list(map(str, ids[best])), words, f"contribution, norm {self.norm}")
            ax.set_xlabel("token")
        else:
            best = np.argsort(-np.abs(values), kind="stable")[:top][::-1]
            if ax is None:
                ax = pyplot.subplots(figsize=(6, 1 + 0.22 * max(len(best), 4)), layout="constrained")[1]
            ax.barh(np.arange(len(best)), values[best], tick_label=list(map(str, features[best])))
            ax.axvline(0, color="0.5", linewidth=0.8)
            ax.set_xlabel(f"contribution, norm {self.norm}, at token {self.read} {self.tokens[self.read]!r}")
        ax.set_ylabel("feature")
        ax.set_title(where)
        return ax


def sae_attribution(
    rm: RewardModel,
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
    if not isinstance(sae, SAE):
        raise TypeError(f"Expected sae to be a rmfast.SAE (rmfast.SAE.load(folder)), got {type(sae).__name__}")
    for name, value, known in (("positions", positions, ("last", "all")), ("norm", norm, ("frozen", "raw"))):
        if value not in known:
            raise ValueError(f'Expected {name} to be "{known[0]}" or "{known[1]}", got {value!r}')
    if top is not None and (not is_int(top) or top < 1):
        raise ValueError(f"Expected top to be at least 1, got {top!r}")
    if layer is not None and not is_int(layer):
        raise ValueError(f"Expected layer to be an int, got {layer!r}")
    at = _place(sae, layer, site)
    many = several(inputs)
    texts = rm.encode(list(inputs) if many else [inputs], **encoding)
    features = _Features(rm, sae, *at, norm, top, batch_tokens, progress)
    results = features.attributions(texts, positions == "all")
    return results if many else results[0]


def _place(sae: SAE, layer: int | None, site: str | None) -> tuple[int, str]:
    """The layer and site that are asked for, else those of the SAE's hook."""
    found: tuple[int, str] | None = None
    for pattern, kind in _HOOKS:
        if sae.hook_name and (match := re.fullmatch(pattern, sae.hook_name)):
            found = int(match[1]), kind or match[2]
            break
    if site is not None and site not in SITES:
        raise ValueError(f"Expected site to be one of {', '.join(SITES)}, got {site!r}")
    if layer is None and found is None:
        raise ValueError(
            f"Expected layer, since the SAE's hook_name, {sae.hook_name!r}, names none that rmfast knows: "
            "blocks.L.hook_resid_pre, _resid_mid, _resid_post, _attn_out or _mlp_out, or a layer, model.layers.L"
        )
    if site is None and found is None and sae.hook_name:
        raise ValueError(
            f"Expected site, one of {', '.join(SITES)}, since the SAE's hook_name, {sae.hook_name!r}, names none"
        )
    layer = found[0] if layer is None and found is not None else layer
    assert layer is not None
    return layer, site or ("resid_post" if found is None else found[1])


class _Features:
    """An SAE's features as directions in a model's reward; made once for any number of texts."""

    def __init__(
        self, rm: RewardModel, sae: SAE, layer: int, site: str, norm: Literal["frozen", "raw"], top: int | None,
        batch_tokens: int | None, progress: bool,
    ):  # fmt: skip
        self.sae, self.layer, self.site, self.norm = sae, layer, site, norm
        # Inside of layers, the packed engine's fused parts pass some sites by.
        self.parts = parts = _Parts(rm, [], norm, batch_tokens, progress, packed=site.startswith("resid_p"))
        if not 0 <= layer < parts.patcher.layers:
            raise ValueError(f"Expected layer to be from 0 to {parts.patcher.layers - 1}, got {layer}")
        parts.patcher.units(site)
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
        self.seen: Tensor | None = None  # the stream at the rows that are read, of the part of a run that is under way
        with torch.no_grad():
            self.projected = reward_head(sae.W_dec.contiguous(), self.direction).to(self.dtype)  # (F, K): W_dec a
            self.bias = self.direction @ sae.b_dec.to(self.dtype)  # (K,)

    def attributions(self, texts: list[Encoded], every: bool) -> list[SAEAttribution]:
        read = [self.parts.rm._position(text.ids, i, None) for i, text in enumerate(texts)]
        rows = [np.arange(len(text)) if every else np.array([at]) for text, at in zip(texts, read)]
        labels, m = len(self.direction), self.top
        sizes = [m, m, m * labels, *[labels] * 5]
        constant = self.parts.constant.cpu()
        found = []
        for text, at, values in zip(texts, read, self.parts.run(texts, rows, self._terms, self._taps())):
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

    def _taps(self) -> list[tuple[Point, Callable[[Tensor], None]]]:
        points = self.parts.patcher.points
        if self.site == "resid_pre":
            return [(points[self.layer]["resid_pre"], self._enters)]
        if self.site != "resid_post":
            return [(points[0]["resid_pre"], self._start), (points[self.layer][self.site], self._at_site)]
        # What enters the next layer, or after the last one leaves the body.
        return [(points[self.layer + 1]["resid_pre"], self._enters)] if self.layer + 1 < len(points) else []

    # Copies, since the model may go on to change what it has.

    def _enters(self, x: Tensor) -> None:
        self.seen = entering(x).clone()

    def _start(self, x: Tensor) -> None:
        self.seen = None

    def _at_site(self, x: Tensor) -> None:
        if self.seen is None:  # a module that has several calls: the first one, as the points are tried
            self.seen = of_rows_read(x).clone()

    def _terms(self, stream: Tensor, scale: Tensor, rewards: Tensor) -> Tensor:
        """(m, C) in fp64, which holds the numbers of features: they, f, their terms, the rest's, b_dec's, the error's,
        the total and the rewards."""
        last = self.site == "resid_post" and self.layer + 1 == self.parts.patcher.layers
        h = stream if last else self.seen
        assert h is not None
        h = h.to(self.direction.device)
        scale = scale.to(self.direction)  # (m, 1)
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
