"""Sparse autoencoders: features of a stream, `SAE.load` of what SAELens saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import embedding_bag

from rmfast.arguments import device as device_of
from rmfast.arguments import flag, instance, shown, whole, word
from rmfast.arguments import path as path_of
from rmfast.ops import topk_encode
from rmfast.patching.normalization import NORMALIZATIONS, normalized

ARCHITECTURES = ("standard", "topk", "jumprelu")
_DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}

# Names of before SAELens 6, and what their values were by default.
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


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
        word("architecture", self.architecture, ARCHITECTURES)
        word("normalize_activations", self.normalize, NORMALIZATIONS)
        flag("apply_b_dec_to_input", self.apply_b_dec_to_input)
        if self.hook_name is not None:
            instance("hook_name", self.hook_name, str)
        for name, of in (("threshold", "jumprelu"), ("k", "topk")):
            if getattr(self, name) is not None and self.architecture != of:
                raise ValueError(f"Expected {name} with architecture {of} alone, got it with {self.architecture}")
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", *(["threshold"] * (self.architecture == "jumprelu"))):
            x = instance(name, getattr(self, name), Tensor)
            if not x.is_floating_point() or (x.dtype, x.device) != (self.W_enc.dtype, self.W_enc.device):
                raise TypeError(
                    f"Expected {name} to be floating point, like W_enc ({self.W_enc.dtype}, {self.W_enc.device}), got "
                    f"{x.dtype}, {x.device}"
                )
        if self.W_enc.dim() != 2:
            raise ValueError(f"Expected W_enc to have shape (d, F), got {tuple(self.W_enc.shape)}")
        d, features = self.W_enc.shape
        shapes = {"b_enc": (features,), "W_dec": (features, d), "b_dec": (d,)}
        if self.architecture == "jumprelu":
            shapes["threshold"] = (features,)
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"Expected {name} to have shape {shape}, got {tuple(getattr(self, name).shape)}")
        if self.architecture == "topk":
            self.k = whole("k", self.k, 1, features)

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
        folder, device = path_of("folder", folder), device_of("device", device)
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
            name = stored.removeprefix("torch.") if isinstance(stored, str) else stored
            stored = _DTYPES[word("dtype", name, _DTYPES)]
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
        x = self._given(self._checked(x))[0]
        if self.architecture == "topk":
            values, indices = self._largest(x)
            return values.new_zeros(x.size(0), self.W_enc.size(1)).scatter_(1, indices, values)
        return self._all(x)

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x̂ (N, d) of rows (N, d) in fp32 (fp64 for an fp64 SAE), and how many rows each feature is active in, (F,).

        Of "topk" only the k features of a row are decoded.
        """
        given, factor, summand = self._given(self._checked(x))
        dtype = torch.promote_types(self.W_dec.dtype, torch.float32)
        with torch.no_grad():
            decoder, features = self.W_dec.to(dtype), self.W_enc.size(1)
            if self.architecture == "topk":
                values, indices = self._largest(given)
                decoded = embedding_bag(indices, decoder, mode="sum", per_sample_weights=values)
                active = torch.bincount(indices[values > 0], minlength=features)
            else:
                values = self._all(given).to(dtype)
                decoded, active = values @ decoder, (values > 0).sum(0)
            return (decoded + self.b_dec) * factor + summand, active

    def _checked(self, x: Any) -> Tensor:
        if not isinstance(x, Tensor) or x.dim() != 2 or x.size(1) != self.W_enc.size(0) or x.is_complex() or x.is_meta:
            raise ValueError(f"Expected x to be a real tensor of shape (N, {self.W_enc.size(0)}), got {shown(x)}")
        return x

    def _given(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the encoder gets of rows, less b_dec for it to subtract, and n⁻¹ as a factor and a summand, (N, 1)."""
        return normalized(x.to(self.W_enc), self.normalize)

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
    word("architecture", options["architecture"], ARCHITECTURES)
    if normalize in ("expected_average_only_in", "covariance_whitening"):
        raise ValueError(
            f"Expected normalize_activations {normalize!r} to be folded into the weights: cfg.json does not hold the "
            "numbers; SAELens folds them when it loads a released SAE, and saves what it has loaded"
        )
    word("activation_fn", options.get("activation_fn", "relu"), ("relu",))
    word("reshape_activations", options.get("reshape_activations", "none"), ("none",))
    for name in ("finetuning_scaling_factor", "hook_head_index"):
        if options.get(name) is not None and options[name] is not False:  # 0 is a head
            raise ValueError(f"Expected an SAE without {name}, got {options[name]!r}")
    return options
