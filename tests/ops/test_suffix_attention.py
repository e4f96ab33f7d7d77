"""suffix_attention: every backend on this machine against dense masked attention in fp64."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from ways import backends_of

import rmfast
from rmfast.ops import suffix_attention

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# CUDA C++ takes fewer dtypes and promises less of a row's bits: test_cuda_suffix_attention.py.
BACKENDS = [param for param in backends_of("suffix_attention") if param.values[0][1] != "cuda"]


@dataclass
class Case:
    """Suffixes of `lens` rows, each on `prefixes[s] = (start, length)` of one pool."""

    lens: list[int]
    prefixes: list[tuple[int, int]] | None = None
    heads: int = 4
    kv_heads: int = 2
    d: int = 32
    options: dict = field(default_factory=dict)

    def inputs(self, dtype=torch.float32, seed=0, device="cpu") -> list[Tensor | None]:
        """q, k and v as slices of one fused projection, NaN in every element that the op has no business to read."""
        generator = torch.Generator().manual_seed(seed)
        n, columns = sum(self.lens), (self.heads + 2 * self.kv_heads) * self.d
        fused = torch.full((n + 2, columns + 16), torch.nan, dtype=dtype)
        fused[1:-1, 8:-8] = torch.randn(n, columns, generator=generator, dtype=torch.float64).to(dtype)
        fused = fused.to(device)[1:-1, 8:-8]
        sizes = [heads * self.d for heads in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (part.unflatten(1, (-1, self.d)) for part in fused.split(sizes, 1))
        cu_seqlens = torch.tensor([0, *self.lens], device=device).cumsum(0).int()
        if self.prefixes is None:
            return [q, k, v, cu_seqlens, None, None, None, None]
        rows = max(start + length for start, length in self.prefixes) + 3
        pool = torch.full((2, rows, self.kv_heads, self.d + 8), torch.nan, dtype=dtype)
        content = torch.randn(2, rows, self.kv_heads, self.d, generator=generator, dtype=torch.float64).to(dtype)
        for start, length in self.prefixes:
            pool[:, start : start + length, :, : self.d] = content[:, start : start + length]
        pool = pool.to(device)[..., : self.d]
        start, length = torch.tensor(self.prefixes, device=device).unbind(1)
        return [q, k, v, cu_seqlens, pool[0], pool[1], start, length.int()]


def dense(q, k, v, cu_seqlens, prefix_k=None, prefix_v=None, prefix_start=None, prefix_len=None, *,
          scale=None, causal=True, softcap=None, window=None, sinks=None,
          alibi=None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One suffix and one head at a time, in the inputs' dtype; for fp64 in extended precision, rounded at the end."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=q.dtype)
    group, ends = q.size(1) // k.size(1), cu_seqlens.tolist()
    for s, (first, last) in enumerate(itertools.pairwise(ends)):
        if first == last:
            continue
        before = 0 if prefix_len is None else int(prefix_len[s])
        own, position = torch.arange(before, before + last - first)[:, None], torch.arange(before + last - first)
        seen = position <= own if causal else position >= own - len(position)
        if window is not None:
            seen &= position > own - window if causal else (position - own).abs() <= window
        for h in range(q.size(1)):
            keys, values = k[first:last, h // group], v[first:last, h // group]
            if before:
                rows = slice(int(prefix_start[s]), int(prefix_start[s]) + before)
                keys = torch.cat([prefix_k[rows, h // group], keys])
                values = torch.cat([prefix_v[rows, h // group], values])
            factor = q.size(2) ** -0.5 if scale is None else scale
            bias = torch.zeros(len(position), dtype=q.dtype) if alibi is None else alibi[h].to(q.dtype) * position
            sink = torch.tensor([-torch.inf if sinks is None else sinks[h]], dtype=q.dtype)
            if q.dtype == torch.float64:
                results = extended(q[first:last, h], keys, values, factor, softcap, bias, sink, seen)
                out[first:last, h], lse[first:last, h] = results
                continue
            logits = q[first:last, h] @ keys.T * factor
            if softcap is not None:
                logits = softcap * (logits / softcap).tanh()
            logits = (logits + bias).masked_fill(~seen, -torch.inf)
            logits = torch.cat([logits, sink.expand(len(logits), 1)], 1)
            out[first:last, h] = logits.softmax(1)[:, :-1] @ values
            lse[first:last, h] = logits.logsumexp(1)
    return out, lse


def extended(q, keys, values, scale, softcap, bias, sink, seen) -> tuple[Tensor, Tensor]:
    """Out (n, D) and lse (n,) of one head, in NumPy's long double, whose own error is below what fp64 shows."""
    q, keys, values, bias, sink = (x.numpy().astype(np.longdouble) for x in (q, keys, values, bias, sink))
    logits = q @ keys.T * scale
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    logits = np.where(seen.numpy(), logits + bias, -np.inf)
    most = np.maximum(logits.max(1, keepdims=True), sink)
    weights = np.exp(logits - most)
    total = weights.sum(1, keepdims=True) + np.exp(sink - most)
    return tuple(
        torch.from_numpy(x.astype(np.float64)) for x in (weights @ values / total, (most + np.log(total))[:, 0])
    )


