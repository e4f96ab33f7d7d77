"""The Triton token-wise kernels: against fp64 in the interpreter or on a GPU, else compiled ahead of time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", minversion="3.6")

import triton.language as tl  # noqa: E402

from rmfast.kernels.token_wise import reference  # noqa: E402
from rmfast.kernels.token_wise import triton as kernels  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="Triton needs a CUDA device, or TRITON_INTERPRET=1 for its interpreter",
)
# e^{-x} overflows for a gate far below 0, and 1 / infinity is the right answer.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Makes torch.empty return NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, dtype: torch.dtype, aligned: bool = True) -> Tensor:
    """Random numbers on the device, a slice of the columns of a buffer that is NaN elsewhere."""
    left = 16 if aligned else 3
    buffer = torch.full((*shape[:-1], (left + shape[-1] + 31) // 16 * 16), torch.nan, dtype=dtype)
    buffer[..., left : left + shape[-1]] = torch.randn(shape, dtype=torch.float64).to(dtype)
    return buffer.to(DEVICE)[..., left : left + shape[-1]]


def norm_inputs(rows: int, d: int, dtype) -> list[Tensor]:
    """x, weight, residual and post_weight."""
    return [draw(*shape, dtype=dtype) for shape in ((rows, d), (d,), (rows, d), (d,))]


def rotary_inputs(rows, heads, kv_heads, d, rotated, dtype, norm=True) -> list[Tensor | None]:
    fused = draw(rows, (heads + kv_heads) * d, dtype=dtype)
    q, k = (part.unflatten(1, (-1, d)) for part in fused.split([heads * d, kv_heads * d], 1))
    gains = [draw(d, dtype=dtype) if norm else None for _ in range(2)]
    return [q, k, draw(rows, rotated, dtype=dtype), draw(rows, rotated, dtype=dtype), *gains]


def check(name: str, *args) -> None:
    """At most twice the error of the eager reference in the same dtype, plus 4 roundings of the largest value."""
    got, eager = getattr(kernels, name)(*args), getattr(reference, name)(*args)
    truth = getattr(reference, name)(*(a.double() if isinstance(a, Tensor) else a for a in args))
    for value, other, true in zip(*(out if isinstance(out, tuple) else (out,) for out in (got, eager, truth))):
        assert value.dtype == other.dtype and value.shape == other.shape
        if value.numel():
            error, allowed = ((x.double() - true).abs().max() for x in (value, other))
            assert error <= 2 * allowed + 4 * torch.finfo(value.dtype).eps * true.abs().max(), (error, allowed)


@runs
@pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma"])
@every_dtype
def test_rms_norm_matches_the_truth(dtype, gemma):
    for rows, d in ((5, 1), (3, 40), (33, 64), (2, 576), (1, 1025), (1, 4096)):
        x, weight, residual, post = norm_inputs(rows, d, dtype)
        sums = [(x, weight, residual, None), (x, weight, residual, post)]
        for args in [(x, weight, None, None), (x, None, None, None), *sums]:
            check("rms_norm", *args, 1e-5, gemma)


@runs
@every_dtype
def test_eps_keeps_its_digits(dtype):
    """0.1 as an fp32 is off by 1.5e-8 of it, where all of a small row's norm is eps."""
    x, weight, _, _ = norm_inputs(3, 64, dtype)
    check("rms_norm", 1e-3 * x, weight, None, None, 0.1, False)
    q, k, cos, sin, *gains = rotary_inputs(3, 2, 1, 16, 16, dtype)
    check("rotary", 1e-3 * q, 1e-3 * k, cos, sin, *gains, 0.1, False)


@runs
@every_dtype
def test_rows_too_long_for_registers_are_normed_too(dtype):
    x, weight, residual, post = norm_inputs(2, kernels.MAX_ROW // 4 + 1, dtype)
    check("rms_norm", x, weight, residual, post, 1e-5, False)


@runs
@pytest.mark.parametrize("norm", ["", "llama", "gemma"])
@every_dtype
def test_rotary_matches_the_truth(dtype, norm):
    for shape in ((3, 9, 3, 64, 64), (2, 40, 1, 96, 64), (5, 3, 1, 15, 6), (2, 2, 0, 128, 128)):
        check("rotary", *rotary_inputs(*shape, dtype, bool(norm)), 1e-5, norm == "gemma")


@runs
@pytest.mark.parametrize("kind", reference.KINDS)
@every_dtype
def test_gated_activation_matches_the_truth(dtype, kind):
    for rows, m in ((5, 1), (3, 111), (2, 1536)):
        gate, up = (4 * draw(rows, 2 * m, dtype=dtype)).chunk(2, 1)
        check("gated_activation", gate, up, reference.KINDS[kind])


@triton.jit
def _not_rounded(p_gate, p_out, KIND: tl.constexpr, BD: tl.constexpr):
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    tl.store(p_out + o_d, kernels.activation_of_16_bits(tl.load(p_gate + o_d), KIND))


@runs
@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("dtype,bits,least", [(torch.bfloat16, 15, 3e-37), (torch.float16, 16, 2**-30)])
def test_every_gate_of_16_bits_before_its_result_is_rounded(dtype, bits, least, kind):
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    gate = torch.where(gate.isfinite(), gate, 0).float().to(DEVICE)  # the interpreter truncates to bf16
    got = torch.empty_like(gate)
    _not_rounded[(64,)](gate, got, reference.KINDS[kind], 1024, enable_fp_fusion=False)
    wide = gate.double()
    if kind == "gelu":  # torch's own cancels below 0
        want = wide * torch.erfc(wide * -(0.5**0.5)) / 2
    elif kind == "gelu_tanh":
        want = wide * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))
    else:
        want = wide * torch.sigmoid(wide)
    assert ((got.double() - want).abs() <= want.abs() * 2.0**-bits + least).all()


