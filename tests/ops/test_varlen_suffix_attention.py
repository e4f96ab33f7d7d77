"""suffix_attention by two calls of torch's varlen_attn: packing and merge on the CPU, where only the kernel below
varlen_attn is replaced by what it computes; and on a GPU."""

from __future__ import annotations

import inspect

import models
import pytest
import test_suffix_attention as contract
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from varlen_on_cpu import varlen_on_cpu

import rmfast
from rmfast import backends
from rmfast.kernels.suffix_attention import reference, varlen
from rmfast.ops import suffix_attention

CAUSE = backends.why_not("suffix_attention", "varlen", "cuda") if torch.cuda.is_available() else "needs a CUDA device"
ON_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(CAUSE is not None, reason=f"varlen_attn: {CAUSE}")]
)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
TAKEN = {
    name: options for name, options in contract.OPTIONS.items() if not {"softcap", "sinks", "alibi"} & set(options)
}


@pytest.fixture(params=["cpu", ON_GPU])
def device(request, poisoned, monkeypatch):
    if request.param == "cpu":
        missing = backends._missing
        monkeypatch.setattr(backends, "_missing", lambda *of: None if of[1] == "varlen" else missing(*of))
        with varlen_on_cpu(), rmfast.backend("varlen"):
            yield "cpu"
    else:
        with rmfast.backend("varlen"):
            yield "cuda"


@each_dtype
@pytest.mark.parametrize("case", [name for name in contract.CASES if name != "nested prefixes"])
def test_agrees_with_dense_attention(case, dtype, device):
    args = contract.CASES[case].inputs(dtype, device=device)
    contract.check(suffix_attention(*args), contract.case_bounds(case, "causal", dtype), dtype)


@each_dtype
@pytest.mark.parametrize("options", TAKEN)
@pytest.mark.parametrize("case", ["prefixes", "no prefix"])
def test_every_option_agrees_with_dense_attention_or_is_refused(case, options, dtype, device):
    args = contract.CASES[case].inputs(dtype, device=device)
    if case == "prefixes" and "window" in TAKEN[options]:
        with pytest.raises(rmfast.BackendError, match="a window ends at another key of the prefix"):
            suffix_attention(*args, **TAKEN[options])
        return
    limits = contract.case_bounds(case, options, dtype)
    contract.check(suffix_attention(*args, **TAKEN[options]), limits, dtype)


def test_a_window_over_the_whole_of_every_text_is_none(device):
    args = contract.CASES["prefixes"].inputs(torch.bfloat16, device=device)
    want = suffix_attention(*args)
    longest = 66 + 65  # rows and prefix of a suffix
    assert all(map(torch.equal, suffix_attention(*args, window=longest), want))
    with pytest.raises(rmfast.BackendError, match="a window"):
        suffix_attention(*args, window=longest - 1)
    args = contract.CASES["no prefix"].inputs(torch.bfloat16, device=device)
    for window in (65, 66):  # of 66 rows: all keys of the last row but one, and all
        got = suffix_attention(*args, window=window)
        contract.check(got, contract.bounds(args, {"window": window}), torch.bfloat16)


