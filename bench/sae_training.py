"""Rows of SAE training: one step of a TopK SAE, forward, backward and Adam, on a batch of activations.

The result is a batch's loss and weighted auxiliary loss after two steps on smaller batches, against the same in fp64 by
the plainest dense form; so gradients and Adam are in it as well as the forward. Decoders' norms are free and features
chosen by activation times norm, clipping and auxiliary loss as SAELens 6 has them by default. A share of the latents is
held dead where shape["dead"] is not 0: they are so again at each call.
- dense: that step as published, written out in PyTorch (autograd, `torch.topk`, a dense decoder), with Adam as SAELens
  makes it and with torch's fused one;
- sparse decoder: the same by a careful user, with `embedding_bag` of the k features for the decoder, dead latents by
  themselves and the fused Adam; the encoder's gradients are dense still, as autograd of `torch.topk` makes them;
- SAELens: `SAETrainer.step` itself where it is installed (its use_sparse_activations has no backward on a CPU).
In bf16 the rows are bf16 and products rounded to it, for the baselines by autocast, as SAELens' `autocast=True`.
The machine's limit is the one product that a sparse step can't go without, the encoder's.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.registry import Benchmark, Maker, Problem, Shape
from rmfast.training.sae_step import TopKRecipe, TopKTraining

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # of the loss
WARM = 256  # rows of the steps before
LR = 1e-3
LONG = 1 << 20  # steps


class Training(Problem):
    """Batches (n, d) that are sums of a few of F directions and noise, and an SAE's parameters at the start."""

    grad = True

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        n, d, features = shape["n"], shape["d"], shape["F"]
        self.k, self.dtype, self.device = shape["k"], getattr(torch, shape["dtype"]), device
        self.half = self.dtype == torch.bfloat16
        draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
        directions = draw(features, d) / d**0.5

        def batch(rows: int) -> Tensor:
            values, which = draw(rows, self.k).abs(), draw(rows, self.k).mul(features).long() % features
            sums = torch.nn.functional.embedding_bag(which, directions, mode="sum", per_sample_weights=values)
            return (sums + 0.1 * draw(rows, d) / d**0.5).to(self.dtype)

        self.warm = [batch(min(WARM, n)) for _ in range(2)]
        first = batch(n)
        self.inputs = [first] + [batch(n) for _ in range(1, min(8, max(1, rotate // first.nbytes)))]
        self.input_bytes = first.nbytes
        self.dead = torch.arange(int(features * shape["dead"]), device=device)
        self.recipe = TopKRecipe(
            features=features, k=self.k, steps=LONG, batch=n, lr=LR, decoder="free", b_dec="zero", aux=1.0,
            product=shape["dtype"], dead_after=1000,
        )  # fmt: skip
        w = TopKTraining(self.recipe, first)
        self.weights = {"W_enc": w.W_enc.T.contiguous(), "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
        parameters = sum(x.numel() for x in self.weights.values())
        self.flops = 2 * n * d * features + 8 * n * d * self.k + 10 * n * d * len(self.dead)
        self.bytes_moved = first.nbytes + 7 * 4 * parameters  # p, m and v are read and written, the gradient read
        self.gemm = (n, features, d)
        self.tolerance = self.baseline_tolerance = TOLERANCE[self.dtype]

    @functools.cached_property
    def truth(self) -> Tensor:
        exact = Dense(self, torch.float64, half=False)
        for x in self.warm:
            exact.step(x)
        return torch.stack(exact.losses(self.inputs[0])[:2]).detach()

    def error(self, out: Tensor) -> float:
        return float((out.double() - self.truth).abs().max() / self.truth[0])


def warmed(p: Training, step: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    for x in p.warm:
        step(x)
    return step


def ours(p: Training) -> Callable[[Tensor], Tensor]:
    made = TopKTraining(p.recipe, p.inputs[0])

    def step(x: Tensor) -> Tensor:
        made.idle[p.dead] = p.recipe.dead_after + 1
        return torch.tensor(made.step(x)[:2], dtype=torch.float64, device=p.device)

    return warmed(p, step)


class Dense:
    """The step as published: SAELens' TopKTrainingSAE and SAETrainer without what logs and hooks."""

    def __init__(self, p: Training, dtype: torch.dtype = torch.float32, half: bool | None = None, **adam: Any) -> None:
        self.p, self.half = p, p.half if half is None else half
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = self.parameters = [
            torch.nn.Parameter(p.weights[name].to(dtype, copy=True)) for name in ("W_enc", "b_enc", "W_dec", "b_dec")
        ]
        self.adam = torch.optim.Adam(self.parameters, lr=LR, **adam)
        self.idle = torch.zeros(p.recipe.features, device=p.device)

    def losses(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, weighted auxiliary loss, and which features were active, (F,)."""
        p, x = self.p, x.to(self.W_dec.dtype)
        self.idle[p.dead] = p.recipe.dead_after + 1
        dead = self.idle > p.recipe.dead_after
        norm = self.W_dec.norm(dim=-1)
        pre = ((x - self.b_dec) @ self.W_enc + self.b_enc) * norm
        best = torch.topk(pre, p.k, dim=-1, sorted=False)
        features = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
        out = features * (1 / norm) @ self.W_dec + self.b_dec
        loss = (out - x).square().sum(-1).mean()
        if not (count := int(dead.sum())):
            return loss, loss.new_zeros(()), features.bool().any(0)
        k_aux = x.size(-1) // 2
        best = torch.where(dead[None], pre, -torch.inf).topk(min(k_aux, count), sorted=False)
        some = torch.zeros_like(pre).scatter(-1, best.indices, best.values)
        made = some * (1 / norm) @ self.W_dec
        aux = (made - (x - out).detach()).square().sum(-1).mean()
        return loss, p.recipe.aux * min(count / k_aux, 1) * aux, features.bool().any(0)

    def step(self, x: Tensor) -> Tensor:
        with torch.autocast(self.p.device.type, torch.bfloat16, enabled=self.half):
            loss, aux, active = self.losses(x)
            with torch.no_grad():
                self.idle += 1
                self.idle[active] = 0
        (loss + aux).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.adam.zero_grad()
        return torch.stack((loss.detach().double(), aux.detach().double()))


class Sparse(Dense):
    """The step with what PyTorch has for it: three dense products in place of six."""

    def losses(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, x = self.p, x.to(self.W_dec.dtype)
        self.idle[p.dead] = p.recipe.dead_after + 1
        dead = (self.idle > p.recipe.dead_after).nonzero()[:, 0]
        norm = self.W_dec.norm(dim=-1)
        pre = ((x - self.b_dec) @ self.W_enc + self.b_enc) * norm
        best = torch.topk(pre, p.k, dim=-1, sorted=False)
        values = (best.values.relu() / norm[best.indices]).to(self.W_dec.dtype)
        decoded = torch.nn.functional.embedding_bag(best.indices, self.W_dec, mode="sum", per_sample_weights=values)
        out = decoded + self.b_dec
        loss = (out - x).square().sum(-1).mean()
        active = torch.zeros(len(norm), dtype=torch.bool, device=x.device)
        active[best.indices[values > 0]] = True
        if not len(dead):
            return loss, loss.new_zeros(()), active
        k_aux = x.size(-1) // 2
        some = pre[:, dead]
        if len(dead) > k_aux:
            largest = some.topk(k_aux, sorted=False)
            some = torch.zeros_like(some).scatter(-1, largest.indices, largest.values)
        made = some * (1 / norm[dead]) @ self.W_dec[dead]
        aux = (made - (x - out).detach()).square().sum(-1).mean()
        return loss, p.recipe.aux * min(len(dead) / k_aux, 1) * aux, active


def dense(**adam: Any) -> Maker:
    return lambda p: warmed(p, Dense(p, **adam).step)


def sparse(p: Training) -> Callable[[Tensor], Tensor]:
    return warmed(p, Sparse(p, fused=True).step)


def saelens(p: Training) -> Callable[[Tensor], Tensor]:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    features, d = p.weights["W_dec"].shape
    device = str(p.device)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=features, k=p.k, device=device))
    with torch.no_grad():
        for name, value in p.weights.items():
            getattr(sae, name).copy_(value)
    config = SAETrainerConfig(
        total_training_samples=LONG * len(p.inputs[0]), train_batch_size_samples=len(p.inputs[0]), lr=LR,
        lr_end=LR, dead_feature_window=p.recipe.dead_after, autocast=p.half, device=device,
    )  # fmt: skip
    trainer = SAETrainer(config, sae, iter(p.inputs))

    def step(x: Tensor) -> Tensor:
        trainer.n_forward_passes_since_fired[p.dead] = p.recipe.dead_after + 1
        out = trainer.step(x)
        trainer.n_training_steps += 1
        both = (out.losses["mse_loss"], out.losses["auxiliary_reconstruction_loss"])
        return torch.stack([loss.detach().double() for loss in both])

    return warmed(p, step)


_PEERS: dict[str, dict[str, Maker]] = {"SAELens": {"": saelens}} if importlib.util.find_spec("sae_lens") else {}


def _row(name: str, dtype: str, dead: float = 0.0, least: float = 2.0) -> Benchmark:
    shape = {"n": 4096, "d": 768, "F": 16384, "k": 32, "dtype": dtype, "dead": dead}
    return Benchmark(
        f"sae_training/{name}",
        shape,
        shape | {"n": 40, "d": 24, "F": 200, "k": 4},
        Training,
        ours,
        {"dense": {"published": dense(), "fused Adam": dense(fused=True)}, "sparse decoder": {"": sparse}, **_PEERS},
        limit={"cpu": "gemm", "cuda": "gemm"},
        targets={"cpu": {"dense": least, **dict.fromkeys(_PEERS, least), "memory": 0.5}},
        rounds=(3, 10),
        memory="dense: fused Adam",
    )


BENCHMARKS = [_row("fp32", "float32"), _row("bf16", "bfloat16"), _row("dead-fp32", "float32", dead=0.1)]