def bounds(args: list, options: dict) -> list[tuple[Tensor, float]]:
    """The truth of out and lse, and how far from it each may be: twice the error of eager PyTorch in the same dtype
    (of fp32 for an lse kept in fp32), or a few roundings."""
    args = [None if a is None else a.cpu() for a in args]
    dtype = args[0].dtype
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    truth = dense(*cast(args, torch.float64), **options)
    eager = truth if dtype == torch.float64 else (dense(*args, **options)[0], dense(*cast(args, acc), **options)[1])
    limits = []
    for want, got, precision in zip(truth, eager, (dtype, acc)):
        # A key's bias counts from its query: sums are of logits up to slope · length, whatever is left of it.
        size = float(want.abs().max().clamp(min=8 if options.get("alibi") is not None else 1)) if want.numel() else 0.0
        error = float((got.double() - want).abs().max()) if want.numel() else 0.0
        limits.append((want, max(2 * error, (8 if precision == acc else 1) * torch.finfo(precision).eps * size)))
    return limits


def cast(args: list, dtype: torch.dtype) -> list:
    return [a.to(dtype) if a is not None and a.is_floating_point() else a for a in args]


def check(got: tuple[Tensor, Tensor], limits: list[tuple[Tensor, float]], dtype: torch.dtype) -> None:
    assert got[0].dtype == dtype and got[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for value, (want, limit) in zip(got, limits):
        assert value.shape == want.shape and value.is_contiguous()
        error = (value.cpu().double() - want).abs()
        assert (error <= limit).all(), f"{error.max():.2e} > {limit:.2e}"


@functools.cache
def case_bounds(name: str, options: str, dtype: torch.dtype) -> list[tuple[Tensor, float]]:
    args = CASES[name].inputs(dtype)
    return bounds(args, given_to(args[0], options))


def given_to(q: Tensor, options: str) -> dict:
    """Those of the name, for q's heads and on its device."""
    return {
        name: value[: q.size(1)].to(q.device) if isinstance(value, Tensor) else value
        for name, value in OPTIONS[options].items()
    }


# Of up to seven heads: a sink above all keys, one below; slopes as of Bloom's first heads, one of them to either side.
SINKS = torch.tensor([3.0, -2.0, 0.5, 9.0, -60.0, 0.0, 1.25])
SLOPES = torch.tensor([0.5, 0.3, -0.125, 0.01, 0.7, 0.25, 0.0])

RAGGED = [1, 5, 0, 66, 1, 1, 17, 2]
CASES = {
    "no prefix": Case(RAGGED),
    "one row": Case([1]),
    "one long": Case([150], heads=1, kv_heads=1),
    "short": Case([3] * 40, d=40),
    "one prefix": Case(RAGGED, [(2, 70)] * 8),
    "prefixes": Case(RAGGED, [(0, 64), (3, 65), (1, 7), (0, 3), (4, 0), (0, 64), (0, 1), (90, 129)]),
    "multi-query": Case([9, 20], [(0, 5), (5, 11)], heads=7, kv_heads=1),
    "multi-head": Case([9, 20], [(0, 5), (0, 11)], heads=3, kv_heads=3, d=80),
    "nested prefixes": Case([1] * 70, [(5, length) for length in range(70)], heads=6),
    "head size 96": Case([20, 3], [(0, 5), (0, 5)], heads=6, d=96),
    "head size 256": Case([20, 3], [(0, 5), (0, 5)], heads=2, kv_heads=1, d=256),
    "head size 8": Case([20, 3], [(0, 5), (0, 5)], heads=2, kv_heads=1, d=8),
}
OPTIONS = {
    "causal": {},
    "scale": {"scale": 0.4},
    "window": {"window": 6},
    "window 1": {"window": 1},
    "softcap": {"softcap": 1.5},
    "softcap and window": {"softcap": 3.0, "window": 70},
    "bidirectional": {"causal": False},
    "bidirectional window": {"causal": False, "window": 4},
    "sinks": {"sinks": SINKS},
    "sinks, softcap and window": {"sinks": SINKS, "softcap": 3.0, "window": 6},
    "alibi": {"alibi": SLOPES},
    "alibi, bidirectional": {"alibi": SLOPES, "causal": False, "softcap": 3.0},
    "sinks and alibi": {"sinks": SINKS, "alibi": SLOPES, "window": 70},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_dense_attention(backend, case, dtype, use_backend, poisoned):
    device = use_backend(backend)
    args = CASES[case].inputs(dtype, device=device)
    check(suffix_attention(*args), case_bounds(case, "causal", dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_agrees_with_dense_attention(backend, options, dtype, use_backend, poisoned):
    device = use_backend(backend)
    args = CASES["prefixes"].inputs(dtype, device=device)
    check(suffix_attention(*args, **given_to(args[0], options)), case_bounds("prefixes", options, dtype), dtype)


lengths = st.integers(0, 40) | st.sampled_from([1, 1, 63, 64, 65, 100])


@st.composite
def cases(draw) -> Case:
    lens = draw(st.lists(lengths, min_size=1, max_size=12))
    prefixes = st.tuples(st.sampled_from([0, 0, 7, 64]), lengths)
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 5))
    return Case(
        lens,
        draw(st.none() | st.lists(prefixes, min_size=len(lens), max_size=len(lens))),
        heads,
        kv_heads,
        draw(st.sampled_from([8, 32, 40])),
        {
            "causal": draw(st.booleans()),
            "window": draw(st.none() | st.integers(1, 130)),
            "softcap": draw(st.sampled_from([None, None, 0.7, 30.0])),
            "scale": draw(st.sampled_from([None, 0.05, 1.3])),
            "sinks": draw(st.sampled_from([None, torch.linspace(-3, 8, heads)])),
            "alibi": draw(st.sampled_from([None, torch.linspace(1, -0.3, heads)])),
        },
    )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_any_batch_agrees_with_the_eager_backend_in_fp64(backend, case, use_backend):
    """The eager backend itself is held to dense attention above; here it stands in for it, being faster."""
    device = use_backend(backend)
    args = case.inputs(torch.float64, device=device)
    with rmfast.backend("eager"):
        want = suffix_attention(*(None if a is None else a.cpu() for a in args), **case.options)
    for value, truth in zip(suffix_attention(*args, **case.options), want):
        torch.testing.assert_close(value.cpu(), truth, rtol=1e-11, atol=1e-11)


KERNELS = [param for param in BACKENDS if param.values[0][1] != "eager"]


def rows_of(case: Case, s: int) -> slice:
    first = sum(case.lens[:s])
    return slice(first, first + case.lens[s])


def alone(case: Case, args: list, s: int) -> tuple[Tensor, Tensor]:
    q, k, v, _, prefix_k, prefix_v, start, length = args
    rows = rows_of(case, s)
    own = [q[rows].clone(), k[rows].clone(), v[rows].clone(), torch.tensor([0, case.lens[s]], device=q.device)]
    pool = [None] * 4 if start is None else [prefix_k, prefix_v, start[s : s + 1], length[s : s + 1]]
    return suffix_attention(*own, *pool, **case.options)


def check_alone(name: str, options: str, dtype: torch.dtype, device: str) -> None:
    args = CASES[name].inputs(dtype, device=device)
    case = replace(CASES[name], options=given_to(args[0], options))
    out, lse = suffix_attention(*args, **case.options)
    for s in range(len(case.lens)):
        got = alone(case, args, s)
        assert torch.equal(got[0], out[rows_of(case, s)]) and torch.equal(got[1], lse[rows_of(case, s)]), (name, s)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_suffix_has_the_same_bits_alone_and_in_any_batch(backend, options, dtype, use_backend):
    device = use_backend(backend)
    for name in ("no prefix", "prefixes", "nested prefixes", "short", "multi-query"):
        check_alone(name, options, dtype, device)


def check_cuts(options: str, dtype: torch.dtype, device: str, n: int = 150, **shape: int) -> None:
    """Rows of a text as suffixes over prefixes of all lengths, all in one batch, have the bits that they have uncut."""
    text = Case([n], **{"heads": 6, "kv_heads": 2, "d": 40, **shape})
    q, k, v, whole, *_ = text.inputs(dtype, device=device)
    given = given_to(q, options)
    want = suffix_attention(q, k, v, whole, **given)
    pool = [torch.cat([torch.full_like(x[:3], torch.nan), x]) for x in (k, v)]
    for lens in ([1] * (n - 1), [n - at for at in range(0, n, 7)], [n - 70] * 3 + [9] * 5, [20, 90, n - 1]):
        starts = [n - length for length in lens]  # where all keys are seen, suffixes that end where the text does
        if given.get("causal", True):
            starts = [min(3 * s % (n - 1), start) for s, start in enumerate(starts)]
        rows = torch.cat([torch.arange(at, at + length) for at, length in zip(starts, lens)]).to(device)
        ends, at = (torch.tensor(x, device=device) for x in ([0, *itertools.accumulate(lens)], starts))
        got = suffix_attention(q[rows], k[rows], v[rows], ends, *pool, torch.full_like(at, 3), at, **given)
        assert torch.equal(got[0], want[0][rows]) and torch.equal(got[1], want[1][rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_row_has_the_same_bits_however_its_text_is_cut(backend, options, dtype, use_backend):
    check_cuts(options, dtype, use_backend(backend))


def last_rows(case: Case, device="cpu") -> tuple[Tensor, Tensor]:
    """cu_queries for one, two, no, one, two, ... last rows of each suffix, and their indices."""
    asks = [min(n, (s + 1) % 3) for s, n in enumerate(case.lens)]
    ends = torch.tensor(case.lens).cumsum(0).tolist()
    rows = [row for end, n in zip(ends, asks) for row in range(end - n, end)]
    return torch.tensor([0, *asks], device=device).cumsum(0), torch.tensor(rows, device=device)


def check_last_rows(case: str, options: str, device: str, tolerance: float) -> None:
    q, *rest = CASES[case].inputs(device=device)
    cu_queries, asked = last_rows(CASES[case], device)
    given = given_to(q, options)
    whole = suffix_attention(q, *rest, **given)
    got = suffix_attention(q[asked], *rest, cu_queries=cu_queries, **given)
    for part, all_of_it in zip(got, whole):
        torch.testing.assert_close(part, all_of_it[asked], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_of_a_suffix_s_last_rows_get_what_they_get_among_all(backend, options, use_backend, poisoned):
    # Matmuls of another size add in another order in BLAS, which the eager backend alone goes through.
    tolerance = 1e-5 if "eager" in backend else 0
    for case in ("prefixes", "no prefix", "short", "nested prefixes"):
        check_last_rows(case, options, use_backend(backend), tolerance)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_number_of_threads_changes_no_bit(backend, use_backend):
    device = use_backend(backend)
    case = Case([300, 1, 40, 170], [(0, 40), (0, 90), (3, 20), (0, 0)], heads=6)
    args = case.inputs(torch.bfloat16, device=device)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(suffix_attention(*args))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_count_the_same_as_prefix_and_as_own_rows(backend, use_backend):
    device = use_backend(backend)
    whole = Case([100])
    q, k, v, *_ = whole.inputs(device=device)
    want = suffix_attention(q, k, v, torch.tensor([0, 100], device=device), window=50)
    for cut in (1, 64, 70, 99):
        ends, zero = torch.tensor([0, 100 - cut], device=device), torch.tensor([0], device=device)
        got = suffix_attention(q[cut:], k[cut:], v[cut:], ends, k, v, zero, zero + cut, window=50)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b[cut:], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_values_stay_in_their_suffix(backend, bad, use_backend):
    device = use_backend(backend)
    case = CASES["nested prefixes"]
    args = case.inputs(device=device)
    want = suffix_attention(*args)
    for which in range(3):
        args = case.inputs(device=device)
        args[which][30] = bad  # suffix 30's only row
        got = suffix_attention(*args)
        others = torch.arange(70) != 30
        assert all(torch.equal(a[others], b[others]) for a, b in zip(got, want))
        assert not got[0][30].isfinite().all()
    args = case.inputs(device=device)
    args[5][5 + 40] = bad  # a prefix row that suffixes 41 to 69 see
    got = suffix_attention(*args)[0]
    assert torch.equal(got[:41], want[0][:41]) and not got[41:].isfinite().flatten(1).all(1).any()


@pytest.mark.parametrize("backend", [param for param in KERNELS if param.values[0][1] == "cpp"])
def test_non_finite_values_stay_behind_the_causal_mask(backend, use_backend):
    use_backend(backend)
    args = Case([100]).inputs()
    want = suffix_attention(*args)[0]
    args[2][70] = torch.nan
    got = suffix_attention(*args)[0]
    assert torch.equal(got[:70], want[:70]) and got[70:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend, use_backend):
    device = use_backend(backend)
    args = CASES["prefixes"].inputs(torch.float32, device=device)
    for scale in (1e3, 1e30):
        out, lse = suffix_attention(*args, scale=scale)
        assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_is_a_key_without_a_value(backend, use_backend):
    """Written as the models do: its logit beside the keys', and its share of the softmax left out."""
    device = use_backend(backend)
    q, k, v, ends, *_ = Case([30]).inputs(torch.float64, device=device)
    sinks = SINKS[:4].double().to(device)
    out, lse = suffix_attention(q, k, v, ends, sinks=sinks)
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q, keys) * 32**-0.5
    logits = logits.masked_fill(torch.ones(30, 30, device=device).triu(1).bool(), -torch.inf)
    logits = torch.cat([logits, sinks[:, None, None].expand(4, 30, 1)], -1)
    torch.testing.assert_close(out, torch.einsum("hqk,khd->qhd", logits.softmax(-1)[..., :-1], values))
    torch.testing.assert_close(lse, logits.logsumexp(-1).T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_of_minus_infinity_is_none(backend, use_backend):
    device = use_backend(backend)
    args = CASES["prefixes"].inputs(device=device)
    want = suffix_attention(*args)
    got = suffix_attention(*args, sinks=torch.full((4,), -torch.inf, device=device))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slopes_at_far_positions_lose_nothing(backend, use_backend):
    """A slope of 0.7 at position 5,000 is a logit of 3,500, of which fp32 has steps of 2e-4: counted from the query."""
    device = use_backend(backend)
    q, k, v, ends, *_ = Case([5000], heads=1, kv_heads=1, d=8).inputs(device=device)
    asked, slope = torch.tensor([0, 1], device=device), torch.tensor([0.7], device=device)
    out, _ = suffix_attention(q[-1:], k, v, ends, cu_queries=asked, alibi=slope)
    bias = 0.7 * torch.arange(-4999, 1, dtype=torch.float64)
    logits = k[:, 0].cpu().double() @ q[-1, 0].cpu().double() * 8**-0.5 + bias
    torch.testing.assert_close(
        out[0, 0].cpu().double(), logits.softmax(0) @ v[:, 0].cpu().double(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches(backend, use_backend):
    device = use_backend(backend)
    for lens in ([], [0], [0, 0, 0]):
        args = Case(lens, [(0, 4)] * len(lens) or None).inputs(device=device)
        out, lse = suffix_attention(*args)
        assert out.shape == (0, 4, 32) and lse.shape == (0, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_may_be_transposed_and_keys_expanded(backend, use_backend):
    device = use_backend(backend)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, 20, 32, generator=generator).to(device).transpose(0, 1)
    k = torch.randn(20, 1, 32, generator=generator).to(device).expand(20, 4, 32)
    args = [q, k, k, torch.tensor([0, 20], device=device)]
    check(suffix_attention(*args), bounds(args, {}), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, use_backend):
    device = use_backend(backend)
    for case in (CASES["prefixes"], CASES["no prefix"]):
        args = case.inputs(torch.bfloat16, device=device)
        torch.library.opcheck(
            torch.ops.rmfast.suffix_attention.default,
            (*args[:4], None, *args[4:], 0.2, True, 3.0, 9, SINKS[:4].to(device), SLOPES[:4].to(device)),
        )
        cu_queries, asked = last_rows(case, device)
        torch.library.opcheck(
            torch.ops.rmfast.suffix_attention.default,
            (args[0][asked], *args[1:4], cu_queries, *args[4:], 0.2, True, 3.0, 9),
        )


def test_compiles_without_a_graph_break():
    def layer(q, *rest):
        out, lse = suffix_attention(q * 2, *rest, window=9, sinks=SINKS[:4], alibi=SLOPES[:4])
        return out + lse[..., None]

    args = CASES["prefixes"].inputs()
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(got, layer(*args))
