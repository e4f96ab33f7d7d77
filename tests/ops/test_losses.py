"""The losses: every backend against the papers' formulas written out in fp64, gradients, layouts, errors."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import backends_of
from torch import Tensor
from torch.nn.functional import logsigmoid

from rmfast.losses import (
    bin_factor,
    binned_mmd,
    bradley_terry,
    correlation_penalty,
    linear_value_loss,
    tcrm_loss,
)
from rmfast.ops import reward_head, tcrm
from rmfast.ops._binned_mmd import _median_rows

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TERMS = ("bradley_terry", "smoothness", "lookahead")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
every_tcrm = pytest.mark.parametrize("backend", backends_of("tcrm"))
every_mmd = pytest.mark.parametrize("backend", backends_of("binned_mmd"))
sum_and_mean = pytest.mark.parametrize("reduction", ["sum", "mean"])


def normal(*shape: int, seed: int = 0, dtype=torch.float64, device="cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


# ------------------------------------------------------------------------------------------------------------ TCRM

LENGTHS = ([5, 1, 40, 2, 1100], [1, 7, 33, 1, 17])  # one longer than the 1,024 tokens that C++ and Triton sum at a time


def ends(lengths: list[int], device="cpu", dtype=torch.int32) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(dtype)


def pair_of_values(dtype=torch.float64, device="cpu", lengths=LENGTHS) -> list[Tensor]:
    """Values of all tokens, between NaN."""
    out = []
    for seed, sizes in enumerate(lengths):
        buffer = torch.full((sum(sizes) + 10,), torch.nan, dtype=dtype)
        buffer[3:-7] = 2 * normal(sum(sizes), seed=seed, dtype=dtype)
        out.append(buffer.to(device)[3:-7])
    return out


def written_out(chosen: list[Tensor], rejected: list[Tensor], smooth, lookahead, reduction="sum", margin=None):
    """The loss as the paper writes it, one response and one token at a time, SG a detach; and its terms."""

    def over_tokens(terms: list[Tensor]) -> Tensor:
        if not terms:
            return chosen[0].new_zeros(())
        return torch.stack(terms).sum() if reduction == "sum" else torch.stack(terms).mean()

    sums = [0, 0, 0]
    for b, (w, r) in enumerate(zip(chosen, rejected)):
        gap = w[-1] - r[-1] - (0 if margin is None else margin[b])
        sums[0] = sums[0] - logsigmoid(gap)
        for v in (w, r):
            sums[1] = sums[1] + over_tokens([(v[k - 1] - v[k].detach()) ** 2 for k in range(1, len(v))])
            sums[2] = sums[2] + over_tokens([(v[k] - v[-1].detach()) ** 2 for k in range(len(v) - 1)])
    terms = [term / len(chosen) for term in sums]
    return terms[0] + smooth * terms[1] + lookahead * terms[2], dict(zip(TERMS, terms))


def close(got: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """fp32 sums of what was rounded to the dtype before; gradients are rounded to it once more."""
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6}.get(got.dtype, torch.finfo(got.dtype).eps)
    scale = truth.abs().max()
    torch.testing.assert_close(got.cpu().double(), truth.cpu().double(), rtol=0, atol=float(tolerance * scale))


@pytest.mark.parametrize("margin", [False, True], ids=["", "margin"])
@sum_and_mean
@every_dtype
@every_tcrm
def test_tcrm_is_the_papers_formula_with_its_gradient(backend, dtype, reduction, margin, use_backend, poisoned):
    device = use_backend(backend)
    values = [v.requires_grad_() for v in pair_of_values(dtype, device)]
    limits = [ends(lengths, device) for lengths in LENGTHS]
    gaps = normal(5, seed=3, device=device) if margin else None
    loss, terms = tcrm_loss(*values, *limits, smooth=0.3, lookahead=0.05, reduction=reduction, margin=gaps)
    (5 * loss).backward()

    wide = [v.detach().cpu().double().requires_grad_() for v in values]
    parts = [list(v.split(lengths)) for v, lengths in zip(wide, LENGTHS)]
    truth, true_terms = written_out(*parts, 0.3, 0.05, reduction, None if gaps is None else gaps.cpu())
    (5 * truth).backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and loss.shape == ()
    close(loss, truth.detach(), dtype)
    assert list(terms) == list(TERMS)
    for name, term in terms.items():
        assert not term.requires_grad
        close(term, true_terms[name].detach(), dtype)
    for got, want in zip(values, wide):
        assert got.grad.dtype == dtype
        close(got.grad, want.grad, dtype)


def frozen(chosen, rejected, limits, smooth, lookahead):
    """The loss with its stop-gradients as constants: what has the analytic gradient as its derivative."""

    def of(values, stops, limits):
        total = 0
        for first, end in zip(limits[:-1].tolist(), limits[1:].tolist()):
            r, s = values[first:end], stops[first:end]
            total = total + smooth * ((r[:-1] - s[1:]) ** 2).sum() + lookahead * ((r[:-1] - s[-1]) ** 2).sum()
        return total

    stops = [chosen.detach(), rejected.detach()]

    def loss(chosen, rejected):
        gap = chosen[limits[0][1:].long() - 1] - rejected[limits[1][1:].long() - 1]
        parts = of(chosen, stops[0], limits[0]) + of(rejected, stops[1], limits[1])
        return parts / gap.size(0) - logsigmoid(gap).mean()

    return loss


@every_tcrm
def test_tcrm_has_the_numerical_gradient_of_the_loss_with_frozen_targets(backend, use_backend):
    device = use_backend(backend)
    lengths = ([4, 1, 6], [2, 5, 1])
    values = [v.requires_grad_() for v in pair_of_values(torch.float64, device, lengths)]
    limits = [ends(sizes, device) for sizes in lengths]
    analytic = torch.autograd.grad(tcrm_loss(*values, *limits, smooth=0.3, lookahead=0.05)[0], values)
    plain = frozen(*values, limits, 0.3, 0.05)
    for i, got in enumerate(analytic):
        for t in range(got.size(0)):
            step = torch.zeros_like(values[i])
            step[t] = 1e-5
            low, high = ([v.detach() + sign * step if i == j else v.detach() for j, v in enumerate(values)]
                         for sign in (-1, 1))  # fmt: skip
            torch.testing.assert_close(got[t], (plain(*high) - plain(*low)) / 2e-5, rtol=1e-6, atol=1e-9)


@every_tcrm
def test_without_targets_gradcheck_holds(backend, use_backend):
    device = use_backend(backend)
    values = [v.requires_grad_() for v in pair_of_values(torch.float64, device, ([4, 1, 6], [2, 5, 1]))]
    limits = [ends([4, 1, 6], device), ends([2, 5, 1], device)]
    margin = normal(3, device=device)
    assert torch.autograd.gradcheck(
        lambda *v: tcrm_loss(*v, *limits, smooth=0.0, lookahead=0.0, margin=margin)[0], values
    )


@every_tcrm
def test_the_final_value_gets_its_gradient_from_bradley_terry_alone(backend, use_backend):
    device = use_backend(backend)
    lengths = ([4, 2], [3, 3])
    grads = []
    for smooth in (0.0, 10.0):
        values = [v.requires_grad_() for v in pair_of_values(torch.float32, device, lengths)]
        limits = [ends(sizes, device) for sizes in lengths]
        tcrm_loss(*values, *limits, smooth=smooth, lookahead=smooth)[0].backward()
        grads.append([v.grad[limit[1:].long() - 1] for v, limit in zip(values, limits)])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@every_tcrm
def test_responses_of_one_token_have_bradley_terry_only(backend, use_backend):
    device = use_backend(backend)
    chosen, rejected = (normal(4, seed=seed, device=device).requires_grad_() for seed in (0, 1))
    limits = ends([1, 1, 1, 1], device)
    loss, terms = tcrm_loss(chosen, rejected, limits, limits, reduction="mean")
    loss.backward()
    want = -logsigmoid(chosen - rejected).mean()
    torch.testing.assert_close(loss, want)
    assert terms["smoothness"] == terms["lookahead"] == 0
    torch.testing.assert_close(chosen.grad, torch.autograd.grad(want, chosen)[0])


def padded(values: Tensor, lengths: list[int], left: list[int], width: int) -> tuple[Tensor, Tensor]:
    """(B, T) of NaN with a text in each row, and its mask."""
    out = torch.full((len(lengths), width), torch.nan, dtype=values.dtype, device=values.device)
    mask = torch.zeros_like(out, dtype=torch.bool)
    for row, (part, pad) in enumerate(zip(values.split(lengths), left)):
        out[row, pad : pad + len(part)] = part
        mask[row, pad : pad + len(part)] = True
    return out, mask


@sum_and_mean
@every_tcrm
def test_padding_at_either_side_changes_nothing(backend, reduction, use_backend):
    device = use_backend(backend)
    lengths = ([3, 1, 20], [9, 20, 2])
    values = pair_of_values(torch.float32, device, lengths)
    leaves = [v.clone().requires_grad_() for v in values]
    want, _ = tcrm_loss(*leaves, *(ends(sizes, device) for sizes in lengths), reduction=reduction)
    want.backward()
    for side in ("left", "right", "both"):
        rows = []
        for v, sizes in zip(values, lengths):
            left = [{"left": 21 - n, "right": 0, "both": (21 - n) // 2}[side] for n in sizes]
            rows.append(padded(v, sizes, left, 21))
        grids = [grid.requires_grad_() for grid, _ in rows]
        loss, _ = tcrm_loss(*grids, *(mask for _, mask in rows), reduction=reduction)
        loss.backward()
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
        for grid, (_, mask), leaf in zip(grids, rows, leaves):
            assert torch.equal(grid.grad[mask], leaf.grad)
            assert (grid.grad[~mask] == 0).all()


@every_tcrm
def test_tokens_before_the_response_have_no_part(backend, use_backend):
    device = use_backend(backend)
    lengths = ([7, 4, 9], [5, 6, 3])
    starts = [torch.tensor([3, 0, 8], device=device), torch.tensor([4, 2, 1], device=device, dtype=torch.int32)]
    values = [v.clone() for v in pair_of_values(torch.float32, device, lengths)]
    parts = [
        [part[s:].cpu().double().requires_grad_() for part, s in zip(v.split(sizes), start.tolist())]
        for v, sizes, start in zip(values, lengths, starts)
    ]
    truth, _ = written_out(*parts, 0.1, 0.01)
    truth.backward()
    for v, sizes, start in zip(values, lengths, starts):
        for part, s in zip(v.split(sizes), start.tolist()):
            part[:s] = torch.nan
        v.requires_grad_()
    loss, _ = tcrm_loss(*values, *(ends(sizes, device) for sizes in lengths), response_start=tuple(starts))
    loss.backward()
    close(loss.detach(), truth.detach(), torch.float32)
    for v, sizes, start, pieces in zip(values, lengths, starts, parts):
        for grad, s, piece in zip(v.grad.split(sizes), start.tolist(), pieces):
            assert (grad[:s] == 0).all()
            close(grad[s:], piece.grad, torch.float32)

    rows = [padded(v.detach(), sizes, [9 - n for n in sizes], 9) for v, sizes in zip(values, lengths)]
    same, _ = tcrm_loss(*(grid for grid, _ in rows), *(mask for _, mask in rows), response_start=tuple(starts))
    assert torch.equal(same, loss.detach())


@every_tcrm
def test_nan_reaches_the_loss_and_the_gradients_of_its_own_pair(backend, use_backend):
    device = use_backend(backend)
    lengths = ([3, 4], [2, 5])
    values = [v.clone() for v in pair_of_values(torch.float32, device, lengths)]
    values[0][1] = torch.nan
    for v in values:
        v.requires_grad_()
    loss, terms = tcrm_loss(*values, *(ends(sizes, device) for sizes in lengths))
    loss.backward()
    assert loss.isnan() and terms["smoothness"].isnan() and terms["bradley_terry"].isfinite()
    assert values[0].grad[:2].isnan().all() and values[0].grad[2:].isfinite().all()
    assert values[1].grad.isfinite().all()


@every_tcrm
def test_final_values_far_apart_neither_overflow_nor_vanish(backend, use_backend):
    device = use_backend(backend)
    limits = ends([1, 1, 1], device)
    chosen = torch.tensor([200.0, -200.0, 20.0], device=device, requires_grad=True)
    loss, _ = tcrm_loss(chosen, torch.zeros(3, device=device), limits, limits)
    loss.backward()
    torch.testing.assert_close(loss.item() * 3, 200 + 2.061153618190204e-09, rtol=1e-6, atol=0)
    torch.testing.assert_close(chosen.grad.cpu() * 3, torch.tensor([0.0, -1.0, -2.0611536e-09]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", [param for param in backends_of("tcrm") if param.values[0][1] == "cpp"])
def test_the_number_of_threads_changes_no_bit_of_tcrm(backend, use_backend):
    use_backend(backend)
    values = [normal(100_000, seed=seed, dtype=torch.bfloat16).requires_grad_() for seed in (0, 1)]
    limits = [ends([100] * 1000), ends([50] * 500 + [150] * 500)]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            loss = tcrm_loss(*values, *limits)[0]
            results.append((loss, *torch.autograd.grad(loss, values)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0]))


# --------------------------------------------------------------------------------- TCRM from hidden states


def head(norm: str | None, d: int, dtype=torch.float64, device="cpu") -> dict:
    """Arguments of `reward_head` that a model with this norm has."""
    out = {"weight": normal(1, d, seed=5) / d**0.5, "bias": normal(1, seed=6), "norm": norm}
    if norm is not None:
        out["norm_weight"] = normal(d, seed=7)
    if norm == "layer":
        out["norm_bias"] = normal(d, seed=8)
    return {k: v.to(device, dtype).requires_grad_() if isinstance(v, Tensor) else v for k, v in out.items()}


def leaves(*values: Tensor | str | None) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor)]


@pytest.mark.parametrize("norm", [None, "rms", "gemma_rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@every_tcrm
def test_linear_value_loss_is_tcrm_of_the_heads_values_with_all_gradients(backend, dtype, norm, use_backend):
    device = use_backend(backend)
    lengths = [4, 1, 9, 2, 6, 3]  # three chosen, three rejected
    hidden = normal(25, 40, dtype=dtype, device=device).requires_grad_()
    parameters = head(norm, 40, dtype, device)
    margin = normal(3, seed=9, device=device)
    loss, terms = linear_value_loss(hidden, cu_seqlens=ends(lengths, device), **parameters, margin=margin)
    got = torch.autograd.grad(loss, leaves(hidden, *parameters.values()))

    wide = [v.detach().cpu().double().requires_grad_() for v in leaves(hidden, *parameters.values())]
    x, weight, bias, *norms = wide
    if norm == "layer":
        x = torch.nn.functional.layer_norm(x, (40,), *norms, eps=1e-6)
    elif norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        x = x * (norms[0] + (1 if norm == "gemma_rms" else 0))
    parts = list((x @ weight.T + bias)[:, 0].split(lengths))
    truth, true_terms = written_out(parts[:3], parts[3:], 0.1, 0.01, margin=margin.cpu())
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(loss.cpu().double(), truth, rtol=tolerance, atol=0)
    for name in TERMS:
        torch.testing.assert_close(terms[name].cpu().double(), true_terms[name], rtol=tolerance, atol=0)
    for a, b in zip(got, torch.autograd.grad(truth, wide)):
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=tolerance * float(b.abs().max()))


def test_linear_value_loss_takes_padded_batches_with_a_vector_of_weights():
    hidden, weight = normal(25, 40, dtype=torch.float32), normal(40, seed=1, dtype=torch.float32)
    lengths, start = [4, 1, 9, 2, 6, 3], torch.tensor([1, 0, 3, 0, 5, 1])
    options = {"norm": "rms", "smooth": 0.2, "lookahead": 0.3, "reduction": "mean", "response_start": start}
    want, _ = linear_value_loss(hidden, weight, ends(lengths), **options)
    grid = torch.zeros(6, 11, 40)
    mask = torch.zeros(6, 11, dtype=torch.bool)
    for row, part in enumerate(hidden.split(lengths)):
        grid[row, 11 - len(part) :] = part
        mask[row, 11 - len(part) :] = True
    got, _ = linear_value_loss(grid, weight[None], mask, **options)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_linear_value_loss_in_16_bits_is_that_of_the_rounded_inputs(dtype):
    hidden, parameters = normal(25, 64, dtype=dtype), head("rms", 64, dtype)
    lengths = ends([4, 1, 9, 2, 6, 3])
    got, _ = linear_value_loss(hidden, cu_seqlens=lengths, **parameters)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in parameters.items()}
    want, _ = linear_value_loss(hidden.double(), cu_seqlens=lengths, **wide)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


def peak_bytes(call) -> int:
    """The most that PyTorch's allocator on the CPU held during a call, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.cumsum(0).max())


