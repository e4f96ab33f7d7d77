"""Direct paths (`rmfast.circuits.direct`) in models that run with hooks: encoders, and layers not taken apart.

A whole forward for each sender, several as the rows of one batch. What attention adds, and what MLPs add where the
change does not go through them, is put back to what it is in the base run, but for what the sender adds. A model that
normalises its sums (BERT) has its norms on the way: they are run anew, as the receiver's own is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from rmfast.binding.modules import active
from rmfast.circuits.direct import MADE, Through
from rmfast.circuits.head_parts import head_part
from rmfast.circuits.nodes import Node
from rmfast.engine.norms import Norm
from rmfast.patching.layers_patcher import LayerRecord, LayersPatcher
from rmfast.patching.sites import SourcedValues

_LANDS = {"embedding": "resid_pre", "head_out": "attn_out", "mlp_out": "mlp_out"}  # what a sender is a part of


class HookedPaths:
    """Direct paths by hooks.

    Args:
        base, other: the run that is patched and the one that changes come from, recorded with `kinds`.
        partner: (T,) the other run's position for each of the base's, or -1.
        senders, receivers: all that values are asked for.

    Raises:
        ValueError: a head is a sender, and what attention adds is not what its output projection and a norm make of
            its heads.
    """

    def __init__(
        self, patcher: LayersPatcher, base: LayerRecord, other: LayerRecord, partner: np.ndarray,
        senders: Sequence[Node], receivers: Sequence[Node], through: Through,
    ):  # fmt: skip
        self.patcher, self.base, self.other, self.through = patcher, base, other, through
        self.partner = torch.from_numpy(partner)
        last = patcher.layers - 1
        self.wanted = {(MADE[node.kind], last if node.layer is None else node.layer) for node in receivers}
        with_heads = {node.layer or 0 for node in senders if node.kind == "head_out"}
        self.out = {layer: self._out(layer) for layer in with_heads}

    @staticmethod
    def kinds(senders: Sequence[Node]) -> set[str]:
        """What is to be recorded of both runs, in all layers."""
        return {"attn_out", "mlp_out", *(["head_out"] if any(node.kind == "head_out" for node in senders) else [])}

    def values(self, senders: Sequence[Node], positions: np.ndarray) -> SourcedValues:
        """What receivers make of their input, with each of the senders changed at the positions (n,)."""
        at = torch.from_numpy(positions)
        made: dict[tuple[str, int], Tensor] = {}
        frozen = ("attn_out", "mlp_out") if self.through == "residual" else ("attn_out",)

        def seen(kind: str, layer: int, x: Tensor) -> Tensor | None:
            """x: (S, T, units, width)."""
            if (kind, layer) in self.wanted:
                made[kind, layer] = x.clone()
            here = [i for i, node in enumerate(senders) if (_LANDS[node.kind], node.layer or 0) == (kind, layer)]
            if kind not in frozen and not here:
                return None
            x = (self.base.activations(kind, layer).to(x).expand_as(x) if kind in frozen else x).clone()
            for i in here:
                x[i, at, 0] = self._sent(senders[i], at).to(x)
            return x

        layers = range(self.patcher.layers)
        places = {("resid_pre", 0), *((kind, m) for m in layers for kind in ("attn_out", "mlp_out")), *self.wanted}
        taps: list[tuple[str, int, Callable[[Tensor], Tensor | None]]] = [
            (kind, m, partial(seen, kind, m)) for kind, m in sorted(places)
        ]
        self.patcher.run(self.base, len(senders), taps)
        return lambda kind, layer: made[kind, layer]

    def _sent(self, node: Node, at: Tensor) -> Tensor:
        """(n, d): what attention, the MLP or the embedding adds to the stream, with the sender changed."""
        layer, there = node.layer or 0, self.partner[at]
        if node.kind != "head_out":
            return self.other.activations(_LANDS[node.kind], layer)[there, 0]

        def part(run: LayerRecord, rows: Tensor) -> Tensor:
            return head_part(*self.out[layer], run.activations("head_out", layer)[rows], node.head or 0)

        new = part(self.other, there) - part(self.base, at)
        return self.base.activations("attn_out", layer)[at, 0].to(new) + new

    def _out(self, layer: int) -> tuple[nn.Module, Norm | None]:
        """The output projection of a layer and the norm between it and the stream, tried on the base run."""
        project, added = (self.patcher.points[layer][kind].module for kind in ("head_out", "attn_out"))
        norm = None
        if not any(module is project for module in added.modules()):
            norm = Norm.of(added, self.patcher.units("attn_out")[1])
            if norm is None:
                raise ValueError(
                    "Expected the norm behind attention to be an RMS or layer norm with a readable weight and no "
                    f"hooks, got {type(active(added)).__name__}; senders mlp_out and embedding need none"
                )
        own = self.base.activations("attn_out", layer)[:, 0]
        found = project(self.base.activations("head_out", layer).flatten(1))
        found = found if norm is None else active(norm.module)(found)
        tolerance = 1e-3 if torch.finfo(own.dtype).bits >= 32 else 0.1
        if not (found - own).norm() <= tolerance * own.norm():
            raise ValueError(
                "Expected heads to add to the stream through their output projection and a norm behind it alone; in "
                f"layer {layer} ({type(self.patcher.modules[layer]).__name__}) there is more"
            )
        return project, norm
