"""Where the kinds of `rmfast.patching.sites` lie in a layer, by the names of its parts and never by its class."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Side = Literal["in", "out"]


@dataclass(frozen=True)
class Point:
    """An activation of a layer: what one of its modules is given or gives, (B, T, n), and which of the n columns.

    Unit u is the columns from start + u · step on, `width` of them.

    Attributes:
        module: the module; at its first call in a forward, where it has several.
        side: "in" for its first argument, "out" for its result (the first item, where that is a tuple or list).
        width: values of a unit; None for all columns, as one unit.
        units: None for as many as n columns hold.
        start, step: of the units' columns; step None is width.
        stream: whether the tensor given is the residual stream itself, to which the layer goes on to add: a
            replacement is then written into it, since another tensor in its place would not reach the sum.
    """

    module: nn.Module
    side: Side
    width: int | None = None
    units: int | None = None
    start: int = 0
    step: int | None = None
    columns: int | None = None  # n, where units alone don't tell
    stream: bool = False

    def view(self, x: Tensor, batch: int = 1) -> Tensor:
        """(B, T, units, width), a view of the module's tensor (B, T, n), or (B · T, n) of a batch of B texts (OPT);
        ValueError where n is not as expected."""
        n, x = x.size(-1), x.unflatten(0, (batch, -1)) if x.dim() == 2 else x
        width = n if self.width is None else self.width
        units = n // width if self.units is None else self.units
        columns = units * width if self.columns is None else self.columns
        if x.dim() != 3 or n != columns or units < 1:
            side = "be given" if self.side == "in" else "give"
            raise ValueError(
                f"Expected {type(self.module).__name__} to {side} (B, T, {columns}) for {units} units of {width}, "
                f"got {tuple(x.shape)}"
            )
        return x[..., self.start :].unfold(-1, width, self.step or width)[:, :, :units]

    @contextmanager
    def tapped(self, use: Callable[[Tensor], Tensor | None], every_call: bool = False) -> Iterator[None]:
        """Calls use(x) on the tensor, once, at the module's next call by this thread; what it returns takes x's place.

        Hooks that are there already come before it: it sees, and has the last word on, what they make of the tensor.
        At the stream it comes before them, as what they put in its place is not what the layer adds to.

        Args:
            use: gets (B, T, n) as the module does, and returns a tensor of that shape or None.
            every_call: at all of the module's calls by this thread.
        """
        thread, calls = threading.get_ident(), 0

        def applied(x: Tensor) -> Tensor | None:
            nonlocal calls
            calls += threading.get_ident() == thread
            return use(x) if (calls == 1 or every_call) and threading.get_ident() == thread else None

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            new = applied(given(args, kwargs))
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, _first_name(kwargs): new})

        def after(module: nn.Module, args: tuple, out: Any) -> Any:
            new = applied(_first(out))
            return type(out)((new, *out[1:])) if new is not None and isinstance(out, tuple | list) else new

        if self.side == "in":
            handle = self.module.register_forward_pre_hook(before, with_kwargs=True, prepend=self.stream)
        else:
            handle = self.module.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple | list) and out else out


def _first_name(kwargs: dict[str, Any]) -> str:
    return "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))


def given(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The tensor that a layer is called with."""
    return args[0] if args else kwargs[_first_name(kwargs)]


# Parts in which a kind is looked for, the first that the layer has: Llama, Qwen, Mistral, Phi, GPT-NeoX, GPT-2;
# BERT, RoBERTa, ELECTRA, DeBERTa, DistilBERT, ModernBERT; Bloom, MPT. "" is the layer.
PLACES: dict[str, Sequence[tuple[str, Side]]] = {
    "resid_pre": [("", "in")],
    "resid_mid": [
        ("attention.output.LayerNorm", "out"),
        ("sa_layer_norm", "out"),
        ("post_attention_layernorm", "in"),
        ("ln_2", "in"),
        ("mlp_norm", "in"),
        ("norm_2", "in"),
        ("final_layer_norm", "in"),
    ],
    "resid_post": [("", "out")],
    "attn_out": [
        ("attention.output.dense", "out"),
        ("post_self_attn_layernorm", "out"),
        ("self_attention.dense", "out"),  # Bloom's modules add the stream themselves
        ("attn.out_proj", "out"),
        ("self_attn", "out"),
        ("attention", "out"),
        ("attn", "out"),
    ],
    "mlp_out": [
        ("post_mlp_layernorm", "out"),
        ("mlp.dense_4h_to_h", "out"),
        ("ffn.down_proj", "out"),
        ("mlp", "out"),
        ("output.dense", "out"),
        ("ffn", "out"),
        ("fc2", "out"),
    ],
    "head_out": [
        ("self_attn.o_proj", "in"),
        ("self_attn.dense", "in"),
        ("self_attn.out_proj", "in"),
        ("self_attention.dense", "in"),
        ("attention.output.dense", "in"),
        ("attention.out_lin", "in"),
        ("attention.dense", "in"),
        ("attn.out_proj", "in"),
        ("attn.Wo", "in"),
        ("attn.c_proj", "in"),
    ],
    "mlp_neuron": [
        ("mlp.down_proj", "in"),
        ("mlp.dense_4h_to_h", "in"),
        ("mlp.c_proj", "in"),
        ("mlp.Wo", "in"),
        ("mlp.fc2", "in"),
        ("mlp.fc_out", "in"),
        ("fc2", "in"),
        ("output.dense", "in"),
        ("ffn.lin2", "in"),
        ("ffn.down_proj", "in"),
    ],
    "q": [("self_attn.q_proj", "out"), ("attention.self.query", "out"), ("attention.self.query_proj", "out"),
          ("attention.q_lin", "out"), ("attn.q_proj", "out")],
    "k": [("self_attn.k_proj", "out"), ("attention.self.key", "out"), ("attention.self.key_proj", "out"),
          ("attention.k_lin", "out"), ("attn.k_proj", "out")],
    "v": [("self_attn.v_proj", "out"), ("attention.self.value", "out"), ("attention.self.value_proj", "out"),
          ("attention.v_lin", "out"), ("attn.v_proj", "out")],
}  # fmt: skip
_ATTENTION = ("self_attn", "attention.self", "attention", "attn", "self_attention")

