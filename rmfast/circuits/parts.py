"""A decoder as senders and receivers: how heads read and write the stream, and runs that show both.

A head of queries, keys or values reads W (γ⊙x) s, with s the scale of the norm before attention, so that its map of the
stream is one matrix γ⊙W but for s; a head writes s' W_O x_h with W_O⊙γ', where a norm stands behind attention (Gemma).
Both are taken from the weights as they are, and the model's own forward runs around them.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rmfast.binding.binding import Binding
from rmfast.binding.compute import chosen
from rmfast.binding.modules import active, is_readable, is_untouched
from rmfast.binding.norm_map import NormMap
from rmfast.circuits.nodes import Node
from rmfast.engine.layers import Layer
from rmfast.engine.scorer import Scorer
from rmfast.patching.layers_patcher import LayersPatcher
from rmfast.patching.points import Point
from rmfast.texts.inputs import Encoded

_LOW = (torch.bfloat16, torch.float16)

# Tensors of a run by name and layer, (B, T, n) each; a name has several where several modules are given the same.
Seen = dict[tuple[str, int], list[Tensor]]


@dataclass(eq=False)
class Sent:
    """What the senders of one run wrote, and the streams that receivers read, for T tokens.

    Attributes:
        embedding: (T, d).
        heads: by layer (T, H, D), heads before the output projection, times the scale of a norm behind it.
        mlps: by layer (T, d).
        streams: (T, d) each: what attention and what the MLP of each layer reads in turn, and the last one's output.
    """

    embedding: Tensor
    heads: list[Tensor]
    mlps: list[Tensor]
    streams: list[Tensor]

    def mapped(self, use: Callable[..., Tensor], *others: Sent) -> Sent:
        """`use` of each tensor, with those of the others beside it."""

        def each(name: str) -> list[Tensor]:
            return [use(*some) for some in zip(*(getattr(sent, name) for sent in (self, *others)))]

        embedding = use(*(sent.embedding for sent in (self, *others)))
        return Sent(embedding, each("heads"), each("mlps"), each("streams"))


class Parts:
    """The senders and receivers of a scorer's model.

    A model stored in 16 bits runs in fp32, as after `.float()`: gradients in bf16 are off by percents, and differences
    of two runs cancel. One whose quantised weights multiply by themselves runs as it is.

    Attributes:
        binding, patcher, layers: the model that runs, and its layers by structure.
        senders: in the order in which they write.
        receivers: layer by layer, q, k and v heads and the MLP; then the reward.
        sees: for each receiver how many senders it reads, the first ones.
        dtype: of the stream.

    Raises:
        ValueError: the model's layers are not taken apart (docs/models.md), or it is clamped at the last token alone;
            a norm stands behind an output projection that adds a bias, which then belongs to no head.
    """

    def __init__(self, rm: Scorer):
        engine = rm.packed_engine()
        why = engine if isinstance(engine, str) else engine.why
        name = type(rm.binding.root).__name__
        if isinstance(engine, str) or why:
            raise ValueError(
                f"Expected a decoder whose layers rmfast takes apart into heads and MLPs, got {name}: {why}"
            )
        if rm.binding.clamps_last:
            raise ValueError('Expected a model without clamps of positions="last", which are no part of any edge')
        self.patcher = LayersPatcher(_precise(rm.binding))
        self.binding = self.patcher.binding
        self.layers: list[Layer] = [layer for _, layer in engine.layers]
        for kind in ("attn_out", "mlp_out"):
            self.patcher.units(kind)
        self.device, self.dtype = self.binding.device, self.binding.stream_dtype
        self.like = torch.empty(0, device=self.device, dtype=torch.promote_types(self.dtype, torch.float32))
        self.senders, self.receivers, self.sees = [Node("embedding")], [], []
        for index, layer in enumerate(self.layers):
            heads, before = layer.projections, len(self.senders)
            for kind, count in (("q_input", heads.count), ("k_input", heads.kv_count), ("v_input", heads.kv_count)):
                self.receivers += [Node(kind, index, head) for head in range(count)]
            self.receivers.append(Node("mlp_input", index))
            self.senders += [Node("head_out", index, head) for head in range(heads.count)]
            reads = [before] * (heads.count + 2 * heads.kv_count)
            self.sees += [*reads, before if layer.parallel else len(self.senders)]
            self.senders.append(Node("mlp_out", index))
        self.receivers.append(Node("reward"))
        self.sees.append(len(self.senders))
        self._made: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        with self.binding.session(grad=True), torch.no_grad():
            self._look()

    @property
    def width(self) -> int:
        """d."""
        return self.layers[0].width

    def edges(self) -> Tensor:
        """(U, V) bool, which senders each receiver reads."""
        return torch.arange(len(self.senders))[:, None] < torch.tensor(self.sees)[None]

    def receivers_of(self, layer: int) -> tuple[slice, int]:
        """The columns of a layer's q, k and v heads, and that of its MLP."""
        counts = [each.projections.count + 2 * each.projections.kv_count for each in self.layers]
        start = sum(counts[:layer]) + layer
        return slice(start, start + counts[layer]), start + counts[layer]

    def senders_of(self, layer: int) -> tuple[slice, int]:
        """The rows of a layer's heads, and that of its MLP."""
        start = 1 + layer + sum(each.projections.count for each in self.layers[:layer])
        return slice(start, start + self.layers[layer].projections.count), start + self.layers[layer].projections.count

    def _look(self) -> None:
        """Makes the maps of modules whose weights can't be read, and refuses biases that belong to no head."""
        for index, layer in enumerate(self.layers):
            widths = {**dict.fromkeys(layer.projections.modules, layer.width), layer.o_proj: self._inner(index)}
            for module, width in widths.items():
                plain = active(module)
                if type(plain) not in (nn.Linear, Conv1D) or not is_untouched(plain) or not is_readable(plain):
                    self._made[module] = self._by_units(module, width)
            norm = self.norm(index, "after_attn")
            if norm.eps is not None and (norm.bias is not None or self._linear(layer.o_proj)[1].any()):
                raise ValueError(
                    "Expected layers whose attention adds no bias before or in the norm behind it, got those of "
                    f"{type(self.binding.root).__name__}: what it adds belongs to no head"
                )

    def _inner(self, index: int) -> int:
        """Columns that the output projection is given."""
        return self.layers[index].projections.count * self.layers[index].projections.size

    # Weights ----------------------------------------------------------------------------------------------------------

    def reads(self, index: int) -> Tensor:
        """How q, k and v heads of a layer read the stream: (V, D, d), the norm's gain in it.

        A head is this map of the stream times the norm's scale, and `offset`.
        """
        return self.norm(index, "before_attn").fold(self._projections(index, 0))

    def offset(self, index: int) -> Tensor:
        """(V, D), what q, k and v heads of a layer are where the norm gives its bias alone."""
        norm, bias = self.norm(index, "before_attn"), self._projections(index, 1)[..., 0]
        return bias if norm.bias is None else bias + self._projections(index, 0) @ norm.bias

    def _projections(self, index: int, which: int) -> Tensor:
        """Weights (V, D, d), or biases (V, D, 1), of q, k and v heads."""
        layer = self.layers[index]
        made = [self._linear(module)[which] for module in layer.projections.modules]
        rows = [x.T if which == 0 else x[None] for x in made]
        return torch.cat(layer.projections.parted(rows), 1).permute(1, 2, 0)

    def writes(self, index: int) -> Tensor:
        """How heads of a layer write to the stream: (H, D, d), the gain of a norm behind them in it."""
        layer = self.layers[index]
        heads = layer.projections
        weight, _ = self._linear(layer.o_proj)
        return self.norm(index, "after_attn").linear(weight.T.unflatten(0, (heads.count, heads.size)))

    def norm(self, index: int, place: str) -> NormMap:
        """Of "before_attn", "after_attn", "before_mlp"."""
        norm = getattr(self.layers[index], place)
        return NormMap() if norm is None else NormMap.of(self.like.dtype, **norm.head_arguments(self.like.device))

    def _linear(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """A linear module's weight (out, in) and bias (out,)."""
        if module in self._made:
            return self._made[module]
        plain: Any = active(module)
        weight = (plain.weight if type(plain) is nn.Linear else plain.weight.T).detach().to(self.like)
        return weight, weight.new_zeros(len(weight)) if plain.bias is None else plain.bias.detach().to(weight)

    def _by_units(self, module: nn.Module, width: int) -> tuple[Tensor, Tensor]:
        """The same of adapters and quantised weights: what the module makes of unit vectors."""
        held = next((p for p in module.parameters() if not p.is_meta), self.like)
        unit = torch.eye(width, device=held.device, dtype=self.dtype)
        bias = module(torch.zeros_like(unit[:1]))
        return (module(unit) - bias).T.to(self.like), bias[0].to(self.like)

    # Runs -------------------------------------------------------------------------------------------------------------

    def run(self, text: Encoded, read: int, embedding: Tensor | None = None) -> tuple[Seen, Tensor]:
        """The model's own run of a text alone: what came by, and its rewards (1, K); in a session with gradients.

        Where autograd is on, "mlp_in" and "end" are branches of what is read there: their gradients are those of these
        receivers alone. The graph begins at "embedding".

        Args:
            embedding: (n, T, d), for n runs at once: what the first layer is given in each.
        """
        seen: Seen = defaultdict(list)
        tracks = torch.is_grad_enabled()

        def kept(*key: Any) -> Callable[[Tensor], None]:
            return lambda x: seen[key].append(x.detach().clone())  # a layer may go on to change it (Falcon)

        def branched(*key: Any) -> Callable[[Tensor], Tensor]:
            def use(x: Tensor) -> Tensor:
                seen[key].append(x.view_as(x))
                return seen[key][-1]

            return use

        def enter(x: Tensor) -> Tensor:
            x = (x if embedding is None else embedding.to(x)).detach().requires_grad_(tracks)
            seen["embedding", 0].append(x)
            return x

        with ExitStack() as stack:

            def tap(module: nn.Module, side: Any, use: Callable[[Tensor], Tensor | None]) -> None:
                stack.enter_context(Point(module, side).tapped(use))

            tap(self.patcher.modules[0], "in", enter)
            for index, (module, layer) in enumerate(zip(self.patcher.modules, self.layers)):
                tap(module, "in", kept("stream", index))
                for which, projection in enumerate(layer.projections.modules):
                    tap(projection, "out", seen[f"projected {which}", index].append)
                tap(layer.o_proj, "in", kept("heads", index))
                if layer.after_attn is not None:
                    tap(layer.after_attn.module, "in", kept("attended", index))
                if layer.before_mlp is not None:
                    tap(layer.before_mlp.module, "in", kept("mlp_stream", index))
                for reader in mlp_readers(module, layer):
                    tap(reader, "in", branched("mlp_in", index))
                stack.enter_context(self.patcher.points[index]["mlp_out"].tapped(kept("mlp_out", index)))
            tap(self.patcher.modules[-1], "out", branched("end", 0))
            ids = torch.from_numpy(text.ids).expand(1 if embedding is None else len(embedding), -1)
            rewards = self.patcher.forward(ids, text.types, read)
        return seen, rewards

    def rows(self, seen: Seen, name: str, index: int = 0) -> Tensor:
        """(B, T, n) of a run, without its graph."""
        x = seen[name, index][0].detach()
        batch = len(seen["embedding", 0][0])
        return x.reshape(batch, -1, x.size(-1)).to(self.like)

    def mlp_stream(self, seen: Seen, index: int) -> Tensor:
        """(B, T, d), what the MLP reads before its norm."""
        return self.rows(seen, "mlp_in" if self.layers[index].before_mlp is None else "mlp_stream", index)

    def sent(self, seen: Seen) -> Sent:
        """What the senders wrote in a run of one text."""
        heads, streams = [], []
        for index, layer in enumerate(self.layers):
            x = self.rows(seen, "heads", index)[0].unflatten(-1, (layer.projections.count, -1))
            if layer.after_attn is not None:
                x = x * self.norm(index, "after_attn").scale(self.rows(seen, "attended", index)[0])[..., None]
            heads.append(x)
            streams += [self.rows(seen, "stream", index)[0], self.mlp_stream(seen, index)[0]]
        mlps = [self.rows(seen, "mlp_out", index)[0] for index in range(len(self.layers))]
        return Sent(self.rows(seen, "embedding")[0], heads, mlps, [*streams, self.rows(seen, "end")[0]])

    def written(self, sent: Sent, at: slice) -> Tensor:
        """(U, t, d), what each sender writes to the stream at some tokens."""
        out = self.like.new_empty(len(self.senders), len(sent.embedding[at]), self.width)
        out[0] = sent.embedding[at]
        for index in range(len(self.layers)):
            heads, mlp = self.senders_of(index)
            torch.bmm(sent.heads[index][at].transpose(0, 1), self.writes(index), out=out[heads])
            out[mlp] = sent.mlps[index][at]
        return out


def mlp_readers(module: nn.Module, layer: Layer) -> list[nn.Module]:
    """What a layer's MLP reads its rows by: itself, or where its parts lie in the layer (OPT) the first of them."""
    if layer.mlp is not module:
        return [layer.mlp]
    assert layer.inner is not None
    return [getattr(module, name) for name in layer.inner.first]


def _precise(binding: Binding) -> Binding:
    """The binding in fp32 where it would run in 16 bits, but for quantised and offloaded weights."""
    if binding.stream_dtype not in _LOW:
        return binding
    try:
        chosen("fp32", binding.root)
    except ValueError:
        return binding
    return dataclasses.replace(binding, compute="fp32")