@pytest.mark.parametrize("backend", [param for param in backends_of("tcrm") if param.values[0][1] == "cpp"])
def test_linear_value_loss_needs_little_beside_its_gradients(backend, use_backend):
    use_backend(backend)
    hidden = normal(8192, 512, dtype=torch.bfloat16).requires_grad_()
    parameters = head("rms", 512, torch.bfloat16)
    limits = ends([512] * 16)

    def run():
        loss, _ = linear_value_loss(hidden, cu_seqlens=limits, **parameters)
        return torch.autograd.grad(loss, leaves(hidden, *parameters.values()))

    run()
    assert peak_bytes(run) <= 1.05 * hidden.nbytes


# ---------------------------------------------------------------------------------------------- the op, and errors


def tcrm_arguments(dtype=torch.float32, device="cpu", margin=True) -> tuple:
    chosen, rejected = (v.clone() for v in pair_of_values(dtype, device, ([3, 1, 5], [2, 4, 1])))
    bounds = torch.tensor([[0, 3, 4], [3, 4, 9], [0, 3, 6], [2, 6, 7]], device=device)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    gaps = normal(3, dtype=acc, device=device) if margin else None
    return chosen.requires_grad_(), rejected.requires_grad_(), bounds, gaps, 0.1, 0.01, True


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@every_tcrm
def test_opcheck_of_tcrm(backend, dtype, use_backend):
    device = use_backend(backend)
    torch.library.opcheck(torch.ops.rmfast.tcrm.default, tcrm_arguments(dtype, device))
    torch.library.opcheck(torch.ops.rmfast.tcrm.default, tcrm_arguments(dtype, device, margin=False))
    grad = torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    arguments = [v.detach() if isinstance(v, Tensor) else v for v in tcrm_arguments(dtype, device)]
    torch.library.opcheck(torch.ops.rmfast.tcrm_backward.default, (grad, *arguments))


