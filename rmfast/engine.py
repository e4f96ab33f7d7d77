"""The suffix engine: a causal body run on ragged suffixes over shared prefixes, without padding.

All rows of a chunk (rmfast.planner) lie flat, (1, n, d), with their own position ids. Every part of a layer but
attention is token-wise, so the model's own modules run on them unchanged; attention is the op `suffix_attention`, put
in through transformers' AttentionInterface. Where a layer has the shape of Llama, Qwen, Mistral, Gemma or Phi, its
token-wise parts are fused ops as well, and the last layer computes queries, output and MLP only for rows that are read.
Both ways are tried on a few tokens against the padded run before they are used. Nothing stays changed in the model.
"""

from __future__ import annotations

import copy
import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from rmfast import backends as _backends
from rmfast import model as _model
from rmfast.ops import gated_activation, rms_norm, rotary, suffix_attention
from rmfast.planner import Chunk, plan

__all__ = ["Engine", "Unsupported"]

_NAME = "rmfast"


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

    def attend(self, key: nn.Module, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention of one layer, of all rows or of `read_rows` alone: q (m, Hq, D) -> (m, Hq, D)."""
        size = q.size(-1)
        if size % 8:  # the op reads 16 bytes at a time; zeros change no dot
            q, k, v = (nn.functional.pad(t, (0, -size % 8)) for t in (q, k, v))
        return self.over_pool(key, q, k, v, options)[..., :size]

    def over_pool(self, key: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """Attention of heads as the op takes them."""
        asked = None if q.size(0) == k.size(0) else self.cu_reads
        return suffix_attention(
            q, k, v, self.cu_seqlens, *self.pool(key, k, v), self.prefix_start, self.prefix_len, cu_queries=asked,
            **options,
        )[0]  # fmt: skip


class _Chained:
    """The pool of a planned chunk: rows left over by the chunk before and its own; keeps what the next one needs."""

    def __init__(
        self,
        chunk: Chunk,
        kept: dict[nn.Module, tuple[Tensor, Tensor]],
        device: torch.device,
        seen: Callable[[nn.Module, Tensor, Tensor], None] | None,
    ):
        self.seen = seen
        self.pool_rows, self.keep_rows = _rows(chunk.pool_rows, device), _rows(chunk.keep_rows, device)
        self.kept = kept if chunk.kept else {}
        self.keep: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def __call__(self, key: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.seen is not None:
            self.seen(key, k, v)
        if key in self.kept:
            k, v = (torch.cat(pair) for pair in zip(self.kept[key], (k, v)))
        if not isinstance(self.keep_rows, Tensor) or self.keep_rows.numel():
            self.keep[key] = (k[self.keep_rows].clone(), v[self.keep_rows].clone())
        return k[self.pool_rows], v[self.pool_rows]


_current: ContextVar[Run | None] = ContextVar("rmfast_run", default=None)


def entering(x: Tensor) -> Tensor:
    """The stream at the rows that are read, (m, d), from what a layer of a packed or padded run is given, (B, T, d)."""
    run, rows = _current.get(), _model.rows_read()
    parts = [x.reshape(-1, x.size(-1))] if run is None or run.delta is None else [x[0], run.delta]
    parts = parts if rows is None else [part[rows.to(part.device)] for part in parts]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def of_rows_read(x: Tensor) -> Tensor:
    """(m, n) at the rows that are read, of what a module has for all rows of a run, or (last layer) those alone."""
    x, rows = x.reshape(-1, x.size(-1)), _model.rows_read()
    return x if rows is None or len(x) == len(rows) else x[rows.to(x.device)]


def _rows(index: np.ndarray, device: torch.device) -> Tensor | slice:
    """Row indices; a slice where they are one stretch (the prompt of best-of-N), which then is not copied."""
    if len(index) and index[-1] - index[0] == len(index) - 1 and (np.diff(index) == 1).all():
        return slice(int(index[0]), int(index[-1]) + 1)
    return torch.from_numpy(index).to(device)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface over the chunk that runs: (1, H, n, D) -> (1, n, Hq, D)."""
    run = _current.get()
    if run is None:
        raise RuntimeError('attn_implementation "rmfast" only works inside rmfast\'s engine: padding would be ignored')
    if attention_mask is not None or not getattr(module, "is_causal", True):
        raise Unsupported(f"{type(module).__name__} asks for a mask of its own")
    for name in ("s_aux", "position_bias", "alibi"):
        if kwargs.get(name) is not None:
            raise Unsupported(f"{type(module).__name__} gives its attention {name}")
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    run.options[module] = {"scale": scaling, "softcap": softcap, "window": sliding_window}
    return run.attend(module, q, k, v, **run.options[module])[None], None


AttentionInterface.register(_NAME, attention)


# Layers with fused token-wise parts -----------------------------------------------------------------------------------

_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                "post_feedforward_layernorm", "resid_attn_dropout", "resid_mlp_dropout"}  # fmt: skip
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}


