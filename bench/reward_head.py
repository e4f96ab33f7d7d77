"""The rows of `reward_head`, and the problem they share.

Baselines, all given what they need once per model (γ⊙w, Gram matrix) for free, while ours folds it in every call:
- HF: transformers' own norm module and `nn.Linear`, in the hidden states' dtype; with interventions "loop", which
  writes h' for each of them and runs that.
- compile: `torch.compile(dynamic=False)` of the same.
- algebraic: `h @ (γ⊙w)` with the norm as a scale, and the interventions by the op's formula. Its forms: the dots as a
  matmul in the hidden dtype ("native"), of an fp32 copy ("upcast"), and of fp32 copies that stay in cache ("chunked").
- compile algebraic: for few heads the dots as plain sums, which Inductor fuses with the norm into one read; with
  interventions the upcast form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bench.registry import Benchmark, Maker, Problem, Shape
from rmfast.ops import reward_head

EPS = 1e-6
# Of the reward scale max(|r|, ‖γ⊙w_k‖): ours as the op promises; baselines as far as rounding in their dtype explains
# (HF in bf16 rounds each of the d normalised values and the result).
OURS, BASELINE = 1e-5, {torch.bfloat16: 2e-2, torch.float32: 1e-5}
# Gradients come in the parameters' dtype: half a unit in the last place of bf16 is 0.2% of the value.
OURS_GRAD, BASELINE_GRAD = {torch.bfloat16: 4e-3, torch.float32: 1e-5}, {torch.bfloat16: 4e-2, torch.float32: 1e-4}
SAMPLE = 64  # rows compared with the truth, the first and the last among them
CHUNK = 256  # rows whose fp32 copy fits a core's L2 at d = 2048


class Head(Problem):
    """Hidden states (n, d), a norm, K heads and perhaps J directions in I interventions."""

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        n, d, heads = shape["n"], shape["d"], shape["heads"]
        j, i = shape.get("directions", 0), shape.get("interventions", 0)
        self.norm_kind = shape["norm"]
        self.dtype = getattr(torch, shape["dtype"])
        draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
        norm: Any = LlamaRMSNorm(d, EPS) if self.norm_kind == "rms" else nn.LayerNorm(d, EPS)
        self.norm = norm.to(device, self.dtype)
        self.linear = nn.Linear(d, heads, bias=False, device=device, dtype=self.dtype)
        with torch.no_grad():
            self.norm.weight.copy_(1 + 0.2 * draw(d))
            if self.norm_kind == "layer":
                self.norm.bias.copy_(0.1 * draw(d))
            self.linear.weight.copy_(draw(heads, d) / d**0.5)
        self.weight, self.gain = self.linear.weight, self.norm.weight
        self.norm_bias = self.norm.bias if self.norm_kind == "layer" else None
        self.directions: Any = None  # (J, d), and (I, J) of each of the other two
        self.strengths: Any = None
        self.targets: Any = None
        if j:
            self.directions = torch.linalg.qr(draw(d, j)).Q.T.contiguous().to(self.dtype)
            self.strengths, self.targets = draw(i, j).sigmoid(), draw(i, j)

        hidden = (3 * draw(n, d)).to(self.dtype)
        self.input_bytes = hidden.nbytes
        self.inputs = [hidden] + [hidden.clone() for _ in range(1, rotate // hidden.nbytes)]
        outputs = n * heads * max(i, 1) * 4
        self.bytes_moved = hidden.nbytes + outputs
        self.flops = 2 * n * d * (heads + j + 1)
        self.gemm = (n, heads + j, d) if heads + j >= 8 else None
        self.tolerance, self.baseline_tolerance = OURS, BASELINE[self.dtype]
        self._sample = torch.linspace(0, n - 1, min(n, SAMPLE), device=device).long()

    def folded(self) -> Tensor:
        """γ⊙w in fp32, (K, d)."""
        return self.weight.float() * self.gain.float()

    def exact(self, hidden: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
        """Rewards of fp64 rows by the definition: h' written out, then the norm, then the head."""
        if self.directions is not None:
            p, alpha, m = (x.double() for x in (self.directions, self.strengths, self.targets))
            hidden = hidden[:, None] - (alpha * ((hidden @ p.T)[:, None] - m)) @ p
        if self.norm_kind == "layer":
            hidden = hidden - hidden.mean(-1, keepdim=True)
        hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + EPS) * gain
        return (hidden if self.norm_bias is None else hidden + self.norm_bias.detach().double()) @ weight.T

    def error(self, out: Any) -> float:
        """On a sample of rows, in units of max(|r|, ‖γ⊙w_k‖)."""
        return self.reward_error(out[self._sample], self.inputs[0][self._sample])

    def reward_error(self, out: Tensor, hidden: Tensor) -> float:
        weight, gain = self.weight.detach().double(), self.gain.detach().double()
        truth = self.exact(hidden.double(), weight, gain)
        if out.shape != truth.shape:
            return float("inf")
        scale = truth.abs().maximum((weight * gain).norm(dim=-1))
        return float(((out.double() - truth).abs() / scale).max())


