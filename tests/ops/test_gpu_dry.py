"""`make gpu-dry` on a few kernels for an H100 or H200, and how machine code is read."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", minversion="3.6")
if triton.knobs.runtime.interpret:
    pytest.skip("compiles kernels, so it needs a process without TRITON_INTERPRET=1", allow_module_level=True)

import gpu_dry  # noqa: E402
from aot import launches  # noqa: E402
from gpu_cases import CASES  # noqa: E402
from sass import Sass, repeated_warps  # noqa: E402

ALL = [(op, case) for op, cases in CASES.items() for case in cases]
# What scoring and sweeps run most.
CHEAP = [
    ("reward_head", "bf16 d 4096 K 1"),
    ("suffix_attention", "bf16 D 128"),
    ("token_wise", "rms_norm d 4096"),
    ("token_wise", "rotary D 128, 32 and 8 heads"),
    ("patch_rows", "d 4096"),
]


@pytest.mark.parametrize(("op", "case"), ALL)
def test_launchers_read_nothing_from_the_device_and_have_a_budget_for_each_kernel(op, case):
    known = gpu_dry.budgets(op)
    for capability in gpu_dry.SHARED:
        made = launches(CASES[op][case], capability)
        assert made
        for kernel, *_ in made:
            assert f"{case}: {kernel.__name__} sm_{capability}" in known


@pytest.mark.parametrize(("op", "case"), CHEAP)
def test_kernels_have_no_faults_and_stay_within_their_budget(op, case, tmp_path):
    known = gpu_dry.budgets(op)
    for name, got in gpu_dry.compiled(op, case, 90, tmp_path):
        print(gpu_dry.line(name, got))
        assert gpu_dry.faults(op, got) == []
        if known[gpu_dry.VERSION] == triton.__version__:
            assert gpu_dry.over(gpu_dry.counts(got), known[name]) == []


CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P1 LDG.E.U16 R8, desc[UR4][R2.64+0x10] ;
.L_x_1:
{instructions}
        /*0080*/               @P0 BRA `(.L_x_1) ;
        /*0090*/                   LDGSTS.E.BYPASS.LTC128B.64 [R5], desc[UR4][R2.64] ;
        /*00a0*/              @!P2 BRA `(.L_x_0) ;
        /*00b0*/                   HGMMA.64x16x16.F32.BF16 R24, R8, gdesc[UR8], R24 ;
        /*00c0*/                   STG.E desc[UR4][R2.64], R0 ;
        /*00d0*/                   STL [R1], R0 ;
        /*00e0*/                   NOP ;
""".replace("{instructions}", "\n".join(["        /*0030*/                   FFMA R0, R1, R2, R3 ;"] * 30))


def test_machine_code_is_read():
    code = Sass(CODE)
    assert [len(loop) for loop in code.loops] == [31]  # the inner one
    assert code.loads() == {128: 1, 16: 1, 64: 1} and code.stores() == {32: 1}
    assert code.wgmma_columns() == {16} and code.spills() == 1 and code.count("FFMA") == 30
    assert len(code.instructions) == 39


def test_warps_that_compute_the_same_part_of_a_product_are_found():
    fields = "versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 64, 16]"
    layout = f"#mma = #ttg.nvidia_mma<{{{fields}}}>\n"
    product = "%1 = ttng.warp_group_dot %a, %b, %c : tensor<ROWSx64xbf16, #d> * !x -> tensor<ROWSx64xf32, #mma>"
    assert repeated_warps(layout + product.replace("ROWS", "128")) == []
    assert repeated_warps(layout + product.replace("ROWS", "64")) == ["64x64 by warps [8, 1]"]
