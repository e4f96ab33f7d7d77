"""Attention of packed runs: `Run` says where each suffix's keys are, and transformers' AttentionInterface leads there.

All rows of a chunk (rmfast.engine.planner) lie flat, (1, n, d). Attention is the op `suffix_attention` over the rows
themselves and a pool of K and V rows that stand before them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from rmfast.binding.compute import outside
from rmfast.binding.modules import modules_of
from rmfast.binding.session import rows_read
from rmfast.engine.planner import Chunk
from rmfast.ops import suffix_attention

_NAME = "rmfast"
_OWN_MASK = "rmfast-own-mask"  # for attention that a model writes out itself, and that wants a mask of it


class Unsupported(Exception):
    """The model cannot run packed; the message says why."""


# An attention module and its K and V of this run's rows -> the pool of K and of V rows that stand before them.
Pool = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Run:
    """What attention needs to know of the suffixes that run."""

    cu_seqlens: Tensor
    prefix_start: Tensor
    prefix_len: Tensor
    pool: Pool
    read_rows: Tensor | None = None  # the only rows that the last layer must give, each segment's last; None: all
    cu_reads: Tensor | None = None  # (S + 1,) int32, each segment's share of them
    options: dict[nn.Module, dict[str, Any]] = field(default_factory=dict)  # what each module gave its attention
    delta: Tensor | None = None  # what the layer before has yet to add to the stream

    def attend(
        self, key: nn.Module, q: Tensor, k: Tensor, v: Tensor, sinks: str | None = None, **options: Any
    ) -> Tensor:
        """Attention of one layer, of all rows or of `read_rows` alone: q (m, Hq, D), v (n, Hkv, Dv) -> (m, Hq, Dv).

        sinks: the name of the parameter of `key` that holds them, looked up at each run as all weights are.
        """
        size = v.size(-1)
        widest = max(q.size(-1), size)
        widest += -widest % 8  # the op reads 16 bytes at a time; zeros change no dot
        if options.get("scale") is None:
            options["scale"] = q.size(-1) ** -0.5
        if sinks is not None:
            options["sinks"] = getattr(key, sinks)
        q, k, v = (t if t.size(-1) == widest else nn.functional.pad(t, (0, widest - t.size(-1))) for t in (q, k, v))
        return self.over_pool(key, q, k, v, options)[..., :size]

    def over_pool(self, key: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """Attention of heads as the op takes them."""
        asked = None if q.size(0) == k.size(0) else self.cu_reads
        pool_k, pool_v = self.pool(key, k, v)
        with outside():
            return suffix_attention(
                q, k, v, self.cu_seqlens, pool_k, pool_v, self.prefix_start, self.prefix_len, cu_queries=asked,
                **options,
            )[0]  # fmt: skip


@dataclass
class Recorded(Run):
    """A run that notes the queries, keys and values (n, heads, D) that each module gives its attention."""

    heads: dict[nn.Module, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def attend(
        self, key: nn.Module, q: Tensor, k: Tensor, v: Tensor, sinks: str | None = None, **options: Any
    ) -> Tensor:
        self.heads[key] = q, k, v
        return super().attend(key, q, k, v, sinks, **options)


class ChainedPool:
    """The pool of a planned chunk: rows left over by the chunk before and its own; keeps what the next one needs.

    Args:
        pool_rows, keep_rows: the chunk's, on the device.
    """

    def __init__(
        self,
        chunk: Chunk,
        pool_rows: Tensor,
        keep_rows: Tensor,
        kept: dict[nn.Module, tuple[Tensor, Tensor]],
        seen: Callable[[nn.Module, Tensor, Tensor], None] | None,
    ):
        self.seen, self.rows = seen, chunk.rows
        self.pool_rows, self.keep_rows = _rows(chunk.pool_rows, pool_rows), _rows(chunk.keep_rows, keep_rows)
        self.kept = kept if chunk.kept else {}
        self.keep: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def __call__(self, key: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.seen is not None:
            self.seen(key, k[: self.rows], v[: self.rows])  # what lies behind is padding
        if key in self.kept:
            k, v = (torch.cat(pair) for pair in zip(self.kept[key], (k, v)))
        if not isinstance(self.keep_rows, Tensor) or self.keep_rows.numel():
            self.keep[key] = (k[self.keep_rows].clone(), v[self.keep_rows].clone())
        return k[self.pool_rows], v[self.pool_rows]


current_run: ContextVar[Run | None] = ContextVar("rmfast_run", default=None)


def entering(x: Tensor) -> Tensor:
    """The stream at the rows that are read, (m, d), from what a layer of a packed or padded run is given, (B, T, d)."""
    run, rows = current_run.get(), rows_read()
    parts = [x.reshape(-1, x.size(-1))] if run is None or run.delta is None else [x[0], run.delta]
    parts = parts if rows is None else [part[rows.to(part.device)] for part in parts]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def of_rows_read(x: Tensor) -> Tensor:
    """(m, n) at the rows that are read, of what a module has for all rows of a run, or (last layer) those alone."""
    x, rows = x.reshape(-1, x.size(-1)), rows_read()
    return x if rows is None or len(x) == len(rows) else x[rows.to(x.device)]


def _rows(index: np.ndarray, there: Tensor) -> Tensor | slice:
    """Row indices on the device; a slice where they are one stretch (the prompt of best-of-N), which is not copied."""
    if len(index) and index[-1] - index[0] == len(index) - 1 and (np.diff(index) == 1).all():
        return slice(int(index[0]), int(index[-1]) + 1)
    return there


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface over the chunk that runs: (1, H, n, D) -> (1, n, Hq, D)."""
    run = current_run.get()
    if run is None:
        raise RuntimeError('attn_implementation "rmfast" only works inside rmfast\'s engine: padding would be ignored')
    run.options[module] = {"scale": scaling, "softcap": softcap, "window": sliding_window}
    if attention_mask is not None or not getattr(module, "is_causal", True):
        raise Unsupported(f"{type(module).__name__} asks for a mask of its own")
    for name in ("position_bias", "alibi"):
        if kwargs.get(name) is not None:
            raise Unsupported(f"{type(module).__name__} gives its attention {name}")
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    run.options[module]["sinks"] = _parameter(module, kwargs.get("s_aux"))
    return run.attend(module, q, k, v, **run.options[module])[None], None


