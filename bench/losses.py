"""Rows of the losses, forward and backward: TCRM from values and from hidden states, the sum of MMD² over bins.

Baselines of TCRM, in eager PyTorch and compiled, given masks and indices for free:
- eager: of padded values (B, T), or of ragged ones with an index of each token's last one ("padded", "ragged").
- HF: transformers' norm and `nn.Linear` on the hidden states, then the ragged form on the fp32 values.
- algebraic: `h @ (γ⊙w)` with the norm as a scale in place of both, then the same.

Baselines of MMD², given bandwidth and membership for free:
- pairs: a loop over bins. Forms: "naive", all three kernel means of each unordered pair of bins; "blocks", each block
  of the kernel matrix once.
- full: the whole kernel matrix. Forms: "blocks", block means by two matmuls; "weights", a sum weighted by a matrix of
  coefficients made before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from bench import reward_head
from bench.registry import Benchmark, Maker, Problem, Shape
from rmfast.losses import binned_mmd, linear_value_loss, tcrm_loss

SMOOTH, LOOKAHEAD = 0.1, 0.01
CHUNK = 512  # rows of the truth's kernel matrix at a time

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
        return _error(got, self.truth)


def _error(got: list[Tensor], truth: Result) -> float:
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
        return _error([out[0], out[1][self._sample], *out[2:]], self.truth)


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


class Binned(Problem):
    """Rewards (n,) or representations (n, features) in bins of equal sizes; the mean rises with the bin."""

    grad = True
    gemm = None

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        n, features, count = shape["n"], shape["features"], shape["bins"]
        self.dtype = torch.float32
        generator = torch.Generator(device).manual_seed(0)
        self.bins = torch.randperm(n, device=device, generator=generator) * count // n
        self.bandwidth = float(features) ** 0.5
        self.tolerance, self.baseline_tolerance = (1e-5, 1e-4) if features == 1 else (1e-4, 1e-3)

        def draw() -> Tensor:
            x = torch.randn(n, features, device=device, generator=generator) + self.bins[:, None] / count
            return (x[:, 0] if features == 1 else x).contiguous().requires_grad_()

        first = draw()
        self.input_bytes = first.nbytes
        self.inputs = [first] + [draw() for _ in range(1, min(64, rotate // self.input_bytes))]
        self.bytes_moved = 2 * self.input_bytes
        self.flops = n * n // 2 * (6 * features + 20)
        self.members = one_hot(self.bins, count).float()
        self.means = self.members / self.members.sum(0)  # (n, M): K's block means are meansᵀ K means
        self.rows = [torch.nonzero(self.bins == m)[:, 0] for m in range(count)]

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        if a.dim() == 1:
            squares = (a[:, None] - b).square()
        else:
            squares = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)
        return torch.exp(squares * (-0.5 / self.bandwidth**2))

    @staticmethod
    def total(a: Tensor) -> Tensor:
        """Σ_{m,m'} MMD² of block means (M, M)."""
        within = a.diagonal()
        return (within[:, None] + within - 2 * a).sum()

    @functools.cached_property
    def truth(self) -> Result:
        x = self.inputs[0].detach().double().requires_grad_()
        means = self.means.double()
        value, grad = 0.0, torch.zeros_like(x)
        for first in range(0, x.size(0), CHUNK):  # the total is linear in the block means, and so in strips of K
            rows = slice(first, first + CHUNK)
            part = self.total(means[rows].T @ self.kernel(x[rows], x) @ means)
            value += float(part.detach())
            grad += torch.autograd.grad(part, x)[0]
        return torch.tensor(value, dtype=torch.float64, device=x.device), grad

    def error(self, out: Any) -> float:
        return _error(list(out), self.truth)


def _graded(value_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Result]:
    def run(x: Tensor) -> Result:
        value = value_of(x)
        return value, *torch.autograd.grad(value, x)

    return run


def ours_binned(p: Binned) -> Callable[[Tensor], Result]:
    return _graded(lambda x: binned_mmd(x, p.bins, bandwidth=p.bandwidth))


def naive(p: Binned) -> Callable[[Tensor], Result]:
    def value(x: Tensor) -> Tensor:
        parts = [x[rows] for rows in p.rows]
        total = x.new_zeros(())
        for i, a in enumerate(parts):
            for b in parts[:i]:
                total = total + 2 * (p.kernel(a, a).mean() + p.kernel(b, b).mean() - 2 * p.kernel(a, b).mean())
        return total

    return _graded(value)


def blocks(p: Binned) -> Callable[[Tensor], Result]:
    def value(x: Tensor) -> Tensor:
        parts = [x[rows] for rows in p.rows]
        within = torch.stack([p.kernel(a, a).mean() for a in parts])
        between = torch.stack([p.kernel(a, b).mean() for i, a in enumerate(parts) for b in parts[:i]])
        return 2 * (len(parts) - 1) * within.sum() - 4 * between.sum()

    return _graded(value)


def full_blocks(p: Binned) -> Callable[[Tensor], Result]:
    return _graded(lambda x: p.total(p.means.T @ p.kernel(x, x) @ p.means))


def full_weights(p: Binned, compiled: bool = False) -> Callable[[Tensor], Result]:
    bins = p.means.size(1)
    sizes = p.members.sum(0)[p.bins]
    same = p.bins[:, None] == p.bins
    weights = torch.where(same, 2.0 * (bins - 1) / sizes**2, -2 / (sizes[:, None] * sizes))
    value = lambda x: (weights * p.kernel(x, x)).sum()  # noqa: E731
    return _graded(torch.compile(value, dynamic=False) if compiled else value)


TCRM = {"pairs": 256, "tokens": 1024, "dtype": "float32"}
HIDDEN = {"texts": 64, "tokens": 1024, "d": 2048, "dtype": "bfloat16"}
MMD = {"n": 8192, "features": 1, "bins": 30}
FULL: dict[str, Maker] = {"blocks": full_blocks, "weights": full_weights}

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
    Benchmark(
        "losses/mmd",
        MMD,
        quick=MMD | {"n": 60, "bins": 4},
        problem=Binned,
        ours=ours_binned,
        baselines={
            "pairs": {"naive": naive, "blocks": blocks},
            "full": FULL,
            "compile": {"full": functools.partial(full_weights, compiled=True)},
        },
        targets={"cpu": {"pairs": 10, "full": 2}, "cuda": {"full": 2}},
        memory="full: weights",
    ),
    Benchmark(
        "losses/mmd-representations",
        MMD | {"features": 256},
        quick=MMD | {"n": 60, "features": 5, "bins": 4},
        problem=Binned,
        ours=ours_binned,
        baselines={"full": FULL, "compile": {"full": functools.partial(full_weights, compiled=True)}},
        memory="full: weights",
    ),
]
