"""Which backend runs an op, and why: one chooser for all ops.

A dispatch key of PyTorch holds one kernel, and a second registration overrides it with only a warning, so each op
is one Python function that asks `choose` for a callable: the compiled library's own op, the Triton launcher or the
eager reference.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import os
import platform
import traceback
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch

from rmfast.arguments import device as arguments_device
from rmfast.arguments import word

NAMES = ("cuda", "triton", "varlen", "cpp", "eager")

# Those of a single op, which other ops do not hear of, and why none runs unless it is asked for.
_ON_REQUEST = {"varlen": "two calls of torch's varlen_attn run only if asked for by name: no GPU has measured them yet"}

# Order of preference by device. On CUDA, Triton stands first until rows in bench/data/ show CUDA C++ ahead, and
# "varlen" stands nowhere until they show that.
_PREFERENCE = {"cuda": ("triton", "cuda", "eager"), "cpu": ("cpp", "eager")}

# Of the compiled libraries' ops, as csrc/include/rmfast/interface.h has it.
_INTERFACE = 5

_requested: ContextVar[str | None] = ContextVar("rmfast_backend", default=None)
_ops: dict[str, dict[str, Callable[[], Callable]]] = {}
# Of an op, by backend: why it does not take arguments that the op takes (those of the callable), or None.
_refusals: dict[str, dict[str, Callable[..., str | None]]] = {}


class BackendError(RuntimeError):
    """A backend asked for by name cannot run; the message holds the cause and the fix."""


@dataclass(frozen=True)
class Choice:
    """One op on one device type: the backend that runs, and the cause for each that does not."""

    op: str
    device: str
    runs: str
    why_not: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.runs}"]
        return "\n".join(lines + [f"  not {name}: {cause}" for name, cause in self.why_not.items()])


class Explanation(list[Choice]):
    """What `explain` returns: a list of `Choice` that prints as text."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__


def register(
    op: str, refusals: dict[str, Callable[..., str | None]] | None = None, **loaders: Callable[[], Callable]
) -> None:
    """Names the backends of an op; a loader returns the callable and runs at its first use.

    refusals: for backends that do not take all that the op takes: given the callable's arguments, the cause or None.
    """
    _refusals[op] = refusals or {}
    _ops[op] = {name: functools.cache(loader) for name, loader in loaders.items()}


def requested() -> str | None:
    """The backend asked for by `backend(...)` or RMFAST_BACKEND, or None.

    Raises ValueError for an unknown name.
    """
    name = _requested.get() or _setting("RMFAST_BACKEND")
    return None if name is None else _known(name)


def _setting(name: str) -> str | None:
    """A variable of the environment, None where it is empty or not there.

    os.environ.get raises and catches two errors where it is not there, 0.5 µs, twice in a call of 10: its dictionary
    tells that first.
    """
    known = getattr(os.environ, "_data", None)
    if os.name == "posix" and known is not None and name.encode() not in known:
        return None
    return os.environ.get(name) or None


def _asked(op: str) -> str | None:
    """The backend asked for, as far as it is one for `op`."""
    name = requested()
    return None if name in _ON_REQUEST and name not in _ops[op] else name


