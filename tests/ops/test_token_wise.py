"""rms_norm, rotary and gated_activation: every backend against fp64 truth and against transformers' own modules."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi3_rotary
from ways import backends_of

from rmfast.kernels.token_wise import reference
from rmfast.ops import gated_activation, rms_norm, rotary

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
SIZES = [(1, 1), (5, 3), (7, 40), (3, 111), (2, 576), (33, 1025)]
BACKENDS = backends_of("rms_norm")
KERNELS = [param for param in BACKENDS if param.values[0][1] != "eager"]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
llama_and_gemma = pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma"])


def draw(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0, scale: float = 1.0) -> Tensor:
    """Random numbers inside a buffer that is NaN everywhere else, with strides of no good alignment."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.full((*(size + 1 for size in shape[:-1]), shape[-1] + 5), torch.nan, dtype=dtype)
    inner = buffer[tuple(slice(0, size) for size in shape[:-1])][..., 3 : 3 + shape[-1]]
    inner.copy_(scale * torch.randn(shape, generator=generator, dtype=torch.float64))
    return buffer.to(device)[tuple(slice(0, size) for size in shape[:-1])][..., 3 : 3 + shape[-1]]


def assert_true(got: Tensor, truth: Tensor, eager: Tensor, roundings: float = 3) -> None:
    """At most twice the error of eager PyTorch in the same dtype, plus a few roundings of the largest value."""
    assert got.dtype == eager.dtype and got.shape == truth.shape and got.is_contiguous()
    error, allowed = ((value.cpu().double() - truth.cpu()).abs().max() for value in (got, eager))
    assert error <= 2 * allowed + roundings * torch.finfo(got.dtype).eps * truth.abs().max().cpu(), (error, allowed)


def wide(*values):
    return [value.double() if isinstance(value, Tensor) else value for value in values]


def norm_inputs(rows: int, d: int, dtype, device="cpu") -> list[Tensor]:
    """x, weight, residual and post_weight."""
    x, residual = (draw(rows, d, dtype=dtype, device=device, seed=seed, scale=3) for seed in (0, 1))
    return [x, draw(d, dtype=dtype, device=device, seed=2), residual, draw(d, dtype=dtype, device=device, seed=3)]


# ------------------------------------------------------------------------------------------------------------ norm


