"""Rows of TCRM's loss, forward and backward: from values, and from hidden states.

Baselines, in eager PyTorch and compiled, given masks and indices for free:
- eager: of padded values (B, T), or of ragged ones with an index of each token's last one ("padded", "ragged").
- HF: transformers' norm and `nn.Linear` on the hidden states, then the ragged form on the fp32 values.
- algebraic: `h @ (γ⊙w)` with the norm as a scale in place of both, then the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bench import reward_head
from bench.registry import Benchmark, Maker, Problem, Shape
from rmfast.losses import linear_value_loss, tcrm_loss

SMOOTH, LOOKAHEAD = 0.1, 0.01

Result = tuple[Tensor, ...]


def ragged_loss(chosen: Tensor, rejected: Tensor, sides: list[tuple[Tensor, Tensor]]) -> Tensor:
    """TCRM of values (N,); `sides` holds, for each, the last token of each text and of each token."""
    finals, parts = [], chosen.new_zeros(())
    for values, (last, owner) in zip((chosen, rejected), sides):
        before_last = owner != torch.arange(values.size(0), device=values.device)
        step = (values[:-1] - values[1:].detach()) * before_last[:-1]
        ahead = (values - values.detach()[owner]) * before_last
        parts = parts + SMOOTH * step.square().sum() + LOOKAHEAD * ahead.square().sum()
        finals.append(values[last])
    return parts / finals[0].size(0) - logsigmoid(finals[0] - finals[1]).mean()


def padded_loss(chosen: Tensor, rejected: Tensor, sides: list[tuple[Tensor, Tensor]]) -> Tensor:
    """TCRM of values (B, T) padded at the right; `sides` holds the index of the last token and the mask before it."""
    finals, parts = [], chosen.new_zeros(())
    for values, (last, inside) in zip((chosen, rejected), sides):
        final = values.gather(1, last)
        step = (values[:, :-1] - values[:, 1:].detach()) * inside[:, :-1]
        ahead = (values - final.detach()) * inside
        parts = parts + SMOOTH * step.square().sum() + LOOKAHEAD * ahead.square().sum()
        finals.append(final)
    return parts / finals[0].size(0) - logsigmoid(finals[0] - finals[1]).mean()


def _limits(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _ends(limits: Tensor) -> tuple[Tensor, Tensor]:
    """The last token of each text (B,), and of each token's text (N,)."""
    last = limits[1:] - 1
    return last, last.repeat_interleave(limits.diff())


