"""suffix_attention: every backend on this machine against dense masked attention in fp64."""

from __future__ import annotations

import functools
import itertools
import re
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
BACKENDS = backends_of("suffix_attention")


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
          scale=None, causal=True, softcap=None, window=None) -> tuple[Tensor, Tensor]:  # fmt: skip
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
            if q.dtype == torch.float64:
                results = extended(q[first:last, h], keys, values, factor, softcap, seen)
                out[first:last, h], lse[first:last, h] = results
                continue
            logits = q[first:last, h] @ keys.T * factor
            if softcap is not None:
                logits = softcap * (logits / softcap).tanh()
            logits = logits.masked_fill(~seen, -torch.inf)
            out[first:last, h] = logits.softmax(1) @ values
            lse[first:last, h] = logits.logsumexp(1)
    return out, lse


def extended(q, keys, values, scale, softcap, seen) -> tuple[Tensor, Tensor]:
    """Out (n, D) and lse (n,) of one head, in NumPy's long double, whose own error is below what fp64 shows."""
    q, keys, values = (x.numpy().astype(np.longdouble) for x in (q, keys, values))
    logits = q @ keys.T * scale
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    logits = np.where(seen.numpy(), logits, -np.inf)
    most = logits.max(1, keepdims=True)
    weights = np.exp(logits - most)
    total = weights.sum(1, keepdims=True)
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
        size = float(want.abs().max().clamp(min=1)) if want.numel() else 0.0
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
    return bounds(CASES[name].inputs(dtype), OPTIONS[options])


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
    check(suffix_attention(*args, **OPTIONS[options]), case_bounds("prefixes", options, dtype), dtype)


lengths = st.integers(0, 40) | st.sampled_from([1, 1, 63, 64, 65, 100])


