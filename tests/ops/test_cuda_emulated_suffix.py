"""suffix_attention's CUDA kernels run on the CPU by cuda_emulator: against dense attention in fp64, without a GPU."""

from __future__ import annotations

import ctypes

import pytest
import test_suffix_attention as contract
import torch

import rmfast
from rmfast.kernels.suffix_attention import cuda
from rmfast.ops import suffix_attention

TYPES = {torch.bfloat16: 2, torch.float16: 3}  # the emulator's `type`
each_dtype = pytest.mark.parametrize("dtype", TYPES, ids=str)


class Emulator:
    """The two native ops behind kernels/suffix_attention/cuda.py."""

    def __init__(self, library):
        self.library, self.made = library, 0

    def suffix_seen_keys(self, ends, asks, start, length, queries, keys, pool, causal, window):
        self.made += 1
        out = torch.full((queries, 8), -7, dtype=torch.int32)
        sizes = (ctypes.c_int64 * 5)(ends.numel() - 1, queries, keys, pool, window)
        given = (None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (ends, asks, start, length))
        assert self.library.emulate_seen(*given, sizes, causal, ctypes.c_void_p(out.data_ptr())) == 0
        return out

    def suffix_attention_seen(self, q, k, v, prefix_k, prefix_v, seen, scale, softcap, sinks, alibi):
        pool = (k, v) if prefix_k is None else (prefix_k, prefix_v)
        out, lse = torch.full(q.shape, torch.nan, dtype=q.dtype), torch.full(q.shape[:2], torch.nan)
        given = (q, k, v, *pool, seen, sinks, alibi)
        pointers = (ctypes.c_void_p * 8)(*(None if t is None else t.data_ptr() for t in given))
        strides = [step for t in (q, k, v, *pool) for step in t.stride()[:2]]
        sizes = (ctypes.c_int64 * 14)(*strides, q.size(0), q.size(1), k.size(1), q.size(2))
        log2e = 1.4426950408889634
        factors = (scale / softcap if softcap else scale * log2e, softcap * log2e)
        results = (ctypes.c_void_p(t.data_ptr()) for t in (out, lse))
        error = self.library.emulate(TYPES[q.dtype], pointers, sizes, *map(ctypes.c_float, factors), *results)
        assert error == 0, "a launch failed, or some thread left while others waited at a barrier"
        return out, lse


@pytest.fixture
def emulator(emulated, monkeypatch):
    made = Emulator(emulated("suffix_attention"))
    monkeypatch.setattr(torch.ops, "rmfast_native", made)

    def choose(op, device, args):
        assert cuda.refuses(*args) is None
        return cuda.forward

    monkeypatch.setattr(rmfast.backends, "choose", choose)
    return made


@each_dtype
@pytest.mark.parametrize("case", contract.CASES)
def test_agrees_with_dense_attention(case, dtype, emulator):
    args = contract.CASES[case].inputs(dtype)
    contract.check(suffix_attention(*args), contract.case_bounds(case, "causal", dtype), dtype)


@each_dtype
@pytest.mark.parametrize("options", contract.OPTIONS)
def test_every_option_agrees_with_dense_attention(options, dtype, emulator):
    args = contract.CASES["prefixes"].inputs(dtype)
    got = suffix_attention(*args, **contract.given_to(args[0], options))
    contract.check(got, contract.case_bounds("prefixes", options, dtype), dtype)


@pytest.mark.parametrize(
    ("d", "options"),
    [
        (64, "softcap and window"), (64, "sinks and alibi"), (64, "bidirectional window"), (128, "causal"),
        (128, "softcap"), (256, "causal"),
    ],
)  # fmt: skip
def test_prefixes_longer_than_a_tile_of_keys_at_every_width(d, options, emulator):
    # Suffixes in tiles of their own and shared ones; prefixes nested, interleaved, empty and far apart in the pool.
    prefixes = [(0, 200), (0, 131), (300, 90), (0, 200), (300, 64), (5, 0)]
    case = contract.Case([1, 1, 3, 50, 1, 9], prefixes, heads=3, kv_heads=1, d=d)
    args = case.inputs(torch.bfloat16)
    given = contract.given_to(args[0], options)
    got = suffix_attention(*args, **given)
    contract.check(got, contract.bounds(args, given), torch.bfloat16)


