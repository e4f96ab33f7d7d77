"""The op binned_mmd: every backend against the paper's formula written out in fp64, gradients, layouts, errors."""

from __future__ import annotations

import re

import pytest
import torch
from losses import every_dtype, normal, peak_bytes
from torch import Tensor
from ways import backends_of

from rmfast.losses import binned_mmd
from rmfast.ops._binned_mmd import median_rows

every_mmd = pytest.mark.parametrize("backend", backends_of("binned_mmd"))


def mmd_by_pairs(x, bins, bandwidths, unbiased=False, groups=None) -> Tensor:
    """Σ_{m,m'} MMD²(m, m') as the paper has it: a loop over groups and ordered pairs of bins."""
    x = x.reshape(x.size(0), -1)

    def kernel(a, b):
        squares = (a[:, None] - b).square().sum(-1)
        return torch.stack([torch.exp(-squares / (2 * h * h)) for h in bandwidths]).mean(0)

    def within(a):
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1)) if unbiased else k.mean()

    total = x.sum() * 0
    for group in (
        [torch.ones_like(bins, dtype=torch.bool)] if groups is None else [groups == g for g in groups.unique()]
    ):
        parts = [x[group & (bins == m)] for m in bins[group].unique()]
        parts = [part for part in parts if len(part) > 1 or not unbiased]
        for i, a in enumerate(parts):
            for j, b in enumerate(parts):
                if i != j:
                    total = total + within(a) + within(b) - 2 * kernel(a, b).mean()
    return total


