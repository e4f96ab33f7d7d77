"""suffix_attention in CUDA C++ on a GPU; the emulator's claims about it are in test_cuda_emulated_suffix.py."""

from __future__ import annotations

import pytest
import test_suffix_attention as contract
import torch

import rmfast
from rmfast.backends import why_not
from rmfast.kernels.suffix_attention import cuda
from rmfast.ops import suffix_attention

CAUSE = why_not("suffix_attention", "cuda", "cuda") if torch.cuda.is_available() else "needs a CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(CAUSE is not None, reason=str(CAUSE))]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(
    autouse=True,
    params=["mma", pytest.param("wgmma", marks=pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0"))],
)
def cuda_backend(request, poisoned, monkeypatch):
    if request.param == "wgmma":
        run = lambda *args: cuda.forward(*args, wgmma=True)  # noqa: E731
        monkeypatch.setattr(rmfast.backends, "choose", lambda op, device, args: run)
        yield
    else:
        with rmfast.backend("cuda"):
            yield


@each_dtype
@pytest.mark.parametrize("case", contract.CASES)
def test_agrees_with_dense_attention(case, dtype):
    args = contract.CASES[case].inputs(dtype, device="cuda")
    contract.check(suffix_attention(*args), contract.case_bounds(case, "causal", dtype), dtype)


@each_dtype
@pytest.mark.parametrize("options", contract.OPTIONS)
def test_every_option_agrees_with_dense_attention(options, dtype):
    args = contract.CASES["prefixes"].inputs(dtype, device="cuda")
    got = suffix_attention(*args, **contract.given_to(args[0], options))
    contract.check(got, contract.case_bounds("prefixes", options, dtype), dtype)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_long_prefixes_at_every_width(d):
    case = contract.Case([1] * 40 + [300, 70, 5], [(3, 700)] * 41 + [(0, 64), (9, 900)], heads=8, kv_heads=2, d=d)
    args = case.inputs(torch.bfloat16, device="cuda")
    contract.check(suffix_attention(*args), contract.bounds(args, {}), torch.bfloat16)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_values_stay_in_their_suffix(bad):
    case = contract.CASES["nested prefixes"]
    want = suffix_attention(*case.inputs(torch.bfloat16, device="cuda"))
    args = case.inputs(torch.bfloat16, device="cuda")
    args[2][30] = bad
    got = suffix_attention(*args)
    others = torch.arange(70) != 30
    for a, b in zip(got, want):  # a tile that is done again may be so by another kernel
        torch.testing.assert_close(a[others], b[others], rtol=1e-2, atol=1e-2)
    assert not got[0][30].isfinite().all()


def test_the_same_call_gives_the_same_bits():
    args = contract.CASES["prefixes"].inputs(torch.bfloat16, device="cuda")
    first, second = suffix_attention(*args), suffix_attention(*args)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_captured_graph_replays_on_new_lengths():
    args = contract.CASES["prefixes"].inputs(torch.bfloat16, device="cuda")
    suffix_attention(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = suffix_attention(*args)[0]
    args[7].clamp_(max=2)
    graph.replay()
    assert torch.equal(out, suffix_attention(*args)[0])