class Rows(Head):
    """Hidden states (texts, tokens, d) of which one token of each text is scored; an input is (hidden, rows)."""

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        texts, tokens = shape["texts"], shape["tokens"]
        super().__init__({**shape, "n": texts * tokens}, device, rotate)
        generator = torch.Generator(device).manual_seed(1)
        order = torch.rand(texts, tokens, device=device, generator=generator).argsort(-1)
        rows = order.T + torch.arange(texts, device=device) * tokens  # (tokens, texts): each token once
        # Each call reads rows that none before has read, until all of the hidden states were.
        hidden = [h.view(texts, tokens, -1) for h in self.inputs]
        self.inputs = [(h, r.contiguous()) for r in rows for h in hidden]
        self.input_bytes //= tokens
        self.bytes_moved = self.input_bytes + texts * shape["heads"] * 4
        self.flops //= tokens
        self.gemm = None

    def error(self, out: Any) -> float:
        hidden, rows = self.inputs[0]
        return self.reward_error(out, hidden.view(-1, hidden.size(-1))[rows])


class Backward(Head):
    """Forward and backward to hidden, weight and norm weight; an input is (hidden, gradient of the rewards)."""

    grad = True

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        super().__init__(shape, device, rotate)
        generator = torch.Generator(device).manual_seed(1)
        grad = torch.randn(shape["n"], shape["heads"], device=device, generator=generator).to(self.dtype)
        self.inputs = [(h.requires_grad_(), grad) for h in self.inputs]
        self.bytes_moved = 3 * self.input_bytes  # read twice, its gradient written
        self.flops *= 3
        self.tolerance, self.baseline_tolerance = OURS_GRAD[self.dtype], BASELINE_GRAD[self.dtype]

    @functools.cached_property
    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """fp64 gradients: of the sampled rows of hidden, of weight, of norm weight."""
        hidden, grad = (x.detach() for x in self.inputs[0])

        def gradients(h: Tensor, g: Tensor) -> tuple[Tensor, ...]:
            leaves = [x.detach().double().requires_grad_() for x in (h, self.weight, self.gain)]
            return torch.autograd.grad(self.exact(*leaves), leaves, g.double())

        parts = [gradients(h, g)[1:] for h, g in zip(hidden.split(4096), grad.split(4096))]
        weight, gain = (torch.stack(part).sum(0) for part in zip(*parts))
        return gradients(hidden[self._sample], grad[self._sample])[0], weight, gain

    def error(self, out: Any) -> float:
        """The largest, over the three gradients, of the difference by the gradient's largest value."""
        got = (out[0][self._sample], *out[1:])
        if any(x.shape != t.shape for x, t in zip(got, self.truth)):
            return float("inf")
        return max(float((x.double() - t).abs().max() / t.abs().max()) for x, t in zip(got, self.truth))


def ours(p: Head) -> Callable[..., Tensor]:
    return functools.partial(
        reward_head, weight=p.weight, norm=p.norm_kind, norm_weight=p.gain, norm_bias=p.norm_bias, eps=EPS,
        directions=p.directions, strengths=p.strengths, targets=p.targets,
    )  # fmt: skip


def hf(p: Head) -> Callable[[Tensor], Tensor]:
    return lambda h: p.linear(p.norm(h))


