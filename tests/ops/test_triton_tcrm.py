"""tcrm in Triton: the claims of test_tcrm.py in the interpreter, or the kernels compiled ahead of time.

On a GPU the kernels run in test_tcrm.py, among the other backends.
"""

from __future__ import annotations

import pytest
import test_tcrm as contract
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

CLAIMS = [
    contract.test_the_final_value_gets_its_gradient_from_bradley_terry_alone,
    contract.test_responses_of_one_token_have_bradley_terry_only,
    contract.test_tokens_before_the_response_have_no_part,
    contract.test_nan_reaches_the_loss_and_the_gradients_of_its_own_pair,
    contract.test_final_values_far_apart_neither_overflow_nor_vanish,
]


@interpreted
@pytest.mark.parametrize("margin", [False, True], ids=["", "margin"])
@contract.sum_and_mean
@every_dtype
def test_tcrm_is_the_papers_formula_with_its_gradient(dtype, reduction, margin, use_backend, poisoned):
    contract.test_tcrm_is_the_papers_formula_with_its_gradient(TRITON, dtype, reduction, margin, use_backend, poisoned)


@interpreted
@pytest.mark.parametrize("test", CLAIMS)
def test_tcrm(test, use_backend):
    test(TRITON, use_backend)


@interpreted
@contract.sum_and_mean
def test_tcrm_of_padded_values(reduction, use_backend):
    contract.test_padding_at_either_side_changes_nothing(TRITON, reduction, use_backend)


@interpreted
def test_ranges_outside_of_the_values_give_nan_and_are_not_read():
    from rmfast.kernels.tcrm import triton as kernels

    for first, end in (([0, 2], [2, 9]), ([0, 2], [2, 2]), ([0, -2], [2, 5])):
        bounds = torch.tensor([first, end, [0, 3], [3, 5]])
        args = torch.ones(8)[:5], torch.zeros(8)[:5], bounds, None, 0.1, 0.01, True
        loss, terms = kernels.forward(*args)
        assert loss.isnan() and terms[0].isnan()
        _, rejected = kernels.backward(torch.ones(()), *args)
        assert rejected[4].isnan() and rejected[:4].isfinite().all()


def tcrm_call(dtype, margin: bool, backward: bool = False):
    from rmfast.kernels.tcrm import triton as kernels

    values, bounds = torch.zeros(100, dtype=dtype), torch.zeros(4, 3, dtype=torch.int64)
    args = values, values, bounds, torch.zeros(3) if margin else None, 0.1, 0.01, True
    if backward:
        return lambda: kernels.backward(torch.ones(()), *args)
    return lambda: kernels.forward(*args)


LAUNCHES = {
    "tcrm bf16": lambda: tcrm_call(torch.bfloat16, False),
    "tcrm fp16 margin": lambda: tcrm_call(torch.float16, True),
    "tcrm fp32 margin": lambda: tcrm_call(torch.float32, True),
    "tcrm backward bf16": lambda: tcrm_call(torch.bfloat16, False, True),
    "tcrm backward fp32 margin": lambda: tcrm_call(torch.float32, True, True),
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
