"""Sites: places inside a model whose activations are read and replaced, the same words for every engine and model.

A *kind* names a place of a layer, a *unit* a part of it (an attention head, an MLP neuron), a *position* a token. The
kinds, for a layer that adds attention and then an MLP to the residual stream:

    resid_pre    the residual stream that enters the layer       one unit of d values
    resid_mid    the stream between attention and MLP            one unit of d values
    resid_post   the stream that leaves the layer                one unit of d values
    attn_out     what attention adds to the stream               one unit of d values, after a norm behind it (Gemma)
    mlp_out      what the MLP adds to the stream                 one unit of d values, after a norm behind it (Gemma)
    head_out     a head's output, before the output projection   a unit for each query head, of its size
    mlp_neuron   a neuron after the activation                   a unit for each, of one value
    q, k, v      a head's query, key, value, before QK norm and  a unit for each query head (q) or K/V head (k, v),
                 rotary embedding                                of its size

A layer that normalises its sums instead (BERT) has as resid_mid and resid_post what these norms give.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from rmfast.texts.inputs import Encoded

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head_out", "mlp_neuron", "q", "k", "v")
STREAM_KINDS = KINDS[:5]  # the stream, and what is added to it: one unit of d values
UNITS = {"head_out": "head", "mlp_neuron": "neuron", "q": "head", "k": "head", "v": "head"}  # the unit axis' name

# (kind, layer) -> (T, units, width): what replaces the activation at each position of the base run.
Values = Callable[[str, int], Tensor]


@dataclass(frozen=True)
class Edits:
    """E replacements, each run by itself on one base run of T tokens.

    Attributes:
        kind: (E,) int8, indices into KINDS.
        layer: (E,) int32.
        group: (E,) int32, rows of `groups`.
        unit: (E,) int32, 0 for kinds of one unit.
        groups: (G, T) bool, the positions that an edit replaces together; none of them is empty.
    """

    kind: np.ndarray
    layer: np.ndarray
    group: np.ndarray
    unit: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.layer)

    def __getitem__(self, some: np.ndarray) -> Edits:
        return Edits(self.kind[some], self.layer[some], self.group[some], self.unit[some], self.groups)


class Record(Protocol):
    """A run of one text, kept for reading and for starting edited runs from it.

    Attributes:
        ids: (T,) int64 token ids.
        read: the position at which the reward is read.
        reward: (K,) rewards, on the CPU.
    """

    ids: np.ndarray
    read: int
    reward: Tensor

    def activations(self, kind: str, layer: int) -> Tensor:
        """(T, units, width), for a kind that was asked for when the run was recorded."""
        ...


class Patcher(Protocol):
    """What runs edits on one model, inside `binding.session()`."""

    layers: int

    def units(self, kind: str) -> tuple[int, int]:
        """Units of a layer and values of each; ValueError where the model's layers lack the part, naming it."""
        ...

    def record(
        self, text: Encoded, read: int, kinds: set[str], layers: Collection[int] | None = None, base: bool = True
    ) -> Record:
        """Runs a text alone and keeps the activations of `kinds` in `layers` (None: all), and of a base run what
        `rewards` needs for edits in these layers."""
        ...

    def rewards(
        self,
        base: Record,
        edits: Edits,
        values: Values,
        batch_tokens: int,
        done: Callable[[np.ndarray, Tensor], None],
        skip: np.ndarray,
    ) -> None:
        """Rewards (n, K) of each edited base run, on the CPU: calls done(indices into edits, rewards) chunk by chunk.

        Chunks depend on the edits and the budget alone, and one of which all are in skip (E,) bool is left out: what is
        resumed after some chunks gets the same numbers. Edits without effect are left out by the caller.
        """
        ...

    def least_tokens(self, base: Record, edits: Edits) -> int:
        """The rows of the largest edited run, which a budget must hold."""
        ...
