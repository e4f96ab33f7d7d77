"""The op tcrm: every backend against the paper's formula written out in fp64, gradients, layouts, errors."""

from __future__ import annotations

import re

import pytest
import torch
from losses import TERMS, close, ends, every_dtype, every_tcrm, normal, sum_and_mean, written_out
from torch import Tensor
from torch.nn.functional import logsigmoid
from ways import backends_of

from rmfast.losses import linear_value_loss, tcrm_loss
from rmfast.ops import reward_head, tcrm

LENGTHS = ([5, 1, 40, 2, 1100], [1, 7, 33, 1, 17])  # one longer than the 1,024 tokens that C++ and Triton sum at a time


def pair_of_values(dtype=torch.float64, device="cpu", lengths=LENGTHS) -> list[Tensor]:
    """Values of all tokens, between NaN."""
    out = []
    for seed, sizes in enumerate(lengths):
        buffer = torch.full((sum(sizes) + 10,), torch.nan, dtype=dtype)
        buffer[3:-7] = 2 * normal(sum(sizes), seed=seed, dtype=dtype)
        out.append(buffer.to(device)[3:-7])
    return out


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
    (tcrm_loss, RAGGED, {"values_chosen": V.int()}, TypeError, "Expected values_chosen to have dtype float64"),
    (tcrm_loss, RAGGED, {"values_rejected": V.half()}, TypeError, "Expected values_rejected to have dtype torch.fl"),
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
