"""Functions of rows: right, differentiable, and each row's bits its own."""

from __future__ import annotations

import pytest
import torch

from rmfast.heads import rowwise
from rmfast.heads.linear import ACTIVATIONS

FUNCTIONS = {**ACTIVATIONS, "exp": torch.exp, "sigmoid": torch.sigmoid, "tanh": torch.tanh}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_has_the_same_bits_wherever_it_stands(name, dtype):
    x = torch.randn(1001, 19, dtype=dtype)
    together = rowwise.each(FUNCTIONS[name], x)
    torch.testing.assert_close(together, FUNCTIONS[name](x))
    for some in (slice(0, 1), slice(3, 20), slice(500, 1001)):
        assert torch.equal(rowwise.each(FUNCTIONS[name], x[some]), together[some])


@pytest.mark.parametrize("columns", [1, 2, 10, 19, 65])
def test_softmax_and_total_are_row_by_row(columns):
    x = torch.randn(300, columns)
    for function, plain in ((rowwise.softmax, lambda x: x.softmax(-1)), (rowwise.total, lambda x: x.sum(-1))):
        torch.testing.assert_close(function(x), plain(x))
        assert torch.equal(function(x)[7:9], function(x[7:9]))


def test_gradients_are_those_of_the_plain_functions():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 7, dtype=torch.float64)
    for function in (
        rowwise.softmax,
        rowwise.total,
        lambda x: rowwise.linear(x, w),
        lambda x: rowwise.each(torch.tanh, x),
    ):
        assert torch.autograd.gradcheck(function, x)
