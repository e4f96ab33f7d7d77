"""patch_rows: every backend against a plain gather, fp64 truth, the op rms_norm and transformers' own norms."""

from __future__ import annotations

import re

import pytest
import torch
from test_token_wise import assert_true, draw
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from ways import backends_of

from rmfast.kernels.patch_rows import reference
from rmfast.ops import patch_rows, rms_norm

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
SIZES = [(1, 1, 1, 1), (5, 2, 3, 3), (7, 3, 1, 40), (33, 4, 9, 111), (9, 6, 2, 576), (6, 3, 3, 1025)]  # n, B, V, d
BACKENDS = backends_of("patch_rows")
KERNELS = [param for param in BACKENDS if param.values[0][1] != "eager"]
WITH_RMS_NORM = [param for param in BACKENDS if param.values[0][1] != "cuda"]
ON_CUDA = [param for param in BACKENDS if param.values[0][0] == "cuda"] or [
    pytest.param(None, id="cuda", marks=pytest.mark.skip(reason="needs a CUDA device"))
]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_kernel = pytest.mark.parametrize("backend", KERNELS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
llama_and_gemma = pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma"])


def case(n: int, B: int, V: int, d: int, dtype=torch.float32, device="cpu") -> tuple[Tensor, ...]:
    """base, values, base_rows, value_rows and weight; the rows lie in buffers that are NaN elsewhere."""
    generator = torch.Generator().manual_seed(0)
    base, values = (draw(rows, d, dtype=dtype, device=device, seed=rows, scale=3) for rows in (B, V))
    base_rows = torch.randint(B, (n,), generator=generator).to(device)
    value_rows = torch.randint(-1, V, (n,), generator=generator).to(device)
    return base, values, base_rows, value_rows, draw(d, dtype=dtype, device=device, seed=2)


def gathered(base: Tensor, values: Tensor, base_rows: Tensor, value_rows: Tensor) -> Tensor:
    """The rows by a loop."""
    rows = [base[b] if v < 0 else values[v] for b, v in zip(base_rows.tolist(), value_rows.tolist())]
    return torch.stack(rows)


@llama_and_gemma
@every_dtype
@every_backend
def test_rows_are_copied_and_their_norm_agrees_with_fp64(backend, dtype, gemma, use_backend, poisoned):
    device = use_backend(backend)
    for sizes in SIZES:
        *rows, weight = case(*sizes, dtype, device)
        x, y = patch_rows(*rows, weight, eps=1e-5, gemma=gemma)
        want = gathered(*rows)
        assert x.is_contiguous() and torch.equal(x, want)
        eager = reference.rms_norm(want, weight, None, None, 1e-5, gemma)[0]
        assert_true(y, reference.rms_norm(want.double(), weight.double(), None, None, 1e-5, gemma)[0], eager)


@llama_and_gemma
@every_dtype
@pytest.mark.parametrize("backend", WITH_RMS_NORM)
def test_the_norm_has_the_bits_of_the_op_rms_norm(backend, dtype, gemma, use_backend):
    device = use_backend(backend)
    for sizes in SIZES:
        args = case(*sizes, dtype, device)
        x, y = patch_rows(*args, eps=1e-5, gemma=gemma)
        assert torch.equal(y, rms_norm(x, args[-1], eps=1e-5, gemma=gemma))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("module", [LlamaRMSNorm, Gemma2RMSNorm])
@every_backend
@torch.no_grad()
def test_the_norm_is_that_of_transformers(backend, module, dtype, use_backend):
    device = use_backend(backend)
    args = case(64, 9, 5, 576, dtype, device)
    norm = module(576).to(device, dtype)
    norm.weight.copy_(args[-1])
    x, y = patch_rows(*args, gemma=module is Gemma2RMSNorm)
    if dtype == torch.float32:
        torch.testing.assert_close(y, norm(x), rtol=2e-6, atol=2e-6)
    else:
        assert (y != norm(x)).float().mean() < 1e-3


@every_dtype
@every_backend
def test_copies_keep_every_bit(backend, dtype, use_backend):
    device = use_backend(backend)
    base, values, base_rows, value_rows, weight = case(50, 6, 4, 48, dtype, device)
    integer = INTEGERS[dtype.itemsize]
    bits = torch.arange(6 * 48, device=device) * 0x0101_0101_0101_0107 + 0x7FF0_0000_0000_0001
    base = (bits >> (64 - 8 * dtype.itemsize)).to(integer).view(dtype).view(6, 48)
    values = -base[:4]
    values[0, 0], values[1, :3] = torch.nan, torch.tensor([-0.0, torch.inf, -torch.inf], dtype=dtype, device=device)
    x, _ = patch_rows(base, values, base_rows, value_rows, weight)
    assert torch.equal(x.view(integer), gathered(base, values, base_rows, value_rows).view(integer))


@every_dtype
@every_kernel
def test_a_row_has_the_same_bits_alone_and_in_any_batch_and_alignment(backend, dtype, use_backend):
    device = use_backend(backend)
    for d in (111, 128, 4096):
        base, values, base_rows, value_rows, weight = case(70, 5, 3, d, dtype, device)
        _, y = patch_rows(base, values, base_rows, value_rows, weight)
        aligned = base.clone(), values.clone()
        assert torch.equal(patch_rows(*aligned, base_rows, value_rows, weight.clone())[1], y)
        for i in (0, 31, 69):
            alone = patch_rows(base, values, base_rows[i : i + 1], value_rows[i : i + 1], weight)
            assert torch.equal(alone[1], y[i : i + 1])


@every_kernel
def test_the_number_of_threads_changes_no_bit(backend, use_backend):
    device = use_backend(backend)
    args = case(2000, 20, 20, 111, torch.bfloat16, device)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(patch_rows(*args))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@every_dtype
@every_backend
def test_a_row_too_long_for_registers_is_normed_too(backend, dtype, use_backend):
    device = use_backend(backend)
    *rows, weight = case(3, 2, 2, 16385, dtype, device)
    for value in rows[:2]:
        value.round_()  # squares of integers add up exactly, in any order
    x, y = patch_rows(*rows, weight)
    want = gathered(*rows)
    eager = reference.rms_norm(want, weight, None, None, 1e-6, False)[0]
    assert torch.equal(x, want)
    assert_true(y, reference.rms_norm(want.double(), weight.double(), None, None, 1e-6, False)[0], eager)


@every_backend
def test_a_weight_of_another_dtype_leaves_the_dtype_of_the_rows(backend, use_backend):
    device = use_backend(backend)
    for d in (40, 111):
        *rows, weight = case(9, 5, 3, d, torch.bfloat16, device)
        want = patch_rows(*rows, weight)
        for dtype in DTYPES[:2]:
            got = patch_rows(*rows, weight.to(dtype))
            assert all(a.dtype == torch.bfloat16 and torch.equal(a, b) for a, b in zip(got, want))


@every_backend
def test_a_non_finite_row_changes_no_other(backend, use_backend):
    device = use_backend(backend)
    base, values, base_rows, value_rows, weight = case(40, 5, 3, 111, device=device)
    want = patch_rows(base, values, base_rows, value_rows, weight)
    values[1] = torch.nan
    bad = value_rows == 1
    assert bad.any()
    for got, before in zip(patch_rows(base, values, base_rows, value_rows, weight), want):
        assert torch.equal(got[~bad], before[~bad]) and got[bad].isnan().all()


@every_backend
def test_without_values_or_rows_or_both(backend, use_backend):
    device = use_backend(backend)
    base, values, base_rows, value_rows, weight = case(9, 5, 3, 40, device=device)
    none = torch.full_like(value_rows, -1)
    want = base[base_rows]
    for x, y in (
        patch_rows(base, values[:0], base_rows, none, weight),
        patch_rows(base, values, base_rows, none, weight),
    ):
        assert torch.equal(x, want) and y.isfinite().all()
    for kept in (values, values[:0]):
        x, y = patch_rows(base, kept, base_rows[:0], value_rows[:0], weight)
        assert x.shape == y.shape == (0, 40)
    x, _ = patch_rows(base[:0], values, base_rows[:0], value_rows[:0], weight)
    assert x.shape == (0, 40)


@every_backend
def test_rows_of_any_stride_are_read(backend, use_backend):
    device = use_backend(backend)
    base, values, base_rows, value_rows, weight = case(20, 5, 3, 48, torch.bfloat16, device)
    want = patch_rows(base, values, base_rows, value_rows, weight)
    turned = base.T.contiguous().T, values.T.contiguous().T  # their last dimension is not contiguous
    spread = torch.full((5, 3, 48), torch.nan, dtype=base.dtype, device=device)
    spread[:, 1] = base
    every_other = torch.stack((value_rows, base_rows), 1)[:, 0]
    for args in (
        (*turned, base_rows, value_rows),
        (spread[:, 1], values, base_rows, value_rows),
        (base, values, base_rows, every_other),
    ):
        assert all(torch.equal(a, b) for a, b in zip(patch_rows(*args, weight), want))
    one = patch_rows(base[:1].expand(5, -1), values, base_rows, value_rows, weight)
    assert torch.equal(one[0][value_rows < 0], base[:1].expand(int((value_rows < 0).sum()), -1))


# --------------------------------------------------------------------------------------------------- out of range


OUTSIDE = [("base_rows", -1), ("base_rows", 5), ("base_rows", 2**40), ("value_rows", -2), ("value_rows", 3)]


@pytest.mark.parametrize(("name", "index"), OUTSIDE)
@every_backend
def test_a_row_out_of_range_raises_on_the_cpu_and_gives_nan_on_cuda(backend, name, index, use_backend, monkeypatch):
    device = use_backend(backend)
    base, values, base_rows, value_rows, weight = case(9, 5, 3, 40, device=device)
    want = patch_rows(base, values, base_rows, value_rows, weight)
    {"base_rows": base_rows, "value_rows": value_rows}[name][4] = index
    limits = "[0, 5)" if name == "base_rows" else "[-1, 3)"
    if device == "cuda":
        others = torch.arange(9, device=device) != 4
        for got, before in zip(patch_rows(base, values, base_rows, value_rows, weight), want):
            assert torch.equal(got[others], before[others]) and got[4].isnan().all()
        monkeypatch.setenv("RMFAST_CHECK", "1")
    with pytest.raises(ValueError, match=re.escape(f"Expected {name} to be in {limits}, got {index}")):
        patch_rows(base, values, base_rows, value_rows, weight)


def check_nan_in_its_own_row_only(run) -> None:
    """`run` is a kernel that nothing checks for, with the signature of `reference.patch_rows`."""
    base_rows = torch.tensor([0, -1, 4, 5, 2, 2**40, 3, 0])
    value_rows = torch.tensor([-1, -1, 2, -1, 3, 0, -2, 0])
    bad = torch.tensor([False, True, False, True, True, True, True, False])
    for d in (40, 111):
        base, values, _, _, weight = case(8, 5, 3, d)
        want = gathered(base, values, base_rows.where(~bad, 0), value_rows.where(~bad, 0))
        x, y = run(base, values, base_rows, value_rows, weight, 1e-6, False)
        assert torch.equal(x[~bad], want[~bad]) and y[~bad].isfinite().all()
        assert x[bad].isnan().all() and y[bad].isnan().all()
    none = torch.tensor([-1, -1]), torch.tensor([-1, 0])
    x, y = run(base[:0], values[:0], torch.tensor([0, 0]), none[1], weight, 1e-6, False)
    assert x.isnan().all() and y.isnan().all()


def test_the_reference_gives_nan_where_nothing_is_checked():
    check_nan_in_its_own_row_only(reference.patch_rows)


@pytest.mark.parametrize("backend", ON_CUDA)
def test_a_captured_graph_replays_on_new_rows(backend, use_backend):
    """A synchronisation would end the capture."""
    device = use_backend(backend)
    base, values, base_rows, value_rows, weight = case(33, 5, 3, 576, torch.bfloat16, device)
    patch_rows(base, values, base_rows, value_rows, weight)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = patch_rows(base, values, base_rows, value_rows, weight)
    value_rows.copy_(value_rows.flip(0))
    base.mul_(-0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, patch_rows(base, values, base_rows, value_rows, weight)))