@pytest.mark.parametrize("options", ["causal", "window", "bidirectional", "sinks and alibi"])
def test_queries_of_a_suffix_s_last_rows_get_what_they_get_among_all(options, emulator):
    for name in ("prefixes", "short"):
        q, *rest = contract.CASES[name].inputs(torch.float16)
        cu_queries, asked = contract.last_rows(contract.CASES[name])
        given = contract.given_to(q, options)
        out, lse = suffix_attention(q, *rest, **given)
        got = suffix_attention(q[asked], *rest, cu_queries=cu_queries, **given)
        # In tiles with other rows, keys are added up in another order.
        torch.testing.assert_close(got[0], out[asked], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(got[1], lse[asked], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_values_stay_in_their_suffix(bad, emulator):
    case = contract.CASES["nested prefixes"]
    want = suffix_attention(*case.inputs(torch.bfloat16))
    for which in range(3):
        args = case.inputs(torch.bfloat16)
        args[which][30] = bad  # suffix 30's only row
        got = suffix_attention(*args)
        others = torch.arange(70) != 30
        assert all(torch.equal(a[others], b[others]) for a, b in zip(got, want)), which
        assert not got[0][30].isfinite().all()
    args = case.inputs(torch.bfloat16)
    args[5][5 + 40] = bad  # a prefix row that suffixes 41 to 69 see
    got = suffix_attention(*args)[0]
    assert torch.equal(got[:41], want[0][:41]) and not got[41:].isfinite().flatten(1).all(1).any()


def test_no_result_hangs_on_which_thread_is_first(emulator, monkeypatch):
    args = contract.CASES["prefixes"].inputs(torch.bfloat16)
    args[2][50] = torch.inf  # the tile is done twice
    results = []
    for order in range(4):
        monkeypatch.setenv("EMULATED_ORDER", str(order))
        results.append(suffix_attention(*args))
    for result in results[1:]:
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(result, results[0]))


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_large_logits_do_not_overflow(scale, emulator):
    out, lse = suffix_attention(*contract.CASES["prefixes"].inputs(torch.bfloat16), scale=scale)
    assert out.isfinite().all() and lse.isfinite().all()


def test_a_prefix_outside_of_its_pool_is_not_read(emulator, monkeypatch):
    monkeypatch.setattr("rmfast.ops._suffix_attention._check_values", lambda *args: None)  # as on CUDA
    args = contract.Case([3], [(0, 5)]).inputs(torch.bfloat16)
    args[7][0] = 1 << 30
    suffix_attention(*args)


def test_what_is_seen_is_worked_out_once_for_all_layers(emulator):
    args = [arg.contiguous() for arg in contract.CASES["prefixes"].inputs(torch.bfloat16)]
    want = suffix_attention(*args)[0]
    for _ in range(3):  # layers
        suffix_attention(*args)
        suffix_attention(*args, window=4)
    assert emulator.made == 2
    args[7].fill_(0)  # in place: other prefixes now
    assert not torch.equal(suffix_attention(*args)[0], want) and emulator.made == 3


def test_rows_that_16_byte_reads_do_not_take_are_refused_by_name():
    q, k, v, ends, *_ = contract.Case([4]).inputs(torch.bfloat16)
    rest = (ends, None, None, None)
    assert cuda.refuses(q, k, v, *rest) is None
    assert "takes bfloat16 and float16, got torch.float32" in cuda.refuses(q.float(), k.float(), v.float(), *rest)
    shifted = torch.empty(v.numel() + 1, dtype=v.dtype)[1:].view(v.shape)
    assert "rows of v do not all start" in cuda.refuses(q, k, shifted, *rest)
