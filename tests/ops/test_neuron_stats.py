"""neuron_stats: every backend against scipy.stats.spearmanr and numpy.median."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from ways import backends_of

import rmfast
from rmfast.ops import neuron_stats

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [(2, 3), (3, 70), (7, 130), (16, 17), (17, 9), (100, 65), (513, 5)]
BACKENDS = backends_of("neuron_stats")
CPP = [param for param in BACKENDS if param.values[0][1] == "cpp"]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def use(use_backend):
    """As `use_backend`, but without a choice where the one of Triton is an error: the eager reference runs."""

    def choose(backend, dtype=torch.float32, texts=2):
        device, name, isa = backend
        return use_backend(
            (device, None if name == "triton" and (dtype == torch.float64 or texts > 2048) else name, isa)
        )

    return choose


def normal(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def attributes(n: int, device="cpu") -> Tensor:
    """Counts with many ties, real numbers, and what falls with the text's number."""
    counts = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(1))
    return torch.stack([counts.double(), normal(n, dtype=torch.float64, seed=2), -torch.arange(n).double()], 1).to(
        device
    )


def tied(n: int, m: int, dtype, device="cpu") -> Tensor:
    """Columns in turn: no ties, half of them 0, a few distinct values, one value but for one text."""
    x = normal(n, m, dtype=torch.float64, seed=3)
    x[:, 1::4] = x[:, 1::4].relu()
    x[:, 2::4] = x[:, 2::4].round()
    x[1:, 3::4] = 0.5
    return x.to(device, dtype)