@llama_and_gemma
@every_dtype
@every_backend
def test_rms_norm_agrees_with_fp64(backend, dtype, gemma, use_backend, poisoned):
    device = use_backend(backend)
    for rows, d in SIZES:
        x, weight, residual, post = norm_inputs(rows, d, dtype, device)
        sums = [(x, weight, residual, None), (x, weight, residual, post)]
        for args in [(x, weight, None, None), (x, None, None, None), *sums]:
            got = rms_norm(args[0], args[1], residual=args[2], post_weight=args[3], eps=1e-5, gemma=gemma)
            truth = reference.rms_norm(*wide(*args), 1e-5, gemma)
            eager = reference.rms_norm(*args, 1e-5, gemma)
            for value, *others in zip(got if isinstance(got, tuple) else (got,), truth, eager):
                assert_true(value, *others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("module", [LlamaRMSNorm, Gemma2RMSNorm])
@every_backend
@torch.no_grad()
def test_rms_norm_is_that_of_transformers(backend, module, dtype, use_backend):
    device = use_backend(backend)
    x, weight, residual, post = norm_inputs(64, 576, dtype, device)
    norm, post_norm = module(576).to(device, dtype), module(576).to(device, dtype)
    norm.weight.copy_(weight)
    post_norm.weight.copy_(post)
    gemma = module is Gemma2RMSNorm
    pairs = [(rms_norm(x, weight, eps=1e-6, gemma=gemma), norm(x))]
    for post_weight, added in ((None, x), (post, post_norm(x))):
        y, total = rms_norm(x, weight, residual=residual, post_weight=post_weight, eps=1e-6, gemma=gemma)
        pairs += [(total, residual + added), (y, norm(residual + added))]
    for got, want in pairs:
        if dtype == torch.float32:
            torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
        else:
            assert (got != want).float().mean() < 1e-3


@every_backend
def test_a_sum_without_post_norm_is_rounded_once(backend, use_backend):
    device = use_backend(backend)
    x, weight, residual, _ = norm_inputs(33, 111, torch.bfloat16, device)
    assert torch.equal(rms_norm(x, weight, residual=residual, eps=1e-6)[1], x + residual)


@every_backend
def test_a_weight_of_another_dtype_leaves_the_dtype_of_x(backend, use_backend):
    device = use_backend(backend)
    x, weight, residual, post = norm_inputs(5, 40, torch.bfloat16, device)
    want = rms_norm(x, weight, residual=residual, post_weight=post, eps=1e-6)
    for dtype in DTYPES[:2]:
        got = rms_norm(x, weight.to(dtype), residual=residual, post_weight=post.to(dtype), eps=1e-6)
        assert all(a.dtype == torch.bfloat16 and torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("post", [False, True], ids=["plain", "post"])
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@llama_and_gemma
@every_backend
def test_beside_an_fp32_residual_nothing_is_rounded_but_y(backend, gemma, dtype, post, use_backend, poisoned):
    device = use_backend(backend)
    for rows, d in SIZES:
        x, weight, _, post_weight = norm_inputs(rows, d, dtype, device)
        residual, post_weight = draw(rows, d, device=device, seed=1, scale=3), post_weight if post else None
        y, total = rms_norm(x, weight, residual=residual, post_weight=post_weight, eps=1e-5, gemma=gemma)
        _, truth = reference.rms_norm(*wide(x, weight, residual, post_weight), 1e-5, gemma)
        torch.testing.assert_close(total, truth.float(), rtol=1e-6, atol=5e-7 * float(truth.abs().max()))
        assert torch.equal(y, rms_norm(total, weight, eps=1e-5, gemma=gemma).to(dtype))
        alone = rms_norm(x[-1:], weight, residual=residual[-1:], post_weight=post_weight, eps=1e-5, gemma=gemma)
        assert torch.equal(alone[0], y[-1:]) and torch.equal(alone[1], total[-1:])
    torch.library.opcheck(torch.ops.rmfast.rms_norm.default, (x, weight, residual, post_weight, 1e-5, gemma))


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@every_backend
def test_a_nan_of_any_payload_in_an_fp32_residual_stays_one(backend, dtype, use_backend):
    device = use_backend(backend)
    x, residual = draw(3, 40, dtype=dtype, device=device), draw(3, 40, device=device).clone()
    for bits in (-1, 0x7FFFFFFF, 0x7F800001):
        residual[1, 7] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        y, total = rms_norm(x, None, residual=residual, eps=1e-6)
        assert y.isnan().all(1).tolist() == [False, True, False]
        assert total.isnan().sum() == 1 and total[1, 7].isnan()


# ---------------------------------------------------------------------------------------------------------- rotary


def rotary_inputs(rows, heads, kv_heads, d, rotated, dtype, device="cpu") -> list[Tensor]:
    """q and k as slices of one fused projection."""
    fused = draw(rows, (heads + 2 * kv_heads) * d, dtype=dtype, device=device)
    q, k, _ = (part.unflatten(1, (-1, d)) for part in fused.split([heads * d, kv_heads * d, kv_heads * d], 1))
    angles = (3 * torch.randn(rows, rotated // 2, generator=torch.Generator().manual_seed(1))).repeat(1, 2)
    return [q, k, angles.cos().to(device, dtype), angles.sin().to(device, dtype)]


ROTARY = {
    "whole": (9, 3, 64, 64),
    "partial": (4, 4, 96, 64),
    "odd": (3, 1, 15, 6),
    "small": (2, 2, 2, 2),
    "no k": (5, 0, 40, 40),
}


@pytest.mark.parametrize("norms", ["", "llama", "gemma"])
@pytest.mark.parametrize("shape", ROTARY)
@every_dtype
@every_backend
def test_rotary_agrees_with_fp64(backend, dtype, shape, norms, use_backend, poisoned):
    device = use_backend(backend)
    args = rotary_inputs(17, *ROTARY[shape], dtype, device)
    d = args[0].size(2)
    gains = [draw(d, dtype=dtype, device=device, seed=seed) if norms else None for seed in (4, 5)]
    got = rotary(*args, q_norm=gains[0], k_norm=gains[1], eps=1e-5, gemma=norms == "gemma")
    truth = reference.rotary(*wide(*args, *gains), 1e-5, norms == "gemma")
    eager = reference.rotary(*args, *gains, 1e-5, norms == "gemma")
    for value, *others in zip(got, truth, eager):
        if value.numel():
            assert_true(value, *others)
        else:
            assert value.shape == others[0].shape


@pytest.mark.parametrize("norm", [None, LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("theirs,shape", [(llama_rotary, "whole"), (phi3_rotary, "partial")], ids=["Llama", "Phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_backend
@torch.no_grad()
def test_rotary_is_as_close_to_the_truth_as_transformers_and_in_16_bits_closer(
    backend, dtype, theirs, shape, norm, use_backend
):
    device = use_backend(backend)
    q, k, cos, sin = rotary_inputs(33, *ROTARY[shape], dtype, device)
    module = None if norm is None else norm(q.size(2)).to(device, dtype)
    if module is not None:
        module.weight.copy_(draw(q.size(2), dtype=dtype, device=device))
    weight = None if module is None else module.weight
    got = rotary(q, k, cos, sin, q_norm=weight, k_norm=weight, eps=1e-6, gemma=norm is Gemma2RMSNorm)

    def run(q, k, cos, sin):
        return [
            out[0].transpose(0, 1) for out in theirs(*(x.transpose(0, 1)[None] for x in (q, k)), cos[None], sin[None])
        ]

    normed = [q, k] if module is None else [module(q), module(k)]
    truth = reference.rotary(*wide(q, k, cos, sin, weight, weight), 1e-6, norm is Gemma2RMSNorm)
    for value, eager, true in zip(got, run(*normed, cos, sin), truth):
        error, allowed = ((x.double() - true).abs().max() for x in (value, eager))
        if dtype == torch.bfloat16:
            assert error <= allowed
        else:
            assert error <= 2 * allowed + 3 * torch.finfo(dtype).eps * true.abs().max()


@every_backend
def test_heads_may_be_transposed_and_tables_float32(backend, use_backend):
    device = use_backend(backend)
    q, k, cos, sin = rotary_inputs(12, 4, 2, 32, 32, torch.bfloat16, device)
    want = rotary(q, k, cos, sin)
    turned = q.transpose(0, 1).contiguous().transpose(0, 1)
    got = rotary(turned, k.clone(), cos.float(), sin.double())
    assert all(torch.equal(a, b) for a, b in zip(got, want))


# ------------------------------------------------------------------------------------------------------ activation


@pytest.mark.parametrize("kind", KINDS)
@every_dtype
@every_backend
def test_gated_activation_agrees_with_transformers_in_fp64(backend, dtype, kind, use_backend, poisoned):
    device = use_backend(backend)
    for rows, m in SIZES:
        fused = draw(rows, 2 * m, dtype=dtype, device=device, scale=4)
        gate, up = fused.chunk(2, 1)
        act = ACT2FN[KINDS[kind]]
        truth = act(gate.double()) * up.double()
        assert_true(gated_activation(gate, up, kind=kind), truth, act(gate) * up, roundings=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [param for param in BACKENDS if param.values[0][1] == "cpp"])
def test_every_gate_has_a_small_relative_error(backend, kind, use_backend):
    use_backend(backend)
    gate = torch.linspace(-9, 9, 40001)[None]
    truth = ACT2FN[KINDS[kind]](gate.double())
    if kind == "gelu":  # without the cancellation of 1 + erf
        truth = gate.double() * 0.5 * torch.erfc(-gate.double() / 2**0.5)
    if kind == "gelu_tanh":  # without that of 1 + tanh
        wide_gate = gate.double()
        truth = wide_gate * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (wide_gate + 0.044715 * wide_gate**3))
    got = gated_activation(gate, torch.ones_like(gate), kind=kind).double()
    error = ((got - truth).abs() / truth.abs().clamp(min=1e-30)).squeeze()
    # Far out in the tail the exponent's own rounding, |exponent| · eps, is what is left.
    assert error[gate[0] >= -1].max() < 4e-7 and error.max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@every_backend
def test_extreme_gates(backend, kind, use_backend):
    device = use_backend(backend)
    gate = torch.tensor([[-3e38, -1e4, -100.0, -0.0, 0.0, 100.0, 1e4, torch.nan]], device=device)
    got = gated_activation(gate, torch.ones_like(gate), kind=kind)[0]
    assert got[:5].abs().max() < 1e-36 and torch.equal(got[5:7], gate[0, 5:7]) and got[7].isnan()


# ------------------------------------------------------------------------------------------------- all of the three


CALLS = {
    "rms_norm": lambda x, w: rms_norm(x, w, eps=1e-6),
    "rms_norm with residual": lambda x, w: rms_norm(x, w, residual=x.flip(-1), post_weight=w, eps=1e-6, gemma=True),
    "rotary": lambda x, w: rotary(x.unflatten(-1, (3, -1)), x.unflatten(-1, (3, -1))[:, :1], x[:, :32], x[:, 32:64]),
    "rotary with norm": lambda x, w: rotary(
        x.unflatten(-1, (3, -1)), x.unflatten(-1, (3, -1))[:, :1], x[:, :32], x[:, 32:64], q_norm=w[:37], k_norm=w[:37]
    ),
    "gated_activation": lambda x, w: gated_activation(x, x.flip(-1), kind="gelu"),
}
every_call = pytest.mark.parametrize("call", CALLS)


def outputs(call: str, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    out = CALLS[call](x, w)
    return out if isinstance(out, tuple) else (out,)


@every_dtype
@every_call
@pytest.mark.parametrize("backend", KERNELS)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(backend, call, dtype, use_backend):
    device = use_backend(backend)
    x, w = draw(70, 111, dtype=dtype, device=device), draw(111, dtype=dtype, device=device, seed=1)
    batch = outputs(call, x, w)
    for row in (0, 31, 69):
        for got, want in zip(outputs(call, x[row : row + 1].clone(), w.clone()), batch):
            assert torch.equal(got, want[row : row + 1])


@every_call
@pytest.mark.parametrize("backend", KERNELS)
def test_the_number_of_threads_changes_no_bit(backend, call, use_backend):
    device = use_backend(backend)
    x, w = draw(2000, 111, dtype=torch.bfloat16, device=device), draw(111, device=device, seed=1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(outputs(call, x, w))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@every_call
@every_backend
def test_a_non_finite_row_changes_no_other(backend, call, use_backend):
    device = use_backend(backend)
    x, w = draw(9, 111, device=device).clone(), draw(111, device=device, seed=1)
    want = outputs(call, x, w)
    x[4] = torch.nan
    others = torch.arange(9) != 4
    for got, before in zip(outputs(call, x, w), want):
        assert torch.equal(got[others], before[others]) and got[4].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@every_backend
def test_a_nan_of_any_payload_stays_one(backend, dtype, use_backend):
    device = use_backend(backend)
    x, bits = draw(3, 40, dtype=dtype, device=device), -1 if dtype == torch.float32 else 0x7FFF
    x[1, 7] = torch.tensor(bits, dtype=torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)
    nan = torch.full((3, 40), -1, dtype=torch.int32, device=device).view(torch.float32)
    gated = gated_activation(x, x, kind="gelu").isnan()
    assert gated.sum() == 1 and gated[1, 7]
    for gemma in (False, True):
        assert rms_norm(x, nan[0], eps=1e-6, gemma=gemma).isnan().all()
        assert rms_norm(x, None, eps=1e-6, gemma=gemma).isnan().all(1).tolist() == [False, True, False]
    assert rotary(x[:, None], x[:, None], nan, nan)[0].isnan().all()


@every_call
@every_backend
def test_empty_batches(backend, call, use_backend):
    device = use_backend(backend)
    w = draw(111, device=device)
    shapes = [out.shape[1:] for out in outputs(call, draw(1, 111, device=device), w)]
    assert [out.shape for out in outputs(call, draw(0, 111, device=device), w)] == [(0, *shape) for shape in shapes]


@every_backend
def test_leading_dimensions_are_kept(backend, use_backend):
    device = use_backend(backend)
    x, w = draw(2, 3, 40, device=device), draw(40, device=device)
    flat = x.reshape(6, 40)
    assert torch.equal(rms_norm(x, w, eps=1e-6), rms_norm(flat, w, eps=1e-6).view(2, 3, 40))
    assert torch.equal(rms_norm(x[0, 0], w, eps=1e-6), rms_norm(flat, w, eps=1e-6)[0])
    assert torch.equal(gated_activation(x, x, kind="silu"), gated_activation(flat, flat, kind="silu").view(2, 3, 40))


ONE = torch.ones(4, 8)
HEADS = torch.ones(4, 2, 8)
VALID = {
    rms_norm: {"x": ONE, "weight": ONE[0], "residual": ONE, "post_weight": ONE[0], "eps": 1e-6},
    rotary: {"q": HEADS, "k": HEADS, "cos": ONE, "sin": ONE},
    gated_activation: {"gate": ONE, "up": ONE, "kind": "silu"},
}
ERRORS = [
    (rms_norm, {"x": [1.0]}, TypeError, "Expected x to be a torch.Tensor, got list"),
    (rms_norm, {"x": ONE.int()}, TypeError, "Expected x to have dtype float64"),
    (rms_norm, {"x": ONE[0, 0]}, ValueError, "Expected x to be of shape (..., d)"),
    (rms_norm, {"x": torch.ones(8, 4).T}, ValueError, "Expected x.stride(-1) to be 1, got 4"),
    (rms_norm, {"weight": ONE[0, :7]}, ValueError, "Expected weight to have shape (8), got (7,)"),
    (rms_norm, {"residual": ONE[:3]}, ValueError, "Expected residual to have shape (4, 8), got (3, 8)"),
    (rms_norm, {"residual": ONE.half()}, TypeError, "Expected residual to have dtype torch.float32, that of the first"),
    (
        rms_norm,
        {"x": ONE.double(), "weight": None, "post_weight": None},
        TypeError,
        "Expected residual to have dtype torch.float64, that of the first",
    ),
    (rms_norm, {"residual": None}, ValueError, "Expected post_weight to be None without residual"),
    (rms_norm, {"eps": 0.0}, ValueError, "Expected eps to be finite and above 0, got 0.0"),
    (rms_norm, {"eps": "1"}, TypeError, "Expected eps to be a float, got str"),
    (rms_norm, {"weight": ONE[0].clone().requires_grad_()}, ValueError, "Expected weight not to require grad"),
    (rotary, {"q": ONE}, ValueError, "Expected q to be of shape (N, Hq, D)"),
    (rotary, {"k": HEADS[:3]}, ValueError, "Expected k to have shape (4, *, 8), got (3, 2, 8)"),
    (rotary, {"k": HEADS.half()}, TypeError, "Expected k to have dtype torch.float32, that of q, got torch.float16"),
    (rotary, {"k": None}, TypeError, "Expected k to be a torch.Tensor, got None"),
    (rotary, {"q": torch.ones(4, 8, 2).mT}, ValueError, "Expected q.stride(-1) to be 1, got 2"),
    (
        rotary,
        {"cos": torch.ones(4, 10)},
        ValueError,
        "Expected cos.size(1) to be even, at least 2 and at most q.size(2)",
    ),
    (rotary, {"cos": ONE[:, :5]}, ValueError, "Expected cos.size(1) to be even, at least 2"),
    (rotary, {"sin": ONE[:, :6]}, ValueError, "Expected sin to have shape (4, 8), got (4, 6)"),
    (rotary, {"q_norm": ONE[0, :4]}, ValueError, "Expected q_norm to have shape (8), got (4,)"),
    (
        rotary,
        {"q": HEADS.clone().requires_grad_()},
        ValueError,
        "Expected q not to require grad: rotary has no gradient",
    ),
    (gated_activation, {"kind": "relu"}, ValueError, 'Expected kind to be "silu", "gelu" or "gelu_tanh", got relu'),
    (gated_activation, {"up": ONE[:, :4]}, ValueError, "Expected up to have shape (4, 8), got (4, 4)"),
    (gated_activation, {"gate": ONE.clone().requires_grad_()}, ValueError, "Expected gate not to require grad"),
]


@pytest.mark.parametrize("op,change,kind,message", ERRORS, ids=[error[3][9:] for error in ERRORS])
def test_bad_input_names_the_argument(op, change, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        op(**(VALID[op] | change))


def registered(dtype=torch.float32, device="cpu") -> dict[str, tuple]:
    """The registered ops with arguments."""
    x, weight, residual, post = norm_inputs(5, 40, dtype, device)
    ops = torch.ops.rmfast
    q, k, cos, sin = rotary_inputs(5, 2, 1, 40, 32, dtype, device)
    return {
        "rms_norm": (ops.rms_norm, x, weight, None, None, 1e-6, False),
        "rms_norm with residual": (ops.rms_norm, x, weight, residual, post, 1e-6, True),
        "rotary": (ops.rotary, q, k, cos, sin, None, None, 1e-6, False),
        "rotary with norm": (ops.rotary, q, k, cos, sin, weight, post, 1e-6, True),
        "gated_activation": (ops.gated_activation, x, residual, reference.GELU),
    }


@pytest.mark.parametrize("case", registered())
def test_asking_a_registered_op_for_a_gradient_raises(case):
    op, x, *rest = registered()[case]
    out = op(x.clone().requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="has no gradient; call it under"):
        (out[0] if isinstance(out, tuple) else out).sum().backward()


@pytest.mark.parametrize("case", registered())
@every_backend
def test_opcheck(backend, case, use_backend):
    device = use_backend(backend)
    op, *args = registered(torch.bfloat16, device)[case]
    torch.library.opcheck(op.default, tuple(args))


@every_call
def test_compiles_without_a_graph_break(call):
    x, w = draw(9, 111).contiguous(), draw(111, seed=1).contiguous()

    def twice(x, w):
        return [out * 2 for out in outputs(call, x * 2, w)]

    got = torch.compile(twice, fullgraph=True, backend="aot_eager")(x, w)
    assert all(torch.equal(a, b) for a, b in zip(got, twice(x, w)))
