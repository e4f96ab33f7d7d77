"""Every op on fake CUDA tensors, which no GPU need hold: shapes, dtypes and devices, gradients, graphs and launches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from calls import CALLS, DIFFERENTIABLE, Given, Numbers, gradients, numbers_of
from fakes import devices, fake_tensors, looks, on_gpu
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from rmfast import ops

every_call = pytest.mark.parametrize("name", CALLS)


@pytest.fixture
def fake() -> Iterator[None]:
    with fake_tensors():
        yield


def test_every_public_op_is_called():
    assert {op for op, _ in CALLS.values()} == set(ops.__all__)


@every_call
def test_a_fake_result_looks_like_a_real_one(name, fake):
    _, call = CALLS[name]
    with unset_fake_temporarily():
        numbers = Numbers()
        real = call(numbers)
    got = call(Given(on_gpu(numbers.made)))
    assert looks(got) == looks(real)
    assert devices(got) == {torch.device("cuda:0")}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_fake_gradient_looks_like_a_real_one_and_like_its_input(name, fake):
    made = numbers_of(CALLS[name][1])
    with unset_fake_temporarily():
        _, real = gradients(name, made)
    inputs, got = gradients(name, on_gpu(made))
    assert looks(list(got)) == looks(list(real))
    assert any(x is not None for x in got) and devices([x for x in got if x is not None]) == {torch.device("cuda:0")}
    for value, grad in zip(inputs, got, strict=True):
        assert grad is None or (grad.shape, grad.dtype) == (value.shape, value.dtype)


@every_call
def test_exports_whole_with_the_same_numbers(name):
    _, call = CALLS[name]
    tensors = numbers_of(call)

    class Called(torch.nn.Module):
        def forward(self, *tensors):
            return call(Given(tensors))

    with torch.no_grad():
        want = tree_leaves(call(Given(tensors)))
        program = torch.export.export(Called(), tuple(tensors))
        got = tree_leaves(program.module()(*tensors))
    assert sum(str(node.target).startswith("rmfast.") for node in program.graph.nodes) == 1
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@every_call
def test_compiles_whole_with_the_same_numbers(name):
    _, call = CALLS[name]
    tensors = numbers_of(call)
    torch._dynamo.reset()  # one more function of the same code

    @torch.compile(fullgraph=True, backend="aot_eager")
    def called(*tensors):
        return call(Given(tensors))

    want, got = tree_leaves(call(Given(tensors))), tree_leaves(called(*tensors))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
