"""Triton kernels as their launchers launch them, compiled ahead of time for GPUs that need not be here."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
import triton
from sass import Sass, repeated_warps
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rmfast.kernels.binned_mmd import reference as binned_mmd
from rmfast.kernels.suffix_attention import triton as suffix_attention
from rmfast.kernels.topk_encode import triton as topk_encode

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass
class Compiled:
    name: str
    capability: int
    warps: int
    ttgir: str
    ptx: str
    sass: str
    shared: int
    registers: int

    @cached_property
    def code(self) -> Sass:
        return Sass(self.sass)

    @property
    def spills(self) -> int:
        return self.code.spills()

    def faults(self, least_columns: int = 32) -> list[str]:
        """What no kernel here may have, whatever it does; `least_columns` of a Hopper matrix product."""
        found = []
        if self.shared > SHARED[self.capability]:
            found.append(f"{self.shared} bytes of shared memory")
        if narrow := {n for n in self.code.wgmma_columns() if n < least_columns}:
            found.append(f"HGMMA of {min(narrow)} columns")
        return found + repeated_warps(self.ttgir)

    def __str__(self) -> str:
        return f"{self.name}: {self.registers} registers, {self.shared} bytes shared, {self.spills} spills"

    __repr__ = __str__


def launches(call, capability: int = 90) -> list[tuple]:
    """The launches of `call` on a GPU of that capability, with nothing run: (kernel, arguments, keywords)."""
    seen = []

    def record(kernel, grid):
        return lambda *args, **kwargs: seen.append((kernel, args, kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "__getitem__", record)
        for module in (suffix_attention, topk_encode):
            patch.setattr(module, "capability", lambda value: capability)
        patch.setattr(binned_mmd, "cancels", lambda *args: False)  # the one question that a launcher puts to the device
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
        elif parameter.annotation_type or isinstance(value, float):
            signature[parameter.name] = parameter.annotation_type or "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = 1
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = tmp_path / f"{kernel.__name__}_{capability}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    def tool(*command: str) -> str:
        line = [str(BIN / command[0]), *command[1:], str(cubin)]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout

    sass = tool("nvdisasm", "--print-code")
    registers = int(re.search(r"REG:(\d+)", tool("cuobjdump", "--dump-resource-usage"))[1])
    return Compiled(
        f"{kernel.__name__} sm_{capability}", capability, compiled.metadata.num_warps, compiled.asm["ttgir"],
        compiled.asm["ptx"], sass, compiled.metadata.shared, registers,
    )  # fmt: skip
