"""Which compiled libraries are used."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rmfast import backends

ROOT = Path(__file__).resolve().parents[1]


def test_torch_2_11_can_build_the_libraries(monkeypatch, tmp_path, capsys):
    """It refuses its pybind11 headers under the stable ABI, and has not the macros that 2.13 brought to that."""
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    made = runpy.run_path(str(ROOT / "setup.py"))
    for ext in made["extensions"]():
        text = made["ninja_file"](ext, tmp_path / "out.so", *ext.settings)
        assert ("TORCH_TARGET_VERSION" in text) == (ext.name != "rmfast._planner"), ext.name
    sources = [path for path in (ROOT / "csrc").rglob("*.*") if "STABLE_TORCH_ERROR_CODE_CHECK" in path.read_text()]
    assert sources == []


@pytest.mark.skipif(backends.library_path("_C") is None, reason="no compiled library")
def test_a_library_of_another_version_is_not_used(monkeypatch):
    """Its ops would read what they are given as something else."""
    monkeypatch.setattr(backends, "_INTERFACE", 0)
    assert "_C.so was built from another version of rmfast; fix: " in backends._load.__wrapped__("_C")


@pytest.fixture
def given(monkeypatch, tmp_path):
    """Points RMFAST_CUDA_LIBRARY at a file of a folder; what is known of libraries is forgotten before and after."""
    known = (backends.library_path, backends._load)
    path = tmp_path / "elsewhere.so"
    monkeypatch.setenv("RMFAST_CUDA_LIBRARY", str(path))
    for function in known:
        function.cache_clear()
    yield path
    for function in known:
        function.cache_clear()


def test_a_cuda_library_may_be_named(given):
    assert backends.library_path("_C_cuda") == given
    assert backends.library_path("_C") != given
    assert backends._load("_C_cuda") == f"RMFAST_CUDA_LIBRARY names {given}, which is no file"


def test_a_named_cuda_library_must_be_of_this_version(given):
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("needs a C compiler")
    code = "int rmfast_interface(void) { return 1; }"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(given)]
    subprocess.run(command, input=code, text=True, check=True)
    assert "elsewhere.so was built from another version of rmfast" in backends._load("_C_cuda")


def test_a_refused_call_goes_to_the_next_backend_and_says_why_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(backends, "_missing", lambda op, name, device: None)
    monkeypatch.setattr(backends, "_PREFERENCE", {"cpu": ("cuda", "eager")})
    monkeypatch.setattr(backends, "_ops", {})
    monkeypatch.setattr(backends, "_refusals", {})
    backends._default.cache_clear()
    refuses = {"cuda": lambda n: "n is odd" if n % 2 else None}
    backends.register("made up", refuses, cuda=lambda: lambda n: "cuda", eager=lambda: lambda n: "eager")
    try:
        assert backends.choose("made up", "cpu", (2,))(2) == "cuda"
        assert backends.choose("made up", "cpu", (3,))(3) == "eager"
        with backends.backend("cuda"), pytest.raises(backends.BackendError, match=r"does not run this call.*n is odd"):
            backends.choose("made up", "cpu", (3,))
    finally:
        backends._default.cache_clear()
