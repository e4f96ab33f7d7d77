"""binned_mmd in Triton: the claims of test_binned_mmd.py in the interpreter, or the kernels compiled ahead of time.

On a GPU the kernels run in test_binned_mmd.py, among the other backends.
"""

from __future__ import annotations

import pytest
import test_binned_mmd as contract
import torch

triton = pytest.importorskip("triton", minversion="3.6")

INTERPRETED = triton.knobs.runtime.interpret
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 for Triton's interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="compiles kernels, so it needs a process without TRITON_INTERPRET=1")
# NaN and infinity are right answers.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TRITON = ("cpu", "triton", None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@interpreted
@pytest.mark.parametrize("features", [None, 1, 5, 48])
@contract.every_mmd_option
@every_dtype
def test_mmd_is_the_papers_sum_over_pairs_of_bins_with_its_gradient(dtype, options, features, use_backend, poisoned):
    contract.test_mmd_is_the_papers_sum_over_pairs_of_bins_with_its_gradient(
        TRITON, dtype, options, features, use_backend, poisoned
    )


@interpreted
@pytest.mark.parametrize("features", [None, 2])
def test_mmd_of_many_tiles(features, use_backend):
    contract.test_mmd_of_many_tiles(TRITON, "grouped unbiased", features, use_backend)


@interpreted
@pytest.mark.parametrize("far", ["a row", "half of the rows", "beyond fp32's squares"])
def test_representations_many_bandwidths_away_cost_the_others_no_accuracy(far, use_backend):
    contract.test_representations_many_bandwidths_away_cost_the_others_no_accuracy(TRITON, far, True, use_backend)


@interpreted
@pytest.mark.parametrize("features", [None, 3])
def test_nan_makes_mmd_nan(features, use_backend):
    contract.test_nan_makes_mmd_nan(TRITON, features, use_backend)


@interpreted
def test_fewer_than_two_bins_give_zero(use_backend):
    contract.test_fewer_than_two_bins_give_zero(TRITON, use_backend)


def mmd_call(features: int, bandwidths: int, need_grad: bool = True):
    from rmfast.kernels.binned_mmd import triton as kernels

    rows, ranges = torch.zeros(100), torch.zeros(4, 100, dtype=torch.int64)
    args = torch.zeros(100, features), ranges, rows, rows, torch.zeros(bandwidths), need_grad
    return lambda: kernels.forward(*args)


LAUNCHES = {
    "mmd": lambda: mmd_call(1, 1),
    "mmd, 5 bandwidths": lambda: mmd_call(1, 5),
    "mmd without gradient": lambda: mmd_call(1, 1, False),
    "mmd of representations": lambda: mmd_call(8, 1),
    "mmd of representations, 5 bandwidths": lambda: mmd_call(8, 5),
}


@compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_kernels_compile_fit_and_do_not_spill(launch, capability, tmp_path):
    from aot import SHARED, build, launches

    got = build(launches(LAUNCHES[launch]())[0], capability, tmp_path)
    print(launch, got)
    assert got.shared <= SHARED[capability], got
    assert got.spills == 0, got
