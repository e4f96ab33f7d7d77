"""What is kept of a run of one text, for reading and for starting edited runs from it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass(eq=False)
class SuffixRecord:
    """A run of one text up to its read token, as `rmfast.patching.sites.Record`; T is the tokens up to there.

    Attributes:
        reward: (K,), or where every token is read (T · K,).
        stream: (T, d) by the layer that it enters, L after the last one.
        parts: (T, units, width) by kind and layer.
        gate: the position that a gated head's gate reads, else None.
        gate_values: (1, V), what the head keeps of that row.
        cos, sin: (T, R) by layer.
        rotated: q, k (after norms and rotation) and v, (T, H, D), by layer.
    """

    ids: np.ndarray
    read: int
    reward: Tensor
    gate: int | None = None
    gate_values: Tensor | None = None
    stream: dict[int, Tensor] = field(default_factory=dict)
    parts: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    cos: dict[int, Tensor] = field(default_factory=dict)
    sin: dict[int, Tensor] = field(default_factory=dict)
    rotated: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def activations(self, kind: str, layer: int) -> Tensor:
        """(T, units, width) of a kind and layer that were recorded."""
        if kind in ("resid_pre", "resid_post"):
            return self.stream[layer + (kind == "resid_post")][:, None]
        return self.parts[kind][layer]
