"""Builds the compiled libraries with ninja: `_C` (CPU), with nvcc and for a GPU `_C_cuda`, and `_planner` (host only).

The first two use PyTorch's stable ABI, so that one build serves torch >= 2.10 and any Python. `_planner` is a pybind11
module for the Python that builds it, with the pybind11 headers that torch carries; without Python.h it is left out,
and rmfast.engine.planner_python plans in Python.
Environment: RMFAST_BUILD_EXT, RMFAST_BUILD_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS, NVCC_THREADS, CXX (ENVIRONMENT.md).
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
X86 = platform.machine().lower() in ("x86_64", "amd64")

# The file compiled once for each: instruction set -> flags. x86-64-v4 is AVX-512 F, BW, CD, DQ, VL.
ISAS = {"avx512": "-march=x86-64-v4", "avx2": "-march=x86-64-v3", "portable": ""} if X86 else {"portable": ""}

# TORCH_TARGET_VERSION 2.10: the oldest torch whose stable ABI has parallel_for and the CUDA stream. Not for `_planner`:
# torch 2.11 refuses its pybind11 headers under it.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CUDA = "rmfast._C_cuda"
CUDA_ARCHS = "8.0 9.0 10.0+PTX"


def torch_or_none():
    setting = os.environ.get("RMFAST_BUILD_EXT", "auto")
    if setting == "0":
        return None
    try:
        import torch
    except ImportError:
        if setting == "1":
            sys.exit(
                "RMFAST_BUILD_EXT=1 needs torch at build time: pip install torch setuptools ninja, then "
                "pip install --no-build-isolation ."
            )
        return None
    if setting == "auto" and shutil.which(os.environ.get("CXX", "c++")) is None:
        return None
    return torch


def nvcc_or_none(torch):
    setting = os.environ.get("RMFAST_BUILD_CUDA", "auto")
    # Two minutes of nvcc on two cores, for a library that only a GPU runs: where torch sees none, on request.
    if setting == "0" or (setting == "auto" and not torch.cuda.is_available()):
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    nvcc = nvcc or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None and setting == "1":
        sys.exit("RMFAST_BUILD_CUDA=1 needs nvcc: install a CUDA toolkit (12.8 or newer) or set CUDA_HOME")
    return nvcc


def gencode(nvcc):
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    flags = []
    for arch in re.split(r"[ ;]+", asked or CUDA_ARCHS):
        number = arch.replace("+PTX", "").replace(".", "")
        if not asked and f"sm_{number}" not in known:
            continue  # a toolkit older than the architecture
        # wgmma is in 9.0a alone, which is what all GPUs of 9.0 are.
        real = "90a" if number == "90" else number
        flags.append(f"-gencode=arch=compute_{real},code=sm_{real}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


class NinjaBuild(build_ext):
    """setuptools compiles one file after another with one set of flags; ninja does neither."""

    def build_extensions(self):
        """All libraries in one graph, so that no core waits for the last file of one of them."""
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        outs = {ext.name: Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions}
        for ext in self.extensions:
            outs[ext.name].parent.mkdir(parents=True, exist_ok=True)
            (build / f"{ext.name}.ninja").write_text(ninja_file(ext, outs[ext.name], *ext.settings))
        (build / "build.ninja").write_text("".join(f"subninja {ext.name}.ninja\n" for ext in self.extensions))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []

        def made(*without):
            targets = [str(out) for name, out in outs.items() if name not in without]
            return subprocess.run([ninja(), "-C", str(build), *jobs, *targets]).returncode == 0

        if made():
            return
        for ext in self.extensions:
            if ext.name == CUDA and os.environ.get("RMFAST_BUILD_CUDA", "auto") == "auto" and made(CUDA):
                # Nobody asked for it: without it Triton runs on CUDA, and rmfast.explain() says so.
                print("warning: could not build the CUDA library; going on without it", file=sys.stderr)
                ext.optional = True
                outs[CUDA].unlink(missing_ok=True)  # of an earlier build
                return
        raise CompileError("ninja could not build the libraries; its messages stand above")

    def copy_extensions_to_source(self):
        # Written anew rather than over the old file, which a running Python may have mapped.
        for ext in self.extensions:
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def get_ext_filename(self, fullname):
        if fullname.endswith("_planner"):
            return super().get_ext_filename(fullname)
        # No Python version in the name: the libraries hold torch ops and no Python module.
        return fullname.replace(".", os.sep) + ".so"


class KernelTree(Command):
    """`python setup.py kernel_tree`: the ops as a tree that `kernels.get_local_kernel("build/kernel-tree")` loads.

    Of the libraries that `build_ext --inplace` has made. One variant serves any Python and torch >= 2.10; the planner,
    which is built for one Python, and what scores models stay out.
    """

    user_options: list = []
    initialize_options = finalize_options = lambda self: None

    def run(self):
        tree = ROOT / "build" / "kernel-tree"
        shutil.rmtree(tree, ignore_errors=True)
        machine = f"{platform.machine().lower()}-linux"
        self.variant(tree, f"torch-stable-abi210-cpu-{machine}", "cpu", ["_C.so"])
        if (ROOT / "rmfast" / "_C_cuda.so").exists():
            major, minor = nvcc_version(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
            self.variant(tree, f"torch-stable-abi210-cu{major}{minor}-{machine}", "cuda", ["_C.so", "_C_cuda.so"])

    def variant(self, tree, name, backend, libraries):
        package = tree / "build" / name / "rmfast"
        package.mkdir(parents=True)
        for module in ("__init__.py", "arguments.py", "backends.py", "py.typed", *libraries):
            shutil.copy2(ROOT / "rmfast" / module, package)
        for folder, source in (("ops", ROOT / "rmfast" / "ops"), ("kernels", ROOT / "kernels")):
            shutil.copytree(source, package / folder, ignore=shutil.ignore_patterns("__pycache__"))
        about = {"id": f"rmfast_{backend}_{version().replace('.', '_')}", "name": "rmfast", "version": 1}
        about |= {"license": "Apache-2.0", "python-depends": [], "backend": {"type": backend}}
        (package.parent / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")
        (package.parent / "__init__.py").write_text(
            '"""rmfast\'s ops; those of an installed rmfast where there is one: torch knows one set in a process."""\n'
            "import importlib.util\nimport os\nimport sys\n\n"
            'if importlib.util.find_spec("rmfast") is None:\n    sys.path.append(os.path.dirname(__file__))\n'
            "from rmfast.ops import *  # noqa: E402, F403\n"
        )


