"""Runs of texts in which the tensors at some points of a model's layers are seen."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
from torch import Tensor

from rmfast.arguments import whole
from rmfast.binding.binding import Binding
from rmfast.engine.attention import entering, of_rows_read
from rmfast.engine.programs import run_gated
from rmfast.engine.scorer import Scorer
from rmfast.patching.layers_patcher import LayersPatcher
from rmfast.patching.points import Point
from rmfast.texts.inputs import Encoded


class Watched(Binding):
    """A binding in whose sessions `taps` see the tensors at their points, at every call of the modules."""

    taps: Sequence[tuple[Point, Callable[[Tensor], None]]]

    @classmethod
    def of(cls, binding: Binding, taps: Sequence[tuple[Point, Callable[[Tensor], None]]]) -> Watched:
        made = cls(**{item.name: getattr(binding, item.name) for item in dataclasses.fields(binding)})
        made.taps = taps
        return made

    @contextmanager
    def session(self, grad: bool = False, clamped: bool = True) -> Iterator[None]:
        with super().session(grad, clamped), ExitStack() as stack:
            for point, use in self.taps:
                stack.enter_context(point.tapped(use, every_call=True))
            yield


def run_watched(
    scorer: Scorer,
    bound: Binding,
    taps: Sequence[tuple[Point, Callable[[Tensor], None]]],
    encoded: list[Encoded],
    read: list[np.ndarray],
    head: Callable[[Tensor, Tensor], Tensor],
    batch_tokens: int | None = None,
    progress: bool = False,
    packed: bool = True,
) -> list[tuple[Tensor, Tensor | None]]:
    """`Scorer.run` with a head, while `taps` see what comes by at their points; `bound` is `layered`'s.

    Returns:
        For each text what the head makes of its rows, and for a gated head of the one that its gate reads.
    """
    scorer.packed_engine()  # before hooks are in the layers, which would rule it out; kept by the scorer
    watched = copy.copy(scorer)
    watched.binding, watched.cuda_graphs = Watched.of(bound, taps), False
    # A norm that stays in the body is one that the packed engine leaves out.
    engine = None if packed and bound is scorer.binding else "padded"
    if scorer.gated:
        return [*run_gated(watched, encoded, read, (batch_tokens, progress, engine), head, told=False)]
    return [(values, None) for values in watched.run(encoded, read, batch_tokens, progress, engine, head)]


class SiteRows:
    """One site of one layer, seen at the rows that are read while texts run under `run_watched`.

    Args:
        patcher: of the model; its `points` are where the sites lie.
        layer, site: one of resid_pre, resid_mid, resid_post, attn_out and mlp_out.

    Attributes:
        packed: whether a run may be the packed engine's, whose fused parts pass sites inside of layers by.
        taps: for `run_watched`.
    """

    def __init__(self, patcher: LayersPatcher, layer: int, site: str) -> None:
        whole("layer", layer, 0, patcher.layers - 1)
        patcher.units(site)
        points, self.packed = patcher.points, site.startswith("resid_p")
        self._last = site == "resid_post" and layer + 1 == patcher.layers
        self._seen: Tensor | None = None  # of the part of a run that is under way
        self.taps: list[tuple[Point, Callable[[Tensor], None]]] = []
        if not self.packed:
            self.taps = [(points[0]["resid_pre"], self._start), (points[layer][site], self._at_site)]
        elif not self._last:  # what a layer gives is what enters the next one
            self.taps = [(points[layer + (site == "resid_post")]["resid_pre"], self._enters)]

    def rows(self, stream: Tensor) -> Tensor:
        """(m, d) of the rows that are read now; `stream` is what they have after the last layer."""
        if self._last:
            return stream
        assert self._seen is not None
        return self._seen

    # Copies, since the model may go on to change what it has.

    def _enters(self, x: Tensor) -> None:
        self._seen = entering(x).clone()

    def _start(self, x: Tensor) -> None:
        self._seen = None

    def _at_site(self, x: Tensor) -> None:
        if self._seen is None:  # a module that has several calls: the first one, as the points are tried
            self._seen = of_rows_read(x).clone()
