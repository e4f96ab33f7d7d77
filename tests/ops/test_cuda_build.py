"""The CUDA C++ kernels compiled by nvcc for GPUs that need not be here: registers, spills, instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rmfast.backends import library_path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = """
#include "rmfast/cuda/patch_rows.cuh"
#include "rmfast/cuda/reward_head.cuh"
namespace rmfast::cuda {
template cudaError_t patch_rows(const PatchRows<double, double>&, cudaStream_t);
template cudaError_t patch_rows(const PatchRows<float, float>&, cudaStream_t);
template cudaError_t patch_rows(const PatchRows<bf16, bf16>&, cudaStream_t);
template cudaError_t patch_rows(const PatchRows<bf16, float>&, cudaStream_t);
template cudaError_t patch_rows(const PatchRows<f16, f16>&, cudaStream_t);
template cudaError_t patch_rows(const PatchRows<f16, float>&, cudaStream_t);
template Status reward_head(const Problem<double>&, const Plan&, void*, int, cudaStream_t);
template Status reward_head(const Problem<float>&, const Plan&, void*, int, cudaStream_t);
template Status reward_head(const Problem<bf16>&, const Plan&, void*, int, cudaStream_t);
template Status reward_head(const Problem<f16>&, const Plan&, void*, int, cudaStream_t);
static_assert(ManyShape<float, 128, 64>::kShared <= 99 * 1024 && ManyShape<bf16, 128, 64>::kShared <= 99 * 1024,
              "the smallest shared memory of a GPU from sm_80 on");
}
"""


def tool(name: str) -> str:
    """A CUDA tool from the PATH, or the copy that Triton ships."""
    found = shutil.which(name)
    if found is None and (spec := find_spec("triton")) is not None and spec.origin is not None:
        found = shutil.which(name, path=Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    if found is None:
        pytest.skip(f"needs {name}")
    return found


class Kernel:
    def __init__(self, name: str, log: str, sass: str):
        self.name = name
        self.registers = int(re.search(r"Used (\d+) registers", log)[1])
        self.spills = sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)))
        self.sass = sass

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.sass))


def readable(name: str) -> str:
    """`few_kernel<bf16, 8, 4, 2, true>` from what c++filt makes of the mangled name."""
    name = re.sub(r"rmfast::cuda::|^void ", "", name)
    return re.sub(r"\((?:int|bool|unsigned int)\)", "", name).split("(")[0]


# What ptxas says of products of wgmma that it runs one by one, or waits for unasked, and of setmaxnreg left out.
ADVICE = re.compile(r".*(?:\(C7\d+\)|GMMA|wgmma|setmaxnreg).*")


def compiled(source: str, arch: str, folder: Path) -> str:
    """Makes kernels.cubin of some CUDA C++; what ptxas says."""
    (folder / "kernels.cu").write_text(source)
    command = [tool("nvcc"), "-O3", "-std=c++20", f"-arch=sm_{arch}", "-Xptxas", "-v", f"-I{ROOT / 'csrc/include'}"]
    made = subprocess.run([*command, "-cubin", "kernels.cu"], cwd=folder, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout + made.stderr


def build(source: str, arch: str, folder: Path) -> list[Kernel]:
    """Every kernel of some CUDA C++, compiled for one architecture, about which ptxas has no advice."""
    cuobjdump, filt = tool("cuobjdump"), tool("c++filt")
    said = compiled(source, arch, folder)
    assert ADVICE.findall(re.sub(r"'\S+'", "", said)) == []  # but for names
    logs = re.split(r"Compiling entry function '(\S+)'", said)
    sass = subprocess.run([cuobjdump, "-sass", "kernels.cubin"], cwd=folder, capture_output=True, text=True).stdout
    bodies = re.split(r"Function : (\S+)", sass)
    bodies = dict(zip(bodies[1::2], bodies[2::2]))
    names = subprocess.run([filt], input="\n".join(logs[1::2]), capture_output=True, text=True).stdout.splitlines()
    return [Kernel(readable(name), log, bodies[key]) for name, key, log in zip(names, logs[1::2], logs[2::2])]


@pytest.fixture(scope="session", params=["80", "90a", "100"], ids=lambda arch: f"sm_{arch}")
def kernels(request, tmp_path_factory) -> list[Kernel]:
    return build(SOURCE, request.param, tmp_path_factory.mktemp(f"sm_{request.param}"))


def named(kernels: list[Kernel], prefix: str) -> list[Kernel]:
    found = [kernel for kernel in kernels if kernel.name.startswith(prefix)]
    assert found, f"no {prefix} among {[kernel.name for kernel in kernels]}"
    return found


def test_no_kernel_spills(kernels):
    assert len(kernels) > 60
    assert {kernel.name: kernel.spills for kernel in kernels if kernel.spills} == {}
    assert not [kernel.name for kernel in kernels if kernel.count(r"\b(LDL|STL)\b")]


def test_registers_leave_the_warps_that_each_launch_counts_on(kernels):
    most = {
        "few_kernel<": 168, "many_kernel<": 176, "recompute": 255, "intervene": 255, "prepare": 64, "cross": 128,
        "patch_rows_kernel<": 64,
    }  # fmt: skip
    for prefix, registers in most.items():
        assert max(kernel.registers for kernel in named(kernels, prefix)) <= registers, prefix
    for kernel in named(kernels, "few_kernel<"):
        dots = int(kernel.name.split(", ")[1])
        assert kernel.registers <= (168 if dots == 8 else 128), kernel.name


def test_hidden_states_are_read_16_bytes_at_a_time_and_past_l1(kernels):
    for kernel in named(kernels, "few_kernel<"):
        rows, unroll, aligned, _ = kernel.name.rstrip(">").split(", ")[2:]
        wide = kernel.count(r"LDG\.E\.NA\.128")
        assert wide >= (int(rows) * int(unroll) if aligned == "true" else 1), kernel.name


def test_patched_rows_are_read_and_written_16_bytes_at_a_time(kernels):
    found = named(kernels, "patch_rows_kernel<")
    assert len(found) == 12
    for kernel in found:
        if kernel.name.endswith("true>"):
            assert kernel.count(r"LDG\.E\.128") >= 4 and kernel.count(r"STG\.E\.128") >= 8, kernel.name
            assert not kernel.count(r"STG\.E(?!\.128)"), kernel.name


def test_many_dots_go_to_the_tensor_cores_through_async_copies(kernels):
    for kernel in named(kernels, "many_kernel<"):
        dtype, _, dots = re.match(r"many_kernel<(\w+), (\d+), (\d+)>", kernel.name).groups()
        # A tile's m16n8k16 products of one warp: 2 x dots / 16 tiles, 4 k16 steps by 2 parts (fp32: 2 by 6).
        assert kernel.count(r"HMMA\.16816\.F32") == 2 * int(dots) // 16 * (12 if dtype == "float" else 8), kernel.name
        assert kernel.count(r"LDGSTS\.E\.BYPASS\.128"), kernel.name
        assert dtype == "float" or kernel.count(r"LDSM\.16\.M88\.4") == 8, kernel.name


def test_the_library_loads_where_torch_has_no_cuda():
    path = library_path("_C_cuda")
    if path is None:
        pytest.skip("this install holds no _C_cuda; needs a build with RMFAST_BUILD_CUDA=1")
    code = (
        "import torch, rmfast.ops\n"
        f"torch.ops.load_library({str(path)!r})\n"
        "attention = ['suffix_seen_keys', 'suffix_attention_seen', 'suffix_attention_wgmma']\n"
        "for op in ['patch_rows', 'reward_head', *attention]:\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key('rmfast_native::' + op, 'CUDA')\n"
        f"print({torch.cuda.is_available()})"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert made.returncode == 0, made.stderr
