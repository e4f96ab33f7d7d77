"""Attention with ALiBi that a model writes out by itself (Bloom, MPT): run packed in place of the module's own forward.

It does not go through transformers' AttentionInterface. Such a module is given a bias for each head and key, makes
queries, keys and values by one linear layer and ends in another. How they lie, the scale, and what is added behind are
found by trying, against what the module itself makes of a few tokens; and what it is given must be a slope times the
key's position, at far ones too, in the arithmetic that it runs in: Bloom rounds its biases to 16 bits where it runs in
them, Falcon in any dtype, and both are refused for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rmfast.binding.binding import Binding
from rmfast.binding.compute import Fp32, holds
from rmfast.binding.find import probe_ids
from rmfast.binding.session import of_this_thread, replaced_forward
from rmfast.engine.attention import Run, Unsupported, attention_of, current_run

# Positions at which biases are looked at, at least: enough for those kept in 16 bits to be off.
_POSITIONS = 4096


@dataclass(frozen=True)
class Written:
    """How a module makes its heads, and what becomes of them.

    Attributes:
        qkv, out: names of its two linear layers.
        blocks: whether all queries come before all keys and values, or each key head has its queries, key and value.
        residual: the argument that is added to the result, or None.
        clip: bound of queries, keys and values, or None.
    """

    qkv: str
    out: str
    heads: int
    kv_heads: int
    blocks: bool
    scale: float
    slopes: Tensor
    residual: str | None
    clip: float | None

    def split(self, module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (n, heads, D) of normed rows."""
        made = getattr(module, self.qkv)(x)
        made = made if self.clip is None else made.clamp(-self.clip, self.clip)
        size = made.size(-1) // (self.heads + 2 * self.kv_heads)
        if self.blocks:
            q, k, v = made.unflatten(-1, (-1, size)).split([self.heads, self.kv_heads, self.kv_heads], 1)
            return q, k, v
        each = made.unflatten(-1, (self.kv_heads, -1, size))
        return each[:, :, :-2].flatten(1, 2), each[:, :, -2], each[:, :, -1]

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        run, given = current_run.get(), _arguments(module, args, kwargs)
        assert run is not None
        x = next(iter(given.values()))
        run.options[module] = {"scale": self.scale, "softcap": None, "window": None}
        heads = run.attend(module, *self.split(module, x[0]), scale=self.scale, alibi=self.slopes.to(x.device))
        out = getattr(module, self.out)(heads.flatten(1))[None]
        return (out if self.residual is None else out + given[self.residual]), None


@contextmanager
def running(written: dict[nn.Module, Written]) -> Iterator[None]:
    """Puts them in the place of their modules' forwards, for this thread."""
    with ExitStack() as stack:
        for module, how in written.items():
            stack.enter_context(replaced_forward(module, lambda *a, m=module, h=how, **kw: h.forward(m, *a, **kw)))
        yield


def find(binding: Binding) -> dict[nn.Module, Written]:
    """How each attention module with ALiBi of a body is written; none where it has no such. In a session.

    Raises:
        Unsupported: it is given biases, but is written, or biased, in another way.
    """
    if not any(len(_linears(module)) == 2 for module in binding.body.modules()):
        return {}
    tokens = probe_ids(binding.root, binding.vocab_size, None, ())[0][None].to(binding.device)
    low = binding.stream_dtype in (torch.bfloat16, torch.float16) and not holds()
    with Fp32() if low else ExitStack():
        seen = _calls(binding, tokens)
    if not seen:
        return {}
    slopes = _slopes(binding, next(iter(seen)))
    with Fp32() if low else ExitStack():  # in 16 bits one formula is as good as another
        return {module: _tried(module, given, out, slopes) for module, (given, out) in seen.items()}


def _linears(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_children() if isinstance(part, nn.Linear | Conv1D)]


def _arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args)), **kwargs}


def _bias(given: dict[str, Any], tokens: int) -> Tensor | None:
    """The biases (H, T) among what a module is given: of one query, for all of them."""
    for value in list(given.values())[1:]:
        of_one_query = isinstance(value, Tensor) and value.dim() >= 3 and value.size(-2) == 1
        if of_one_query and value.is_floating_point() and value.size(-1) >= tokens:
            return value.reshape(-1, value.size(-1))
    return None