def binned(rows: int, features: int | None, dtype=torch.float64, device="cpu", bins=7) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that depend on their bins, which have a row or none, some or many; and groups."""
    generator = torch.Generator().manual_seed(rows)
    index = (bins * torch.rand(rows, generator=generator).square()).long() * 3 - 5
    groups = torch.randint(0, 3, (rows,), generator=generator)
    x = normal(*((rows,) if features is None else (rows, features)), seed=2)
    x = x + 0.2 * (index if features is None else index[:, None])
    return x.to(device, dtype), index.to(device), groups.to(device)


MMD_OPTIONS = {
    "biased": {},
    "unbiased": {"unbiased": True},
    "grouped": {"groups": True},
    "grouped unbiased": {"groups": True, "unbiased": True},
    "bandwidths": {"bandwidth": [0.5, 1.0, 4.0]},
}
every_mmd_option = pytest.mark.parametrize("options", MMD_OPTIONS)


def mmd_options(options: str, groups: Tensor) -> tuple[dict, dict]:
    """Arguments of `binned_mmd`, and the same of `mmd_by_pairs`."""
    given = {"bandwidth": 0.7, **MMD_OPTIONS[options]}
    if given.pop("groups", False):
        given["groups"] = groups
    plain = dict(given)
    h = plain.pop("bandwidth")
    return given, {"bandwidths": h if isinstance(h, list) else [h], **plain}


@pytest.mark.parametrize("features", [None, 1, 5, 48])
@every_mmd_option
@every_dtype
@every_mmd
def test_mmd_is_the_papers_sum_over_pairs_of_bins_with_its_gradient(
    backend, dtype, options, features, use_backend, poisoned
):
    device = use_backend(backend)
    x, bins, groups = binned(90, features, dtype, device)
    if features == 48:
        x = x / 7  # a typical distance of 1
    given, plain = mmd_options(options, groups)
    x.requires_grad_()
    got = binned_mmd(x, bins, **given)
    (3 * got).backward()
    wide = x.detach().double().requires_grad_()
    truth = mmd_by_pairs(wide, bins, **plain)
    (3 * truth).backward()
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and got.shape == ()
    # The sum is a difference of terms of about the number of bins squared, a distance of longer rows one of squares.
    eps = torch.finfo(got.dtype).eps
    lost = 16 if (features or 1) == 1 else float((wide - wide.mean(0)).detach().square().sum(1).max()) / 0.5**2
    torch.testing.assert_close(got.double(), truth, rtol=16 * eps, atol=eps * bins.unique().numel() ** 2)
    assert x.grad.dtype == dtype and x.grad.shape == x.shape
    rounding = lost * eps + (torch.finfo(dtype).eps if dtype.itemsize == 2 else 0)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0, atol=float(rounding * wide.grad.abs().max()))


@pytest.mark.parametrize("features", [None, 3])
@every_mmd_option
@every_mmd
def test_mmd_passes_gradcheck(backend, options, features, use_backend):
    device = use_backend(backend)
    x, bins, groups = binned(17, features, torch.float64, device, bins=4)
    given, _ = mmd_options(options, groups)
    assert torch.autograd.gradcheck(lambda v: binned_mmd(v, bins, **given), x.requires_grad_())


@pytest.mark.parametrize("features", [None, 2])
@pytest.mark.parametrize("options", ["biased", "grouped unbiased"])
@every_mmd
def test_mmd_of_many_tiles(backend, options, features, use_backend):
    device = use_backend(backend)
    x, bins, groups = binned(1300, features, torch.float32, device)
    given, plain = mmd_options(options, groups)
    x.requires_grad_()
    got = binned_mmd(x, bins, **given)
    got.backward()
    wide = x.detach().double().requires_grad_()
    truth = mmd_by_pairs(wide, bins, **plain)
    truth.backward()
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)
    rounding = 5e-6 if features is None else 3e-5  # 11 squared lengths, and then a sum that cancels
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0, atol=float(rounding * wide.grad.abs().max()))


@every_mmd
def test_the_median_bandwidth_is_the_median_distance_and_has_no_gradient(backend, use_backend):
    device = use_backend(backend)
    for features in (None, 4):
        x, bins, _ = binned(60, features, torch.float64, device)
        h = float(torch.pdist(x.reshape(60, -1)).median())
        x.requires_grad_()
        got, want = binned_mmd(x, bins), binned_mmd(x, bins, bandwidth=h)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))


@pytest.mark.parametrize("period", [2, 3, 4, 6])
def test_the_median_of_a_long_batch_is_over_rows_that_take_turns_alike(period):
    for rows in (1024, 4096, 5000):
        counts = (median_rows(rows, torch.device("cpu")) % period).bincount()
        assert counts.size(0) == period and counts.max() < 1.3 * counts.min()


@pytest.mark.parametrize("value", [1.0, 0.1])
@every_mmd
def test_mmd_of_constant_rewards_is_zero_with_a_zero_gradient(backend, value, use_backend):
    device = use_backend(backend)
    _, bins, _ = binned(50, None, torch.float32, device)
    for shape in ((50,), (50, 3)):
        x = torch.full(shape, value, device=device, requires_grad=True)
        got = binned_mmd(x, bins)
        got.backward()
        assert got.abs() < 1e-5 and (x.grad == 0).all()


@every_mmd
def test_fewer_than_two_bins_give_zero(backend, use_backend):
    device = use_backend(backend)
    x = normal(6, dtype=torch.float32, device=device).requires_grad_()
    single = torch.arange(6, device=device)
    for bins, unbiased in ((torch.zeros_like(single), False), (torch.zeros_like(single), True), (single, True)):
        got = binned_mmd(x, bins, bandwidth=1.0, unbiased=unbiased)
        assert got == 0 and (torch.autograd.grad(got, x)[0] == 0).all()
    assert binned_mmd(x[:1], single[:1]) == 0


@every_mmd
def test_mmd_depends_on_neither_the_order_of_rows_nor_the_names_of_bins(backend, use_backend):
    device = use_backend(backend)
    x, bins, groups = binned(200, None, torch.float64, device)
    x.requires_grad_()
    want = binned_mmd(x, bins, groups=groups, bandwidth=0.7)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).to(device)
    got = binned_mmd(x[order], 2**40 - 7 * bins[order], groups=-groups[order], bandwidth=0.7)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))


@every_mmd
def test_a_large_common_offset_of_representations_costs_no_accuracy(backend, use_backend):
    device = use_backend(backend)
    x, bins, _ = binned(120, 8, torch.float32, device)
    x = (64 * x).round() / 64  # so that the sum is exact
    want = binned_mmd(x, bins, bandwidth=3.0)
    torch.testing.assert_close(binned_mmd(x + 1024, bins, bandwidth=3.0), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("far", ["a row", "half of the rows", "beyond fp32's squares"])
@every_mmd
def test_representations_many_bandwidths_away_cost_the_others_no_accuracy(backend, far, unbiased, use_backend):
    """In fp32 a row 1e4 away moves the mean by 100 and squared distances, as differences of products, by 1e-3."""
    device = use_backend(backend)
    x, bins, groups = binned(100, 8, torch.float32, device)
    if far == "half of the rows":
        x[::2] += 300
    else:
        x[17] += 1e4 if far == "a row" else 1e20
    x.requires_grad_()
    got = binned_mmd(x, bins, bandwidth=3.0, unbiased=unbiased, groups=groups)
    got.backward()
    wide = x.detach().double().requires_grad_()
    truth = mmd_by_pairs(wide, bins, [3.0], unbiased, groups)
    truth.backward()
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(got.double(), truth, rtol=16 * eps, atol=eps * bins.unique().numel() ** 2)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0, atol=float(64 * eps * wide.grad.abs().max()))


@every_mmd
def test_rows_far_apart_pull_as_the_kernel_says_down_to_nothing(backend, use_backend):
    """Groups of two rows in two bins: gradients of one kernel each, also where fp32 has no number for it."""
    device = use_backend(backend)
    gap = torch.cat((torch.linspace(0.1, 16, 400), torch.tensor([1e4, 1e15]))).to(device)
    x = torch.stack((torch.zeros_like(gap), gap), 1).flatten().requires_grad_()
    bins = torch.tensor([0, 1], device=device).repeat(len(gap))
    groups = torch.arange(len(gap), device=device).repeat_interleave(2)
    (grad,) = torch.autograd.grad(binned_mmd(x, bins, bandwidth=1.0, groups=groups), x)
    truth = 4 * gap.double() * torch.exp(-(gap.double() ** 2) / 2)
    smallest = 64 * torch.finfo(torch.float32).tiny
    torch.testing.assert_close(grad[1::2].double(), truth, rtol=2e-5, atol=smallest)
    torch.testing.assert_close(grad[::2].double(), -truth, rtol=2e-5, atol=smallest)


@pytest.mark.parametrize("features", [None, 3])
@every_mmd
def test_nan_makes_mmd_nan(backend, features, use_backend):
    device = use_backend(backend)
    x, bins, _ = binned(40, features, torch.float32, device)
    x[11] = torch.nan
    for bandwidth in (1.0, "median"):
        leaf = x.clone().requires_grad_()
        got = binned_mmd(leaf, bins, bandwidth=bandwidth)
        got.backward()
        assert got.isnan() and leaf.grad[11].isnan().all()


@pytest.mark.parametrize("backend", [param for param in backends_of("binned_mmd") if param.values[0][1] == "cpp"])
def test_the_number_of_threads_changes_no_bit_of_mmd(backend, use_backend):
    use_backend(backend)
    x, bins, _ = binned(3000, None, torch.float32)
    x.requires_grad_()
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            value = binned_mmd(x, bins)
            results.append((value, *torch.autograd.grad(value, x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0]))


@pytest.mark.parametrize("features", [None, 4])
@pytest.mark.parametrize("backend", [param for param in backends_of("binned_mmd") if "avx" not in param.id])
def test_mmd_never_holds_the_kernel_matrix(backend, features, use_backend):
    if use_backend(backend) != "cpu":
        pytest.skip("counts allocations on the CPU")
    x, bins, _ = binned(8192, features, torch.float32)
    x.requires_grad_()
    run = lambda: torch.autograd.grad(binned_mmd(x, bins, bandwidth=1.0), x)  # noqa: E731
    assert peak_bytes(run) < 4 * 8192 * 8192 / 2


@pytest.mark.parametrize("features", [None, 3])
@every_mmd
def test_opcheck_of_mmd(backend, features, use_backend):
    device = use_backend(backend)
    x, bins, groups = binned(20, features or 1, torch.bfloat16, device)
    op = torch.ops.rmfast.binned_mmd.default
    torch.library.opcheck(op, (x.requires_grad_(), bins, groups, [1.0, 2.0], True, True))
    torch.library.opcheck(op, (x.detach(), bins, None, [], False, False))
    unit = x.detach().float()
    torch.library.opcheck(torch.ops.rmfast.binned_mmd_backward.default, (unit.sum(), unit, x.detach()))


@every_mmd
def test_mmd_compiles_without_a_graph_break_also_its_gradient(backend, use_backend):
    device = use_backend(backend)
    x, bins, groups = binned(30, None, torch.float32, device)

    def run(x):
        return binned_mmd(2 * x, bins, groups=groups) + binned_mmd(x[:, None] * torch.ones_like(x[:2]), bins)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        results.append((value, *torch.autograd.grad(value, leaf)))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_second_derivative_of_mmd_and_a_gradient_it_did_not_compute_raise():
    x, bins, _ = binned(20, 1, torch.float32)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(binned_mmd(x, bins), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="called without need_grad"):
        torch.ops.rmfast.binned_mmd(x, bins, None, [], False, False)[0].backward()


def on_rank(rank: int, store: str, results) -> None:
    """Half of the work of `test_gather_takes_the_rows_of_all_ranks_together`, in a process of its own."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x, bins, groups = binned(50, None, torch.float64)
    rows = slice(0, 20) if rank == 0 else slice(20, 50)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    leaf = x[rows].clone().requires_grad_()
    value = binned_mmd(scale * leaf, bins[rows], groups=groups[rows], bandwidth=0.7, gather=True)
    value.backward()
    torch.distributed.all_reduce(scale.grad)
    results.put((rank, value.item(), leaf.grad.tolist(), scale.grad.item() / 2))
    torch.distributed.destroy_process_group()


