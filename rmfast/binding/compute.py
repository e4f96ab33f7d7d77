"""In which arithmetic a session runs linear layers: torch's in the weights' own dtype, or `rmfast.ops.linear`'s fp32.

A CPU without units for 16 bits multiplies in them many times slower than in fp32 (a Zen 3: 7 times), and AMD's run
MKL's fp32 at half of what `linear` reaches. So a session may hold `Fp32`: weights stay as they are stored, and
everything that is made of them is fp32, as in the same model after `.float()`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rmfast import backends as _backends
from rmfast.binding.modules import modules_of, parameters_of
from rmfast.ops import linear

COMPUTE = ("auto", "native", "fp32")
LOW = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float64, torch.float32, *LOW)
_PLAIN = (Tensor, nn.Parameter)
_ASKED = "as was asked for"


def stored_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """Of a model's weights: what most of their elements have."""
    counts: dict[torch.dtype, int] = {}
    for p in parameters:
        if p.is_floating_point():
            counts[p.dtype] = counts.get(p.dtype, 0) + p.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def chosen(compute: str, root: nn.Module) -> tuple[bool, str]:
    """Whether sessions of a model hold `Fp32`, and why.

    A rule on the device, dtype, vendor and features, which is the same in every process; `measured` is its witness.

    Raises:
        ValueError: "fp32" for weights that are not ordinary tensors in float32, bfloat16 or float16.
    """
    if compute == "native":
        return False, _ASKED
    modules = modules_of(root)  # looked through once: every session asks
    parameters = parameters_of(modules)
    stored = stored_dtype(parameters)
    why_not = (
        "its weights are quantised, and multiply by themselves" if _are_quantised(parameters, modules)
        else "some of its weights are offloaded" if any(p.is_meta for p in parameters)
        else "its weights are float64" if stored == torch.float64
        else None
    )  # fmt: skip
    if compute == "fp32":
        if why_not is not None:
            raise ValueError(f'Expected compute to be "native" or "auto", got "fp32": {why_not}')
        return True, _ASKED
    if why_not is not None:
        return False, why_not
    devices = {p.device.type for p in parameters}
    if devices != {"cpu"}:
        return False, f"{str(stored)[6:]} is multiplied on {' and '.join(sorted(devices)) or 'no device'}"
    return _backends.fp32_linear_pays(stored)


def _are_quantised(parameters: Iterable[Tensor], modules: Iterable[nn.Module]) -> bool:
    """Whether weights are tensors of another class (torchao), or are packed into small integers or 8-bit floats, as
    parameters (bitsandbytes, FP8) or as buffers (GPTQ, AWQ)."""
    # A parameter made of another class is of that class; `.data` makes a tensor, so that it is asked last.
    if any(p.dtype not in _FLOATS or (type(p) not in _PLAIN and type(p.data) is not Tensor) for p in parameters):
        return True
    buffers = (buffer for module in modules for buffer in module._buffers.values())
    return any(b.dtype not in (*_FLOATS, torch.int64, torch.bool) for b in buffers if b is not None)


def measured(dtype: torch.dtype) -> str:
    """What `linear` and torch's own product reach on this CPU now, for `explain`: a few milliseconds."""
    x, weight = torch.randn(256, 512, device="cpu"), torch.randn(512, 512, device="cpu").to(dtype)
    native = x.to(dtype)
    ways: list[Callable[[], Tensor]] = [lambda: linear(x, weight), lambda: nn.functional.linear(native, weight)]
    best = [float("inf")] * 2
    for _ in range(3):
        for i, way in enumerate(ways):
            start = time.perf_counter()
            way()
            best[i] = min(best[i], time.perf_counter() - start)
    ours, native_rate = (2e-9 * 256 * 512 * 512 / seconds for seconds in best)
    return f"here now {ours:.0f} GFLOP/s, torch's {str(dtype)[6:]} {native_rate:.0f}"


def is_ours(weight: Any) -> bool:
    """Whether `Fp32` multiplies by a weight with `linear`."""
    return (
        type(weight) in _PLAIN
        and weight.dim() == 2
        and weight.dtype in (torch.float32, *LOW)
        and (weight.stride(1) == 1 or weight.size(1) == 1)
    )


