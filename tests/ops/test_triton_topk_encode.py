"""The Triton top-k encoder: against the reference in the interpreter or on a GPU, else compiled ahead of time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", minversion="3.6")

import rmfast  # noqa: E402
from rmfast.kernels.topk_encode import triton as kernels  # noqa: E402
from rmfast.ops import topk_encode  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="Triton needs a CUDA device, or TRITON_INTERPRET=1 for its interpreter",
)
# Infinity times 0 is computed before NaN is put aside.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def inputs(n: int, d: int, features: int, dtype, ties: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W, b and b_dec inside buffers that are NaN elsewhere; with ties small integers, whose products are exact."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for shape in ((n, d), (d, features), (1, features), (1, d)):
        x = torch.randn(shape, generator=generator)
        buffer = torch.full((shape[0] + 1, shape[1] + 3), torch.nan, dtype=dtype)
        buffer[: shape[0], 1 : shape[1] + 1] = x.round() if ties else x
        out.append(buffer.to(DEVICE)[: shape[0], 1 : shape[1] + 1])
    return out[0], out[1], out[2][0], out[3][0]


def both(x, weight, bias, k, b_dec=None, relu=False) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    with rmfast.backend("triton"):
        got = topk_encode(x, weight, bias, k, b_dec=b_dec, relu=relu)
    with rmfast.backend("eager"):
        return got, topk_encode(x, weight, bias, k, b_dec=b_dec, relu=relu)


@runs
@every_dtype
def test_agrees_with_the_reference(dtype):
    for n, d, features, k in ((3, 5, 7, 7), (130, 33, 300, 32), (5, 8, 600, 200)):
        x, weight, bias, b_dec = inputs(n, d, features, dtype, ties=False)
        got, want = both(x, weight, bias, k, b_dec)
        torch.testing.assert_close(got[0], want[0], rtol=2e-6, atol=2e-5)
        assert (got[1] == want[1]).float().mean() > 0.99  # neighbours that differ by a rounding may change places


@runs
@every_dtype
def test_ties_go_to_the_lowest_index(dtype):
    for n, d, features, k in ((2, 3, 130, 1), (66, 20, 333, 20)):
        x, weight, bias, b_dec = inputs(n, d, features, dtype, ties=True)
        for w in (weight, weight.T.contiguous().T):
            got, want = both(x, w, bias, k, b_dec, relu=True)
            assert all(torch.equal(a, b) for a, b in zip(got, want))


@runs
def test_zeros_infinities_and_nan():
    row = [0.0, -0.0, 1.0, torch.nan, -torch.inf, torch.inf, -1.0, torch.nan, 1.0]
    x = torch.ones(1, 1, device=DEVICE)
    for k in (2, 9):
        got, want = both(x, torch.tensor([row], device=DEVICE), None, k)
        assert torch.equal(got[1], want[1]) and torch.equal(got[0].nan_to_num(9), want[0].nan_to_num(9))


@runs
def test_bits_depend_neither_on_other_rows_nor_on_the_split():
    x, weight, bias, _ = inputs(70, 40, 500, torch.float32, ties=False)
    with rmfast.backend("triton"):
        values, indices = topk_encode(x, weight, bias, 16)
        alone = topk_encode(x[69:], weight, bias, 16)
    assert torch.equal(alone[0][0], values[69]) and torch.equal(alone[1][0], indices[69])


@runs
@pytest.mark.parametrize(
    "k,dtype,cause",
    [(kernels.MAX_K + 1, torch.float32, "at most 256 words"), (4, torch.float64, "float64 has 64")],
)
def test_what_it_cannot_hold_is_an_error_by_name_and_else_the_references(k, dtype, cause):
    x, weight = torch.ones(2, 1, dtype=dtype, device=DEVICE), torch.arange(300.0, dtype=dtype, device=DEVICE)[None]
    with rmfast.backend("triton"), pytest.raises(rmfast.BackendError, match=cause):
        topk_encode(x, weight, None, k)
    if DEVICE == "cuda":
        assert topk_encode(x, weight, None, k)[1][0, 0].item() == 299


# N, d, F, k, dtype, and whether W is given as W.T of (F, d)
CALLS = {
    "bf16": (512, 2048, 16384, 32, torch.bfloat16, False),
    "bf16 by feature, k 64": (512, 4096, 32768, 64, torch.bfloat16, True),
    "bf16 odd": (512, 1001, 5001, 64, torch.bfloat16, False),
    "fp16 by feature": (512, 2048, 16384, 20, torch.float16, True),
    "bf16 k 64": (512, 4096, 32768, 64, torch.bfloat16, False),
    "fp16 k 100": (512, 2048, 16384, 100, torch.float16, False),
    "bf16, longest": (512, 2048, 16384, kernels.MAX_K, torch.bfloat16, False),
    "fp32": (512, 2048, 16384, 32, torch.float32, False),
    "fp32 by feature, longest": (512, 2048, 16384, kernels.MAX_K, torch.float32, True),
    "fp32 odd": (512, 1001, 5001, 32, torch.float32, False),
}


@pytest.mark.skipif(INTERPRETED, reason="compiles kernels, so it needs a process without TRITON_INTERPRET=1")
@pytest.mark.parametrize("case", CALLS)
def test_kernels_compile_fit_and_do_not_spill(case, tmp_path):
    from aot import SHARED, build, launches

    n, d, features, k, dtype, by_feature = CALLS[case]
    weight = torch.empty(features, d, dtype=dtype).T if by_feature else torch.empty(d, features, dtype=dtype)
    x, bias = torch.empty(n, d, dtype=dtype), torch.empty(features)
    for capability in SHARED:
        (launch,) = launches(lambda: kernels.topk_encode(x, weight, bias, k, None, True), capability)
        got = build(launch, capability, tmp_path)
        print(case, got)
        assert got.shared <= SHARED[capability], got
        assert got.spills == 0, got
