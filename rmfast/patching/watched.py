"""Runs of texts in which the tensors at some points of a model's layers are seen."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
from torch import Tensor

from rmfast.binding.binding import Binding
from rmfast.engine.programs import run_gated
from rmfast.engine.scorer import Scorer
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
    watched.binding = Watched.of(bound, taps)
    # A norm that stays in the body is one that the packed engine leaves out.
    engine = None if packed and bound is scorer.binding else "padded"
    if scorer.gated:
        return [*run_gated(watched, encoded, read, (batch_tokens, progress, engine), head, told=False)]
    return [(values, None) for values in watched.run(encoded, read, batch_tokens, progress, engine, head)]