def _known(name: str) -> str:
    return word("backend", name, NAMES)


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Runs every op inside the block on backend `name` ("cuda", "triton", "cpp", "eager"; None: the default choice).

    "varlen" is for suffix_attention alone: other ops run on what they run on by default.

    Raises ValueError for an unknown name at once, and BackendError where an op cannot run on that backend.
    """
    token = _requested.set(None if name is None else _known(name))
    try:
        yield
    finally:
        _requested.reset(token)


@functools.cache
def library_path(name: str) -> Path | None:
    """Where a compiled library lies, or would if RMFAST_CUDA_LIBRARY is right."""
    if name == "_C_cuda" and (given := os.environ.get("RMFAST_CUDA_LIBRARY")):
        return Path(given).expanduser()
    return next(iter(sorted(Path(__file__).parent.glob(f"{name}*.so"))), None)


@functools.cache
def _load(name: str) -> str | None:
    """Loads a compiled library; None, or the reason why it could not be."""
    path = library_path(name)
    if path is None:
        return (
            "this install holds no compiled library; fix: pip install --no-build-isolation . (needs torch, setuptools, "
            "ninja and a C++ compiler)"
        )
    if not path.is_file():
        return f"RMFAST_CUDA_LIBRARY names {path}, which is no file"
    try:
        torch.ops.load_library(str(path))
    except OSError:
        return (
            f"{path.name} did not load; likely built for a newer torch than {torch.__version__} (2.10 is the oldest) "
            f"or a missing libstdc++; fix: pip install --no-build-isolation --force-reinstall .\n"
            + traceback.format_exc(limit=0).strip()
        )
    interface = getattr(ctypes.CDLL(str(path)), "rmfast_interface", None)  # None: a library built before it
    if interface is None or interface() != _INTERFACE:
        return f"{path.name} was built from another version of rmfast; fix: pip install --no-build-isolation ."
    return None


def cpu_isa() -> str | None:
    """The instruction set that the C++ kernels use now ("avx512", "avx2", "portable").

    None where there is no compiled library, or RMFAST_CPU_ISA asks for one that this CPU or build does not have.
    """
    read = _isa_reader()
    name = None if read is None else read()
    return None if name is None else name.decode()


@functools.cache
def _isa_reader() -> Callable[[], bytes | None] | None:
    path = library_path("_C")
    if path is None or _load("_C") is not None:
        return None
    read = ctypes.CDLL(str(path)).rmfast_cpu_isa
    read.restype = ctypes.c_char_p
    return read


@functools.cache
def bf16_matmul_pays() -> bool:
    """Whether torch's bf16 matmul on this CPU is faster than its fp32 one; what is not measured counts as no.

    With AMX it is, several times; by AVX-512's dot instruction on AMD (Zen 4: 2.1 times), but not on Intel's (Emerald
    Rapids without AMX: 0.55 to 0.7 times). oneDNN, which multiplies, may be held to less by the environment.
    """
    if not _is_x86() or _onednn_limit() in _NO_BF16:
        return False
    if torch.cpu._is_amx_tile_supported() and "AMX" in (_onednn_limit() or "AMX"):
        return True
    return torch.cpu._is_avx512_bf16_supported() and _is_amd()


# What ONEDNN_MAX_CPU_ISA may hold oneDNN to that has no instruction for bf16.
_NO_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


def _onednn_limit() -> str | None:
    limit = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL").upper()
    return None if limit in ("ALL", "DEFAULT") else limit


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def _is_amd() -> bool:
    """Whether the CPU is AMD's; False where no compiled library can say."""
    path = library_path("_C")
    if path is None or _load("_C") is not None:
        return False
    is_amd = getattr(ctypes.CDLL(str(path)), "rmfast_cpu_is_amd", None)  # None: a library built before it
    return is_amd is not None and bool(is_amd() & 1)


def fp32_linear_pays(dtype: torch.dtype) -> tuple[bool, str]:
    """Whether the op `linear`, in fp32 on weights of `dtype`, is faster on this CPU than torch's product in that dtype;
    and why. What is not measured counts as no."""
    name = str(dtype)[6:]
    if not _is_x86():
        return False, f"{name} is not measured on {platform.machine()}"
    if dtype == torch.float32:
        if not _is_amd():
            return False, "MKL multiplies float32 at this CPU's rate"
        if cpu_isa() not in ("avx512", "avx2"):
            return False, f"RMFAST_CPU_ISA is {cpu_isa()}"
        return True, "MKL's float32 runs below the rate of AMD's CPUs"
    if dtype == torch.float16:
        return True, "this CPU multiplies float16 more slowly than float32"
    if bf16_matmul_pays():
        return False, "this CPU multiplies bfloat16 faster than float32"
    return True, "this CPU multiplies bfloat16 more slowly than float32"


