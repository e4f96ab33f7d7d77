"""The Triton neuron statistics: the reference's bits in the interpreter or on a GPU, else compiled ahead of time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", minversion="3.6")

import rmfast  # noqa: E402
from rmfast.kernels.neuron_stats import triton as kernels  # noqa: E402
from rmfast.ops import neuron_stats  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="Triton needs a CUDA device, or TRITON_INTERPRET=1 for its interpreter",
)
# 0 / 0 of a constant neuron is computed before it is put aside.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def inputs(n: int, m: int, dtype) -> tuple[Tensor, Tensor]:
    """Neurons with and without ties inside a buffer that is NaN elsewhere, and two attributes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, m, generator=generator)
    x[:, ::2] = x[:, ::2].relu()
    buffer = torch.full((n + 1, m + 3), torch.nan, dtype=dtype)
    buffer[:n, 1 : m + 1] = x
    attributes = torch.stack([torch.arange(n).float(), torch.randint(0, 3, (n,), generator=generator).float()], 1)
    return buffer.to(DEVICE)[:n, 1 : m + 1], attributes.to(DEVICE)


def both(x: Tensor, attributes: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    with rmfast.backend("triton"):
        got = neuron_stats(x, attributes)
    with rmfast.backend("eager"):
        return got, neuron_stats(x, attributes)


@runs
@every_dtype
def test_bits_are_those_of_the_reference(dtype):
    for n, m in ((2, 3), (7, 70), (16, 5), (60, 2)):
        got, want = both(*inputs(n, m, dtype))
        assert all(torch.equal(a, b) for a, b in zip(got, want)), (n, m)


@runs
def test_long_columns():
    got, want = both(*inputs(513 if INTERPRETED else kernels.MAX_TEXTS, 1, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@runs
@every_dtype
def test_zeros_infinities_constants_and_nan(dtype):
    x, attributes = inputs(9, 5, dtype)
    x[:, 0], x[::2, 0] = 0.0, -0.0
    x[:2, 1], x[2, 1] = torch.inf, -torch.inf
    x[4, 2], x[5, 3] = torch.nan, -torch.nan
    attributes[:, 1] = 1
    (spearman, median), want = both(x, attributes)
    assert (spearman[0] == 0).all() and spearman[2:4].isnan().all() and median[2:4].isnan().all()
    assert torch.equal(spearman.nan_to_num(9), want[0].nan_to_num(9))
    assert torch.equal(median.nan_to_num(9), want[1].nan_to_num(9))


@runs
def test_columns_may_be_contiguous():
    x, attributes = inputs(20, 6, torch.float32)
    got, want = both(x.T.contiguous().T, attributes)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@runs
@pytest.mark.parametrize(
    "n,dtype,cause",
    [(kernels.MAX_TEXTS + 1, torch.float32, "at most 2048 texts"), (4, torch.float64, "float64 has 64")],
)
def test_what_it_cannot_sort_is_an_error_by_name_and_else_the_references(n, dtype, cause):
    x = torch.arange(n, dtype=dtype, device=DEVICE)[:, None]
    with rmfast.backend("triton"), pytest.raises(rmfast.BackendError, match=cause):
        neuron_stats(x, x)
    if DEVICE == "cuda":
        assert neuron_stats(x, x)[0].item() == 1


CALLS = {
    "few texts": (16, torch.float32),
    "500 texts": (500, torch.bfloat16),
    "longest": (kernels.MAX_TEXTS, torch.float32),
}


@pytest.mark.skipif(INTERPRETED, reason="compiles kernels, so it needs a process without TRITON_INTERPRET=1")
@pytest.mark.parametrize("case", CALLS)
def test_kernels_compile_fit_and_do_not_spill(case, tmp_path):
    from aot import SHARED, build, launches

    n, dtype = CALLS[case]
    x, ranks = torch.empty(n, 256, dtype=dtype), torch.empty(n, 5, dtype=torch.int32)
    call = lambda: kernels.neuron_stats(x, ranks, torch.empty(5, dtype=torch.float64))  # noqa: E731
    (launch,) = launches(call)
    for capability in SHARED:
        got = build(launch, capability, tmp_path)
        print(case, got)
        assert got.shared <= SHARED[capability], got
        assert got.spills == 0, got