class Fp32(TorchFunctionMode):
    """Runs linear layers by `linear`, and all that takes 16-bit weights beside fp32 activations in fp32.

    A mode, and no forward on modules: it holds for this thread alone, in any module and whatever calls it, and leaves
    nothing behind. A cast to 16 bits (`x.to(weight.dtype)`) gives fp32, but for `x.bfloat16()` and `x.half()`, which no
    dtype of the weights is behind: Falcon rounds its ALiBi biases so in fp32 too.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        handler = _HANDLERS.get(func)
        return func(*args, **kwargs or {}) if handler is None else handler(func, args, kwargs or {})


def holds() -> bool:
    """Whether this thread is in a session that holds `Fp32`."""
    return any(isinstance(mode, Fp32) for mode in torch.overrides._get_current_function_mode_stack())


def outside() -> AbstractContextManager[Any]:
    """For what a session runs that is not of the model: an SAE, in its own dtypes; ops of ours, whose checks ask a
    tensor 20 times for its sizes, and a mode takes 1 µs each time."""
    return torch._C.DisableTorchFunction()


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in LOW and type(value) in _PLAIN else value
    return type(value)(map(_wide, value)) if isinstance(value, list | tuple) else value


def _widened(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What takes no two dtypes at once."""
    if "out" in kwargs:  # to be written to, and not a copy of it
        return func(*args, **kwargs)
    return func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})


def _linear(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    def parts(input: Any, weight: Any, bias: Any = None) -> Any:
        x = _wide(input)
        if not is_ours(weight) or x.dtype != torch.float32 or x.device != weight.device:
            return func(x, weight, bias)
        return _product(x, weight, bias, across=False)

    return parts(*args, **kwargs)


def _addmm(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """transformers' Conv1D."""
    if len(args) == 3 and not kwargs and is_ours(args[2]) and isinstance(args[2], nn.Parameter):
        bias, x, weight = args
        x = _wide(x)
        if bias.dim() == 1 and x.dtype == torch.float32:
            return _product(x, weight, bias, across=True)
    return _widened(func, args, kwargs)


def _matmul(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """x @ weight.T, as Falcon's linear layers multiply; not what is of more dimensions (attention's scores)."""
    if len(args) == 2 and not kwargs and all(isinstance(value, Tensor) for value in args):
        x, other = _wide(args[0]), args[1]
        if x.dim() > 1 and other.dim() == 2 and x.dtype == torch.float32 and is_ours(other.T):
            return _product(x, other.T, None, across=False)
    return _widened(func, args, kwargs)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, across: bool) -> Tensor:
    rows = x if x.dim() == 2 else x.reshape(-1, x.size(-1))
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    if torch.is_grad_enabled():  # a session asks for no gradient of parameters
        weight, bias = weight.detach(), bias.detach() if isinstance(bias, Tensor) else None
    out = linear(rows, weight, bias, across=across)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.size(-1))


def _with_weight(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What is made of a weight itself, and would be rounded to its 16 bits (1 + γ of Nemotron, softplus of Apertus)."""
    made = any(type(value) is nn.Parameter for value in (*args, *kwargs.values()))
    return _widened(func, args, kwargs) if made else func(*args, **kwargs)


def _embedding(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return _wide(func(*args, **kwargs))


def _kept(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A cast: to fp32 where it is to 16 bits."""

    def target(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return torch.float32 if value in LOW else value
        return value

    x, *rest = args
    like = rest[0] if rest else kwargs.get("other")  # x.to(other), x.type_as(other)
    if isinstance(like, Tensor) and like.dtype in LOW:
        return x.to(like.device, torch.float32)
    return func(x, *map(target, rest), **{name: target(value) for name, value in kwargs.items()})


# torch's product of a mixture's experts, where this torch has it.
_GROUPED = (getattr(torch, "_grouped_mm", None), getattr(nn.functional, "grouped_mm", None))

_OF_WEIGHTS = ("add", "sub", "mul", "div", "pow", "exp", "sigmoid", "tanh", "sqrt", "rsqrt", "neg")
_OPERATORS = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow", "neg")

_HANDLERS: dict[Any, Callable[[Any, tuple, dict[str, Any]], Any]] = {
    nn.functional.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    nn.functional.embedding: _embedding,
    **{getattr(owner, name): _with_weight for owner in (torch, Tensor) for name in _OF_WEIGHTS},
    **{getattr(Tensor, f"__{name}__"): _with_weight for name in _OPERATORS},
    nn.functional.softplus: _with_weight,
    Tensor.to: _kept,
    Tensor.type_as: _kept,
    **dict.fromkeys(
        (
            nn.functional.layer_norm, nn.functional.rms_norm, nn.functional.group_norm, nn.functional.batch_norm,
            torch.layer_norm, torch.rms_norm, torch.group_norm, nn.functional.scaled_dot_product_attention,
            nn.functional.bilinear, torch.conv1d, torch.conv2d, torch.mm, torch.bmm, torch.baddbmm,
            torch.addbmm, torch.mv, torch.einsum, Tensor.__rmatmul__, Tensor.mm,
            Tensor.bmm, Tensor.addmm, Tensor.baddbmm, *filter(None, _GROUPED),
        ),
        _widened,
    ),
}  # fmt: skip