@functools.cache
def _varlen_missing() -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return f"torch {torch.__version__} has no varlen_attn ({error}); fix: pip install 'torch>=2.11'"
    if not {"return_aux", "scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys():
        return f"varlen_attn of torch {torch.__version__} takes no scale or window; fix: pip install 'torch>=2.11'"
    return None


@functools.cache
def _triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); fix: pip install 'triton>=3.6'"
    return None


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python on CPU tensors (TRITON_INTERPRET=1 before its import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _missing(op: str, name: str, device: str) -> str | None:
    """Why this install cannot run `op` on backend `name` and a device type, with the fix; None where it can."""
    if name not in _ops[op]:
        return f"{op} has no {name} kernel"
    if name == "cpp":
        return _load("_C") if device == "cpu" else f"cpp kernels run on cpu tensors, not on {device}"
    if name in ("cuda", "varlen"):
        if device != "cuda":
            return f"{name} kernels run on cuda tensors, not on {device}"
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA; fix: install a CUDA build of torch"
        if name == "varlen":
            return _varlen_missing()
        if library_path("_C_cuda") is None:
            return (
                "not built (no GPU or no nvcc at build time, or its build failed);"
                " fix: RMFAST_BUILD_CUDA=1 pip install --no-build-isolation ."
            )
        return _load("_C_cuda")
    if name == "triton":
        if (missing := _triton_missing()) is not None:
            return missing
        if device == "cuda" or (device == "cpu" and interpreting()):
            return None
        return f"triton kernels run on cuda tensors, not on {device}; TRITON_INTERPRET=1 runs them in Python, slowly"
    return None


def why_not(op: str, name: str, device: str) -> str | None:
    """Why backend `name` cannot run `op` on a device type now, with the fix; None where it can."""
    if (cause := _missing(op, name, device)) is not None:
        return cause
    asked = os.environ.get("RMFAST_CPU_ISA")
    if name == "cpp" and asked and cpu_isa() is None:
        return f"RMFAST_CPU_ISA={asked} is not one of avx512, avx2, portable that this CPU and build have"
    return None


def choose(op: str, device: str, args: tuple = ()) -> Callable:
    """The callable that runs `op` on tensors of a device type; `args`: its arguments, where some backend refuses some.

    Raises BackendError where a backend asked for by name, or an instruction set asked for, cannot run, or not on these
    arguments.
    """
    name = _asked(op)
    asked = name
    explicit = name is not None or _setting("RMFAST_CPU_ISA")
    name = name or _default(op, device)
    if explicit and (cause := why_not(op, name, device)) is not None:
        raise BackendError(f"Backend {name!r} cannot run {op} on {device}: {cause}")
    if (refused := _refusal(op, name, args)) is not None:
        if asked is not None:
            raise BackendError(f"Backend {name!r} does not run this call of {op}: {refused}")
        name = next(
            other
            for other in _preferred(device)
            if _missing(op, other, device) is None and _refusal(op, other, args) is None
        )
    run = _ops[op][name]()
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        # Autocast would run the matmuls of a reference, or of a kernel's preparation, in 16 bits.
        return torch.autocast(device, enabled=False)(run)
    return run


def runs(op: str, device: str) -> str:
    """The backend that `choose` takes, whether or not it can run."""
    return _asked(op) or _default(op, device)


def _refusal(op: str, name: str, args: tuple) -> str | None:
    refuses = _refusals[op].get(name) if args else None
    return None if refuses is None else refuses(*args)


def _preferred(device: str) -> tuple[str, ...]:
    return _PREFERENCE.get(device, ("eager",))


@functools.cache
def _default(op: str, device: str) -> str:
    return next(name for name in _preferred(device) if _missing(op, name, device) is None)


def explain(op: str | None = None, device: str | None = None) -> Explanation:
    """What would run for each op and device type, and why the others would not.

    Args:
        op: one op's name, or None for all that are registered, which `rmfast.ops` does when it is imported.
        device: "cpu", "cuda", ..., or None for the CPU and, where torch sees one, CUDA.

    Raises ValueError for an unknown op.
    """
    if not _ops:
        raise RuntimeError("No op is registered yet: import rmfast.ops first, or call rmfast.explain")
    if op is not None:
        word("op", op, sorted(_ops))
    if device is not None:
        device = arguments_device("device", device).type
    devices = [device] if device else ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    out = Explanation()
    for name in [op] if op else sorted(_ops):
        for kind in devices:
            runs = _asked(name) or _default(name, kind)
            tried = [other for other in NAMES if other in _ops[name] or other not in _ON_REQUEST]
            causes = {other: cause for other in tried if (cause := why_not(name, other, kind)) is not None}
            if runs in causes:
                runs = f"nothing: {runs} was asked for and cannot run"
            elif runs == "cpp":
                runs = f"cpp ({cpu_isa()})"
            causes = {o: why for o, why in _ON_REQUEST.items() if o in tried and o != runs} | causes
            out.append(Choice(name, kind, runs, causes))
    return out
