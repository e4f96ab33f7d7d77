"""One step of training a TopK sparse autoencoder, at a cost of k features a row but for the encoder's product.

A dense step multiplies rows (B, d) by (d, F) six times: encoder, decoder, the gradients of both and of what reaches
their inputs. Of a row all but k activations are 0, so five of the six are sums over k rows of a matrix; only the
encoder's product, by which the k are chosen, is left, and `topk_encode` keeps no (B, F) array of it. Both gradients are
sums by feature: entries sorted by feature, a weighted sum of the batch's rows for each (`embedding_bag`, which is that
product of a sparse matrix in a fixed order). Adam is torch's own, over all parameters: a feature that is in no row of
a batch moves by its momentum, as it does in a dense step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rmfast.arguments import flag, number, sequence, whole, word
from rmfast.backends import fp32_linear_pays
from rmfast.ops import linear, topk_encode
from rmfast.patching.normalization import NORMALIZATIONS, normalized

AVERAGE = "expected_average_only_in"

# Activations of dead latents that exist at once: 64 MiB.
_ELEMENTS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class TopKRecipe:
    """How a TopK sparse autoencoder (arXiv 2406.04093) is trained. Names and meanings are SAELens' where it has them.

    The loss is the mean over rows of ‖x̂ − x‖² and, where latents are dead, `aux` · min(1, dead / k_aux) times that of
    the residual's reconstruction x − x̂ ≈ Σ h_i W_dec,i from the k_aux largest pre-activations h of dead latents (AuxK).

    Attributes:
        features: F, latents.
        k: how many of them a row has.
        steps: of training, of `batch` rows each.
        batch: rows of a step.
        lr: of Adam; over `warmup` first steps it rises from lr / warmup, over `decay` last ones it falls to lr / decay.
        betas: of Adam.
        clip: the gradient's largest norm, over all parameters.
        decoder: "unit" holds each W_dec row at norm 1, its gradient without the part along the row; "free" lets norms
            go and chooses features by activation times norm, as SAELens 6 does (rescale_acts_by_decoder_norm).
        aux: weight of the auxiliary loss: 1/32 in the paper, 1 in SAELens.
        k_aux: default d / 2.
        dead_after: steps without an activation above 0 after which a latent is dead (dead_feature_window).
        b_dec: where b_dec starts: at the "geometric_median" of a sample of rows, their "mean", or "zero" (SAELens 6).
        apply_b_dec_to_input: whether the encoder subtracts b_dec.
        normalize: "none", "layer_norm", "constant_norm_rescale", or "expected_average_only_in": one factor for all
            rows, which makes their mean norm √d and is folded into the weights in the end.
        product: dtype of the encoder's product: "float32", or "bfloat16", which rounds rows and weights to it for the
            forward, as autocast does. Parameters and sums are fp32 in both.
        seed: of the weights at the start and the order of rows.
    """

    features: int
    k: int
    steps: int
    batch: int = 4096
    lr: float = 3e-4
    warmup: int = 0
    decay: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    decoder: str = "unit"
    aux: float = 1 / 32
    k_aux: int | None = None
    dead_after: int = 1000
    b_dec: str = "geometric_median"
    apply_b_dec_to_input: bool = True
    normalize: str = "none"
    product: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = {name: whole(name, getattr(self, name), 1) for name in ("features", "steps", "batch", "dead_after")}
        sizes |= {name: whole(name, getattr(self, name), 0) for name in ("warmup", "decay")}
        sizes["seed"] = whole("seed", self.seed, 0, 2**63 - 1)
        sizes["k"] = whole("k", self.k, 1, self.features)
        if self.k_aux is not None:
            sizes["k_aux"] = whole("k_aux", self.k_aux, 1)
        if self.warmup + self.decay > self.steps:
            raise ValueError(f"Expected warmup and decay within {self.steps} steps, got {self.warmup} and {self.decay}")
        betas = sequence("betas", self.betas, "two numbers", 2)
        numbers = {
            "lr": number("lr", self.lr, 0, above=True), "clip": number("clip", self.clip, 0, above=True),
            "aux": number("aux", self.aux, 0),
            "betas": tuple(number("betas", beta, 0, 1, below=True) for beta in betas),
        }  # fmt: skip
        word("decoder", self.decoder, ("unit", "free"))
        word("b_dec", self.b_dec, ("geometric_median", "mean", "zero"))
        flag("apply_b_dec_to_input", self.apply_b_dec_to_input)
        word("normalize", self.normalize, (*NORMALIZATIONS, AVERAGE))
        word("product", self.product, ("float32", "bfloat16"))
        # Plain ones, which a checkpoint can hold.
        for name, value in {**sizes, **numbers, "apply_b_dec_to_input": bool(self.apply_b_dec_to_input)}.items():
            object.__setattr__(self, name, value)

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * min(1, (self.steps - step) / self.decay) if self.decay else self.lr


class StepResult(NamedTuple):
    """What a step has found, before its update: (5,) numbers.

    loss: mean over rows of ‖x̂ − x‖². aux: the auxiliary loss, weighted. explained: 1 − Σ‖x̂ − x‖² / Σ‖x − mean‖² of the
    batch. l0: mean number of activations above 0. dead: latents that were dead.
    """

    loss: float
    aux: float
    explained: float
    l0: float
    dead: int


class TopKTraining:
    """The parameters of a TopK SAE in training, fp32, with their optimizer.

    Attributes:
        W_enc: (F, d), a feature's weights side by side.
        b_enc, W_dec, b_dec: (F,), (F, d), (d,).
        idle: (F,) int64, steps since each latent was last active.
        scale: the factor of all rows, 1 but for "expected_average_only_in".
        done: steps done.
    """

    def __init__(self, recipe: TopKRecipe, sample: Tensor) -> None:
        """sample: (n, d) rows on the device to train on, by which b_dec and scale are set."""
        self.recipe = recipe
        d, features, device = sample.size(1), recipe.features, sample.device
        sample = sample.float()
        self.scale = d**0.5 / float(sample.norm(dim=1).mean()) if recipe.normalize == AVERAGE else 1.0
        draw = torch.randn(features, d, generator=torch.Generator().manual_seed(recipe.seed))
        unit = draw / draw.norm(dim=1, keepdim=True)
        self.W_dec = (unit * (1 if recipe.decoder == "unit" else 0.1)).to(device)
        self.W_enc = self.W_dec.clone()
        self.b_enc = sample.new_zeros(features)
        self.b_dec = start_of(self._given(sample)[0], recipe.b_dec)
        self.idle = torch.zeros(features, dtype=torch.int64, device=device)
        self.done = 0
        self.optimizer = torch.optim.Adam(
            [self.W_enc, self.b_enc, self.W_dec, self.b_dec], lr=recipe.lr, betas=recipe.betas, fused=True
        )

    def _given(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows under the recipe's norm, and what takes it back."""
        return normalized(x, "none" if self.recipe.normalize == AVERAGE else self.recipe.normalize)

    @torch.no_grad()
    def step(self, x: Tensor) -> StepResult:
        """One step on rows (B, d) of any float dtype, on the parameters' device."""
        recipe, free = self.recipe, self.recipe.decoder == "free"
        x = x.float() * self.scale if self.scale != 1 else x.float()
        given, factor, summand = self._given(x)
        rows = given - self.b_dec if recipe.apply_b_dec_to_input else given
        norm = self.W_dec.norm(dim=1) if free else None
        values, indices = self._encode(rows, norm)

        with torch.enable_grad():
            values.requires_grad_()
            decoded = embedding_bag(indices, self.W_dec, mode="sum", per_sample_weights=values)
        error = (decoded.detach() + self.b_dec) * factor + summand - x
        back = error * (factor * (2 / len(x)))  # of what the decoder gives
        (slope,) = torch.autograd.grad(decoded, values, back)
        values = values.detach()
        active = values > 0
        slope *= active

        by_feature = _Sorted(indices, recipe.features)
        W_dec = by_feature.sums(values, back)
        W_enc = by_feature.sums(slope, rows)
        b_enc = by_feature.totals(slope)
        b_dec = back.sum(0)
        dead, aux = (self.idle > recipe.dead_after).nonzero()[:, 0], 0.0
        if recipe.aux and len(dead):
            aux = self._add_auxiliary(dead, rows, error, factor, norm, W_enc, b_enc, W_dec)
        if recipe.apply_b_dec_to_input:
            b_dec -= b_enc @ self.W_enc
        if not free:
            W_dec.addcmul_(torch.linalg.vecdot(W_dec, self.W_dec)[:, None], self.W_dec, value=-1)
        squares, spread = float(error.square().sum()), float((x - x.mean(0)).square_().sum())
        fired = torch.zeros_like(self.idle, dtype=torch.bool)
        fired[indices[active]] = True
        self.idle = (self.idle + 1).masked_fill_(fired, 0)
        self._update(W_enc, b_enc, W_dec, b_dec)
        explained = 1 - squares / spread if spread else torch.nan
        return StepResult(squares / len(x), aux, explained, int(active.sum()) / len(x), len(dead))

    def _encode(self, rows: Tensor, norm: Tensor | None) -> tuple[Tensor, Tensor]:
        """The k activations (B, k) of each row and their features, chosen by activation times norm."""
        weight, bias = self.W_enc, self.b_enc
        if norm is not None:
            weight, bias = weight * norm[:, None], bias * norm
        dtype = torch.bfloat16 if self.recipe.product == "bfloat16" else torch.float32
        values, indices = topk_encode(rows.to(dtype), weight.to(dtype).T, bias, self.recipe.k)
        return values if norm is None else values / norm[indices], indices

    def _add_auxiliary(
        self, dead: Tensor, rows: Tensor, error: Tensor, factor: Tensor, norm: Tensor | None, W_enc: Tensor,
        b_enc: Tensor, W_dec: Tensor,
    ) -> float:  # fmt: skip
        """The auxiliary loss, whose gradients are added; products with all dead latents, of some rows at a time."""
        k_aux = self.recipe.k_aux or max(1, rows.size(1) // 2)
        weight = self.recipe.aux * min(1, len(dead) / k_aux) / len(rows)
        encoder, bias, decoder = self.W_enc[dead], self.b_enc[dead], self.W_dec[dead]
        parts = torch.zeros_like(encoder), torch.zeros_like(bias), torch.zeros_like(decoder)
        loss, most = rows.new_zeros(()), max(1, _ELEMENTS // len(dead))
        for some, residual, by in zip(rows.split(most), error.split(most), factor.split(most)):
            h = _product(some, encoder).add_(bias)
            if len(dead) > k_aux:
                best = (h if norm is None else h * norm[dead]).topk(k_aux, sorted=False).indices
                chosen = torch.zeros_like(h, dtype=torch.bool).scatter_(1, best, True)
                h *= chosen
            off = _product(h, decoder, across=True) * by + residual  # the residual is −error
            loss += weight * off.square().sum()
            back = off * (by * (2 * weight))
            slope = _product(back, decoder)
            if len(dead) > k_aux:
                slope *= chosen
            parts[0].add_(_product(slope.T.contiguous(), some, across=True))
            parts[1].add_(slope.sum(0))
            parts[2].add_(_product(h.T.contiguous(), back, across=True))
        for total, part in zip((W_enc, b_enc, W_dec), parts):
            total.index_add_(0, dead, part)
        return float(loss)

    def _update(self, *gradients: Tensor) -> None:
        parameters = self.optimizer.param_groups[0]["params"]
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        total = get_total_norm(gradients)
        if not total <= self.recipe.clip:
            clip_grads_with_norm_(parameters, self.recipe.clip, total)
        self.optimizer.param_groups[0]["lr"] = self.recipe.rate(self.done)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.recipe.decoder == "unit":
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        self.done += 1

    def tensors(self) -> dict[str, Tensor]:
        """All that a step depends on; views."""
        moments = {
            f"{name}.{moment}": self.optimizer.state[getattr(self, name)][moment]
            for name in ("W_enc", "b_enc", "W_dec", "b_dec") if self.done
            for moment in ("exp_avg", "exp_avg_sq", "step")
        }  # fmt: skip
        own = {name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "idle")}
        scale, done = torch.tensor(self.scale, dtype=torch.float64), torch.tensor(self.done)
        return {**own, **moments, "scale": scale, "done": done}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from what `tensors` gave."""
        self.done, self.scale = int(tensors["done"]), float(tensors["scale"])
        self.idle.copy_(tensors["idle"])
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            parameter = getattr(self, name)
            parameter.copy_(tensors[name])
            if self.done:
                self.optimizer.state[parameter] = {
                    moment: tensors[f"{name}.{moment}"].to(parameter) for moment in ("exp_avg", "exp_avg_sq", "step")
                }

    def inference(self) -> dict[str, Tensor]:
        """W_enc (d, F), b_enc, W_dec (F, d) of norms 1 / scale, and b_dec: a plain TopK SAE of rows as given."""
        norm = self.W_dec.norm(dim=1).clamp(min=1e-8)
        return {
            "W_enc": (self.W_enc * (norm * self.scale)[:, None]).T.contiguous(),
            "b_enc": self.b_enc * norm,
            "W_dec": self.W_dec / (norm * self.scale)[:, None],
            "b_dec": self.b_dec / self.scale,
        }


def _product(x: Tensor, weight: Tensor, across: bool = False) -> Tensor:
    """x weightᵀ, or x weight; by the op `linear` where torch's own runs below the CPU's rate."""
    if x.device.type == "cpu" and fp32_linear_pays(torch.float32)[0]:
        return linear(x, weight, across=across)
    return x @ (weight if across else weight.T)


class _Sorted:
    """A batch's activations (B, k) in the order of their features."""

    def __init__(self, indices: Tensor, features: int) -> None:
        flat = indices.flatten()
        self.order = flat.argsort(stable=True)
        self.rows = self.order.div(indices.size(1), rounding_mode="floor")
        counts = torch.bincount(flat, minlength=features)
        self.offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def sums(self, weights: Tensor, rows: Tensor) -> Tensor:
        """(F, d): for each feature the sum of the rows (B, d) that it is active in, by its weights (B, k) there."""
        ordered = weights.flatten()[self.order]
        return embedding_bag(
            self.rows, rows, self.offsets, mode="sum", per_sample_weights=ordered, include_last_offset=True
        )

    def totals(self, weights: Tensor) -> Tensor:
        """(F,): for each feature the sum of its weights."""
        return torch.segment_reduce(weights.flatten()[self.order], "sum", offsets=self.offsets, initial=0)


def start_of(rows: Tensor, how: str) -> Tensor:
    """(d,): the geometric median of rows (n, d), by Weiszfeld's steps, their mean, or zero."""
    if how == "zero":
        return rows.new_zeros(rows.size(1))
    centre = rows.mean(0)
    if how == "mean":
        return centre
    for _ in range(100):
        distance = (rows - centre).norm(dim=1).clamp(min=1e-8)
        moved = (rows / distance[:, None]).sum(0) / (1 / distance).sum()
        if float((moved - centre).norm()) <= 1e-6 * float(distance.mean()):
            return moved
        centre = moved
    return centre