@dataclass
class Norm:
    module: nn.Module
    kind: str

    def __call__(self, x: Tensor, residual: Tensor | None = None, post: Norm | None = None) -> Any:
        """norm(x); with a residual (norm(sum), sum) for sum = x + residual, or post(x) + residual."""
        post_weight: Any = None if post is None else post.module.weight
        return rms_norm(x, residual=residual, post_weight=post_weight, **self.arguments)

    @property
    def arguments(self) -> dict[str, Any]:
        """Weight, eps and gemma, as the ops take them."""
        norm: Any = self.module
        return {"weight": norm.weight, "eps": _model._eps(norm), "gemma": self.kind == "gemma_rms"}


@dataclass
class Layer:
    """One decoder layer, by structure; calling it is its forward on (1, n, d), and its parts take (n, ...) rows."""

    attn: Any
    mlp: Any
    norms: list[Norm]  # before attention, (after it), before the MLP, (after it)
    head_norm: str | None  # kind of the norms of q and k heads
    activation: str | None  # None: the MLP runs as the module that it is
    last: bool
    options: dict[str, Any] = field(default_factory=dict)  # scale, softcap and window, as the module itself gives them

    @property
    def sandwich(self) -> bool:
        return len(self.norms) == 4

    def __call__(self, hidden_states: Tensor, *args: Any, position_embeddings: Any = None, **kwargs: Any) -> Tensor:
        run = _current.get()
        assert run is not None
        y, x = self.enter(hidden_states[0], run.delta)
        cos, sin = (t[0] for t in position_embeddings)
        x, run.delta = self.rows(run, y, x, cos, sin)
        if not self.last:
            return x[None]
        x, run.delta = x + run.delta, None
        return x[None]

    def moved(self, copies: Mapping[nn.Module, nn.Module]) -> Layer:
        """The same layer made of copies of its modules."""
        norms = [Norm(copies[norm.module], norm.kind) for norm in self.norms]
        return replace(self, attn=copies[self.attn], mlp=copies[self.mlp], norms=norms)

    def enter(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The first norm's output and the stream, from the stream and what is yet to be added to it."""
        return (self.norms[0](x), x) if delta is None else self.norms[0](delta, x)

    def rows(self, run: Run, y: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The stream and what the MLP has yet to add to it; in the last layer at the run's read rows."""
        read = run.read_rows if self.last else None
        q, k, v = self.heads(y, cos, sin, read)
        return self.after_heads(run, q, k, v, x if read is None else x[read])

    def heads(self, y: Tensor, cos: Tensor, sin: Tensor, read: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (at the rows `read`), keys and values (n, heads, D) of normed rows, as attention takes them."""
        q, k, v = self.project(y, read)
        if read is None:
            return *self.turn(q, k, cos, sin), v
        q, _ = self.turn(q, q[:, :0], cos[read], sin[read])
        return q, self.turn(k[:, :0], k, cos, sin)[1], v

    def after_heads(self, run: Run, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stream at the queries' rows x, with attention added, and what the MLP has yet to add to it."""
        attended = self.attn.o_proj(run.attend(self.attn, q, k, v, **self.options).flatten(1))
        if self.sandwich:
            y, x = self.norms[2](attended, x, post=self.norms[1])
        else:
            y, x = self.norms[1](attended, x)
        return x, self.mlp_of(y)

    def added_by(self, heads: Tensor) -> Tensor:
        """What attention adds to the stream, from its heads' outputs (n, Hq, D)."""
        out = self.attn.o_proj(heads.flatten(1))
        return self.norms[1](out) if self.sandwich else out

    def adds(self, kind: str) -> tuple[nn.Module, Norm | None]:
        """The module that gives what attention (or the MLP, "mlp_out") adds to the stream, and the norm behind it."""
        if kind == "attn_out":
            return self.attn.o_proj, self.norms[1] if self.sandwich else None
        return self.mlp if self.activation is None else self.mlp.down_proj, self.norms[3] if self.sandwich else None

    @property
    def middle_norm(self) -> Norm:
        """The norm before the MLP."""
        return self.norms[2 if self.sandwich else 1]

    def project(self, y: Tensor, read: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (at the rows `read`), keys and values (n, heads, D) of normed rows, before norms and rotation."""
        attn, d = self.attn, self.attn.head_dim
        if hasattr(attn, "qkv_proj"):
            split = attn.config.num_attention_heads * d
            qkv = attn.qkv_proj(y)
            kv = (qkv.size(-1) - split) // 2
            q, k, v = qkv.split([split, kv, kv], dim=-1)
            q = q if read is None else q[read]
        else:
            q, k, v = attn.q_proj(y if read is None else y[read]), attn.k_proj(y), attn.v_proj(y)
        q, k, v = (t.unflatten(-1, (-1, d)) for t in (q, k, v))
        return q, k, v

    def turn(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys after their norms and rotation; either may have no heads."""
        attn, norms = self.attn, {}
        if self.head_norm is not None:
            norms = {"q_norm": attn.q_norm.weight, "k_norm": attn.k_norm.weight, "eps": _model._eps(attn.q_norm),
                     "gemma": self.head_norm == "gemma_rms"}  # fmt: skip
        return rotary(q, k, cos, sin, **norms)

    def mlp_of(self, y: Tensor) -> Tensor:
        """What the MLP adds to the stream, from its normed rows."""
        if self.activation is None:
            out = self.mlp(y[None])
            delta = (out[0] if isinstance(out, tuple) else out)[0]
            return self.norms[3](delta) if self.sandwich else delta
        return self.mlp_from(self.neurons(y))

    def neurons(self, y: Tensor) -> Tensor:
        """The MLP's inner activations (n, m) of normed rows."""
        mlp = self.mlp
        if hasattr(mlp, "gate_up_proj"):
            gate, up = mlp.gate_up_proj(y).chunk(2, dim=-1)
        else:
            gate, up = mlp.gate_proj(y), mlp.up_proj(y)
        return gated_activation(gate, up, kind=self.activation)  # type: ignore[arg-type]

    def mlp_from(self, neurons: Tensor) -> Tensor:
        """What the MLP adds to the stream, from its inner activations."""
        delta = self.mlp.down_proj(neurons)
        return self.norms[3](delta) if self.sandwich else delta


def _norm(module: Any, size: int) -> Norm | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != (size,) or not _model._plain(module):
        return None
    if not _model._readable(module):
        return None
    probe = torch.linspace(-2, 3, 4 * size, dtype=torch.float32).reshape(1, 4, size).to(weight.device, weight.dtype)
    kind = _model._norm_kind(_model.Call("", module, probe, None))
    return Norm(module, kind) if kind in ("rms", "gemma_rms") else None


def _activation(mlp: Any) -> str | None:
    parts = {name for name, _ in mlp.named_children()}
    act = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    if not callable(act) or not _model._plain(mlp):
        return None
    if not ({"gate_proj", "up_proj", "down_proj"} <= parts or {"gate_up_proj", "down_proj"} <= parts):
        return None
    if parts - {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"}:
        return None
    x = torch.linspace(-4, 4, 33)
    matches = [kind for kind, formula in _ACTIVATIONS.items() if torch.allclose(act(x), formula(x), atol=1e-6)]
    return matches[0] if matches else None


def _structure(body: nn.Module) -> list[tuple[nn.Module, Layer]] | str:
    """Every decoder layer by structure, or the reason why they are run as the modules that they are."""
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return "the body has no list of layers named layers"
    found = []
    for index, layer in enumerate(layers):
        where = f"layer {index} ({type(layer).__name__})"
        parts = {name for name, _ in layer.named_children()}
        if extra := parts - _LAYER_PARTS:
            return f"{where} has parts of its own: {', '.join(sorted(extra))}"
        attn, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        if attn is None or mlp is None:
            return f"{where} lacks self_attn or mlp"
        inside = {name for name, _ in attn.named_children()}
        if inside - _ATTENTION_PARTS or not ({"q_proj", "k_proj", "v_proj"} <= inside or "qkv_proj" in inside):
            return f"{where}: its attention has other parts than q, k, v and o projections"
        if not (_model._plain(layer) and _model._plain(attn)) or not isinstance(getattr(attn, "head_dim", None), int):
            return f"{where} carries hooks, or its attention names no head_dim"
        names = ["input_layernorm", "post_attention_layernorm"]
        if "pre_feedforward_layernorm" in parts:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        size = getattr(layer.input_layernorm, "weight", torch.empty(0)).numel() if "input_layernorm" in parts else 0
        norms = [norm for name in names if (norm := _norm(getattr(layer, name, None), size)) is not None]
        if len(norms) < len(names) or len({(norm.kind, _model._eps(norm.module)) for norm in norms}) > 1:
            return f"{where}: not all of {', '.join(names)} are RMS norms of one kind and eps"
        head_norm = None
        if "q_norm" in inside:
            pair = [_norm(attn.q_norm, attn.head_dim), _norm(getattr(attn, "k_norm", None), attn.head_dim)]
            if pair[0] is None or pair[1] is None or pair[0].kind != pair[1].kind:
                return f"{where}: its q_norm and k_norm are not RMS norms over a head"
            head_norm = pair[0].kind
        last = index == len(layers) - 1
        found.append((layer, Layer(attn, mlp, norms, head_norm, _activation(mlp), last)))
    return found


# Running --------------------------------------------------------------------------------------------------------------


class Engine:
    """Packed runs of one bound model.

    Attributes:
        mode: "fused" (layers by structure) or "modules" (the model's own layers around suffix_attention).
        why: why the mode is not "fused", or None.

    Raises:
        Unsupported: the model can't run packed.
    """

    def __init__(self, binding: _model.Binding):
        if not binding.causal:
            raise Unsupported("its attention sees later tokens too")
        if not binding.head:
            raise Unsupported("it pools by itself")
        hooked = [name or "the body" for name, module in binding.body.named_modules() if _model._hooked(module)]
        if hooked:
            raise Unsupported(f"hooks (on {hooked[0]}) expect padded batches")
        if not _configs(binding.body):
            raise Unsupported("its attention does not use transformers' AttentionInterface")
        self.binding = binding
        self.why: str | None = None
        self.layers: list[tuple[nn.Module, Layer]] = []
        self._options: dict[nn.Module, dict[str, Any]] = {}
        with binding.session(clamped=False):
            precise = next(binding.body.parameters()).dtype in (torch.float32, torch.float64)
            # fp32 differs by 1e-6, a wrong formula by a percent or more. bf16 itself is off by up to 2%.
            error = self._probe(1e-4 if precise else 0.1)
            if isinstance(error, str):
                raise Unsupported(error)
            if (problem := self._masked_window() or self._other_layers()) is not None:
                raise Unsupported(problem)
            layers = _structure(binding.body)
            if isinstance(layers, str):
                self.why = layers
                return
            for _, fused in layers:
                fused.options = self._options[fused.attn]
            self.layers = layers
            limit = 2 * error + (1e-5 if precise else 0.01)
            fused_error = self._probe(limit)
            if not isinstance(fused_error, str) and not (far := self._far_error()) <= limit:
                fused_error = f"they differ from the model's own by {far:.1e} at its last positions"
            if isinstance(fused_error, str):
                self.layers, self.why = [], f"fused layers: {fused_error}"

    @property
    def mode(self) -> str:
        return "fused" if self.layers else "modules"

    def moved(self, binding: _model.Binding, copies: Mapping[nn.Module, nn.Module] | None) -> Engine:
        """The engine of the same model under another binding, or of `copies` of its modules with other weights."""
        made = copy.copy(self)
        made.binding = binding
        if copies is not None:
            made._options = {copies[module]: options for module, options in self._options.items()}
            made.layers = [(copies[module], layer.moved(copies)) for module, layer in self.layers]
        return made

    def affordable_tokens(self) -> int:
        """Rows of a chunk that fit into half of the free memory, K/V rows kept for the next chunk included."""
        config, body = self.binding.config, self.binding.body
        weight = next(body.parameters())
        try:
            d, heads = int(config.hidden_size), int(config.num_attention_heads)
            head_dim = int(getattr(config, "head_dim", None) or d // heads)
            kv = int(getattr(config, "num_key_value_heads", None) or heads) * head_dim
            inner = int(getattr(config, "intermediate_size", None) or 4 * d)
        except (AttributeError, TypeError):  # sizes that differ by layer: no estimate, the default budget
            return 1 << 30
        # A row at its widest: stream, norm, q, k, v, output, gate, up and their product; a pool may hold 8 rows of K/V
        # for each; and K/V kept in every layer.
        row = 6 * d + 3 * inner + 2 * kv * (9 + config.num_hidden_layers)
        return max(256, _free_memory(self.binding.device) // 2 // (row * weight.element_size()))

    def _masked_window(self) -> str | None:
        """Why a window that the model puts into its mask, which no longer exists, rules packed runs out."""
        config = self.binding.config
        kinds = getattr(config, "layer_types", None)
        if getattr(config, "attention_chunk_size", None) and (kinds is None or "chunked_attention" in kinds):
            return "its attention is chunked by its mask"
        if getattr(config, "sliding_window", None) is None or getattr(config, "use_sliding_window", True) is False:
            return None
        for module, options in self._options.items():
            index = getattr(module, "layer_idx", None)
            due = kinds is None or index is None or kinds[index] == "sliding_attention"
            if due and options["window"] is None:
                return "it has its sliding window in the mask alone"
        return None

    def _other_layers(self) -> str | None:
        """Why layers without attention of their own, which the probe's error may not show in bf16, rule it out.

        Rows of other texts would run through what else mixes tokens (Mamba, convolutions), and a layer that is run
        twice has two sets of K and V.
        """
        count, seen = getattr(self.binding.config, "num_hidden_layers", None), len(self._options)
        if count is None or seen >= count:
            return None
        return f"only {seen} of its {count} layers have attention of their own"

    def _far_error(self) -> float:
        """Relative error of fused layers against the model's own at the last positions it is made for.

        Some models scale by position (Ministral), which the few first positions of the probe do not show.
        """
        device, limit = self.binding.device, getattr(self.binding.config, "max_position_embeddings", None) or 4096
        tokens = _model._probe_ids(self.binding.root, self.binding.vocab_size, None, ())[0].to(device)
        n = len(tokens)
        positions = torch.arange(max(0, limit - n), max(0, limit - n) + n, device=device)
        cu, none = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, n], [0]))
        ways = []
        for forwards in ([], [fused for _, fused in self.layers]):
            run = Run(cu, none, none, lambda key, k, v: (k[:0], v[:0]))
            ways.append(self.body(tokens, positions, run, forwards, 0).double())
        return float((ways[1] - ways[0]).norm() / ways[0].norm())

    def _probe(self, limit: float) -> float | str:
        """The error of packed hidden states against padded ones; above the limit, or failing, what is wrong."""
        try:
            error = self._probe_error()
        except (_backends.BackendError, torch.OutOfMemoryError):
            raise  # says nothing about the model
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, Unsupported) as failure:
            return f"packed rows failed: {failure}"
        if error <= limit:
            return error
        return f"packed and padded hidden states differ by {error:.1e}"

    def _probe_error(self) -> float:
        """Relative error on three texts that share a beginning, cut so that one chunk leaves K/V to the next."""
        binding = self.binding
        ids = _model._probe_ids(binding.root, binding.vocab_size, None, ())[0].numpy()
        texts = [ids, np.concatenate([ids[:4], ids[::-1]]), ids[2:5]]
        flat, cu = np.concatenate(texts), np.cumsum([0, *map(len, texts)])
        got = []
        for read in ("all", np.array([len(t) - 1 for t in texts])):
            planned = plan(flat, cu, batch_tokens=8, min_shared=2, read=read)  # type: ignore[arg-type]
            out = torch.cat([rows for _, rows in self.run(flat, planned, 0)])
            got.append(out[torch.from_numpy(planned.read_index).to(out.device)])
        want = []
        for text in texts:
            one = torch.from_numpy(text)[None].to(binding.device)
            want.append(binding.hidden(one, torch.ones_like(one))[0])
        got.append(torch.cat(want))
        every, last, wanted = (t.double() for t in got)
        wanted_last = wanted[torch.from_numpy(cu[1:] - 1).to(wanted.device)]
        return max(
            float((every - wanted).norm() / wanted.norm()), float((last - wanted_last).norm() / wanted_last.norm())
        )

    def run(
        self,
        ids: np.ndarray,
        planned: Any,
        longest: int,
        seen: Callable[[nn.Module, Tensor, Tensor], None] | None = None,
    ) -> Iterator[tuple[Chunk, Tensor]]:
        """Runs a plan's chunks in order, inside `binding.session()`.

        Args:
            ids: flat token ids, as given to the planner.
            planned: a `rmfast.planner.Plan`, or some of its chunks from one with kept == 0 on.
            longest: tokens of the longest text, by which length-dependent rotary embeddings go; 0 for none.
            seen: is given each attention module and its K and V of a chunk's rows (n, heads, D), after RoPE; D is
                padded to a multiple of 8.

        Yields:
            Each chunk and its hidden states (M, d) at chunk.read_rows, before the final norm where
            `binding.leaves_norm_out`.
        """
        kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for chunk in planned:
            hidden, kept = self._chunk(ids, chunk, kept, longest, seen)
            yield chunk, hidden

    def _chunk(
        self,
        ids: np.ndarray,
        chunk: Chunk,
        kept: dict[nn.Module, tuple[Tensor, Tensor]],
        longest: int,
        seen: Callable[[nn.Module, Tensor, Tensor], None] | None,
    ) -> tuple[Tensor, dict[nn.Module, tuple[Tensor, Tensor]]]:
        device = self.binding.device

        def move(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        pool = _Chained(chunk, kept, device, seen)
        run = Run(move(chunk.cu_seqlens), move(chunk.prefix_start), move(chunk.prefix_len), pool)
        if len(chunk.read_rows) < chunk.rows:
            cu_reads = np.searchsorted(chunk.read_rows, chunk.cu_seqlens)
            run.read_rows, run.cu_reads = move(chunk.read_rows), move(cu_reads.astype(np.int32))
        tokens = move(ids[chunk.tokens].astype(np.int64))
        with _model.reading(chunk.rows, run.read_rows):
            hidden = self.body(tokens, move(chunk.positions), run, [fused for _, fused in self.layers], longest)
        if run.read_rows is not None and not self.layers:
            hidden = hidden[run.read_rows]
        return hidden, pool.keep

    def body(
        self, tokens: Tensor, positions: Tensor, run: Run, forwards: Sequence[Callable[..., Tensor]], longest: int
    ) -> Tensor:
        """Runs the body on flat rows (n,) with the given forwards of its layers (or none: their own); (m, d).

        `longest` as for `run`; hidden states before the final norm where `binding.leaves_norm_out`.
        """
        binding = self.binding
        if binding.device.type == "cpu":
            _reuse_freed_memory()
        _model._fresh_rope(binding._rope)
        with ExitStack() as stack:
            stack.enter_context(_attention_of(binding.body))
            if longest:
                stack.enter_context(_longest_text(binding.body, longest))
            if binding.leaves_norm_out:
                stack.enter_context(_model._identity(binding.norm))
            for (layer, _), forward in zip(self.layers, forwards):
                stack.enter_context(_model.replaced_forward(layer, forward))
            token = _current.set(run)
            try:
                out = binding.body(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
            finally:
                _current.reset(token)
        self._options.update(run.options)
        return _model._hidden_state(out)[0]


@cache
def _reuse_freed_memory() -> None:
    """Has glibc's malloc keep what is freed for the next allocation, as PyTorch does on a GPU.

    By its defaults the large outputs of every layer go back to the system and fault in again page by page, which takes
    10 to 14% of a run on two cores. It holds for the process from the first packed run on; RMFAST_MALLOC=0 leaves
    malloc as it is, and other allocators (jemalloc, tcmalloc) are not touched.
    """
    if not sys.platform.startswith("linux") or os.environ.get("RMFAST_MALLOC") == "0":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 1 << 25)  # the most that older versions take
        mallopt(trim_threshold, 2**31 - 1)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            found = dict(line.split(":") for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 4 << 30


def _configs(body: nn.Module) -> list[Any]:
    """The distinct configurations that the body's attention modules ask for their implementation."""
    found: dict[int, Any] = {}
    for module in body.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return list(found.values())


@contextmanager
def _attention_of(body: nn.Module) -> Iterator[None]:
    """Makes the body's attention ours, for the thread that has a run; put back at the end.

    The configuration gets a subclass of its own class, so that another thread's forward still sees its own choice.
    """
    saved = [(config, type(config)) for config in _configs(body)]
    try:
        for config, kind in saved:
            object.__setattr__(config, "__class__", _with_our_attention(kind))  # type: ignore[arg-type]
        yield
    finally:
        for config, kind in saved:
            object.__setattr__(config, "__class__", kind)


@cache
def _with_our_attention(kind: Any) -> type:
    def implementation(self: Any) -> Any:
        return self._attn_implementation_internal if _current.get() is None else _NAME

    return type(kind.__name__, (kind,), {"_attn_implementation": property(implementation)})


@contextmanager
def _longest_text(body: nn.Module, longest: int) -> Iterator[None]:
    """Rotary embeddings as they are beside a text of `longest` tokens: one more position, taken off again."""
    with ExitStack() as stack:
        for module in body.modules():
            if not hasattr(module, "original_inv_freq") and not hasattr(module, "rope_type"):
                continue
            original = module.forward

            def longer(x: Tensor, position_ids: Tensor, *args: Any, original: Any = original, **kw: Any) -> Any:
                more = torch.cat([position_ids, position_ids.new_full((position_ids.size(0), 1), longest - 1)], dim=1)
                return tuple(t[:, :-1] for t in original(x, more, *args, **kw))

            stack.enter_context(_model.replaced_forward(module, longer))
        yield
