"""What tests share: a backend to run on; poisoned memory for op tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from functools import partial

import numpy as np
import pytest
import torch

import rmfast


@pytest.fixture
def use_backend(monkeypatch):
    """Runs the rest of a test on (device, backend, ISA); gives the device."""
    import contextlib

    with contextlib.ExitStack() as stack:

        def use(param: tuple[str, str, str | None]) -> str:
            device, name, isa = param
            if isa is not None:
                monkeypatch.setenv("RMFAST_CPU_ISA", isa)
                if rmfast.backends.cpu_isa() is None:
                    pytest.skip(f"this CPU has no {isa}")
            stack.enter_context(rmfast.backend(name))
            return device

        yield use


@pytest.fixture
def poisoned(monkeypatch):
    """`torch.empty` and friends come back full of NaN, so that an element nobody wrote shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def figures_are_closed():
    """No test sees the figures of the one before it."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def _dot(self, a, b, d, *precision):
    x, y, out = a.data.astype(d.data.dtype), b.data.astype(d.data.dtype), np.zeros_like(d.data)
    for k in range(x.shape[-1]):
        out += x[..., k, None] * y[..., k, None, :]
    return type(d)(out + d.data, d.dtype.scalar)


@pytest.fixture(autouse=True, scope="session")
def dot_of_one_order():
    """`tl.dot` in Triton's interpreter adds its products one after the other, for each element alike.

    The interpreter's own is NumPy's matmul: there the host's BLAS rules whether a row has the same bits in any batch
    (OpenBLAS's kernels for AVX2 add up the last rows of a block in another order), not the kernel under test.
    """
    if not os.environ.get("TRITON_INTERPRET") or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", _dot)
        yield


def pytest_configure(config):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Inductor's cache does not tell instruction sets apart: code made under ATEN_CPU_CAPABILITY=avx2 is later run as
    # AVX-512 and writes behind its buffers.
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="rmfast-inductor-")
        config.add_cleanup(partial(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True))
