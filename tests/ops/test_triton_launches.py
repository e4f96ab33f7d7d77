"""Every Triton launcher on fake CUDA tensors and a driver that only writes down: grids, arguments, devices, streams."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", minversion="3.6")
if triton.knobs.runtime.interpret:
    pytest.skip("launches kernels, so it needs a process without TRITON_INTERPRET=1", allow_module_level=True)

from calls import CALLS, DIFFERENTIABLE, Given, Recorded, gradients, module_of, numbers_of  # noqa: E402
from fakes import devices, fake_tensors, looks, on_gpu  # noqa: E402
from stub_driver import Driver, stubbed  # noqa: E402

from rmfast import backends  # noqa: E402
from rmfast.kernels.binned_mmd import reference as binned_mmd  # noqa: E402
from rmfast.kernels.launch import cdiv, power_of_2  # noqa: E402
from rmfast.kernels.token_wise import triton as token_wise  # noqa: E402

SECOND = torch.device("cuda:1")
LAUNCHED = [name for name, (op, _) in CALLS.items() if op != "linear"]  # which has no kernel in Triton


def assert_sound(driver: Driver) -> None:
    """Launches that a GPU takes, on the device of their tensors and its stream, with the current one as before."""
    assert driver.device == 0
    for launch in driver.launches:
        assert (launch.device, launch.stream) == (1, 1), launch.kernel
        tensors = [x for x in launch.arguments if isinstance(x, Tensor)]
        assert tensors and devices(tensors) == {SECOND}, launch.kernel
        x, *rest = launch.grid
        assert 1 <= x < 2**31 and all(1 <= y <= 65535 for y in rest), launch


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launcher_gives_what_the_fake_says(name, monkeypatch):
    op, call = CALLS[name]
    made = numbers_of(call)
    with fake_tensors(), stubbed() as driver, backends.backend("triton"):
        tensors = on_gpu(made, "cuda:1")
        want = call(Given(tensors))
        assert not driver.launches
        monkeypatch.setattr(module_of(op), "direct", lambda args: True)
        monkeypatch.setattr(binned_mmd, "cancels", lambda *args: False)  # a fake tensor can't be read
        got = call(Given(tensors))
        assert looks(got) == looks(want) and devices(got) == devices(want) == {SECOND}
    assert driver.launches
    assert_sound(driver)


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name in LAUNCHED])
def test_a_launcher_of_a_gradient_gives_what_the_fake_says(name):
    op, call = CALLS[name]
    made = numbers_of(call)
    with fake_tensors(), stubbed() as driver, backends.backend("triton"):
        with Recorded() as recorded:
            gradients(name, on_gpu(made, "cuda:1"))
        backward = [seen for seen in recorded.calls if seen[0] == f"{op}_backward"]
        assert backward and not driver.launches
        for called, inputs, want in backward:
            got = getattr(module_of(op), f"_{called}")(*inputs)
            assert looks(got) == looks(want) and devices(got) == {SECOND}
    assert driver.launches or op == "binned_mmd"  # whose forward has made the gradient
    assert_sound(driver)


def test_sizes_are_rounded_up_as_triton_does():
    sizes = [*range(1, 70), 2**31 - 1, 2**31, 2**31 + 1]
    assert [power_of_2(size) for size in sizes] == [triton.next_power_of_2(size) for size in sizes]
    assert [cdiv(size, 16) for size in (0, *sizes)] == [triton.cdiv(size, 16) for size in (0, *sizes)]


def test_a_second_call_compiles_nothing():
    _, call = CALLS["rms_norm"]
    made = numbers_of(call)
    with fake_tensors(), stubbed() as driver:
        x, weight = on_gpu(made)
        for _ in range(3):
            token_wise.rms_norm(x[0], weight, None, None, 1e-5, False)
    assert (len(driver.compiled), len(driver.launches)) == (1, 3)
