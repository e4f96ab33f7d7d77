"""topk_encode: every backend against the formula in float64, and its order of equal values, NaN and rounding."""

from __future__ import annotations

import platform
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from ways import backends_of

import rmfast
from rmfast import backends
from rmfast.ops import _topk_encode as op
from rmfast.ops import topk_encode

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# N, d, F, k: one feature, k = F, k beyond a tile of the C++ backend, tiles that end within a vector
SIZES = [(1, 1, 1, 1), (3, 5, 7, 7), (17, 33, 1025, 32), (2, 8, 2100, 2050), (5, 64, 5003, 70)]
BACKENDS = backends_of("topk_encode")
CPP = [param for param in BACKENDS if param.values[0][1] == "cpp"]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def use(use_backend):
    """As `use_backend`, but without a choice where the one of Triton is an error: the eager reference runs."""

    def choose(backend, dtype=torch.float32, k=1):
        device, name, isa = backend
        return use_backend((device, None if name == "triton" and (dtype == torch.float64 or k > 256) else name, isa))

    return choose


def normal(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def whole(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0) -> Tensor:
    """Small integers: products that are exact in every dtype, many of them equal."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def inputs(n: int, d: int, features: int, dtype, device="cpu", draw=normal) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W, b and b_dec."""
    shapes = (n, d), (d, features), (features,), (d,)
    return tuple(draw(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(shapes))


def truth(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, b_dec: Tensor | None) -> tuple[Tensor, Tensor]:
    """By the definition in float64, equal values in the order of their indices; x − b_dec as rounded to x's dtype."""
    x = x if b_dec is None else x - b_dec
    pre = x.double() @ weight.double() + (0 if bias is None else bias.double())
    values, indices = pre.sort(dim=1, descending=True, stable=True)
    return values[:, :k].relu(), indices[:, :k]


@every_dtype
@every_backend
def test_agrees_with_the_formula(backend, dtype, use, poisoned):
    for n, d, features, k in SIZES:
        device = use(backend, dtype, k)
        x, weight, bias, b_dec = inputs(n, d, features, dtype, device)
        values, indices = topk_encode(x, weight, bias, k, b_dec=b_dec)
        assert values.dtype == (dtype if dtype == torch.float64 else torch.float32) and indices.dtype == torch.int64
        pre = (x - b_dec).double() @ weight.double() + bias.double()
        scale = float(pre.abs().max())
        # A bf16 product may be rounded once; all else is exact but for sums in fp32.
        atol = {torch.float64: 1e-13, torch.bfloat16: 2**-8}.get(dtype, 2e-6) * scale
        torch.testing.assert_close(values.double(), pre.gather(1, indices).relu(), rtol=0, atol=atol)
        want = truth(x, weight, bias, k, b_dec)[0]
        torch.testing.assert_close(values.double(), want, rtol=0, atol=atol)
        assert (values.diff(dim=1) <= 0).all() and all(len(set(row)) == k for row in indices.tolist())


@every_dtype
@every_backend
def test_equal_values_stand_in_the_order_of_their_indices(backend, dtype, use):
    for n, d, features, k in SIZES:
        device = use(backend, dtype, k)
        x, weight, bias, b_dec = inputs(n, d, features, dtype, device, whole)
        for args in ((bias, k, b_dec), (None, k, None)):
            values, indices = topk_encode(x, weight, args[0], k, b_dec=args[2])
            want = truth(x, weight, *args)
            assert torch.equal(values.double(), want[0]) and torch.equal(indices, want[1])


@every_dtype
@every_backend
def test_zeros_are_equal_infinities_are_values_and_nan_is_above_all(backend, dtype, use):
    device = use(backend, dtype)
    row = [0.0, -0.0, 1.0, torch.nan, -torch.inf, torch.inf, -1.0, torch.nan, 1.0, -0.0]
    weight = torch.tensor([row], dtype=dtype, device=device)
    x = torch.ones(2, 1, dtype=dtype, device=device)
    values, indices = topk_encode(x, weight, None, 10, relu=False)
    assert indices[1].tolist() == [3, 7, 5, 2, 8, 0, 1, 9, 6, 4]
    ordered = [torch.nan, torch.nan, torch.inf, 1.0, 1.0, 0.0, 0.0, 0.0, -1.0, -torch.inf]
    assert torch.equal(values[0].nan_to_num(9), torch.tensor(ordered, dtype=values.dtype, device=device).nan_to_num(9))
    assert topk_encode(x, weight, None, 2)[1][0].tolist() == [3, 7]


@every_backend
def test_a_row_with_nan_is_nan_and_no_other(backend, use):
    device = use(backend)
    x, weight, bias, _ = inputs(5, 16, 3000, torch.float32, device)
    want = topk_encode(x, weight, bias, 9)
    x[2, 3] = torch.nan
    values, indices = topk_encode(x, weight, bias, 9)
    assert values[2].isnan().all() and indices[2].tolist() == list(range(9))
    others = [0, 1, 3, 4]
    assert torch.equal(values[others], want[0][others]) and torch.equal(indices[others], want[1][others])


@pytest.mark.parametrize("order", ["up", "down", "same"])
@every_backend
def test_ordered_features(backend, order, use):
    device = use(backend)
    row = {"up": torch.arange(6000.0), "down": -torch.arange(6000.0), "same": torch.ones(6000)}[order].to(device)
    x = torch.ones(2, 1, device=device)
    for k in (1, 32, 100):
        values, indices = topk_encode(x, row[None], None, k, relu=False)
        want = row.sort(descending=True, stable=True)
        assert torch.equal(values[1], want.values[:k]) and torch.equal(indices[1], want.indices[:k])


@every_backend
def test_relu_changes_values_alone(backend, use):
    device = use(backend)
    x, weight, bias, _ = inputs(4, 8, 50, torch.float32, device)
    with_relu, without = topk_encode(x, weight, bias, 40), topk_encode(x, weight, bias, 40, relu=False)
    assert (without[0] < 0).any()
    assert torch.equal(with_relu[0], without[0].relu()) and torch.equal(with_relu[1], without[1])


@every_dtype
@every_backend
def test_views_of_any_strides(backend, dtype, use):
    device = use(backend, dtype)
    x, weight, bias, b_dec = inputs(9, 40, 600, dtype, device, whole)
    want = topk_encode(x, weight, bias, 8, b_dec=b_dec)
    around = torch.full((11, 50), torch.nan, dtype=dtype, device=device)
    around[1:10, 3:43] = x
    steps = torch.full((80, 1800), torch.nan, dtype=dtype, device=device)
    steps[::2, ::3] = weight
    inside = torch.full((42, 611), torch.nan, dtype=dtype, device=device)
    inside[1:41, 5:605] = weight
    rows = around[1:10, 3:43], x.T.contiguous().T
    for some in rows:
        for w in (weight, weight.T.contiguous().T, steps[::2, ::3], inside[1:41, 5:605]):
            got = topk_encode(some, w, bias.expand(2, -1).T.contiguous()[:, 0], 8, b_dec=b_dec)
            assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("pays", [True, False], ids=["own matmul", "fp32 matmul"])
@pytest.mark.parametrize("backend", CPP)
def test_many_rows_take_several_blocks(backend, pays, use, monkeypatch):
    use(backend)
    monkeypatch.setattr(backends, "bf16_matmul_pays", lambda: pays)
    monkeypatch.setattr(op, "_ROWS", 40)
    monkeypatch.setattr(op, "_FEATURES", 16)
    monkeypatch.setattr(op, "_WIDENED_ROWS", 40)
    monkeypatch.setattr(op, "_WIDENED_FEATURES", 16)
    monkeypatch.setattr(op, "_TRANSPOSE_ROWS", 4)
    for dtype in DTYPES:
        x, weight, bias, b_dec = inputs(43, 100, 300, dtype, draw=whole)
        for w in (weight, weight.T.contiguous().T):
            values, indices = topk_encode(x, w, bias, 33, b_dec=b_dec)
            want = truth(x, weight, bias, 33, b_dec)
            assert torch.equal(values.double(), want[0]) and torch.equal(indices, want[1])


@pytest.mark.parametrize("pays, error", [(True, 2**-8), (False, 1e-6)], ids=["own matmul", "fp32 matmul"])
@pytest.mark.parametrize("backend", CPP)
def test_bf16_products_are_rounded_only_where_the_cpu_s_bf16_matmul_is_the_faster_one(
    backend, pays, error, use, monkeypatch
):
    use(backend)
    monkeypatch.setattr(backends, "bf16_matmul_pays", lambda: pays)
    for n, d, features, k in (*SIZES, (7, 64, 500, 20)):
        x, weight, bias, b_dec = inputs(n, d, features, torch.bfloat16)
        for w in (weight, weight.T.contiguous().T):
            values, indices = topk_encode(x, w, bias, k, b_dec=b_dec)
            pre = (x - b_dec).double() @ weight.double() + bias.double()
            for want in (pre.gather(1, indices).relu(), truth(x, weight, bias, k, b_dec)[0]):
                torch.testing.assert_close(values.double(), want, rtol=0, atol=error * float(pre.abs().max()))


def test_which_matmul_pays_is_a_property_of_the_cpu(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    ask = backends.bf16_matmul_pays.__wrapped__
    assert ask() in (True, False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert ask() == (platform.machine() == "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not ask()


@pytest.mark.parametrize("backend", CPP)
def test_16_bit_weights_are_transposed(backend, use):
    use(backend)
    for d, n in ((1, 1), (3, 130), (64, 128), (67, 1100)):
        x = normal(d, n + 5, dtype=torch.bfloat16)[:, 2 : n + 2]
        out = torch.full((n, d), torch.nan, dtype=torch.bfloat16)
        torch.ops.rmfast_native.transpose_16_(out, x)
        assert torch.equal(out, x.T)


@every_backend
def test_no_rows(backend, use):
    device = use(backend)
    values, indices = topk_encode(torch.empty(0, 5, device=device), torch.ones(5, 9, device=device), None, 4)
    assert values.shape == indices.shape == (0, 4)


@every_backend
def test_no_inputs_are_all_bias(backend, use):
    device = use(backend)
    bias = torch.tensor([1.0, 3.0, 2.0], device=device)
    values, indices = topk_encode(torch.empty(2, 0, device=device), torch.empty(0, 3, device=device), bias, 2)
    assert values.tolist() == [[3, 2]] * 2 and indices.tolist() == [[1, 2]] * 2


MEMORY = """
import resource, torch
from rmfast.ops import topk_encode
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
x, weight = torch.randn(8192, 32), torch.randn(32, 16384)
topk_encode(x[:64], weight[:, :64].contiguous(), None, 32)
before = peak()
topk_encode(x, weight, None, 32)
print((peak() - before) / (8192 * 16384 * 4))
"""


@pytest.mark.parametrize("backend", CPP[:1])
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory in KiB")
def test_memory_is_less_than_a_tenth_of_all_features(backend, use):
    use(backend)
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.1


X, W = torch.ones(4, 6), torch.ones(6, 10)
ERRORS = [
    ({"x": [1.0]}, TypeError, "Expected x to be a torch.Tensor, got list"),
    ({"x": X.int()}, TypeError, "Expected x to have dtype float64"),
    ({"x": X[0]}, ValueError, "Expected x to be of shape (N, d), got (6,)"),
    ({"x": X.clone().requires_grad_()}, ValueError, "Expected x not to require grad: topk_encode has no gradient"),
    ({"weight": None}, TypeError, "Expected weight to be a torch.Tensor, got NoneType"),
    ({"weight": W.T}, ValueError, "Expected weight to have shape (6, *), got (10, 6)"),
    ({"weight": W.bfloat16()}, TypeError, "Expected weight to have dtype torch.float32, that of x, got torch.bfloat16"),
    ({"bias": X[0]}, ValueError, "Expected bias to have shape (10), got (6,)"),
    ({"bias": W[0].long()}, TypeError, "Expected bias to have dtype float64"),
    ({"b_dec": W[0]}, ValueError, "Expected b_dec to have shape (6), got (10,)"),
    ({"k": 0}, ValueError, "Expected k to be from 1 to the number of features, 10, got 0"),
    ({"k": 11}, ValueError, "Expected k to be from 1 to the number of features, 10, got 11"),
    ({"k": 2.0}, TypeError, "Expected k to be an int, got float"),
]


@pytest.mark.parametrize("change,kind,message", ERRORS, ids=[error[2][9:] for error in ERRORS])
def test_bad_input_names_the_argument(change, kind, message):
    args = {"x": X, "weight": W, "bias": None, "k": 3} | change
    with pytest.raises(kind, match=re.escape(message)):
        topk_encode(**args)


def test_asking_the_registered_op_for_a_gradient_raises():
    values, _ = torch.ops.rmfast.topk_encode(X.clone().requires_grad_(), W, None, 3, None, True)
    with pytest.raises(RuntimeError, match="topk_encode has no gradient; call it under"):
        values.sum().backward()


@every_dtype
@every_backend
def test_opcheck(backend, dtype, use):
    device = use(backend, dtype)
    x, weight, bias, b_dec = inputs(3, 8, 20, dtype, device)
    bias = bias if dtype == torch.float64 else bias.float()
    torch.library.opcheck(torch.ops.rmfast.topk_encode.default, (x, weight, bias, 4, b_dec, True))
    torch.library.opcheck(torch.ops.rmfast.topk_encode.default, (x, weight, None, 4, None, False))


def test_compiles_without_a_graph_break():
    x, weight, bias, b_dec = inputs(6, 8, 40, torch.float32)

    def doubled(x):
        values, indices = topk_encode(x * 2, weight, bias, 5, b_dec=b_dec)
        return values * 2, indices

    got = torch.compile(doubled, fullgraph=True, backend="aot_eager")(x)
    assert all(torch.equal(a, b) for a, b in zip(got, doubled(x)))


def test_explain_names_the_backends():
    assert "topk_encode on cpu" in str(rmfast.explain("topk_encode", "cpu"))