def truth(x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """scipy's and numpy's answers in float64; 0 where scipy has NaN for a constant."""
    columns, others = x.double().cpu().numpy(), f.double().cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = [[scipy.stats.spearmanr(c, o).statistic for o in others.T] for c in columns.T]
        median = torch.from_numpy(np.median(columns, 0))
    return torch.tensor(pairs, dtype=torch.float64).reshape(x.size(1), f.size(1)).nan_to_num(0.0), median


def assert_true(got: tuple[Tensor, Tensor], x: Tensor, f: Tensor) -> None:
    spearman, median = truth(x, f)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert got[0].dtype == got[1].dtype == dtype
    torch.testing.assert_close(got[0].double().cpu(), spearman, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)
    torch.testing.assert_close(got[1].cpu(), median.to(dtype), rtol=1e-7, atol=0, equal_nan=True)


@every_dtype
@every_backend
def test_agrees_with_scipy_and_numpy(backend, dtype, use, poisoned):
    device = use(backend, dtype)
    for n, m in SIZES:
        x, f = tied(n, m, dtype, device), attributes(n, device)
        assert_true(neuron_stats(x, f), x, f)


@every_backend
def test_all_float_dtypes_serve_as_attributes(backend, use):
    device = use(backend)
    x, f = tied(40, 9, torch.float32, device), attributes(40, device)
    for dtype in DTYPES:
        assert_true(neuron_stats(x, f.to(dtype)), x, f.to(dtype))


@pytest.mark.parametrize("a", [0, 1, 4, 32])
@every_backend
def test_any_number_of_attributes(backend, a, use):
    device = use(backend)
    x, f = tied(33, 5, torch.float32, device), normal(33, a, device=device)
    spearman, median = neuron_stats(x, f)
    assert spearman.shape == (5, a)
    assert_true((spearman, median), x, f)


@every_dtype
@every_backend
def test_zeros_are_equal_whatever_their_sign_and_infinities_are_values(backend, dtype, use):
    device = use(backend, dtype)
    values = [0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, 0.0, torch.inf, -0.0, 2.0]
    x = torch.tensor(values, dtype=dtype, device=device)[:, None]
    f = attributes(len(values), device)
    assert_true(neuron_stats(x, f), x, f)
    half = x[:5]  # the two middle values are 0 and 1 without the first, 0 and inf without both
    assert_true(neuron_stats(half, f[:5]), half, f[:5])


@every_backend
def test_constants_have_no_correlation(backend, use):
    device = use(backend)
    x, f = normal(20, 4, device=device), attributes(20, device)
    x[:, 1], f[:, 2] = -3.0, 7.0
    spearman, median = neuron_stats(x, f)
    assert (spearman[1] == 0).all() and (spearman[:, 2] == 0).all() and median[1] == -3
    assert (spearman[0, :2] != 0).all()


@every_dtype
@every_backend
def test_monotone_neurons_have_correlation_one(backend, dtype, use):
    device = use(backend, dtype)
    f = torch.arange(50, dtype=torch.float64, device=device)[:, None]
    x = torch.cat([3 * f, -f, (f / 7).floor()], 1).sub(10).to(dtype)
    spearman, _ = neuron_stats(x, torch.cat([f, (f / 7).floor()], 1))
    assert spearman[0, 0] == 1 and spearman[1, 0] == -1 and spearman[2, 1] == 1


@every_dtype
@every_backend
def test_a_neuron_with_nan_is_nan_and_no_other(backend, dtype, use):
    device = use(backend, dtype)
    x, f = tied(30, 20, dtype, device), attributes(30, device)
    want = neuron_stats(x, f)
    x[3, 7], x[29, 16] = torch.nan, -torch.nan
    spearman, median = neuron_stats(x, f)
    nan = torch.zeros(20, dtype=torch.bool, device=device)
    nan[[7, 16]] = True
    assert torch.equal(median.isnan(), nan) and torch.equal(spearman.isnan(), nan[:, None].expand(-1, 3))
    assert torch.equal(spearman[~nan], want[0][~nan]) and torch.equal(median[~nan], want[1][~nan])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@every_backend
def test_values_that_differ_in_their_last_bit_are_ordered(backend, dtype, use):
    """Beside an outlier, which leaves the words that the C++ sorts no bits to tell them apart."""
    device = use(backend, dtype)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    x = 1 + torch.stack([order, (order / 3).floor()], 1) * torch.finfo(dtype).eps
    x[17] = -1e30
    f = torch.stack([order, attributes(200, device)[:, 0].to(dtype)], 1)
    assert_true(neuron_stats(x, f), x, f)


@pytest.mark.parametrize("n", [1000, 4096, 4097])
@every_backend
def test_many_texts(backend, n, use):
    device = use(backend, texts=n)
    for dtype in (torch.float32, torch.bfloat16):
        x, f = tied(n, 5, dtype, device), attributes(n, device)
        assert_true(neuron_stats(x, f), x, f)


@every_backend
def test_more_texts_than_16_bits_number(backend, use):
    device = use(backend, texts=32768)
    for n, dtype in ((32768, torch.bfloat16), (32769, torch.bfloat16), (70001, torch.float32)):
        x, f = tied(n, 2, dtype, device), attributes(n, device)
        assert_true(neuron_stats(x, f), x, f)


@every_dtype
@every_backend
def test_views_of_any_strides_give_the_same_bits(backend, dtype, use):
    device = use(backend, dtype)
    x, f = tied(37, 70, dtype, device), attributes(37, device)
    want = neuron_stats(x, f)
    around = torch.full((39, 80), torch.nan, dtype=dtype, device=device)
    around[1:38, 3:73] = x
    steps = torch.full((74, 210), torch.nan, dtype=dtype, device=device)
    steps[::2, ::3] = x
    for view in (around[1:38, 3:73], x.T.contiguous().T, steps[::2, ::3], x[:1].expand(37, -1) * 0 + x):
        assert all(torch.equal(a, b) for a, b in zip(neuron_stats(view, f), want))
    flipped = neuron_stats(x, f.T.contiguous().T)
    assert all(torch.equal(a, b) for a, b in zip(flipped, want))


@every_dtype
@every_backend
def test_a_neuron_has_the_same_bits_alone_and_among_others(backend, dtype, use):
    device = use(backend, dtype)
    x, f = tied(100, 200, dtype, device), attributes(100, device)
    spearman, median = neuron_stats(x, f)
    for i in (0, 1, 17, 63, 64, 199):
        alone = neuron_stats(x[:, i : i + 1], f)
        assert torch.equal(alone[0][0], spearman[i]) and torch.equal(alone[1][0], median[i])


@every_dtype
@every_backend
def test_all_backends_agree_to_the_bit(backend, dtype, use):
    x, f = tied(300, 20, dtype), attributes(300)
    with rmfast.backend("eager"):
        want = neuron_stats(x, f)
    device = use(backend, dtype)
    got = neuron_stats(x.to(device), f.to(device))
    # torch's float64 square root is off by a last bit now and then.
    torch.testing.assert_close(got[0].cpu(), want[0], rtol=5e-16 if dtype == torch.float64 else 0, atol=0)
    assert torch.equal(got[1].cpu(), want[1])


@pytest.mark.parametrize("backend", CPP)
def test_the_number_of_threads_changes_no_bit(backend, use):
    use(backend)
    x, f = tied(500, 700, torch.float32), attributes(500)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(neuron_stats(x, f))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@every_backend
def test_no_neurons(backend, use):
    device = use(backend)
    spearman, median = neuron_stats(torch.empty(5, 0, device=device), attributes(5, device))
    assert spearman.shape == (0, 3) and median.shape == (0,)


MEMORY = """
import resource, torch
from rmfast.ops import neuron_stats
torch.set_num_threads(2)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
f = torch.rand(512, 5)
neuron_stats(torch.rand(512, 256), f)
x = torch.rand(512, 16384)
before = peak()
neuron_stats(x, f)
print((peak() - before) / x.nbytes)
"""


@pytest.mark.parametrize("backend", CPP[:1])
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory in KiB")
def test_memory_beyond_the_input_is_less_than_a_tenth_of_it(backend, use):
    use(backend)
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.1


X = torch.ones(4, 6)
ERRORS = [
    ({"activations": [1.0]}, TypeError, "Expected activations to be a torch.Tensor, got list"),
    ({"activations": X.int()}, TypeError, "Expected activations to have dtype float64"),
    ({"activations": X[0]}, ValueError, "Expected activations to be of shape (n, m), got (6,)"),
    ({"activations": X[:1]}, ValueError, "Expected activations.size(0), the number of texts, to be at least 2, got 1"),
    ({"activations": X.clone().requires_grad_()}, ValueError, "Expected activations not to require grad"),
    ({"attributes": None}, TypeError, "Expected attributes to be a torch.Tensor, got NoneType"),
    ({"attributes": X[:3]}, ValueError, "Expected attributes to have shape (4, *), got (3, 6)"),
    ({"attributes": X[:, 0]}, ValueError, "Expected attributes to have shape (4, *), got (4,)"),
    ({"attributes": X.long()}, TypeError, "Expected attributes to have dtype float64"),
    (
        {"attributes": torch.tensor([[1, torch.nan]] * 4)},
        ValueError,
        "Expected attributes to have no NaN, got one in c",
    ),
    ({"attributes": X.clone().requires_grad_()}, ValueError, "Expected attributes not to require grad"),
]


@pytest.mark.parametrize("change,kind,message", ERRORS, ids=[error[2][9:] for error in ERRORS])
def test_bad_input_names_the_argument(change, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        neuron_stats(**({"activations": X, "attributes": X} | change))


def registered(dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of the registered op."""
    ranks = 2 * torch.arange(30, dtype=torch.int32, device=device)[:, None] - 29
    return tied(30, 7, dtype, device), ranks, ranks.double().square().sum(0)


def test_asking_the_registered_op_for_a_gradient_raises():
    x, *rest = registered()
    spearman, _ = torch.ops.rmfast.neuron_stats(x.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="neuron_stats has no gradient; call it under"):
        spearman.sum().backward()


@every_dtype
@every_backend
def test_opcheck(backend, dtype, use):
    device = use(backend, dtype)
    torch.library.opcheck(torch.ops.rmfast.neuron_stats.default, registered(dtype, device))


def test_compiles_without_a_graph_break():
    x, f = tied(30, 7, torch.float32), attributes(30)

    def doubled(x, f):
        return [out * 2 for out in neuron_stats(x * 2, f)]

    got = torch.compile(doubled, fullgraph=True, backend="aot_eager")(x, f)
    assert all(torch.equal(a, b) for a, b in zip(got, doubled(x, f)))
