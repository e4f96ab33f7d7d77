"""The key by which Triton keeps what it compiled: launches of equal keys run one kernel, others compile anew."""

from __future__ import annotations

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import compute_cache_key, create_function_from_signature


def key_of(launch: tuple, capability: int = 90) -> tuple[str, str]:
    """The kernel's name and Triton's own key of a launch that `aot.launches` recorded."""
    kernel, args, kwargs = launch
    backend = make_backend(GPUTarget("cuda", capability, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    _arguments, specialization, options = binder(*args, **kwargs)
    return kernel.__name__, compute_cache_key({}, specialization, options)
