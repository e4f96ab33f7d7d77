"""Direct paths: what receivers make of their input when one sender alone is changed and all between them is frozen.

This is the first of path patching's two steps, for many senders at once. A sender's change is what it adds to the
residual stream in the other run less what it adds in the base run, at corresponding positions. As attention is frozen,
the change stays at its positions. What stands on its way decides how it comes to the receiver:

    through="residual"   every head and MLP between is frozen: the change comes to the receiver as it is. The edge of a
                         graph of heads and MLPs (Goldowsky-Dill et al. 2023; ACDC, edge attribution)
    through="mlps"       heads are frozen, MLPs between are run anew on the changed stream (Wang et al. 2022, IOI)

The receiver then reads stream + change through its own norm, whose scale is that of the sum. What it makes of it (a
query, key or value, what an MLP adds, or the stream that is read) is what the second step puts into the base run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rmfast.circuits.head_parts import head_part
from rmfast.circuits.nodes import Node
from rmfast.engine.invariance import padded
from rmfast.patching.sites import SourcedValues
from rmfast.patching.suffix_patcher import SuffixPatcher, SuffixRecord

Through = Literal["residual", "mlps"]

# The kind (`rmfast.patching.sites`) that stands for what a receiver makes of its input.
MADE = {"q_input": "q", "k_input": "k", "v_input": "v", "mlp_input": "mlp_out", "reward": "resid_post"}


def written(node: Node) -> int:
    """When a sender is in the stream: by 2l in what enters layer l, by 2l + 1 in what is behind its attention."""
    if node.layer is None:
        return 0
    return 2 * node.layer + (1 if node.kind == "head_out" else 2)


@dataclass(frozen=True)
class _Rows:
    """Values (S, n, units, width) at n of a text's positions; place (T,) is where a position's are among them."""

    values: Tensor
    place: Tensor

    def __getitem__(self, index: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        source, position, unit = index
        return self.values[source, self.place[position], unit]


class SuffixPaths:
    """Direct paths in a model whose layers the suffix engine knows.

    Args:
        base, other: the run that is patched and the one that changes come from, recorded with `kinds`.
        partner: (T,) the other run's position for each of the base's.
    """

    def __init__(
        self, patcher: SuffixPatcher, base: SuffixRecord, other: SuffixRecord, partner: np.ndarray, through: Through
    ):
        self.patcher, self.base, self.other, self.through = patcher, base, other, through
        self.partner = torch.from_numpy(partner[: len(base.ids)])
        self.layers = [fused for _, fused in patcher.engine.layers]

    @staticmethod
    def kinds(senders: Sequence[Node], receivers: Sequence[Node], through: Through) -> tuple[set[str], set[str]]:
        """What is to be recorded of the base run and of the other, in all layers."""
        sent = {"resid_pre" if node.kind == "embedding" else node.kind for node in senders}
        made = {MADE[node.kind] for node in receivers}
        return sent | made | {"resid_mid"} | ({"mlp_out"} if through == "mlps" else set()), sent

    def values(self, senders: Sequence[Node], positions: np.ndarray) -> SourcedValues:
        """What receivers make of their input, with each of the senders changed at the positions (n,)."""
        return _Changed(self, senders, torch.from_numpy(positions).to(self.patcher.binding.device)).made

    def changes(self, senders: Sequence[Node], at: Tensor) -> Tensor:
        """(S, n, d): what each sender adds in the other run less what it adds in the base run.

        One sender at a time, so that its numbers are the same beside any others.
        """
        stream, there = self.base.stream[0], self.partner.to(at.device)[at]
        wide = torch.promote_types(stream.dtype, torch.float32)
        out = stream.new_empty(len(senders), len(at), stream.size(1), dtype=wide)
        for into, node in zip(out, senders):
            into.copy_(self._added(self.other, node, there).to(out) - self._added(self.base, node, at).to(out))
        return out

    def _added(self, run: SuffixRecord, node: Node, rows: Tensor) -> Tensor:
        m = node.layer or 0
        if node.kind != "head_out":
            return run.activations("resid_pre" if node.kind == "embedding" else node.kind, m)[rows, 0]
        layer = self.layers[m]
        return head_part(layer.o_proj, layer.after_attn, run.activations("head_out", m)[rows], node.head or 0)


class _Changed:
    """The streams of S base runs, each with one sender changed at n positions, and what receivers make of them."""

    def __init__(self, paths: SuffixPaths, senders: Sequence[Node], at: Tensor):
        self.at, self.base, self.layers = at, paths.base, paths.layers
        self.residual, self.tile = paths.through == "residual", paths.patcher.engine.tile
        self.added = paths.changes(senders, at)
        self.since = np.array([written(node) for node in senders])
        self.place = torch.zeros(len(self.base.ids), dtype=torch.int64, device=at.device)
        self.place[at] = torch.arange(len(at), device=at.device)
        # Chunks of edits ask layer by layer, upwards, and for several kinds of a layer.
        self.entering, self.behind = lru_cache(2)(self._entering), lru_cache(2)(self._behind)
        self.heads, self.made = lru_cache(1)(self._heads), lru_cache(4)(self._made)

    def _made(self, kind: str, m: int) -> _Rows:
        """What receivers of a layer make of their input, by the kind of it."""
        stream = self.base.stream
        if kind == "resid_post":
            return _Rows(
                self._sum(stream[m + 1], self.entering(m + 1)).unflatten(0, (-1, len(self.at)))[:, :, None], self.place
            )
        which = self._in_stream(2 * m + (kind == "mlp_out" and not self.layers[m].parallel))
        found = self._mlp(m, which)[:, :, None] if kind == "mlp_out" else self.heads(m)["qkv".index(kind)]
        values = found.new_zeros(len(self.added), *found.shape[1:])
        values[which] = found
        return _Rows(values, self.place)

    # What senders change of the stream that enters layer m, and of that behind its attention, (S, n, d). Where nothing
    # on the way is run, that is what they add; no edge leads from those that are not in the stream yet.

    def _entering(self, m: int) -> Tensor:
        if self.residual:
            return self.added
        if m == 0:
            return self._arriving(0)
        change, which = self.behind(m - 1) + self._arriving(2 * m), self._in_stream(2 * m - 1)
        if len(which):
            own = self.base.parts["mlp_out"][m - 1][self.at, 0]
            change[which] += self._mlp(m - 1, which).to(change) - own.to(change)
        return change

    def _behind(self, m: int) -> Tensor:
        return self.added if self.residual else self.entering(m) + self._arriving(2 * m + 1)

    def _arriving(self, when: int) -> Tensor:
        return self.added * torch.from_numpy(self.since == when).to(self.added)[:, None, None]

    def _in_stream(self, when: int) -> Tensor:
        """Senders that are in the stream at a time, by index."""
        return torch.from_numpy(np.flatnonzero(self.since <= when)).to(self.at.device)

    def _heads(self, m: int) -> tuple[Tensor, ...]:
        """Queries, keys and values (S', n, heads, D) of senders that are in the stream."""
        layer, change = self.layers[m], self.entering(m)[self._in_stream(2 * m)]
        return self._run(lambda x: layer.project(layer.enter(x, None)[0]), self._sum(self.base.stream[m], change))

    def _mlp(self, m: int, which: Tensor) -> Tensor:
        """(S', n, d): what the MLP adds, with some of the senders changed."""
        layer, middle = self.layers[m], self.base.parts["resid_mid"][m][:, 0]
        given = self._sum(self.base.stream[m], self.entering(m)[which]), self._sum(middle, self.behind(m)[which])
        return self._run(lambda x, middle: (layer.mlp_after(x, middle),), *given)[0]

    def _sum(self, x: Tensor, change: Tensor) -> Tensor:
        """(S * n, d): rows of the base run (T, d) and what is changed of them (S, n, d)."""
        return (x[self.at].to(change) + change).to(x).flatten(0, 1)

    def _run(self, make: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> tuple[Tensor, ...]:
        """make(*given) as (S, n, ...); matmuls run on a whole number of tiles."""
        rows = len(given[0])
        whole = torch.from_numpy(padded(np.arange(rows), self.tile)).to(self.at.device)
        return tuple(x[:rows].unflatten(0, (-1, len(self.at))) for x in make(*(x[whole] for x in given)))