# --------------------------------------------------------------------------------------------------------- errors


ONE = torch.ones(4, 8)
ROWS = torch.zeros(3, dtype=torch.int64)
VALID = {"base": ONE, "values": ONE[:2], "base_rows": ROWS, "value_rows": ROWS, "weight": ONE[0]}
ERRORS = [
    ({"base": [1.0]}, TypeError, "Expected base to be a torch.Tensor, got list"),
    ({"weight": None}, TypeError, "Expected weight to be a torch.Tensor, got NoneType"),
    ({"base": ONE.int()}, TypeError, "Expected base to have dtype float64, float32, bfloat16 or float16, got"),
    ({"base": ONE[0]}, ValueError, "Expected base to be of shape (B, d) with d >= 1, got (8,)"),
    ({"base": ONE[:, :0]}, ValueError, "Expected base to be of shape (B, d) with d >= 1, got (4, 0)"),
    ({"values": ONE[:, :7]}, ValueError, "Expected values to have shape (*, 8), got (4, 7)"),
    ({"values": ONE.half()}, TypeError, "Expected values to have dtype torch.float32, that of base, got torch.float16"),
    ({"base_rows": ROWS.int()}, TypeError, "Expected base_rows to have dtype torch.int64, got torch.int32"),
    ({"base_rows": ROWS[None]}, ValueError, "Expected base_rows to have shape (*), got (1, 3)"),
    ({"value_rows": ROWS[:2]}, ValueError, "Expected value_rows to have shape (3), got (2,)"),
    ({"value_rows": ROWS.float()}, TypeError, "Expected value_rows to have dtype torch.int64, got torch.float32"),
    ({"values": ONE[:0]}, ValueError, "Expected value_rows to be in [-1, 0), got 0"),
    ({"base": ONE[:0]}, ValueError, "Expected base_rows to be in [0, 0), got 0"),
    ({"weight": ONE[0, :7]}, ValueError, "Expected weight to have shape (8), got (7,)"),
    ({"weight": ONE[0].to("meta")}, ValueError, "Expected weight.device to be that of the first argument, cpu"),
    ({"eps": 0.0}, ValueError, "Expected eps to be finite and above 0, got 0.0"),
    ({"eps": "1"}, TypeError, "Expected eps to be a float, got str"),
    ({"base": ONE.clone().requires_grad_()}, ValueError, "Expected base not to require grad: patch_rows has no"),
    ({"weight": ONE[0].clone().requires_grad_()}, ValueError, "Expected weight not to require grad: patch_rows has no"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS, ids=[error[2][9:] for error in ERRORS])
def test_bad_input_names_the_argument(change, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        patch_rows(**(VALID | change))


def test_asking_the_registered_op_for_a_gradient_raises():
    base, *rest = case(9, 5, 3, 40)
    x, _ = torch.ops.rmfast.patch_rows(base.clone().requires_grad_(), *rest, 1e-6, False)
    with pytest.raises(RuntimeError, match="patch_rows has no gradient; call it under"):
        x.sum().backward()


@llama_and_gemma
@every_backend
def test_opcheck(backend, gemma, use_backend):
    device = use_backend(backend)
    torch.library.opcheck(
        torch.ops.rmfast.patch_rows.default, (*case(9, 5, 3, 40, torch.bfloat16, device), 1e-6, gemma)
    )


@every_backend
def test_compiles_without_a_graph_break(backend, use_backend):
    device = use_backend(backend)
    args = case(9, 5, 3, 40, device=device)

    def twice(base, *rest):
        return [out * 2 for out in patch_rows(base * 2, *rest)]

    got = torch.compile(twice, fullgraph=True, backend="aot_eager")(*args)
    assert all(torch.equal(a, b) for a, b in zip(got, twice(*args)))