def _parameter(module: nn.Module, value: Tensor | None) -> str | None:
    """Which of the module's own parameters a value is."""
    if value is None:
        return None
    for name, parameter in module.named_parameters(recurse=False):
        if parameter is value:
            return name
    raise Unsupported(f"{type(module).__name__} gives its attention sinks (s_aux) that are no parameter of its own")


AttentionInterface.register(_NAME, attention)
AttentionInterface.register(_OWN_MASK, attention)
AttentionMaskInterface.register(_OWN_MASK, lambda *args, **kwargs: torch.empty(0))


def attention_configs(body: nn.Module) -> list[Any]:
    """The distinct configurations that the body's attention modules ask for their implementation."""
    found: dict[int, Any] = {}
    for module in modules_of(body):
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return list(found.values())


_runs: dict[int, tuple[int, type]] = {}  # by a configuration's id: runs that are under way, and its own class
_runs_guard = threading.Lock()


_own_mask: ContextVar[bool] = ContextVar("rmfast_own_mask", default=False)


@contextmanager
def attention_of(body: nn.Module, own_mask: bool = False) -> Iterator[None]:
    """Makes the body's attention ours, for the thread that has a run; put back at the end.

    own_mask: gives it an empty mask and not none: its attention is replaced itself, and what is around it is not.

    The configuration gets a subclass of its own class, so that another thread's forward still sees its own choice. It
    keeps it until the last run is over: two models may have one configuration, and run at once.
    """
    configs = attention_configs(body)
    with _runs_guard:
        for config in configs:
            runs, kind = _runs.get(id(config), (0, type(config)))
            _runs[id(config)] = runs + 1, kind
            object.__setattr__(config, "__class__", _with_our_attention(kind))
    token = _own_mask.set(own_mask)
    try:
        yield
    finally:
        _own_mask.reset(token)
        with _runs_guard:
            for config in configs:
                runs, kind = _runs.pop(id(config))
                if runs > 1:
                    _runs[id(config)] = runs - 1, kind
                else:
                    object.__setattr__(config, "__class__", kind)


@cache
def _with_our_attention(kind: Any) -> type:
    def implementation(self: Any) -> Any:
        if current_run.get() is None:
            return self._attn_implementation_internal
        return _OWN_MASK if _own_mask.get() else _NAME

    return type(kind.__name__, (kind,), {"_attn_implementation": property(implementation)})
