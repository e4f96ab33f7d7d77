"""A TopK SAE's training step as the published code has it: dense, by autograd (SAELens 6 and arXiv 2406.04093)."""

from __future__ import annotations

import torch
from torch import Tensor


class DenseTopK:
    """SAELens' TopKTrainingSAE and SAETrainer in one, in any dtype; `unit` is the paper's decoder of unit norm."""

    def __init__(
        self, tensors: dict[str, Tensor], k: int, *, unit: bool, lr: float, aux: float, dead_after: int, clip: float,
        apply_b_dec: bool, normalize: str, dtype: torch.dtype = torch.float64,
    ) -> None:  # fmt: skip
        self.k, self.unit, self.aux, self.dead_after, self.clip = k, unit, aux, dead_after, clip
        self.apply_b_dec, self.normalize = apply_b_dec, normalize
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = self.parameters = [
            tensors[name].to(dtype, copy=True).requires_grad_() for name in ("W_enc", "b_enc", "W_dec", "b_dec")
        ]
        self.idle = torch.zeros(len(self.b_enc), dtype=torch.int64)
        self.adam = torch.optim.Adam(self.parameters, lr=lr)

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        if self.normalize == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            deviation = (x - mean).std(-1, keepdim=True)
            return (x - mean) / (deviation + 1e-5), deviation, mean
        if self.normalize == "constant_norm_rescale":
            size = x.norm(dim=-1, keepdim=True) / x.size(-1) ** 0.5
            return x / size, size, 0.0
        return x, 1.0, 0.0

    def step(self, x: Tensor) -> tuple[float, float]:
        """The loss and the weighted auxiliary loss, before the update."""
        x = x.to(self.W_dec)
        given, size, mean = self._normalized(x)
        pre = (given - self.b_dec * self.apply_b_dec) @ self.W_enc + self.b_enc
        norm = 1 if self.unit else self.W_dec.norm(dim=-1)
        pre = pre * norm
        best = pre.topk(self.k)
        features = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
        out = (features / norm @ self.W_dec + self.b_dec) * size + mean
        loss = (out - x).square().sum(-1).mean()
        auxiliary = torch.zeros(())
        dead = self.idle > self.dead_after
        if count := int(dead.sum()):
            k_aux = x.size(-1) // 2
            scale = min(count / k_aux, 1)
            best = pre.where(dead, -torch.inf).topk(min(k_aux, count))
            some = torch.zeros_like(pre).scatter(-1, best.indices, best.values)
            made = some / norm @ self.W_dec * size
            auxiliary = self.aux * scale * (made - (x - out).detach()).square().sum(-1).mean()
        self.idle += 1
        self.idle[(features > 0).any(0)] = 0
        self.adam.zero_grad()
        (loss + auxiliary).backward()
        if self.unit:
            along = (self.W_dec.grad * self.W_dec.data).sum(-1, keepdim=True)
            self.W_dec.grad -= along * self.W_dec.data
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.adam.step()
        if self.unit:
            with torch.no_grad():
                self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True)
        return float(loss.detach()), float(auxiliary.detach())
