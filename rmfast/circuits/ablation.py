"""A model run as a circuit: each receiver reads kept senders as they are in this run, all others as in another.

Receiver v reads Σ_u kept z_u + Σ_u excluded z'_u, where z_u is what u writes in this very run, whose receivers read
so as well, and z'_u what it wrote in the other run. With z − z' by sender that is the other run's stream and one
matrix product of the kept edges with it, for all heads of a layer and several circuits at once; the model's own modules
do all else.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from rmfast.binding.session import replaced_forward
from rmfast.circuits.parts import Parts, Sent, mlp_readers
from rmfast.patching.points import Point
from rmfast.texts.inputs import Encoded

_ELEMENTS = 1 << 27  # of what senders write in the runs of a batch: 512 MiB
_ROWS = 3072  # tokens that run at once


class Ablation:
    """Circuits of one text; inside `binding.session(grad=True)`.

    Args:
        parts: of the model.
        text, read: what runs, and where its reward is read.
        own: what the senders wrote in the text's own run.
        other: what excluded senders write, at the text's tokens (T, ...).
    """

    def __init__(self, parts: Parts, text: Encoded, read: int, own: Sent, other: Sent):
        self.parts, self.text, self.read, self.own, self.other = parts, text, read, own, other

    def rewards(self, kept: Tensor) -> Tensor:
        """Rewards (C, K) on the CPU of circuits (C, U, V) bool, whatever they say of edges that there are not."""
        parts, tokens = self.parts, len(self.text)
        kept = (kept & parts.edges().to(kept.device)).to(parts.like)
        size = min(_ELEMENTS // (len(parts.senders) * tokens * parts.width), _ROWS // tokens)
        with torch.no_grad():
            return torch.cat([_Run(self, some).rewards().cpu() for some in kept.split(max(1, size))])


class _Run:
    """Some circuits (C, U, V), as numbers, in one batch."""

    def __init__(self, ablation: Ablation, kept: Tensor):
        self.of, self.parts, self.kept = ablation, ablation.parts, kept
        own, other = ablation.own, ablation.other
        # What each sender writes in these runs less what it wrote in the other run.
        self.apart = kept.new_zeros(len(kept), kept.size(1), *own.embedding.shape)
        self.apart[:, 0] = own.embedding - other.embedding
        self.made: dict[tuple[str, int], Any] = {}

    def rewards(self) -> Tensor:
        parts, patcher = self.parts, self.parts.patcher
        with ExitStack() as stack:
            for index, (module, layer) in enumerate(zip(patcher.modules, parts.layers)):
                for which, projection in enumerate(layer.projections.modules):
                    stack.enter_context(replaced_forward(projection, self._projection(index, which)))
                stack.enter_context(Point(layer.o_proj, "in").tapped(self._heads(index)))
                if layer.after_attn is not None:
                    stack.enter_context(Point(layer.after_attn.module, "in").tapped(self._attended(index)))
                for reader in mlp_readers(module, layer):
                    stack.enter_context(Point(reader, "in").tapped(self._mlp(index)))
                stack.enter_context(patcher.points[index]["mlp_out"].tapped(self._mlp_out(index)))
            stack.enter_context(Point(patcher.modules[-1], "out").tapped(self._end))
            ids = torch.from_numpy(self.of.text.ids).expand(len(self.kept), -1)
            return patcher.forward(ids, self.of.text.types, self.of.read)

    def _reads(self, columns: slice, stream: Tensor) -> Tensor:
        """(C, v, T, d), what receivers read that see the same senders; of the other run they would read the stream."""
        senders = self.parts.sees[columns.start]
        kept = self.kept[:, :senders, columns].transpose(1, 2)
        return torch.bmm(kept, self.apart[:, :senders].flatten(2)).unflatten(2, stream.shape) + stream

    def _projection(self, index: int, which: int) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if ("heads", index) not in self.made:
                self.made["heads", index] = self._projected(index)
            return self.made["heads", index][which].reshape(*x.shape[:-1], -1).to(x)

        return forward

    def _projected(self, index: int) -> list[Tensor]:
        """What the projections of a layer give, (C · T, columns) each."""
        parts, heads = self.parts, self.parts.layers[index].projections
        x = self._reads(parts.receivers_of(index)[0], self.of.other.streams[2 * index])
        x = x.transpose(0, 1).flatten(1, 2)  # (V, C · T, d)
        made = torch.bmm(x, parts.reads(index).transpose(1, 2)) * parts.norm(index, "before_attn").scale(x)
        made = (made + parts.offset(index)[:, None]).transpose(0, 1)
        q, k, v = made.split([heads.count, heads.kv_count, heads.kv_count], 1)
        return heads.joined(q, k, v)

    def _heads(self, index: int) -> Callable[[Tensor], None]:
        def use(x: Tensor) -> None:
            count = self.parts.layers[index].projections.count
            self.made["given", index] = x.reshape(len(self.kept), -1, count, x.size(-1) // count).to(self.kept)
            if self.parts.layers[index].after_attn is None:
                self._write_heads(index, 1.0)

        return use

    def _attended(self, index: int) -> Callable[[Tensor], None]:
        def use(x: Tensor) -> None:
            scale = self.parts.norm(index, "after_attn").scale(x.to(self.kept))
            self._write_heads(index, scale.reshape(len(self.kept), -1, 1, 1))

        return use

    def _write_heads(self, index: int, scale: Any) -> None:
        rows, _ = self.parts.senders_of(index)
        apart = self.made.pop(("given", index)) * scale - self.of.other.heads[index]  # (C, T, H, D)
        heads = apart.permute(2, 0, 1, 3).flatten(1, 2)  # (H, C · T, D)
        written = torch.bmm(heads, self.parts.writes(index)).unflatten(1, apart.shape[:2])
        self.apart[:, rows] = written.transpose(0, 1)

    def _mlp(self, index: int) -> Callable[[Tensor], Tensor]:
        def use(x: Tensor) -> Tensor:
            if ("mlp", index) not in self.made:  # projections of one MLP read the same
                _, column = self.parts.receivers_of(index)
                stream = self._reads(slice(column, column + 1), self.of.other.streams[2 * index + 1])[:, 0]
                self.made["mlp", index] = self.parts.norm(index, "before_mlp")(stream)
            return self.made["mlp", index].reshape(x.shape).to(x)

        return use

    def _mlp_out(self, index: int) -> Callable[[Tensor], None]:
        def use(x: Tensor) -> None:
            _, row = self.parts.senders_of(index)
            written = x.to(self.kept).reshape(len(self.kept), *self.of.own.embedding.shape)
            self.apart[:, row] = written - self.of.other.mlps[index]
            for key in [key for key in self.made if key[1] == index]:
                del self.made[key]

        return use

    def _end(self, x: Tensor) -> Tensor:
        last = len(self.parts.receivers) - 1
        return self._reads(slice(last, last + 1), self.of.other.streams[-1])[:, 0].reshape(x.shape).to(x)