# Projections of q, k and v in one: all of q, then of k, then of v, with fewer heads of k and v ("grouped") or as many;
# or each head of k and of v behind the heads of q that read it ("by group"; NeoX: one).
_FUSED = {
    "self_attn.qkv_proj": "grouped",
    "attn.c_attn": "equal",
    "attn.Wqkv": "equal",
    "attention.query_key_value": "by group",
    "self_attention.query_key_value": "by group",
}

# A norm behind attention and behind the MLP (Gemma 2 and 3, OLMo 2): what they give is what is added to the stream.
_SANDWICH: dict[str, Sequence[tuple[str, Side]]] = {
    "resid_mid": [("pre_feedforward_layernorm", "in"), ("mlp", "in")],
    "attn_out": [("post_attention_layernorm", "out")],
    "mlp_out": [("post_feedforward_layernorm", "out")],
}

# Modules of these names may add the stream inside (Bloom, but not Falcon): their last projection is what they add.
_INSIDE: dict[str, Sequence[tuple[str, Side]]] = {
    "attn_out": [("self_attention.dense", "out")],
    "mlp_out": [("mlp.dense_4h_to_h", "out")],
}


def points(layer: nn.Module) -> dict[str, Point]:
    """Where each kind of `rmfast.patching.sites.KINDS` lies in a layer, by the names of the layer's parts.

    Kinds whose parts the layer lacks are left out; resid_pre and resid_post are always there. Names don't tell all: in
    a layer with these parts attention and MLP may read the same stream (then there is no resid_mid), or what they give
    may be scaled before it is added. `LayersPatcher.points` holds those that a run has borne out.
    """
    parts = dict(layer.named_modules())
    special = _SANDWICH if "post_feedforward_layernorm" in parts else _INSIDE if "self_attention" in parts else {}
    attention = next((parts[name] for name in _ATTENTION if name in parts), None)
    heads, kv_heads, size = (None, None, None) if attention is None else _heads(attention)
    found: dict[str, Point] = {}
    for kind, places in PLACES.items():
        place = next((place for place in special.get(kind, places) if place[0] in parts), None)
        if place is None:
            continue
        module, side = parts[place[0]], place[1]
        if kind == "mlp_neuron":
            found[kind] = Point(module, side, width=1)
        elif kind not in ("head_out", "q", "k", "v"):
            found[kind] = Point(module, side, stream=kind == "resid_mid" and side == "in")
        elif heads is not None and size is not None:
            # k and v have as many heads as fit: a configuration may state a number that the model goes without.
            found[kind] = Point(module, side, width=size, units=None if kind in "kv" else heads)
    fused = next((name for name in _FUSED if name in parts), None)
    if fused is not None and "q" not in found and heads is not None and kv_heads is not None and size is not None:
        if _FUSED[fused] == "by group":
            kv_heads = getattr(attention, "num_kv_heads", heads)
        counts = (heads, kv_heads, kv_heads) if _FUSED[fused] != "equal" else (heads, heads, heads)
        each = heads // counts[1]  # heads of q to one of k
        for i, (kind, units) in enumerate(zip("qkv", counts)):
            start, step = sum(counts[:i]) * size, size
            if _FUSED[fused] == "by group":
                start, step = (0, each + i - 1)[i > 0] * size, (each + 2) * size
                if kind == "q" and counts[1] == 1:
                    step = size
                elif kind == "q" and each > 1:
                    continue  # not at equal distances
            found[kind] = Point(parts[fused], "out", size, units, start, step, sum(counts) * size)
    return found


def _heads(attention: nn.Module) -> tuple[int | None, int | None, int | None]:
    """Query heads, K/V heads and the size of a head, as the attention module or its configuration state them."""
    config = getattr(attention, "config", None)

    def stated(*names: str) -> int | None:
        values = (getattr(holder, name, None) for name in names for holder in (attention, config))
        return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)

    heads = stated("num_attention_heads", "num_heads", "n_heads")
    size = stated("head_dim", "attention_head_size", "head_size")
    width = stated("hidden_size")
    if size is None and heads and width and width % heads == 0:
        size = width // heads
    return heads, stated("num_key_value_heads") or heads, size
