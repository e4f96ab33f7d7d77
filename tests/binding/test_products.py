"""Linear maps of rows: the product of few and of many outputs, with a row's bits its own."""

from __future__ import annotations

import models as M
import pytest
import torch

import rmfast
from rmfast.binding.products import is_product, row_product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("outputs", [3, 64, 200])
def test_a_row_has_the_same_bits_in_any_company(outputs, dtype):
    draw = torch.Generator().manual_seed(outputs)
    x = torch.randn(50, 48, generator=draw).to(dtype)
    weight, bias = (torch.randn(*size, generator=draw).to(dtype) for size in ((outputs, 48), (outputs,)))
    together = row_product(x, weight, bias)
    assert together.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = x.double() @ weight.double().T + bias.double()
    assert (together.double() - wide).abs().max() <= 1e-5 * wide.abs().max()
    for some in (slice(0, 1), slice(7, 29)):
        assert torch.equal(row_product(x[some], weight, bias), together[some])
    torch.testing.assert_close(row_product(x.unflatten(0, (5, 10)), weight, bias).flatten(0, 1), together)


def test_many_outputs_go_another_way_only_where_that_promises_a_rows_bits():
    weight = torch.zeros(64, 48)
    assert is_product(weight, torch.device("cpu"), torch.bfloat16) == (rmfast.backends.runs("linear", "cpu") == "cpp")
    assert not is_product(weight[:63], torch.device("cpu"), torch.float32)
    assert not is_product(weight, torch.device("cpu"), torch.float64)
    with rmfast.backend("eager"):
        assert not is_product(weight, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_final_norm_is_that_of_a_few_outputs(family, dtype):
    rm = rmfast.RewardModel(M.decoder(family).to(dtype))
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 20, 48, generator=draw).to(dtype)
    weight, rows = torch.randn(100, 48, generator=draw), torch.tensor([19, 0, 3])
    with rm.binding.session():
        many = rm.binding.linear(hidden, rows, weight, None)
        few = torch.cat([rm.binding.linear(hidden, rows, some, None) for some in weight.split(50)], 1)
    torch.testing.assert_close(many, few, rtol=1e-5, atol=1e-5 * float(few.abs().max()))


def test_gradients_are_those_of_the_plain_product():
    x = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(70, 8)
    (row_product(x, weight).square().sum()).backward()
    wanted = 2 * (x.detach() @ weight.T) @ weight
    torch.testing.assert_close(x.grad, wanted, rtol=1e-4, atol=1e-3)