class Values(Problem):
    """Values of pairs of texts of 1/4 to 7/4 of `tokens`; an input is two pairs, ragged and padded ones."""

    grad = True
    gemm = None
    tolerance, baseline_tolerance = 1e-5, 1e-5

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        pairs, tokens = shape["pairs"], shape["tokens"]
        self.dtype = getattr(torch, shape["dtype"])
        generator = torch.Generator(device).manual_seed(0)
        longest = 7 * tokens // 4
        lengths = torch.randint(tokens // 4, longest + 1, (2, pairs), device=device, generator=generator)
        self.limits = [_limits(side) for side in lengths]
        self.ragged = [_ends(limits) for limits in self.limits]
        token = torch.arange(longest, device=device)
        self.masks = [token < side[:, None] for side in lengths]
        self.padded = [(side[:, None] - 1, (token < side[:, None] - 1).to(self.dtype)) for side in lengths]

        def values() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
            grids = [torch.randn(pairs, longest, device=device, generator=generator).to(self.dtype) for _ in range(2)]
            flat = [grid[mask].requires_grad_() for grid, mask in zip(grids, self.masks)]
            grids = [(grid * mask).requires_grad_() for grid, mask in zip(grids, self.masks)]
            return (flat[0], flat[1]), (grids[0], grids[1])

        first = values()
        self.input_bytes = sum(v.nbytes for v in first[0])
        self.inputs = [first] + [values() for _ in range(1, rotate // self.input_bytes)]
        self.bytes_moved = 2 * self.input_bytes  # read, gradients written
        self.flops = 10 * sum(v.numel() for v in first[0])

    @functools.cached_property
    def truth(self) -> Result:
        values = [v.detach().double().requires_grad_() for v in self.inputs[0][0]]
        loss = ragged_loss(values[0], values[1], self.ragged)
        return loss.detach(), *torch.autograd.grad(loss, values)

    def error(self, out: Any) -> float:
        """The largest difference of the loss and of each gradient by its own largest value."""
        got = [out[0], *(v if v.dim() == 1 else v[mask] for v, mask in zip(out[1:], self.masks))]
        return error_of(got, self.truth)


def error_of(got: list[Tensor], truth: Result) -> float:
    """The largest difference of any result, in units of its own largest value."""
    if any(a.shape != b.shape for a, b in zip(got, truth)):
        return float("inf")
    return max(float((a.detach().double() - b).abs().max() / b.abs().max()) for a, b in zip(got, truth))


def ours(p: Values) -> Callable[[Any], Result]:
    def run(inputs: Any) -> Result:
        chosen, rejected = inputs[0]
        loss, _ = tcrm_loss(chosen, rejected, *p.limits, smooth=SMOOTH, lookahead=LOOKAHEAD)
        return loss, *torch.autograd.grad(loss, (chosen, rejected))

    return run


def eager(form: str, compiled: bool = False) -> Maker:
    def make(p: Values) -> Callable[[Any], Result]:
        loss_of = ragged_loss if form == "ragged" else padded_loss
        sides, place = (p.ragged, 0) if form == "ragged" else (p.padded, 1)
        function = torch.compile(loss_of, dynamic=False) if compiled else loss_of

        def run(inputs: Any) -> Result:
            chosen, rejected = inputs[place]
            loss = function(chosen, rejected, sides)
            return loss, *torch.autograd.grad(loss, (chosen, rejected))

        return run

    return make


class Hidden(reward_head.Head):
    """Hidden states of `texts` texts, chosen and then rejected, of 3/4 and 5/4 `tokens` in turn; one head."""

    grad = True

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        texts, tokens = shape["texts"], shape["tokens"]
        super().__init__({**shape, "n": texts * tokens, "heads": 1, "norm": "rms"}, device, rotate)
        self.inputs = [h.requires_grad_() for h in self.inputs]
        self.bytes_moved = 3 * self.input_bytes  # read twice, its gradient written
        self.output_bytes = self.input_bytes
        self.flops *= 3
        self.tolerance = reward_head.OURS_GRAD[self.dtype]
        self.baseline_tolerance = reward_head.BASELINE_GRAD[self.dtype]
        lengths = torch.tensor([tokens * 3 // 4, tokens * 2 - tokens * 3 // 4] * (texts // 2), device=device)
        self.limits = _limits(lengths)
        self.split = int(lengths[: texts // 2].sum())
        self.sides = [_ends(self.limits[: texts // 2 + 1]), _ends(self.limits[texts // 2 :] - self.split)]

    def loss(self, values: Tensor) -> Tensor:
        return ragged_loss(values[: self.split], values[self.split :], self.sides)

    @functools.cached_property
    def truth(self) -> Result:
        """fp64 loss, and its gradients: of the sampled rows of hidden, of weight, of norm weight."""
        hidden = self.inputs[0].detach()
        leaves = [x.detach().double().requires_grad_() for x in (self.weight, self.gain)]
        with torch.no_grad():
            values = torch.cat([self.exact(h.double(), *leaves)[:, 0] for h in hidden.split(4096)])
        loss = self.loss(values.requires_grad_())
        (slopes,) = torch.autograd.grad(loss, values)

        def gradients(h: Tensor, slope: Tensor) -> Result:
            h = h.double().requires_grad_()
            return torch.autograd.grad(self.exact(h, *leaves)[:, 0], [h, *leaves], slope)

        parts = [gradients(h, slope)[1:] for h, slope in zip(hidden.split(4096), slopes.split(4096))]
        weight, gain = (torch.stack(part).sum(0) for part in zip(*parts))
        return loss.detach(), gradients(hidden[self._sample], slopes[self._sample])[0], weight, gain

    def error(self, out: Any) -> float:
        return error_of([out[0], out[1][self._sample], *out[2:]], self.truth)


def ours_hidden(p: Hidden) -> Callable[[Tensor], Result]:
    def run(h: Tensor) -> Result:
        loss, _ = linear_value_loss(
            h, p.weight, p.limits, norm="rms", norm_weight=p.gain, eps=reward_head.EPS, smooth=SMOOTH,
            lookahead=LOOKAHEAD,
        )  # fmt: skip
        return loss, *torch.autograd.grad(loss, (h, p.weight, p.gain))

    return run


def trained(maker: Maker, compiled: bool = False) -> Maker:
    def make(p: Hidden) -> Callable[[Tensor], Result]:
        forward = maker(p)

        def loss_of(h: Tensor) -> Tensor:
            return p.loss(forward(h)[:, 0].float())

        function = torch.compile(loss_of, dynamic=False) if compiled else loss_of

        def run(h: Tensor) -> Result:
            loss = function(h)
            return loss, *torch.autograd.grad(loss, (h, p.weight, p.gain))

        return run

    return make


TCRM = {"pairs": 256, "tokens": 1024, "dtype": "float32"}
HIDDEN = {"texts": 64, "tokens": 1024, "d": 2048, "dtype": "bfloat16"}

BENCHMARKS = [
    Benchmark(
        "losses/tcrm",
        TCRM,
        quick=TCRM | {"pairs": 3, "tokens": 40},
        problem=Values,
        ours=ours,
        baselines={
            "eager": {"padded": eager("padded"), "ragged": eager("ragged")},
            "compile": {"padded": eager("padded", True), "ragged": eager("ragged", True)},
        },
        targets={"cpu": {"eager": 5}, "cuda": {"compile": 1}},
    ),
    Benchmark(
        "losses/linear-value-bf16",
        HIDDEN,
        quick=HIDDEN | {"texts": 4, "tokens": 12, "d": 96},
        problem=Hidden,
        ours=ours_hidden,
        baselines={
            "HF": {"": trained(reward_head.hf)},
            "compile": {"": trained(reward_head.hf, True)},
            "algebraic": {
                form: trained(reward_head.live(maker))
                for form, maker in (("native", reward_head.native), ("chunked", reward_head.chunked))
            },
        },
        limit={"cpu": "copy", "cuda": "copy"},
        targets={"cpu": {"HF": 5, "memory": 0.1}, "cuda": {"compile": 1, "memory": 0.1}},
        memory="HF",
    ),
]
