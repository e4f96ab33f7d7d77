"""The Triton kernels, as the launchers launch them, compiled ahead of time for GPUs that need not be here."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.6")
if triton.knobs.runtime.interpret:
    pytest.skip("compiles kernels, so it needs a process without TRITON_INTERPRET=1", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from rmfast.kernels.reward_head import reference  # noqa: E402
from rmfast.kernels.reward_head import triton as kernels  # noqa: E402

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass
class Compiled:
    name: str
    ttgir: str
    ptx: str
    sass: str
    shared: int
    registers: int
    spills: int

    def __str__(self) -> str:
        return f"{self.name}: {self.registers} registers, {self.shared} bytes shared, {self.spills} spills"

    __repr__ = __str__


def launches(monkeypatch, call) -> list[tuple]:
    """The launches of `call`, which is made on CPU tensors with nothing run: (kernel, arguments, keywords)."""
    seen = []

    def record(kernel, grid):
        return lambda *args, **kwargs: seen.append((kernel, args, kwargs))

    with monkeypatch.context() as patch:
        patch.setattr(triton.JITFunction, "__getitem__", record)
        call()
    return seen


def build(launch: tuple, capability: int, tmp_path: Path) -> Compiled:
    """One launch compiled with the specialisation that a launch on a GPU would give it."""
    kernel, args, kwargs = launch
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args))
    values.update({name: kwargs[name] for name in names if name in kwargs})
    options = {name: value for name, value in kwargs.items() if name not in names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            assert parameter.do_not_specialize, parameter.name
            integer = "i32" if abs(value) < 2**31 else "i64"
            signature[parameter.name] = "fp32" if isinstance(value, float) else integer
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = tmp_path / f"{kernel.__name__}_{capability}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    def tool(*command: str) -> str:
        line = [str(BIN / command[0]), *command[1:], str(cubin)]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout

    sass = tool("nvdisasm", "--print-code")
    registers = int(re.search(r"REG:(\d+)", tool("cuobjdump", "--dump-resource-usage"))[1])
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    name = f"{kernel.__name__} sm_{capability}"
    return Compiled(name, compiled.asm["ttgir"], compiled.asm["ptx"], sass, compiled.metadata.shared, registers, spills)


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
def test_kernels_compile_fit_and_do_not_spill(case, capability, monkeypatch, tmp_path):
    for launch in launches(monkeypatch, CALLS[case]):
        got = build(launch, capability, tmp_path)
        print(case, got)
        assert got.shared <= SHARED[capability], got
        assert got.spills == 0, got


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize(
    "dtype,heads,directions", [(torch.bfloat16, 1, 0), (torch.bfloat16, 4, 4), (torch.float32, 8, 0)]
)
def test_few_dots_load_16_bytes_a_thread_and_share_only_row_sums(
    dtype, heads, directions, capability, monkeypatch, tmp_path
):
    call = forward(dtype, 4096, heads, directions, bias=False)
    got = [
        build(launch, capability, tmp_path) for launch in launches(monkeypatch, call) if launch[0].__name__ == "_few"
    ]
    assert set(re.findall(r"ld\.global\S*", got[0].ptx)) == {"ld.global.v4.b32"}
    assert got[0].shared <= 4 * 4 * 4  # a number for each of 4 warps and 4 rows


@pytest.mark.parametrize("capability,instruction", [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_dots_run_on_the_tensor_cores(dtype, capability, instruction, monkeypatch, tmp_path):
    call = forward(dtype, 2048, 16, 32)
    many = [launch for launch in launches(monkeypatch, call) if launch[0].__name__ == "_many"]
    assert re.search(rf"\b{instruction}\b", build(many[0], capability, tmp_path).sass)


@pytest.mark.parametrize("case", ["K=1", "K=2 J=2", "K=16 J=32", "K=1 fp32"])
def test_launches_do_not_depend_on_the_number_of_rows(case, monkeypatch):
    dtype = torch.float32 if "fp32" in case else torch.bfloat16
    heads, directions = {"K=1": (1, 0), "K=2 J=2": (2, 2), "K=16 J=32": (16, 32), "K=1 fp32": (1, 0)}[case]
    seen = []
    for tokens in (1, 2, 48, 50_000):
        calls = launches(monkeypatch, forward(dtype, 64, heads, directions, tokens=tokens))
        seen.append([(kernel.__name__, keywords) for kernel, _args, keywords in calls])
    assert all(other == seen[0] for other in seen)