@runs
@pytest.mark.parametrize("kind", reference.KINDS)
def test_extreme_gates(kind):
    gate = torch.tensor([[-3e38, -1e4, -100.0, 0.0, 100.0, 1e4, torch.nan]], device=DEVICE)
    got = kernels.gated_activation(gate, torch.ones_like(gate), reference.KINDS[kind])[0]
    assert got[:4].abs().max() < 1e-36 and torch.equal(got[4:6], gate[0, 4:6]) and got[6].isnan()


@runs
@every_dtype
def test_a_row_has_the_same_bits_alone_unaligned_and_in_any_batch(dtype):
    x, weight, residual, post = norm_inputs(37, 96, dtype)
    y, total = kernels.rms_norm(x, weight, residual, post, 1e-6, False)
    other = draw(1, 96, dtype=dtype, aligned=False).copy_(x[30])
    alone = kernels.rms_norm(other, weight, residual[30:31], post, 1e-6, False)
    assert torch.equal(alone[0], y[30:31]) and torch.equal(alone[1], total[30:31])
    args = rotary_inputs(37, 9, 3, 64, 64, dtype)
    batch = kernels.rotary(*args, 1e-6, False)
    alone = kernels.rotary(*(a[30:31] for a in args[:4]), *args[4:], 1e-6, False)
    assert all(torch.equal(a, b[30:31]) for a, b in zip(alone, batch))


def matrix(dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def norm_call(dtype, d: int, residual: bool = True, post: bool = False, gemma: bool = False):
    gain = matrix(dtype, d)
    return lambda: kernels.rms_norm(
        matrix(dtype, 512, d), gain, matrix(dtype, 512, d) if residual else None, gain if post else None, 1e-6, gemma
    )


def rotary_call(dtype, d: int, rotated: int, norm: bool = False):
    gain = matrix(dtype, d) if norm else None
    table = matrix(dtype, 512, rotated)
    return lambda: kernels.rotary(
        matrix(dtype, 512, 32, d), matrix(dtype, 512, 8, d), table, table, gain, gain, 1e-6, False
    )


def gated_call(dtype, m: int, kind: int):
    return lambda: kernels.gated_activation(*matrix(dtype, 512, 2 * m).chunk(2, 1), kind)


BF16 = torch.bfloat16
CALLS = {
    "norm": norm_call(BF16, 576, residual=False),
    "norm, residual": norm_call(BF16, 4096),
    "norm, residual, post": norm_call(torch.float16, 3584, post=True, gemma=True),
    "norm, residual, post, longest": norm_call(BF16, 16384, post=True),
    "norm, residual, post, longest fp32": norm_call(torch.float32, 16384, post=True),
    "norm, residual, post, longest fp64": norm_call(torch.float64, 8192, post=True),
    "rotary": rotary_call(BF16, 64, 64),
    "rotary with norm": rotary_call(BF16, 128, 128, norm=True),
    "rotary with norm, partial": rotary_call(torch.float32, 256, 128, norm=True),
    "rotary with norm, fp64": rotary_call(torch.float64, 256, 128, norm=True),
    "silu": gated_call(BF16, 1536, reference.SILU),
    "gelu": gated_call(torch.float32, 14336, reference.GELU),
    "gelu_tanh": gated_call(torch.float16, 9216, reference.GELU_TANH),
    "gelu fp64": gated_call(torch.float64, 1536, reference.GELU),
}


@pytest.mark.skipif(INTERPRETED, reason="compiles kernels, so it needs a process without TRITON_INTERPRET=1")
@pytest.mark.parametrize("case", CALLS)
def test_kernels_compile_fit_and_do_not_spill(case, tmp_path):
    from aot import SHARED, build, launches

    seen = launches(CALLS[case])
    for capability in SHARED:
        for launch in seen:
            got = build(launch, capability, tmp_path)
            print(case, got)
            assert got.shared <= SHARED[capability], got
            assert got.spills == 0, got
            if "fp" not in case and "partial" not in case:
                assert "ld.global.v4.b32" in got.ptx, got