def _calls(binding: Binding, tokens: Tensor) -> dict[nn.Module, tuple[dict[str, Any], Tensor]]:
    """Modules that are given biases: by what, and what they make of it."""
    seen: dict[nn.Module, tuple[dict[str, Any], Tensor]] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        given = _arguments(module, args, kwargs)
        bias = _bias(given, tokens.size(1))
        if bias is not None and bool((bias != bias[:, :1]).any()):  # a mask that hides nothing is no bias
            seen[module] = given, out[0] if isinstance(out, tuple) else out

    with ExitStack() as stack:
        for module in binding.body.modules():
            if len(_linears(module)) == 2:
                handle = module.register_forward_hook(of_this_thread(note), with_kwargs=True)
                stack.callback(handle.remove)
        binding.hidden(tokens, torch.ones_like(tokens))
    return seen


class _Enough(Exception):
    pass


def _slopes(binding: Binding, module: nn.Module) -> Tensor:
    """(H,), from the biases that the first of the modules is given in a long text; nothing behind it runs."""
    length = max(_POSITIONS, getattr(binding.config, "max_position_embeddings", None) or 0)
    biases: list[Tensor | None] = []

    def stop(*args: Any, **kwargs: Any) -> None:
        biases.append(_bias(_arguments(module, args, kwargs), 1))
        raise _Enough

    tokens = torch.zeros(1, length, dtype=torch.int64, device=binding.device)
    none = tokens[0, :0].int()
    with attention_of(binding.body, own_mask=True), replaced_forward(module, stop):
        token = current_run.set(Run(none, none, none, lambda key, k, v: (k, v)))
        try:
            binding.body(input_ids=tokens, use_cache=False)
        except _Enough:
            pass
        except (RuntimeError, IndexError) as error:
            name = type(module).__name__
            raise Unsupported(f"{name} is given biases, and a text of {length} tokens fails: {error}") from error
        finally:
            current_run.reset(token)
    if not biases or biases[0] is None:
        raise Unsupported(f"{type(module).__name__} is given no biases beside a long text")
    table = biases[0].double()
    # Where biases are small their differences are exact.
    slopes = table[:, 1] - table[:, 0] if table[0, 0].abs() <= table[0, -1].abs() else table[:, -1] - table[:, -2]
    line = slopes[:, None] * torch.arange(table.size(1), device=table.device)
    if not torch.allclose(table - table[:, :1], line, rtol=1e-6, atol=1e-6 * float(line.abs().max())):
        raise Unsupported(
            f"the biases that {type(module).__name__} is given are not a slope times the position, as ALiBi's are: "
            "at far ones they are rounded to 16 bits, or it is another scheme"
        )
    return slopes


def _tried(module: Any, given: dict[str, Any], own: Tensor, slopes: Tensor) -> Written:
    qkv, out = _linears(module)
    x, heads = next(iter(given.values())), slopes.numel()
    size = getattr(module, out).weight.size(0 if isinstance(getattr(module, out), Conv1D) else 1) // heads
    columns = getattr(module, qkv)(x[0, :1]).size(-1)
    kv_heads = (columns // size - heads) // 2 if size else 0
    where = f"{type(module).__name__}, which is given biases of its logits,"
    if kv_heads < 1 or (heads + 2 * kv_heads) * size != columns or heads % kv_heads:
        raise Unsupported(f"{where} makes {columns} columns for {heads} heads of {size}")
    scales = {size**-0.5, *(value for value in vars(module).values() if isinstance(value, float) and value > 0)}
    added = [name for name, value in list(given.items())[1:] if isinstance(value, Tensor) and value.shape == x.shape]
    clip = getattr(module, "clip_qkv", None) or None
    ends, none = torch.tensor([0, x.size(1)], device=x.device), torch.zeros(1, dtype=torch.int64, device=x.device)
    for blocks in (False, True):
        for scale in sorted(scales):
            for residual in (None, *added):
                how = Written(qkv, out, heads, kv_heads, blocks, scale, slopes, residual, clip)
                run = Run(ends, none, none, lambda key, k, v: (k[:0], v[:0]))
                token = current_run.set(run)
                try:
                    made = how.forward(module, **given)[0]
                finally:
                    current_run.reset(token)
                attended = own if residual is None else own - given[residual]
                if float((made - own).norm()) <= 1e-4 * float(attended.norm()):
                    return how
    raise Unsupported(f"{where} makes of them what is not known here")