@st.composite
def cases(draw) -> Case:
    lens = draw(st.lists(lengths, min_size=1, max_size=12))
    prefixes = st.tuples(st.sampled_from([0, 0, 7, 64]), lengths)
    kv_heads = draw(st.integers(1, 3))
    return Case(
        lens,
        draw(st.none() | st.lists(prefixes, min_size=len(lens), max_size=len(lens))),
        kv_heads * draw(st.integers(1, 5)),
        kv_heads,
        draw(st.sampled_from([8, 32, 40])),
        {
            "causal": draw(st.booleans()),
            "window": draw(st.none() | st.integers(1, 130)),
            "softcap": draw(st.sampled_from([None, None, 0.7, 30.0])),
            "scale": draw(st.sampled_from([None, 0.05, 1.3])),
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
    case = replace(CASES[name], options=OPTIONS[options])
    args = case.inputs(dtype, device=device)
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
    want = suffix_attention(q, k, v, whole, **OPTIONS[options])
    pool = [torch.cat([torch.full_like(x[:3], torch.nan), x]) for x in (k, v)]
    for lens in ([1] * (n - 1), [n - at for at in range(0, n, 7)], [n - 70] * 3 + [9] * 5, [20, 90, n - 1]):
        starts = [n - length for length in lens]  # where all keys are seen, suffixes that end where the text does
        if OPTIONS[options].get("causal", True):
            starts = [min(3 * s % (n - 1), start) for s, start in enumerate(starts)]
        rows = torch.cat([torch.arange(at, at + length) for at, length in zip(starts, lens)]).to(device)
        ends, at = (torch.tensor(x, device=device) for x in ([0, *itertools.accumulate(lens)], starts))
        got = suffix_attention(q[rows], k[rows], v[rows], ends, *pool, torch.full_like(at, 3), at, **OPTIONS[options])
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
    whole = suffix_attention(q, *rest, **OPTIONS[options])
    got = suffix_attention(q[asked], *rest, cu_queries=cu_queries, **OPTIONS[options])
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


def ok() -> dict:
    case = Case([3, 2], [(0, 4), (1, 2)])
    names = ("q", "k", "v", "cu_seqlens", "prefix_k", "prefix_v", "prefix_start", "prefix_len")
    return dict(zip(names, case.inputs()))


ERRORS = {
    "q is no tensor": ("q", [1.0], TypeError, "Expected q to be a torch.Tensor, got list"),
    "q of integers": ("q", torch.ones(5, 4, 32, dtype=torch.int32), TypeError, "Expected q to have dtype"),
    "q of two dimensions": ("q", torch.ones(5, 128), ValueError, "Expected q to be of shape (N, Hq, D)"),
    "odd head size": ("q", torch.ones(5, 4, 36), ValueError, "Expected q.size(2), the head size, to be a multiple"),
    "large head size": ("q", torch.ones(5, 4, 264), ValueError, "Expected q.size(2), the head size, to be"),
    "strided q": ("q", torch.ones(5, 4, 64)[..., ::2], ValueError, "Expected q.stride(-1) to be 1, got 2"),
    "strided k": ("k", torch.ones(5, 2, 64)[..., ::2], ValueError, "Expected k.stride(-1) to be 1, got 2"),
    "rows of k": ("k", torch.ones(4, 2, 32), ValueError, "Expected k to have shape (5, *, 32), got (4, 2, 32)"),
    "heads": (
        "k", torch.ones(5, 3, 32), ValueError, "the number of key heads, to be a divisor of the 4 heads of q",
    ),
    "dtype of v": ("v", torch.ones(5, 2, 32).half(), TypeError, "Expected v to have dtype torch.float32"),
    "float cu_seqlens": (
        "cu_seqlens", torch.ones(3), TypeError, "Expected cu_seqlens to have dtype int32 or int64",
    ),
    "no cu_seqlens": ("cu_seqlens", torch.ones(0, dtype=torch.int32), ValueError, "Expected cu_seqlens to be of"),
    "cu_seqlens starts late": ("cu_seqlens", torch.tensor([1, 3, 5]), ValueError, "Expected cu_seqlens[0] to be 0"),
    "cu_seqlens ends early": (
        "cu_seqlens", torch.tensor([0, 3, 4]), ValueError, "cu_seqlens[-1] to be 5, the rows",
    ),
    "cu_seqlens falls": (
        "cu_seqlens", torch.tensor([0, 6, 5]), ValueError, "cu_seqlens not to fall, got [6, 5] at 1",
    ),
    "float cu_queries": (
        "cu_queries", torch.ones(3), TypeError, "Expected cu_queries to have dtype int32 or int64",
    ),
    "cu_queries of more rows": (
        "cu_queries", torch.tensor([0, 1, 5]), ValueError, "to give suffix 1 at most its",
    ),
    "cu_queries ends early": (
        "cu_queries", torch.tensor([0, 1, 2]), ValueError, "cu_queries[-1] to be 5, the rows of q",
    ),
    "half a prefix": ("prefix_v", None, ValueError, "Expected prefix_v to be a tensor, as the other prefix"),
    "heads of the pool": (
        "prefix_k", torch.ones(9, 4, 32), ValueError, "Expected prefix_k to have shape (*, 2, 32)",
    ),
    "prefix_start of one": (
        "prefix_start", torch.tensor([0]), ValueError, "Expected prefix_start to be of shape (2,)",
    ),
    "prefix outside": (
        "prefix_len", torch.tensor([1, 99]), ValueError, "to stay in the 7 rows of prefix_k, got start 1",
    ),
    "prefix before": (
        "prefix_start", torch.tensor([-1, 0]), ValueError, "Expected prefix_start and prefix_len to stay",
    ),
    "negative length": (
        "prefix_len", torch.tensor([1, -1]), ValueError, "Expected prefix_start and prefix_len to stay",
    ),
    "scale": ("scale", 0.0, ValueError, "Expected scale to be finite and above 0, got 0.0"),
    "scale of text": ("scale", "1", TypeError, "Expected scale to be a float, got str"),
    "softcap": ("softcap", -1.0, ValueError, "Expected softcap to be finite and above 0, got -1.0"),
    "window": ("window", 0, ValueError, "Expected window to be at least 1, got 0"),
    "float window": ("window", 2.0, TypeError, "Expected window to be an int, got float"),
    "grad": ("k", torch.ones(5, 2, 32).requires_grad_(), ValueError, "Expected k not to require grad"),
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_bad_input_names_the_argument(error):
    argument, value, kind, message = ERRORS[error]
    with pytest.raises(kind, match=re.escape(message)):
        suffix_attention(**(ok() | {argument: value}))


def test_inputs_that_require_grad_are_fine_without_gradients():
    args = ok()
    want = suffix_attention(**args)
    args["q"] = args["q"].clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(suffix_attention(**args)[0], want[0])


def test_asking_the_registered_op_for_a_gradient_raises():
    args = list(ok().values())
    args[0] = args[0].clone().requires_grad_()
    out, _ = torch.ops.rmfast.suffix_attention(*args[:4], None, *args[4:], 1.0, True, 0.0, 0)
    with pytest.raises(RuntimeError, match="suffix_attention has no gradient"):
        out.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, use_backend):
    device = use_backend(backend)
    for case in (CASES["prefixes"], CASES["no prefix"]):
        args = case.inputs(torch.bfloat16, device=device)
        torch.library.opcheck(
            torch.ops.rmfast.suffix_attention.default, (*args[:4], None, *args[4:], 0.2, True, 3.0, 9)
        )
        cu_queries, asked = last_rows(case, device)
        torch.library.opcheck(
            torch.ops.rmfast.suffix_attention.default,
            (args[0][asked], *args[1:4], cu_queries, *args[4:], 0.2, True, 3.0, 9),
        )


def test_compiles_without_a_graph_break():
    def layer(q, *rest):
        out, lse = suffix_attention(q * 2, *rest, window=9)
        return out + lse[..., None]

    args = CASES["prefixes"].inputs()
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(got, layer(*args))