@pytest.mark.parametrize("options", ["causal", "bidirectional", "window"])
def test_queries_of_a_suffix_s_last_rows_get_what_they_get_among_all(options, device):
    for name in ("no prefix", "short") if options == "window" else ("prefixes", "one prefix", "no prefix"):
        q, *rest = contract.CASES[name].inputs(torch.float16, device=device)
        cu_queries, asked = (x.to(device) for x in contract.last_rows(contract.CASES[name]))
        out, lse = suffix_attention(q, *rest, **TAKEN[options])
        got = suffix_attention(q[asked], *rest, cu_queries=cu_queries, **TAKEN[options])
        torch.testing.assert_close(got[0], out[asked], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(got[1], lse[asked], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_long_prefixes_at_every_width(d, device):
    prefixes = [(3, 700)] * 41 + [(0, 64), (9, 900)]
    case = contract.Case([1] * 40 + [300, 70, 5], prefixes, heads=8, kv_heads=2, d=d)
    args = case.inputs(torch.bfloat16, device=device)
    contract.check(suffix_attention(*args), contract.bounds(args, {}), torch.bfloat16)


def test_permuted_heads_come_back_contiguous(device):
    q, k, v, *rest = contract.CASES["one prefix"].inputs(torch.bfloat16, device=device)
    want = suffix_attention(q, k, v, *rest)
    permuted = q.transpose(0, 1).contiguous().transpose(0, 1)
    for got, same in zip(suffix_attention(permuted, k, v, *rest), want):
        assert got.is_contiguous() and torch.equal(got, same)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_values_stay_in_their_suffix(bad, device):
    case = contract.CASES["one prefix"]
    want = suffix_attention(*case.inputs(torch.bfloat16, device=device))
    for which in range(3):
        args = case.inputs(torch.bfloat16, device=device)
        args[which][3] = bad  # of suffix 1, rows 1 to 5
        got = suffix_attention(*args)
        others = torch.cat([torch.tensor([0]), torch.arange(6, len(want[0]))])
        assert all(torch.equal(a[others], b[others]) for a, b in zip(got, want)), which
        assert not got[0][3].isfinite().all()


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_large_logits_do_not_overflow(scale, device):
    out, lse = suffix_attention(*contract.CASES["prefixes"].inputs(torch.bfloat16, device=device), scale=scale)
    assert out.isfinite().all() and lse.isfinite().all()


def test_lengths_are_read_once_for_all_layers_and_anew_when_they_change(device, monkeypatch):
    made, plan = [], varlen._plan
    monkeypatch.setattr(varlen, "_plan", lambda *args: made.append(1) or plan(*args))
    args = [arg.contiguous() for arg in contract.CASES["prefixes"].inputs(torch.bfloat16, device=device)]
    want = suffix_attention(*args)[0]
    for _ in range(3):
        assert torch.equal(suffix_attention(*args)[0], want)
    assert len(made) == 1
    args[7].fill_(0)
    assert not torch.equal(suffix_attention(*args)[0], want) and len(made) == 2


# What follows needs no GPU: it is about packing, merge and choice alone.


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=contract.cases(), last=st.booleans())
def test_any_batch_is_packed_and_merged_right(case, last, poisoned):
    """In fp64, which the kernel takes here, so that a row at a wrong place or with a wrong share shows."""
    q, k, v, cu_seqlens, *pool = case.inputs(torch.float64)
    cu_queries = None
    if last:
        cu_queries, asked = contract.last_rows(case)
        q = q[asked.long()]  # of none: floats
    if not len(q):
        return
    plan = varlen._planned(cu_seqlens, cu_queries, pool[0], *pool[2:])
    window = case.options["window"] or 0
    if plan.shared is not None and window < plan.longest:
        window = 0  # refused
    args = (q, k, v, cu_seqlens, cu_queries, *pool, case.options["scale"] or 0.2, case.options["causal"], 0.0, window)
    with varlen_on_cpu():
        got = varlen.forward(*args)
    for value, want in zip(got, reference.forward(*args)):
        torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-12)
        assert value.is_contiguous()


def planned(lens: list[int], prefixes: list[tuple[int, int]], asks: list[int] | None = None) -> varlen._Plan:
    ends = torch.tensor([0, *lens]).cumsum(0)
    start, length = torch.tensor(prefixes).unbind(1)
    cu_queries = None if asks is None else torch.tensor([0, *asks]).cumsum(0)
    return varlen._planned(ends, cu_queries, torch.empty(200, 1, 8), start.contiguous(), length.contiguous())


def test_rows_on_one_prefix_are_one_sequence():
    plan = planned([3, 2, 4, 1], [(0, 10), (10, 5), (0, 10), (7, 0)])
    assert plan.shared.cu_q.tolist() == [0, 7, 9] and plan.shared.cu_k.tolist() == [0, 10, 15]
    assert plan.shared.rows.tolist() == [0, 1, 2, 5, 6, 7, 8, 3, 4]
    assert (plan.shared.max_q, plan.shared.max_k, plan.own.max_q, plan.longest) == (7, 10, 4, 14)


def test_stretches_end_to_end_are_read_where_they_lie_and_others_copied():
    joined = planned([3, 2], [(20, 10), (30, 5)]).shared
    assert joined.keys == slice(20, 35) and joined.rows is None and joined.copies == 0
    apart = planned([3, 2], [(20, 3), (40, 2)]).shared
    assert apart.keys.tolist() == [20, 21, 22, 40, 41] and apart.copies == 5


def test_suffixes_that_ask_nothing_bring_no_prefix():
    shared = planned([3, 2], [(0, 10), (10, 5)], asks=[0, 1]).shared
    assert shared.cu_k.tolist() == [0, 5] and shared.keys == slice(10, 15) and shared.rows is None
    assert planned([3], [(0, 10)], asks=[0]).shared is None


def test_a_prefix_outside_of_its_pool_is_an_error():
    with pytest.raises(ValueError, match="in the 200 rows of prefix_k"):
        planned([3], [(190, 11)])


def refusal(q: torch.Tensor | None = None, case: str = "prefixes", **options: object) -> str | None:
    given = {"scale": 0.1, "causal": True, "softcap": 0.0, "window": 0, "sinks": None, "alibi": None} | options
    args = contract.CASES[case].inputs(torch.bfloat16)
    q = args[0] if q is None else q
    return varlen.refuses(q, *(x.to(q.dtype) for x in args[1:3]), args[3], None, *args[4:], *given.values())


