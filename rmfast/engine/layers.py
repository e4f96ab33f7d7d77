"""Decoder layers taken apart: those with the shape of Llama, Qwen, Mistral, Gemma or Phi, by structure and formula.

Their token-wise parts are fused ops, and the last layer computes queries, output and MLP only for rows that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.binding.modules import active, is_plain, is_readable, settings_of
from rmfast.binding.norms import Call, eps_of, norm_kind
from rmfast.engine.attention import Run, current_run
from rmfast.ops import gated_activation, rms_norm, rotary

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
    """An RMS norm and its kind, "rms" or "gemma_rms"; calling it runs the fused op.

    Attributes:
        module: the norm, or peft's wrapper around several: which of them is active is looked up at each run.
    """

    module: nn.Module
    kind: str

    def __call__(self, x: Tensor, residual: Tensor | None = None, post: Norm | None = None) -> Any:
        """norm(x); with a residual (norm(sum), sum) for sum = x + residual, or post(x) + residual."""
        post_weight = None if post is None else post.arguments["weight"]
        return rms_norm(x, residual=residual, post_weight=post_weight, **self.arguments)

    @property
    def arguments(self) -> dict[str, Any]:
        """Weight, eps and gemma, as the ops take them."""
        norm: Any = active(self.module)
        return {"weight": norm.weight, "eps": eps_of(norm), "gemma": self.kind == "gemma_rms"}


@dataclass
class Layer:
    """One decoder layer, by structure; calling it is its forward on (1, n, d), and its parts take (n, ...) rows."""

    attn: Any
    mlp: Any
    norms: list[Norm]  # before attention, (after it), before the MLP, (after it)
    head_norms: list[Norm]  # of queries' heads and of keys', of one kind and eps; or none
    activation: str | None  # None: the MLP runs as the module that it is
    last: bool
    angles: int = 0  # of the rotary tables' frequencies, where the body says them: gpt-oss's hold each one once
    options: dict[str, Any] = field(default_factory=dict)  # scale, softcap, window, sinks, as the module gives them

    @property
    def sandwich(self) -> bool:
        return len(self.norms) == 4

    def __call__(self, hidden_states: Tensor, *args: Any, position_embeddings: Any = None, **kwargs: Any) -> Tensor:
        run = current_run.get()
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
        norms, head_norms = (
            [Norm(copies[norm.module], norm.kind) for norm in some] for some in (self.norms, self.head_norms)
        )
        return replace(self, attn=copies[self.attn], mlp=copies[self.mlp], norms=norms, head_norms=head_norms)

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

    def parts(
        self, given: Mapping[str, Any], heads: tuple[Tensor, Tensor, Tensor]
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Its parts' names, their outputs and those of the modules in their place.

        Args: what its attention was given, by name, and the heads that this made of it.
        """
        cos, sin = (t[0] for t in given["position_embeddings"])
        made = self.heads(given["hidden_states"][0], cos, sin)
        yield from zip(("queries", "keys", "values"), made, heads)
        if self.activation is not None:
            y = given["hidden_states"][0]
            yield "MLPs", self.mlp.down_proj(self.neurons(y)), self.mlp(y[None])[0]

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
        if cos.size(-1) == self.angles:
            cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        if not self.head_norms:
            return rotary(q, k, cos, sin)
        q_norm, k_norm = (norm.arguments for norm in self.head_norms)
        return rotary(
            q, k, cos, sin, q_norm=q_norm["weight"], k_norm=k_norm["weight"], eps=q_norm["eps"], gemma=q_norm["gemma"]
        )

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
    if not isinstance(weight, Tensor) or tuple(weight.shape) != (size,) or not is_plain(module):
        return None
    if not is_readable(module):
        return None
    probe = torch.linspace(-2, 3, 4 * size, dtype=torch.float32).reshape(1, 4, size).to(weight.device, weight.dtype)
    kind = norm_kind(Call("", module, probe, None))
    return Norm(module, kind) if kind in ("rms", "gemma_rms") else None


def _alike(norms: list[Norm]) -> bool:
    """Whether they are of one kind and eps, which the ops take for all."""
    return len({(norm.kind, norm.arguments["eps"]) for norm in norms}) == 1


def _function(mlp: Any) -> Any:
    return getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)


def _activation(mlp: Any) -> str | None:
    parts = {name for name, _ in mlp.named_children()}
    act = _function(mlp)
    if not callable(act) or not is_plain(mlp):
        return None
    if not ({"gate_proj", "up_proj", "down_proj"} <= parts or {"gate_up_proj", "down_proj"} <= parts):
        return None
    if parts - {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"}:
        return None
    if isinstance(act, nn.Module) and any(True for _ in act.parameters()):
        return None  # what it learns may take it away from the formula
    near, far = torch.linspace(-4, 4, 33), torch.logspace(0.6, 6, 28)  # bounds (gelu_10) show where neurons are large
    x = torch.cat([near, far, -far])
    matches = [kind for kind, formula in _ACTIVATIONS.items() if torch.allclose(act(x), formula(x), atol=1e-6)]
    return matches[0] if matches else None


def settings(layers: list[tuple[nn.Module, Layer]]) -> list[Any]:
    """What the modules that these stand for hold beside parts and weights, which are looked up at each run: scales,
    windows, functions (`settings_of`)."""
    held: list[Any] = []
    for module, layer in layers:
        norms = [each for norm in (*layer.norms, *layer.head_norms) for each in (norm.module, active(norm.module))]
        for part in (module, layer.attn, layer.mlp, _function(layer.mlp), *norms):
            held += settings_of(part)
    return held


def structure(body: nn.Module) -> list[tuple[nn.Module, Layer]] | str:
    """Every decoder layer by structure, or the reason why they are run as the modules that they are."""
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return "the body has no list of layers named layers"
    found = []
    frequencies = getattr(getattr(body, "rotary_emb", None), "inv_freq", None)
    angles = frequencies.numel() if isinstance(frequencies, Tensor) else 0
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
        if not (is_plain(layer) and is_plain(attn)) or not isinstance(getattr(attn, "head_dim", None), int):
            return f"{where} carries hooks, or its attention names no head_dim"
        names = ["input_layernorm", "post_attention_layernorm"]
        if "pre_feedforward_layernorm" in parts:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        size = getattr(layer.input_layernorm, "weight", torch.empty(0)).numel() if "input_layernorm" in parts else 0
        norms = [norm for name in names if (norm := _norm(getattr(layer, name, None), size)) is not None]
        if len(norms) < len(names) or not _alike(norms):
            return f"{where}: not all of {', '.join(names)} are RMS norms of one kind and eps"
        pair = [getattr(attn, name, None) for name in ("q_norm", "k_norm") if name in inside]
        head_norms = [norm for each in pair if (norm := _norm(each, attn.head_dim)) is not None]
        if pair and (len(head_norms) < 2 or not _alike(head_norms)):
            return f"{where}: its q_norm and k_norm are not RMS norms over a head, of one kind and eps"
        last = index == len(layers) - 1
        found.append((layer, Layer(attn, mlp, norms, head_norms, _activation(mlp), last, angles)))
    return found
