"""The losses in plain PyTorch: their formulas, gradients, errors."""

from __future__ import annotations

import re

import pytest
import torch
from losses import normal

from rmfast.losses import bin_factor, bradley_terry, correlation_penalty


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


X, BINS = torch.zeros(4), torch.tensor([0, 0, 1, 1])
PLAIN_ERRORS = [
    (lambda: bradley_terry(X, X[:3]), ValueError, "Expected rejected to be of shape (4,), got (3,)"),
    (lambda: bradley_terry(X, X, X[:3]), ValueError, "Expected margin to be of shape (4,), got (3,)"),
    (
        lambda: bradley_terry(X, X, center=-1.0),
        ValueError,
        "Expected center to be a finite number of at least 0, got -1.0",
    ),
    (lambda: bradley_terry(X[:0], X[:0]), ValueError, "Expected chosen to be at least one reward"),
    (lambda: bradley_terry(BINS, BINS), TypeError, "Expected chosen to have dtype float64"),
    (lambda: correlation_penalty(X, BINS[:3]), ValueError, "Expected factor to be of shape (4,), got (3,)"),
    (lambda: correlation_penalty(X[:0], X[:0]), ValueError, "Expected x to be of shape (N,) with N >= 1"),
    (lambda: correlation_penalty(X, [1.0]), TypeError, "Expected factor to be a torch.Tensor, got list"),
    (lambda: correlation_penalty(X, X.to(torch.complex64)), TypeError, "Expected factor to have a real dtype"),
    (lambda: bin_factor(X, 0), ValueError, "Expected n to be a positive int, got 0"),
    (lambda: bin_factor(X, 2.0), TypeError, "Expected n to be a positive int, got 2.0"),
    (lambda: bin_factor(X[:0], 2), ValueError, "Expected z to be of shape (N,) with N >= 1"),
    (lambda: bin_factor(X > 0, 2), TypeError, "Expected z to have a real dtype, got torch.bool"),
]


@pytest.mark.parametrize("call,kind,message", PLAIN_ERRORS, ids=[error[2] for error in PLAIN_ERRORS])
def test_bad_input_of_the_plain_losses_names_the_argument(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()
