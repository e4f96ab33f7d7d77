"""The Triton kernels, as the launchers launch them, compiled ahead of time for GPUs that need not be here."""

from __future__ import annotations

import re

import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.6")
if triton.knobs.runtime.interpret:
    pytest.skip("compiles kernels, so it needs a process without TRITON_INTERPRET=1", allow_module_level=True)

from aot import SHARED, build, launches  # noqa: E402

from rmfast.kernels.reward_head import reference  # noqa: E402
from rmfast.kernels.reward_head import triton as kernels  # noqa: E402


def forward(dtype, d, heads, directions=0, norm=reference.RMS, index=False, rows=False, bias=True, tokens=512):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    matrix = lambda *shape: torch.empty(shape, dtype=acc)  # noqa: E731
    some = directions > 0
    return lambda: kernels.forward(
        torch.empty(2, tokens, d, dtype=dtype), matrix(heads, d), matrix(heads) if bias else None, norm,
        None if norm == reference.NONE else matrix(d), matrix(d) if norm == reference.LAYER else None, 1e-6,
        torch.zeros(8, dtype=torch.int64) if rows else None, matrix(directions, d) if some else None,
        matrix(4, directions) if some else None, matrix(4, directions) if some else None,
        torch.zeros(8 if rows else 2 * tokens, dtype=torch.int64) if index else None,
    )  # fmt: skip


def backward(dtype, d, heads, norm=reference.RMS, tokens=512):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return lambda: kernels.backward(
        torch.empty(2 * tokens, heads, dtype=acc), torch.empty(2, tokens, d, dtype=dtype),
        torch.empty(heads, d, dtype=acc), norm, None if norm == reference.NONE else torch.empty(d, dtype=acc), 1e-6,
        None, True, True,
    )  # fmt: skip


CALLS = {
    "K=1": forward(torch.bfloat16, 4096, 1),
    "K=1 fp16 gemma": forward(torch.float16, 3584, 1, norm=reference.GEMMA_RMS),
    "K=1 fp32": forward(torch.float32, 2048, 1),
    "K=1 fp64 layer": forward(torch.float64, 1024, 1, norm=reference.LAYER),
    "K=8": forward(torch.bfloat16, 2048, 8),
    "K=8 fp32 layer": forward(torch.float32, 2048, 8, norm=reference.LAYER),
    "K=5 odd d": forward(torch.bfloat16, 1025, 5, norm=reference.LAYER),
    "K=2 J=2 rows index": forward(torch.bfloat16, 2048, 2, 2, index=True, rows=True),
    "K=1 J=1 layer": forward(torch.bfloat16, 1024, 1, 1, norm=reference.LAYER),
    "K=16 J=32": forward(torch.bfloat16, 2048, 16, 32),
    "K=16 J=32 layer": forward(torch.float16, 1024, 16, 32, norm=reference.LAYER),
    "K=16 J=32 fp32": forward(torch.float32, 2048, 16, 32),
    "K=16 J=32 fp64": forward(torch.float64, 1024, 16, 32),
    "K=1024": forward(torch.bfloat16, 4096, 1024, norm=reference.LAYER),
    "J=1024": forward(torch.bfloat16, 2048, 1, 1024),
    "backward K=1": backward(torch.bfloat16, 2048, 1),
    "backward K=1 d=16384": backward(torch.bfloat16, 16384, 1),
    "backward K=1 fp32 layer": backward(torch.float32, 8192, 1, norm=reference.LAYER),
    "backward K=8": backward(torch.bfloat16, 2048, 8),
    "backward K=19": backward(torch.bfloat16, 2048, 19),
    "backward K=1024": backward(torch.float32, 4096, 1024, norm=reference.LAYER),
    "backward K=3 fp64": backward(torch.float64, 4096, 3, norm=reference.LAYER),
    "backward K=19 fp64": backward(torch.float64, 1024, 19),
}


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("case", CALLS)
def test_kernels_compile_fit_and_do_not_spill(case, capability, tmp_path):
    for launch in launches(CALLS[case]):
        got = build(launch, capability, tmp_path)
        print(case, got)
        assert got.shared <= SHARED[capability], got
        assert got.spills == 0, got


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize(
    "dtype,heads,directions", [(torch.bfloat16, 1, 0), (torch.bfloat16, 2, 3), (torch.float32, 8, 0)]
)
def test_few_dots_load_16_bytes_a_thread_and_share_only_row_sums(dtype, heads, directions, capability, tmp_path):
    call = forward(dtype, 4096, heads, directions, bias=False)
    got = [build(launch, capability, tmp_path) for launch in launches(call) if launch[0].__name__ == "_few"]
    assert set(re.findall(r"ld\.global\S*", got[0].ptx)) == {"ld.global.v4.b32"}
    assert got[0].shared <= 4 * 4 * 4  # a number for each of 4 warps and 4 rows


@pytest.mark.parametrize("capability,instruction", [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_dots_run_on_the_tensor_cores(dtype, capability, instruction, tmp_path):
    call = forward(dtype, 2048, 16, 32)
    many = [launch for launch in launches(call) if launch[0].__name__ == "_many"]
    assert re.search(rf"\b{instruction}\b", build(many[0], capability, tmp_path).sass)


@pytest.mark.parametrize("case", ["K=1", "K=2 J=2", "K=16 J=32", "K=1 fp32"])
def test_launches_do_not_depend_on_the_number_of_rows(case):
    dtype = torch.float32 if "fp32" in case else torch.bfloat16
    heads, directions = {"K=1": (1, 0), "K=2 J=2": (2, 2), "K=16 J=32": (16, 32), "K=1 fp32": (1, 0)}[case]
    seen = []
    for tokens in (1, 2, 48, 50_000):
        calls = launches(forward(dtype, 64, heads, directions, tokens=tokens))
        seen.append([(kernel.__name__, keywords) for kernel, _args, keywords in calls])
    assert all(other == seen[0] for other in seen)
