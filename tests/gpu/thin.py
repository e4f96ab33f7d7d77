"""A pytest plugin: of the tests that need a GPU, a few parameters of each, as time there is short.

`--thin N` keeps N of each function's, spread over all, and leaves out what runs without a GPU as well. A kernel that
faults makes every later call of its process fail: so the likelier ones come last, and a worker that lost its GPU ends,
in whose place xdist starts another.
"""

from __future__ import annotations

import os
from collections import defaultdict

import pytest
import torch

# They compile, or launch on a driver that only writes down.
WITHOUT_A_GPU = ("test_triton_compile.py", "test_triton_launches.py", "test_triton_specialisation.py")


def pytest_addoption(parser):
    parser.addoption("--thin", type=int, default=0, metavar="N", help="N parameters of each GPU test alone")


def needs_a_gpu(item) -> bool:
    # The Triton kernels' own tests run on a GPU where there is one; what they compile for others needs none.
    own = item.path.name.startswith("test_triton_") and item.path.name not in WITHOUT_A_GPU
    return "gpu" in item.keywords or (own and "compile" not in item.name)


def kept(items: list, count: int) -> list:
    groups = defaultdict(list)
    for item in items:
        if needs_a_gpu(item):
            # A backend is a parameter too: some of each.
            backend = next((name for name in ("cuda-cuda", "cuda-triton", "cuda-eager") if name in item.name), "")
            groups[item.path, item.originalname, backend].append(item)
    few = []
    for group in groups.values():
        step = max(1, (len(group) - 1) / max(1, count - 1))
        few += [group[i] for i in sorted({min(len(group) - 1, round(step * n)) for n in range(count)})]
    return sorted(few, key=risk)


def risk(item) -> int:
    """Triton checks its kernels' addresses and barriers as it makes them, nobody those of CUDA C++."""
    return 2 if "wgmma" in item.name else int("cuda-cuda" in item.name or item.path.name.startswith("test_cuda_"))


def gpu_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    # The test's own report is sent by now.
    if hasattr(item.config, "workerinput") and torch.cuda.is_initialized() and gpu_is_lost():
        os._exit(1)


def pytest_collection_modifyitems(config, items):
    count = config.getoption("thin")
    if count:
        few = kept(items, count)
        chosen = {item.nodeid for item in few}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
        items[:] = few