def test_gather_takes_the_rows_of_all_ranks_together(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    torch.multiprocessing.spawn(on_rank, (str(tmp_path / "store"), results), nprocs=2)
    parts = sorted(results.get() for _ in range(2))
    x, bins, groups = binned(50, None, torch.float64)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    want = binned_mmd(scale * x, bins, groups=groups, bandwidth=0.7)
    want.backward()
    for _, value, _, mean_gradient in parts:
        torch.testing.assert_close(value, want.item())
        torch.testing.assert_close(mean_gradient, scale.grad.item())  # what DistributedDataParallel would leave
    torch.testing.assert_close(torch.tensor(parts[0][2] + parts[1][2], dtype=torch.float64), 2 * x.grad)


X, BINS = torch.zeros(4), torch.tensor([0, 0, 1, 1])
MMD = {"x": X, "bins": BINS}
MMD_ERRORS = [
    ({"x": [0.0]}, TypeError, "Expected x to be a torch.Tensor, got list"),
    ({"x": X.int()}, TypeError, "Expected x to have dtype float64, float32, bfloat16 or float16"),
    ({"x": X.view(1, 2, 2)}, ValueError, "Expected x to be of shape (N,) or (N, f), got (1, 2, 2)"),
    ({"x": X[:0], "bins": BINS[:0]}, ValueError, "Expected x to be of shape (N,) or (N, f), not empty, got (0,)"),
    ({"x": X[:3]}, ValueError, "Expected bins to be of shape (3,), got (4,)"),
    ({"bins": BINS.int()}, TypeError, "Expected bins to have dtype torch.int64, got torch.int32"),
    ({"bins": None}, TypeError, "Expected bins to be a torch.Tensor, got NoneType"),
    ({"groups": BINS[:3]}, ValueError, "Expected groups to be of shape (4,), got (3,)"),
    ({"groups": X}, TypeError, "Expected groups to have dtype torch.int64"),
    ({"kernel": "laplace"}, ValueError, "Expected kernel to be one of rbf, got 'laplace'"),
    ({"bandwidth": "mean"}, ValueError, 'Expected bandwidth to be "median", a number or several'),
    ({"bandwidth": 0.0}, ValueError, "Expected bandwidth to be a finite number above 0, got 0.0"),
    ({"bandwidth": [1.0, float("inf")]}, ValueError, "Expected bandwidth to be a finite number above 0, got inf"),
    ({"bandwidth": []}, ValueError, 'Expected bandwidth to be "median", a number or several, got []'),
    ({"bandwidth": None}, TypeError, "Expected bandwidth to be a finite number above 0, got None"),
    ({"gather": True}, ValueError, "Expected torch.distributed to be initialised for gather"),
]


@pytest.mark.parametrize("change,kind,message", MMD_ERRORS, ids=[error[2] for error in MMD_ERRORS])
def test_bad_input_of_mmd_names_the_argument(change, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        binned_mmd(**(MMD | change))
