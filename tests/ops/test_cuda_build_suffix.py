"""suffix_attention's CUDA C++ kernels compiled by nvcc: registers, spills, the tensor cores' instructions."""

from __future__ import annotations

import re

import pytest
from test_cuda_build import ADVICE, Kernel, build, compiled, named

SOURCE = r"""
#include "rmfast/cuda/suffix_attention_sm90.cuh"
namespace rmfast::cuda {
static_assert(SuffixTile<64, false>::kShared <= 99 * 1024 && SuffixTile<128, false>::kShared <= 99 * 1024 &&
              SuffixTile<256, false>::kShared <= 99 * 1024, "the smallest shared memory of a GPU from sm_80 on");
static_assert(HopperTile<64>::kShared <= 227 * 1024 && HopperTile<128>::kShared <= 227 * 1024 &&
              HopperTile<256>::kShared <= 227 * 1024, "that of sm_90");
#define MMA(...) template __global__ void suffix_attention_kernel<__VA_ARGS__>(const SuffixAttention<bf16>)
#define WGMMA(...) template __global__ void suffix_attention_sm90_kernel<__VA_ARGS__>( \
    const SuffixAttention<bf16>, const __grid_constant__ Maps, int*)
INSTANCES
}
"""
# Head sizes, and whether logits are capped: by mma, and by wgmma.
INSTANCES = {
    "80": ["MMA(bf16, 64, false)", "MMA(bf16, 128, false)", "MMA(bf16, 256, false)", "MMA(bf16, 128, true)"],
    "90a": ["MMA(bf16, 128, false)", "WGMMA(bf16, 64, false)", "WGMMA(bf16, 128, false)", "WGMMA(bf16, 256, true)"],
    "100": ["MMA(bf16, 128, false)", "MMA(bf16, 256, true)"],
}


@pytest.fixture(scope="session", params=INSTANCES, ids=lambda arch: f"sm_{arch}")
def kernels(request, tmp_path_factory) -> list[Kernel]:
    source = SOURCE.replace("INSTANCES", ";\n".join(INSTANCES[request.param]) + ";")
    return build(source, request.param, tmp_path_factory.mktemp(f"suffix_{request.param}"))


def width(kernel: Kernel) -> int:
    return int(re.search(r", (\d+), ", kernel.name)[1])


def test_no_kernel_spills(kernels):
    assert {kernel.name: kernel.spills for kernel in kernels if kernel.spills} == {}
    assert not [kernel.name for kernel in kernels if kernel.count(r"\b(LDL|STL)\b")]


def test_two_blocks_of_mma_fit_a_multiprocessor(kernels):
    for kernel in named(kernels, "suffix_attention_kernel<"):
        assert kernel.registers <= 255, kernel.name


def test_each_product_is_one_instruction_and_each_copy_16_bytes(kernels):
    for kernel in named(kernels, "suffix_attention_kernel<"):
        d = width(kernel)
        keys = 64 if d == 64 else 32 if "true" in kernel.name else 48
        strips = 2 if d <= 128 else 1
        # Q K^T and P V of a warp: m16n8k16 each.
        assert kernel.count(r"HMMA\.16816\.F32") == 2 * strips * (d // 16) * (keys // 8), kernel.name
        # K and V by fours of 8 x 8, and Q: no fragment is read twice in a step.
        assert kernel.count(r"LDSM\.16\.M(T)?88\.4") >= 2 * (d // 16) * (keys // 16), kernel.name
        assert kernel.count(r"LDGSTS\.E\.BYPASS\.128") and not kernel.count(r"LDGSTS\.E(?!\.BYPASS\.128)"), kernel.name


def test_wgmma_has_full_widths_and_its_copies_are_tma_s(kernels):
    found = [kernel for kernel in kernels if "sm90" in kernel.name]
    for kernel in found:
        d = width(kernel)
        keys = 128 if d <= 128 else 64
        # The SASS of bf16 says so behind the shape, that of fp16 does not.
        widths = re.findall(r"HGMMA\.64x(\d+)x16", kernel.sass)
        assert sorted(map(int, widths)) == sorted([keys] * (d // 16) + [d] * (keys // 16)), kernel.name
        assert not kernel.count(r"\bHMMA\b") and kernel.count("UTMALDG"), kernel.name
        assert kernel.count("USETMAXREG") >= 2, kernel.name


def test_no_register_of_a_product_is_touched_between_its_fence_and_its_wait(kernels):
    for kernel in [kernel for kernel in kernels if "sm90" in kernel.name]:
        stretches = re.findall(r"WARPGROUP\.ARRIVE(.*?)WARPGROUP\.DEPBAR\.LE gsb0, 0x0", kernel.sass, re.DOTALL)
        assert len(stretches) == 2 == kernel.count(r"WARPGROUP\.ARRIVE"), kernel.name
        for stretch in stretches:
            instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", stretch)
            held = set()
            for columns, sums, a in re.findall(r"HGMMA\.64x(\d+)x16\S* R(\d+), (?:R(\d+), )?", stretch):
                held |= {*range(int(sums), int(sums) + int(columns) // 2)}
                held |= {*range(int(a), int(a) + 4)} if a else set()
            others = " ".join(each for each in instructions if "HGMMA" not in each)
            assert held and held.isdisjoint(map(int, re.findall(r"\bR(\d+)\b", others))), kernel.name


def test_the_warps_that_copy_make_do_with_the_registers_that_they_keep(kernels):
    for kernel in [kernel for kernel in kernels if "sm90" in kernel.name]:
        keeps, theirs = re.search(r"USETMAXREG\.DEALLOC\.CTAPOOL (0x\w+)(.*?)\bEXIT\b", kernel.sass, re.DOTALL).groups()
        assert max(map(int, re.findall(r"\bR(\d+)\b", theirs))) < int(keeps, 16) == 40, kernel.name


EARLY = r"""
#include "rmfast/cuda/wgmma.cuh"
namespace rmfast::cuda {
__global__ void early(float* to, uint64_t a, uint64_t b) {
  float s[16][4] = {};
  wgmma_fence(s);
  wgmma_shared<bf16>(s, a, b, 1);
  wgmma_commit();
  to[threadIdx.x] = s[0][0];
  wgmma_wait(s);
  to[threadIdx.x] = s[1][0];
}
}
"""


def test_ptxas_says_so_where_sums_are_read_before_their_wait(tmp_path):
    assert ADVICE.search(compiled(EARLY, "90a", tmp_path))