def test_what_two_calls_cannot_do_is_refused_by_name():
    assert refusal() is None
    assert refusal(softcap=30.0) == "varlen_attn has no softcap"
    assert refusal(sinks=torch.zeros(4)) == "varlen_attn has no sinks"
    assert refusal(alibi=torch.zeros(4)) == "varlen_attn has no alibi"
    assert "a window" in refusal(window=6) and refusal(case="no prefix", window=6) is None
    assert "got torch.float32" in refusal(contract.CASES["prefixes"].inputs()[0])
    assert refusal(case="nested prefixes") == "it would copy 2415 rows of prefixes that overlap in a pool of 77"


def test_a_log_sum_exp_of_another_layout_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(varlen, "_shape_of_lse", lambda: (3, 2))
    assert "gives (3, 2) as log-sum-exp" in refusal()


def test_torch_s_own_function_is_what_is_called_here():
    """(heads, rows) is what the kernel gives in 2.11 to 2.13, against the documentation; names are those since 2.11."""
    taken = inspect.signature(varlen.varlen_attn).parameters
    first = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert list(taken)[:7] == first and {"return_aux", "scale", "window_size"} <= set(taken)
    assert ("enable_gqa" in taken) == bool(varlen._GQA)
    assert varlen._shape_of_lse() == (2, 3) and backends._varlen_missing() is None


def test_the_arguments_of_2_11_do(monkeypatch):
    called, gqa = varlen.varlen_attn, varlen._GQA

    def of_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        args = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
        return called(*args, return_aux=return_aux, scale=scale, window_size=window_size, **gqa)

    args = contract.CASES["prefixes"].inputs(torch.float64)
    args = (*args[:4], None, *args[4:], 0.2, True, 0.0, 0)
    monkeypatch.setattr(varlen, "varlen_attn", of_2_11)
    monkeypatch.setattr(varlen, "_GQA", {})
    with varlen_on_cpu():
        got = varlen.forward(*args)
    for value, want in zip(got, reference.forward(*args)):
        torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-12)


def test_a_torch_whose_varlen_attn_takes_no_scale_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, is_causal=False, return_aux=None: None)
    assert "takes no scale or window; fix: pip install 'torch>=2.11'" in backends._varlen_missing.__wrapped__()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Choices as on a machine with a GPU."""
    monkeypatch.setattr(backends, "_missing", lambda op, name, device: None if name in backends._ops[op] else "none")
    backends._default.cache_clear()
    yield
    backends._default.cache_clear()


def test_it_runs_only_if_asked_for_and_explain_says_so(on_a_gpu):
    assert backends.runs("suffix_attention", "cuda") == "triton"
    (choice,) = rmfast.explain("suffix_attention", "cuda")
    assert choice.runs == "triton" and "no GPU has measured" in choice.why_not["varlen"]
    with rmfast.backend("varlen"):
        (choice,) = rmfast.explain("suffix_attention", "cuda")
        assert choice.runs == "varlen" and "varlen" not in choice.why_not
        assert backends.runs("rms_norm", "cuda") == "triton"
        assert "varlen" not in str(rmfast.explain("rms_norm", "cuda"))


def test_on_a_cpu_it_is_refused_by_name():
    with rmfast.backend("varlen"), pytest.raises(rmfast.BackendError, match="varlen kernels run on cuda tensors"):
        suffix_attention(*contract.CASES["prefixes"].inputs(torch.bfloat16))


def test_a_refused_call_goes_on_where_the_table_had_it_first_and_is_an_error_where_it_was_asked_for(
    on_a_gpu, monkeypatch
):
    monkeypatch.setattr(backends, "_PREFERENCE", {"cpu": ("varlen", "eager")})
    args = contract.CASES["prefixes"].inputs(torch.bfloat16)
    with varlen_on_cpu():
        got = suffix_attention(*args, softcap=1.5)
        with rmfast.backend("varlen"), pytest.raises(rmfast.BackendError, match="varlen_attn has no softcap"):
            suffix_attention(*args, softcap=1.5)
    with rmfast.backend("eager"):
        assert all(map(torch.equal, got, suffix_attention(*args, softcap=1.5)))


def test_a_model_is_scored_with_it_in_attention_alone(monkeypatch):
    rm = rmfast.RewardModel(models.decoder("llama").to(torch.bfloat16), compute="native")  # in fp32 it is refused
    shared = models.token_ids([30])[0]
    texts = [shared + ids for ids in models.token_ids([5, 9, 1, 30], 4)] + models.token_ids([7, 12], 5)
    want, missing, asked = rm.score(texts), backends._missing, []
    monkeypatch.setattr(backends, "_missing", lambda *of: None if of[1] == "varlen" else missing(*of))
    forward = varlen.forward
    monkeypatch.setattr(varlen, "forward", lambda *args: asked.append(args) or forward(*args))
    backends._ops["suffix_attention"]["varlen"].cache_clear()
    try:
        with varlen_on_cpu(), rmfast.backend("varlen"):
            got = rm.score(texts)
    finally:
        backends._ops["suffix_attention"]["varlen"].cache_clear()
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert asked and any(args[8].any() for args in asked)  # prefixes