@every_tcrm
def test_tcrm_compiles_without_a_graph_break_also_its_gradient(backend, use_backend):
    device = use_backend(backend)
    lengths = ([3, 1, 5], [2, 4, 1])
    hidden = normal(16, 24, dtype=torch.float32, device=device)
    weight, limits = normal(1, 24, seed=1, dtype=torch.float32, device=device), [ends(n, device) for n in lengths]
    start = (torch.tensor([1, 0, 2], device=device), torch.tensor([0, 1, 0], device=device))
    both = ends([*lengths[0], *lengths[1]], device)

    def run(hidden, weight):
        values = reward_head(2 * hidden, weight)[:, 0]
        loss, terms = tcrm_loss(values[:9], values[9:], *limits, response_start=start)
        direct, _ = linear_value_loss(3 * hidden, weight, both, norm="rms", response_start=torch.cat(start))
        return loss + direct, terms["smoothness"]

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        inputs = [v.clone().requires_grad_() for v in (hidden, weight)]
        loss, term = function(*inputs)
        results.append((loss, term, *torch.autograd.grad(loss, inputs)))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_second_derivative_of_tcrm_raises():
    chosen, rejected, *rest = tcrm_arguments()
    loss = torch.ops.rmfast.tcrm(chosen, rejected, *rest)[0]
    (grad,) = torch.autograd.grad(loss, chosen, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.square().sum().backward()


def test_only_the_side_that_needs_a_gradient_gets_one():
    chosen, rejected, *rest = tcrm_arguments()
    want = torch.autograd.grad(torch.ops.rmfast.tcrm(chosen, rejected, *rest)[0], chosen)[0]
    loss = torch.ops.rmfast.tcrm(chosen, rejected.detach(), *rest)[0]
    loss.backward()
    assert torch.equal(chosen.grad, want) and rejected.grad is None


V, CU = torch.zeros(6), torch.tensor([0, 2, 6])
GRID, MASK = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
HOLE = torch.tensor([[True, False, True], [True, True, True]])
EMPTY = torch.tensor([[True, True, True], [False, False, False]])
RAGGED = {"values_chosen": V, "values_rejected": V, "cu_seqlens_chosen": CU, "cu_seqlens_rejected": CU}
GRIDS = {"values_chosen": GRID, "values_rejected": GRID, "cu_seqlens_chosen": MASK, "cu_seqlens_rejected": MASK}
HEAD = {"hidden": torch.ones(6, 4), "weight": torch.ones(1, 4), "cu_seqlens": CU}
OP = {"chosen": V, "rejected": V, "bounds": torch.tensor([[0, 2], [2, 6], [0, 2], [2, 6]])}
NONE = torch.tensor([0])
TCRM_ERRORS = [
    (tcrm_loss, RAGGED, {"values_chosen": [0.0]}, TypeError, "Expected values_chosen to be a torch.Tensor, got list"),
    (tcrm_loss, RAGGED, {"values_chosen": V.view(1, 2, 3)}, ValueError, "of shape (N,) or (B, T), got (1, 2, 3)"),
    (tcrm_loss, RAGGED, {"values_chosen": V.int()}, TypeError, "Expected chosen to have dtype float64, float32"),
    (tcrm_loss, RAGGED, {"values_rejected": V.half()}, TypeError, "Expected rejected to have dtype torch.float32"),
    (tcrm_loss, RAGGED, {"cu_seqlens_chosen": CU.float()}, TypeError, "Expected cu_seqlens_chosen to have dtype"),
    (tcrm_loss, RAGGED, {"cu_seqlens_chosen": MASK}, TypeError, "Expected cu_seqlens_chosen to have dtype torch.int32"),
    (tcrm_loss, RAGGED, {"cu_seqlens_chosen": CU + 1}, ValueError, "Expected cu_seqlens_chosen[0] to be 0, got 1"),
    (tcrm_loss, RAGGED, {"cu_seqlens_rejected": CU // 2}, ValueError, "cu_seqlens_rejected[-1] to be 6, the number of"),
    (tcrm_loss, RAGGED, {"cu_seqlens_chosen": CU[[0, 1, 1, 2]]}, ValueError, "as many rejected texts as chosen ones"),
    (tcrm_loss, RAGGED, {"cu_seqlens_chosen": NONE}, ValueError, "of shape (B + 1,) with B >= 1, got (1,)"),
    (tcrm_loss, RAGGED, {k: CU[[0, 1, 1, 2]] for k in RAGGED if "cu" in k}, ValueError, "got tokens 2 up to 2"),
    (tcrm_loss, RAGGED, {k: CU[[0, 2, 1, 2]] for k in RAGGED if "cu" in k}, ValueError, "got tokens 6 up to 2"),
    (tcrm_loss, RAGGED, {"response_start": NONE}, TypeError, "Expected response_start to be a pair (chosen, rejected)"),
    (tcrm_loss, RAGGED, {"response_start": (NONE, NONE)}, ValueError, "response_start of chosen to be of shape (2,)"),
    (tcrm_loss, RAGGED, {"response_start": (CU[:2], V[:2])}, TypeError, "response_start of rejected to have dtype"),
    (tcrm_loss, RAGGED, {"response_start": (CU[1:], CU[1:])}, ValueError, "got 2 for text 0 of 2 tokens"),
    (tcrm_loss, RAGGED, {"response_start": (-CU[:2], CU[:2])}, ValueError, "got -2 for text 1 of 4 tokens"),
    (tcrm_loss, RAGGED, {"margin": torch.zeros(3)}, ValueError, "Expected margin to have shape (2), got (3,)"),
    (tcrm_loss, RAGGED, {"margin": torch.zeros(2, requires_grad=True)}, ValueError, "Expected margin not to require"),
    (tcrm_loss, RAGGED, {"smooth": -0.1}, ValueError, "Expected smooth to be finite and at least 0, got -0.1"),
    (tcrm_loss, RAGGED, {"lookahead": "1"}, TypeError, "Expected lookahead to be a float, got str"),
    (tcrm_loss, RAGGED, {"reduction": "none"}, ValueError, 'Expected reduction to be "sum" or "mean"'),
    (tcrm_loss, GRIDS, {"cu_seqlens_chosen": HOLE}, ValueError, "one run of tokens in each row, got holes in row 0"),
    (tcrm_loss, GRIDS, {"cu_seqlens_rejected": EMPTY}, ValueError, "rejected to be True at one run of tokens"),
    (tcrm_loss, GRIDS, {"cu_seqlens_chosen": MASK.int()}, TypeError, "dtype torch.bool for padded values, got"),
    (tcrm_loss, GRIDS, {"cu_seqlens_chosen": MASK.T}, ValueError, "of shape (2, 3), got (3, 2)"),
    (tcrm_loss, GRIDS, {k: v[:0] for k, v in GRIDS.items()}, ValueError, "of at least one text and token, got (0, 3)"),
    (linear_value_loss, HEAD, {"hidden": V}, ValueError, "of shape (N, d) or (2 B, T, d), got (6,)"),
    (linear_value_loss, HEAD, {"weight": torch.ones(2, 4)}, ValueError, "of shape (1, 4) or (4,), got (2, 4)"),
    (linear_value_loss, HEAD, {"cu_seqlens": CU[[0, 2]]}, ValueError, "an even number of texts"),
    (linear_value_loss, HEAD, {"norm": "batch"}, ValueError, "Expected norm to be None"),
    (tcrm, OP, {"bounds": OP["bounds"].int()}, TypeError, "Expected bounds to have dtype torch.int64"),
    (tcrm, OP, {"bounds": OP["bounds"][:, :0]}, ValueError, "of shape (4, B) with B >= 1"),
    (tcrm, OP, {"bounds": OP["bounds"] + 1}, ValueError, "got tokens 3 up to 7 for response 1"),
    (tcrm, OP, {"chosen": V[:1]}, ValueError, "at least one token for each of the 2 pairs, got 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    "function,valid,change,kind,message", TCRM_ERRORS, ids=[f"{e[0].__name__} {e[4]}" for e in TCRM_ERRORS]
)
def test_bad_input_of_tcrm_names_the_argument(function, valid, change, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        function(**(valid | change))


# ------------------------------------------------------------------------------------------------------------- MMD


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
        counts = (_median_rows(rows, torch.device("cpu")) % period).bincount()
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
    ({"kernel": "laplace"}, ValueError, "Expected kernel to be \"rbf\", got 'laplace'"),
    ({"bandwidth": "mean"}, ValueError, 'Expected bandwidth to be "median", a number or several'),
    ({"bandwidth": 0.0}, ValueError, "Expected bandwidth to be finite and above 0, got 0.0"),
    ({"bandwidth": [1.0, float("inf")]}, ValueError, "Expected bandwidth to be finite and above 0, got inf"),
    ({"bandwidth": []}, ValueError, 'Expected bandwidth to be "median", a number or several, got []'),
    ({"bandwidth": None}, TypeError, 'Expected bandwidth to be "median", a float or floats, got NoneType'),
    ({"gather": True}, ValueError, "Expected torch.distributed to be initialised for gather"),
]


@pytest.mark.parametrize("change,kind,message", MMD_ERRORS, ids=[error[2] for error in MMD_ERRORS])
def test_bad_input_of_mmd_names_the_argument(change, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        binned_mmd(**(MMD | change))


# --------------------------------------------------------------------------------------------------- plain PyTorch


def test_bins_have_equal_sizes_where_no_value_is_repeated():
    z = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    bins = bin_factor(z, 8)
    assert torch.equal(bins.bincount(), torch.full((8,), 125))
    assert torch.equal(bins[z.argsort()], torch.arange(8).repeat_interleave(125))


def test_equal_values_share_the_bin_of_the_first_of_them():
    assert bin_factor(torch.tensor([5.0, 1.0, 5.0, 5.0, 9.0, 10.0]), 3).tolist() == [0, 0, 0, 0, 2, 2]
    assert bin_factor(torch.tensor([7, 7, 7]), 5).tolist() == [0, 0, 0]


def test_a_factor_of_few_values_has_a_bin_for_each_and_nan_is_the_largest():
    assert bin_factor(torch.tensor([1, 0, 1, 1, 1]), 2).tolist() == [1, 0, 1, 1, 1]
    assert bin_factor(torch.tensor([3, 1, 2]), 6).tolist() == [2, 0, 1]
    assert bin_factor(torch.tensor([torch.nan, 0.0, 1.0, torch.nan]), 4).tolist() == [2, 0, 1, 2]
    assert bin_factor(torch.tensor([torch.nan, 0.0, 1.0, 2.0, torch.nan]), 3).tolist() == [1, 0, 0, 1, 1]


def test_bradley_terry_is_the_mean_of_its_formula():
    chosen, rejected, margin = (normal(2, 6, seed=seed) for seed in range(3))
    want = -(1 / (1 + torch.exp(-(chosen - rejected)))).log().mean()
    torch.testing.assert_close(bradley_terry(chosen, rejected), want)
    want = -(1 / (1 + torch.exp(-(chosen - rejected - margin)))).log().mean()
    torch.testing.assert_close(bradley_terry(chosen, rejected, margin), want)
    want = want + 0.01 * ((chosen + rejected) ** 2).mean()
    torch.testing.assert_close(bradley_terry(chosen, rejected, margin, 0.01), want)
    torch.testing.assert_close(bradley_terry(chosen, rejected, 0.5), bradley_terry(chosen - 0.5, rejected))


def test_bradley_terry_passes_gradcheck_and_computes_in_fp32():
    inputs = [normal(5, seed=seed).requires_grad_() for seed in range(2)]
    assert torch.autograd.gradcheck(lambda c, r: bradley_terry(c, r, 0.3, 0.1), inputs)
    chosen, rejected = (v.bfloat16() for v in inputs)
    assert torch.equal(bradley_terry(chosen, rejected), bradley_terry(chosen.float(), rejected.float()))


def test_the_correlation_penalty_is_pearsons_and_passes_gradcheck():
    x, z = normal(30).requires_grad_(), normal(30, seed=1).exp()
    torch.testing.assert_close(correlation_penalty(x, z), torch.corrcoef(torch.stack((x, z)))[0, 1].abs())
    torch.testing.assert_close(correlation_penalty(x, 3 - 2 * x.detach()), torch.tensor(1.0, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda v: correlation_penalty(v, z), x)
    assert correlation_penalty(x.bfloat16(), torch.arange(30)).dtype == torch.float32


@pytest.mark.parametrize("scale, shift", [(1e25, 0), (1e-25, 0), (1, 2**40)])
def test_the_correlation_penalty_does_not_depend_on_the_factor_s_unit(scale, shift):
    x, z = normal(30).float(), torch.arange(30)
    other = shift + z if scale == 1 else scale * z.double()
    torch.testing.assert_close(correlation_penalty(x, other), correlation_penalty(x, z))


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_the_correlation_penalty_of_constants_is_zero_with_a_zero_gradient(constant):
    for x, z in ((torch.full((7,), constant), torch.arange(7)), (torch.arange(7.0), torch.full((7,), constant))):
        x = x.requires_grad_()
        got = correlation_penalty(x, z)
        got.backward()
        assert got == 0 and (x.grad == 0).all()


def test_the_correlation_penalty_of_nan_is_nan():
    assert correlation_penalty(torch.tensor([1.0, torch.nan, 2.0]), torch.arange(3)).isnan()


PLAIN_ERRORS = [
    (lambda: bradley_terry(X, X[:3]), ValueError, "Expected rejected to be of shape (4,), got (3,)"),
    (lambda: bradley_terry(X, X, X[:3]), ValueError, "Expected margin to be of shape (4,), got (3,)"),
    (lambda: bradley_terry(X, X, center=-1.0), ValueError, "Expected center to be at least 0, got -1.0"),
    (lambda: bradley_terry(X[:0], X[:0]), ValueError, "Expected chosen to be at least one reward"),
    (lambda: bradley_terry(BINS, BINS), TypeError, "Expected chosen to have dtype float64"),
    (lambda: correlation_penalty(X, BINS[:3]), ValueError, "Expected factor to be of shape (4,), got (3,)"),
    (lambda: correlation_penalty(X[:0], X[:0]), ValueError, "Expected x to be of shape (N,) with N >= 1"),
    (lambda: correlation_penalty(X, [1.0]), TypeError, "Expected factor to be a torch.Tensor, got list"),
    (lambda: correlation_penalty(X, X.to(torch.complex64)), TypeError, "Expected factor to have a real dtype"),
    (lambda: bin_factor(X, 0), ValueError, "Expected n to be at least 1, got 0"),
    (lambda: bin_factor(X, 2.0), TypeError, "Expected n to be an int, got float"),
    (lambda: bin_factor(X[:0], 2), ValueError, "Expected z to be of shape (N,) with N >= 1"),
    (lambda: bin_factor(X > 0, 2), TypeError, "Expected z to have a real dtype, got torch.bool"),
]


@pytest.mark.parametrize("call,kind,message", PLAIN_ERRORS, ids=[error[2] for error in PLAIN_ERRORS])
def test_bad_input_of_the_plain_losses_names_the_argument(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()