def loop(p: Head) -> Callable[[Tensor], Tensor]:
    directions, strengths, targets = (x.to(p.dtype) for x in (p.directions, p.strengths, p.targets))

    def run(h: Tensor) -> Tensor:
        z = h @ directions.T
        changed = (h - (alpha * (z - m)) @ directions for alpha, m in zip(strengths, targets))
        return torch.stack([p.linear(p.norm(x)) for x in changed], 1)

    return run


def compiled(maker: Maker, **options: Any) -> Maker:
    return lambda p: torch.compile(maker(p), dynamic=False, **options)


def _square(p: Head, x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square()


def _algebra(p: Head) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """The dots' matrix (K + J, d) in fp32, and the function of (rows, their dots in fp32) that gives the rewards."""
    a = p.folded()
    d, heads = a.size(1), a.size(0)
    if p.directions is None:
        total = a.sum(-1)
        offset = 0 if p.norm_bias is None else p.weight.float() @ p.norm_bias.float()

        def finish(x: Tensor, dots: Tensor) -> Tensor:
            square = _square(p, x) / d
            if p.norm_kind == "layer":
                mean = x.mean(-1, keepdim=True, dtype=torch.float32)
                dots, square = dots - mean * total, square - mean.square()
            return dots * torch.rsqrt(square + EPS) + offset

        return a, finish

    directions, strengths, targets = p.directions.float(), p.strengths, p.targets
    gram, overlap = directions @ directions.T, directions @ a.T

    def finish_intervened(x: Tensor, dots: Tensor) -> Tensor:
        s, z = dots[:, None, :heads], dots[:, None, heads:]
        c = strengths * (z - targets)  # (n, I, J)
        square = _square(p, x) + ((c @ gram - 2 * z) * c).sum(-1)
        return (s - c @ overlap) * torch.rsqrt(square / d + EPS)[..., None]

    return torch.cat((a, directions)), finish_intervened


def native(p: Head) -> Callable[[Tensor], Tensor]:
    matrix, finish = _algebra(p)
    matrix = matrix.to(p.dtype)
    return lambda h: finish(h, (h @ matrix.T).float())


def upcast(p: Head) -> Callable[[Tensor], Tensor]:
    matrix, finish = _algebra(p)

    def run(h: Tensor) -> Tensor:
        x = h.float()
        return finish(x, x @ matrix.T)

    return run


def chunked(p: Head) -> Callable[[Tensor], Tensor]:
    run = upcast(p)
    return lambda h: torch.cat([run(x) for x in h.split(CHUNK)])


def sums(p: Head) -> Callable[[Tensor], Tensor]:
    matrix, finish = _algebra(p)

    def run(h: Tensor) -> Tensor:
        x = h.float()
        return finish(x, torch.stack([(x * a).sum(-1) for a in matrix.unbind()], -1))

    return run


def trained(maker: Maker) -> Maker:
    """Forward of a maker and backward to hidden, weight and norm weight."""

    def make(p: Backward) -> Callable[[tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
        forward = maker(p)

        def run(inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            hidden, grad = inputs
            out = forward(hidden)
            return torch.autograd.grad(out, (hidden, p.weight, p.gain), grad.to(out.dtype))

        return run

    return make


def live(maker: Maker) -> Maker:
    """Does a maker's own work in every call: γ⊙w is then part of the graph, so that both get gradients."""
    return lambda p: lambda h: maker(p)(h)


def gathered(maker: Maker) -> Maker:
    """Gathers the rows, then runs a maker's function on them."""

    def make(p: Rows) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
        run = maker(p)
        return lambda inputs: run(inputs[0].view(-1, inputs[0].size(-1))[inputs[1]])

    return make


def after(maker: Maker) -> Maker:
    """Runs a maker's function on all tokens, then gathers, as transformers does."""

    def make(p: Rows) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
        run = maker(p)
        return lambda inputs: run(inputs[0]).flatten(0, 1)[inputs[1]]

    return make


def ours_rows(p: Rows) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    run = ours(p)
    return lambda inputs: run(inputs[0], rows=inputs[1])


MODES: dict[str, dict[str, Any]] = {"default": {}, "max-autotune": {"mode": "max-autotune-no-cudagraphs"}}


def _baselines(dtype: str, backward: bool = False, modes: int = 2) -> dict[str, dict[str, Maker]]:
    algebraic: dict[str, Maker] = {"native": native, "chunked": chunked}
    if dtype == "bfloat16":
        algebraic["upcast"] = upcast
    return {
        "HF": {"": hf},
        "compile": {mode: compiled(hf, **options) for mode, options in list(MODES.items())[:modes]},
        "algebraic": {form: live(maker) if backward else maker for form, maker in algebraic.items()},
        "compile algebraic": {"": compiled(live(sums) if backward else sums)},
    }


def _row(name: str, dtype: str = "bfloat16", n: int = 32768, d: int = 2048, heads: int = 1, norm: str = "rms",
         modes: int = 1, **changes: Any) -> Benchmark:  # fmt: skip
    """Forward without interventions."""
    shape = {"n": n, "d": d, "dtype": dtype, "heads": heads, "norm": norm}
    fields: dict[str, Any] = {
        "quick": {**shape, "n": min(n, 48), "d": 96},
        "problem": Head,
        "ours": ours,
        "baselines": _baselines(dtype, modes=modes),
        "limit": {"cpu": "read", "cuda": "copy"},
        "targets": {"cuda": GPU | ({"share": 0.85} if heads <= 4 else {})},
    }
    return Benchmark(f"reward_head/{name}", shape, **(fields | changes))


# On a GPU: ahead of torch.compile on every row.
GPU = {"compile": 1.0}
INTERVENED = {
    "n": 32768, "d": 2048, "dtype": "bfloat16", "heads": 16, "norm": "rms", "directions": 32, "interventions": 8,
}  # fmt: skip
SCORED = {"texts": 64, "tokens": 512, "d": 2048, "heads": 1, "norm": "rms"}

BENCHMARKS = [
    _row("rms-bf16", modes=2, targets={"cpu": {"HF": 50, "compile": 9, "share": 0.8}, "cuda": GPU | {"share": 0.85}}),
    _row(
        "rms-fp32", "float32", modes=2,
        targets={"cpu": {"HF": 12, "compile": 5, "algebraic": 1.5, "share": 0.8}, "cuda": GPU | {"share": 0.85}},
    ),
    Benchmark(
        "reward_head/interventions-bf16",
        INTERVENED,
        quick=INTERVENED | {"n": 48, "d": 96, "directions": 5},
        problem=Head,
        ours=ours,
        baselines={
            "loop": {"": loop},
            "compile": {"loop": compiled(loop)},
            "algebraic": {"native": native, "upcast": upcast, "chunked": chunked},
            "compile algebraic": {"": compiled(upcast)},
        },
        limit={"cpu": "gemm", "cuda": "copy"},
        targets={"cpu": {"loop": 100, "algebraic": 3}, "cuda": GPU},
    ),
    *(
        Benchmark(
            f"reward_head/rows-{short}",
            SCORED | {"dtype": dtype},
            quick=SCORED | {"dtype": dtype, "texts": 3, "tokens": 8, "d": 96},
            problem=Rows,
            ours=ours_rows,
            baselines={
                "HF": {"": after(hf)},
                "gather": {"": gathered(hf)},
                "compile": {"gather": compiled(gathered(hf))},
                "gather algebraic": {"": gathered(native)},
            },
            targets={"cpu": {"gather": 2}, "cuda": GPU},
        )
        for short, dtype in (("bf16", "bfloat16"), ("fp32", "float32"))
    ),
    _row(
        "backward-bf16", modes=2, problem=Backward, ours=trained(ours),
        baselines={
            group: {form: trained(maker) for form, maker in forms.items()}
            for group, forms in _baselines("bfloat16", backward=True).items()
        },
        limit={"cpu": "copy", "cuda": "copy"}, targets={"cpu": {"HF": 10}, "cuda": GPU},
    ),
    *(_row(f"rms-bf16-k{heads}", heads=heads) for heads in (2, 4, 8, 16)),
    _row("layer-bf16", norm="layer"),
    _row("layer-fp32", "float32", norm="layer"),
    # The cost of a call: these inputs stay in cache, as hidden states that were just computed do.
    *(_row(f"small-{n}", n=n, rotate=0, limit={}, targets={"cuda": GPU}) for n in (1, 64, 1024)),
    *(_row(f"rms-bf16-large-k{heads}", n=131072, d=4096, heads=heads, devices=("cuda",)) for heads in (1, 4)),
]  # fmt: skip
