"""patch_rows in Triton: the claims of test_patch_rows.py in the interpreter, or the kernel compiled ahead of time.

On a GPU the kernel runs in test_patch_rows.py, among the other backends.
"""

from __future__ import annotations

import re

import pytest
import test_patch_rows as contract
import torch

triton = pytest.importorskip("triton", minversion="3.6")

from rmfast.kernels.patch_rows import triton as kernels  # noqa: E402
from rmfast.kernels.token_wise import triton as token_wise  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1, in a process of its own")
compiled = pytest.mark.skipif(INTERPRETED, reason="compiles kernels, so it needs a process without TRITON_INTERPRET=1")
# NaN and infinity are right answers.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TRITON = ("cpu", "triton", None)


@interpreted
@contract.llama_and_gemma
@contract.every_dtype
def test_rows_are_copied_and_their_norm_agrees_with_fp64(dtype, gemma, use_backend, poisoned):
    contract.test_rows_are_copied_and_their_norm_agrees_with_fp64(TRITON, dtype, gemma, use_backend, poisoned)


@interpreted
@contract.llama_and_gemma
@contract.every_dtype
def test_the_norm_has_the_bits_of_the_op_rms_norm(dtype, gemma, use_backend):
    contract.test_the_norm_has_the_bits_of_the_op_rms_norm(TRITON, dtype, gemma, use_backend)


@interpreted
@pytest.mark.parametrize(
    "test",
    [
        contract.test_copies_keep_every_bit,
        contract.test_a_row_has_the_same_bits_alone_and_in_any_batch_and_alignment,
        contract.test_a_row_too_long_for_registers_is_normed_too,
    ],
)
@contract.every_dtype
def test_every_dtype(test, dtype, use_backend):
    test(TRITON, dtype, use_backend)


@interpreted
@pytest.mark.parametrize(
    "test",
    [
        contract.test_a_weight_of_another_dtype_leaves_the_dtype_of_the_rows,
        contract.test_a_non_finite_row_changes_no_other,
        contract.test_without_values_or_rows_or_both,
        contract.test_rows_of_any_stride_are_read,
    ],
)
def test_one_dtype(test, use_backend):
    test(TRITON, use_backend)


@interpreted
def test_what_is_out_of_range_gives_nan_in_its_own_row_only_and_is_not_read():
    contract.check_nan_in_its_own_row_only(kernels.patch_rows)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
LAUNCHES = [
    ("bf16", 576),
    ("bf16", 1025),
    ("bf16", 16384),
    ("fp16", 3584),
    ("fp32", 59),
    ("fp32", 16384),
    ("fp64", 8192),
]


def patch_launch(dtype, d: int, n: int = 512, gemma: bool = False) -> tuple:
    from aot import launches

    rows, index = torch.empty(64, d, dtype=dtype), torch.zeros(n, dtype=torch.int64)
    call = lambda: kernels.patch_rows(rows, rows, index, index, rows[0].clone(), 1e-6, gemma)  # noqa: E731
    return launches(call)[0]


@compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("name", "d"), LAUNCHES)
def test_kernels_compile_fit_and_do_not_spill(name, d, capability, tmp_path):
    from aot import SHARED, build

    got = build(patch_launch(DTYPES[name], d, gemma=d == 3584), capability, tmp_path)
    print(name, d, got)
    assert got.shared <= SHARED[capability], got
    assert got.spills == 0, got
    if d % 8 == 0 and name != "fp64":
        assert "ld.global.v4.b32" in got.ptx and set(re.findall(r"st\.global\S*", got.ptx)) == {"st.global.v4.b32"}


def reduced_layout(ttgir: str) -> str:
    """Which thread holds which element of the tile that is summed: with it, the order of the sum is fixed."""
    alias = re.search(r'"tt\.reduce".*?\}\) : \(tensor<\S+, (#\w+)>', ttgir, re.DOTALL)
    assert alias is not None
    layout = re.search(rf"^{alias[1]} = (.*)$", ttgir, re.MULTILINE)
    assert layout is not None
    return layout[1]


@compiled
@pytest.mark.parametrize(("name", "d"), [("bf16", 576), ("bf16", 1025), ("fp32", 59), ("fp64", 8192)])
def test_the_sum_of_a_row_has_the_layout_of_rms_norm(name, d, tmp_path):
    from aot import build, launches

    x = torch.empty(512, d, dtype=DTYPES[name])
    call = lambda: token_wise.rms_norm(x, x[0].clone(), None, None, 1e-6, False)  # noqa: E731
    norm = build(launches(call)[0], 90, tmp_path)
    ours = build(patch_launch(DTYPES[name], d), 90, tmp_path)
    assert reduced_layout(ours.ttgir) == reduced_layout(norm.ttgir)


@compiled
def test_launches_do_not_depend_on_the_number_of_rows():
    options = [patch_launch(torch.bfloat16, 64, n=n)[2] for n in (1, 2, 50_000)]
    assert all(other == options[0] for other in options)
