"""The CUDA kernels' own source, compiled for the CPU."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The function that compiles one op's kernels for the CPU."""
    folder = tmp_path_factory.mktemp("emulator")

    @functools.cache
    def compile(op: str) -> ctypes.CDLL:
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        if compiler is None:
            pytest.skip("needs a C++20 compiler")
        out = folder / f"{op}.so"
        source = Path(__file__).parent / "cuda_emulator" / f"{op}.cpp"
        flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-w", "-DRMFAST_EMULATE_CUDA"]
        include = [f"-I{ROOT / 'csrc' / 'include'}", f"-I{source.parent}"]
        made = subprocess.run([compiler, *flags, *include, str(source), "-o", str(out)], capture_output=True, text=True)
        if "_Float16" in made.stderr:
            pytest.skip("this compiler has no _Float16")
        assert made.returncode == 0, made.stderr
        return ctypes.CDLL(str(out))

    return compile
