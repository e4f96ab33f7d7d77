"""suffix_attention in Triton: in the interpreter against dense attention, and compiled for GPUs that need not be here.

On a GPU the kernel runs in test_suffix_attention.py, among the other backends.
"""

from __future__ import annotations

import pytest
import test_suffix_attention as contract
import torch

import rmfast
from rmfast.ops import suffix_attention

triton = pytest.importorskip("triton", minversion="3.6")
INTERPRETED = triton.knobs.runtime.interpret
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1, in a process of its own")
compiled = pytest.mark.skipif(INTERPRETED, reason="compiles kernels, so it needs a process without TRITON_INTERPRET=1")
every_dtype = pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)


@pytest.fixture
def on_triton():
    with rmfast.backend("triton"):
        yield


@interpreted
@pytest.mark.parametrize("case", [case for case in contract.CASES if case not in ("short", "nested prefixes")])
def test_agrees_with_dense_attention(case, on_triton, poisoned):
    args = contract.CASES[case].inputs()
    contract.check(suffix_attention(*args), contract.case_bounds(case, "causal", torch.float32), torch.float32)


@interpreted
@every_dtype
@pytest.mark.parametrize("options", contract.OPTIONS)
def test_every_option_agrees_with_dense_attention(options, dtype, on_triton, poisoned):
    args = contract.CASES["prefixes"].inputs(dtype)
    got = suffix_attention(*args, **contract.given_to(args[0], options))
    contract.check(got, contract.case_bounds("prefixes", options, dtype), dtype)


@interpreted
@pytest.mark.parametrize("options", contract.OPTIONS)
def test_a_suffix_has_the_same_bits_alone_and_in_any_batch(options, on_triton):
    contract.check_alone("prefixes", options, torch.float32, "cpu")


@interpreted
@pytest.mark.parametrize("options", contract.OPTIONS)
def test_a_row_has_the_same_bits_however_its_text_is_cut(options, on_triton):
    # Four blocks of keys, the last one ragged, and longer than any window; each program costs the interpreter 0.1 s.
    contract.check_cuts(options, torch.float32, "cpu", 100, heads=3, kv_heads=1, d=24)


@interpreted
@pytest.mark.parametrize("options", contract.OPTIONS)
def test_queries_of_a_suffix_s_last_rows_get_what_they_get_among_all(options, on_triton, poisoned):
    contract.check_last_rows("prefixes", options, "cpu", 0)


@interpreted
def test_non_finite_values_stay_in_their_suffix(on_triton):
    args = contract.Case([1, 3, 1], [(0, 4), (0, 3), (0, 4)]).inputs()
    want = suffix_attention(*args)[0]
    args[2][2] = torch.nan
    got = suffix_attention(*args)[0]
    assert torch.equal(got[[0, 4]], want[[0, 4]]) and got[2].isnan().all()


# (dtype, head size, causal, softcap, window), the last ones with sinks and slopes
LAUNCHES = {
    "bf16 64": (torch.bfloat16, 64, True, 0.0, 0),
    "bf16 64 bidirectional window": (torch.bfloat16, 64, False, 0.0, 64),
    "bf16 80": (torch.bfloat16, 80, True, 0.0, 0),
    "fp16 128 window": (torch.float16, 128, True, 0.0, 4096),
    "bf16 256 softcap window": (torch.bfloat16, 256, True, 50.0, 4096),
    "fp32 64 softcap": (torch.float32, 64, True, 50.0, 0),
    "fp32 128": (torch.float32, 128, True, 0.0, 0),
    "fp32 256 softcap window": (torch.float32, 256, True, 50.0, 4096),
    "fp64 128": (torch.float64, 128, True, 0.0, 0),
    "bf16 64 sinks window": (torch.bfloat16, 64, True, 0.0, 128, "sinks"),
    "bf16 128 alibi": (torch.bfloat16, 128, True, 0.0, 0, "alibi"),
    "fp32 64 sinks alibi": (torch.float32, 64, True, 0.0, 0, "sinks", "alibi"),
}


@compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_kernels_compile_fit_and_do_not_spill(launch, capability, tmp_path):
    from aot import SHARED, build, launches

    from rmfast.kernels.suffix_attention import triton as kernels

    dtype, d, causal, softcap, window, *heads = LAUNCHES[launch]
    q, k, v, cu_seqlens, *pool = contract.Case([3, 200], [(0, 5), (0, 64)], 8, 2, d).inputs(dtype)
    given = {name: torch.ones(8) for name in heads}
    call = lambda: kernels.forward(  # noqa: E731
        q, k, v, cu_seqlens, None, *pool, d**-0.5, causal, softcap, window, **given
    )
    got = build(*launches(call, capability), capability, tmp_path)
    print(launch, got)
    assert got.shared <= SHARED[capability], got
    # ptxas spends two slots of stack in fp64, which is there for tests, at half of the registers.
    assert got.spills <= (2 if dtype == torch.float64 else 0), got
    if dtype != torch.float64:
        assert "mma" in got.ptx, got  # tensor cores
        assert "cp.async.cg" in got.ptx or "ld.global.v4" in got.ptx, got  # reads of 16 bytes