def nvcc_version(nvcc):
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return re.findall(r"release (\d+)\.(\d+)", said)[0]


def ninja():
    found = shutil.which("ninja")
    if found:
        return found
    try:
        import ninja as package
    except ImportError:
        sys.exit("The compiled build needs ninja: pip install ninja")
    return os.path.join(package.BIN_DIR, "ninja")


def ninja_file(ext, out, includes, libs, nvcc, abi=STABLE_ABI):
    include = " ".join(f"-I{path}" for path in [CSRC / "include", *includes])
    cxx = os.environ.get("CXX", "c++")
    lines = [
        f"cflags = -O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall "
        f"-Wno-psabi -Wno-ignored-attributes -Wno-maybe-uninitialized {abi} "
        f"{'-DRMFAST_X86' if X86 else ''} {include}",
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d $cflags $extra -c $in -o $out",
        "  description = compile $out",
        "  depfile = $out.d",
        "rule link",
        # nvcc knows where its own runtime is, also where it is a wrapper script.
        f"  command = {f'{nvcc} -cudart static' if nvcc else cxx} -shared $in -o $out {libs}",
        "  description = link $out",
    ]
    if nvcc:
        threads = os.environ.get("NVCC_THREADS", "2")
        lines += [
            "rule nvcc",
            f"  command = {nvcc} -O3 -std=c++20 -Xcompiler -fPIC,-fvisibility=hidden -DUSE_CUDA {abi} "
            f"--expt-relaxed-constexpr -t {threads} -MD -MF $out.d {gencode(nvcc)} {include} -c $in -o $out",
            "  depfile = $out.d",
            "  description = compile $out with nvcc",
        ]
    objects = []

    def compile(rule, source, name, extra=""):
        objects.append(f"{ext.name}/{name}.o")
        lines.append(f"build {objects[-1]}: {rule} {CSRC / source}")
        if extra:
            lines.append(f"  extra = {extra}")

    for source in ext.sources:
        name = Path(source).stem
        if source.endswith(".cu"):
            compile("nvcc", source, name)
        elif source.endswith("_isa.cpp"):
            for isa, flags in ISAS.items():
                compile("cxx", source, f"{name}_{isa}", f"-DRMFAST_ISA={isa} {flags}")
        else:
            compile("cxx", source, name)
    lines.append(f"build {out}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def extensions():
    torch = torch_or_none()
    if torch is None:
        return []
    base = Path(torch.__file__).parent
    includes = [base / "include", base / "include" / "torch" / "csrc" / "api" / "include"]

    def extension(name, folder, pattern, nvcc=None):
        # The longest first, so that all cores have work until the end.
        paths = sorted((CSRC / folder).glob(pattern), key=lambda path: (-path.stat().st_size, path.name))
        made = Extension(name, [str(path.relative_to(CSRC)) for path in paths])
        made.settings = (includes, f"-L{base / 'lib'} -ltorch_cpu -ltorch -lc10", nvcc)
        return made

    made = []
    nvcc = nvcc_or_none(torch)
    if nvcc:
        made.append(extension(CUDA, "cuda", "*.cu", nvcc))
    python = Path(sysconfig.get_path("include"))
    if (python / "Python.h").exists() and (base / "include" / "pybind11").exists():
        planner = Extension("rmfast._planner", ["host/planner.cpp"])
        planner.settings = ([python, base / "include"], "", None, "")
        made.append(planner)
    made.append(extension("rmfast._C", "cpu", "*.cpp"))
    return made


def version():
    return (ROOT / "rmfast" / "__init__.py").read_text().split('__version__ = "')[1].split('"')[0]


setup(
    version=version(),
    # `kernels` at the top level would be Hugging Face's package: installed as rmfast.kernels, always listed by name.
    packages=[
        "rmfast",
        "rmfast.audit",
        "rmfast.binding",
        "rmfast.circuits",
        "rmfast.cli",
        "rmfast.concepts",
        "rmfast.debias",
        "rmfast.engine",
        "rmfast.evaluation",
        "rmfast.heads",
        "rmfast.integrations",
        "rmfast.integrations.reward_lens",
        "rmfast.integrations.serve",
        "rmfast.integrations.serve.protocols",
        "rmfast.interpret",
        "rmfast.loading",
        "rmfast.ops",
        "rmfast.patching",
        "rmfast.probes",
        "rmfast.rewards",
        "rmfast.texts",
        "rmfast.training",
        "rmfast.kernels",
        "rmfast.kernels.binned_mmd",
        "rmfast.kernels.linear",
        "rmfast.kernels.neuron_stats",
        "rmfast.kernels.patch_rows",
        "rmfast.kernels.reward_head",
        "rmfast.kernels.suffix_attention",
        "rmfast.kernels.tcrm",
        "rmfast.kernels.token_wise",
        "rmfast.kernels.topk_encode",
    ],
    package_dir={"rmfast": "rmfast", "rmfast.kernels": "kernels"},
    package_data={"rmfast": ["py.typed"], "rmfast.audit": ["templates/*"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild, "kernel_tree": KernelTree},
)
