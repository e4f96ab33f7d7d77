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
    pattern      a head's attention probabilities; what is put  a unit for each query head; only in layers that the
                 in is its output with these and its own       suffix engine knows
                 values: of the size of a head_out

`z` is taken as TransformerLens' name of head_out.

A layer that normalises its sums instead (BERT) has as resid_mid and resid_post what these norms give.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from rmfast import arguments
from rmfast.texts.inputs import Encoded

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head_out", "mlp_neuron", "q", "k", "v")
SITES = (*KINDS, "pattern")  # the last one in layers that the suffix engine knows, the others in any
STREAM_KINDS = KINDS[:5]  # the stream, and what is added to it: one unit of d values
_ALIASES = {"z": "head_out"}
# The unit axis' name.
UNITS = {"head_out": "head", "mlp_neuron": "neuron", "q": "head", "k": "head", "v": "head", "pattern": "head"}

# (kind, layer) -> (T, units, width): what replaces the activation at each position of the base run.
Values = Callable[[str, int], Tensor]


class Sourced(Protocol):
    """What replaces an activation where there are several sets of values for it."""

    def __getitem__(self, index: tuple[Any, Any, Any]) -> Tensor:
        """(n, width) of n sources, positions and units."""
        ...


# The same for edits with a source.
SourcedValues = Callable[[str, int], Sourced]


@dataclass(frozen=True)
class Edits:
    """E replacements, each run by itself on one base run of T tokens.

    Attributes:
        kind: (E,) int8, indices into SITES.
        layer: (E,) int32.
        group: (E,) int32, rows of `groups`.
        unit: (E,) int32, 0 for kinds of one unit.
        groups: (G, T) bool, the positions that an edit replaces together; none of them is empty.
        source: (E,) int32, which set of values replaces, where there are several; None where there is one.
    """

    kind: np.ndarray
    layer: np.ndarray
    group: np.ndarray
    unit: np.ndarray
    groups: np.ndarray
    source: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.layer)

    def __getitem__(self, some: np.ndarray) -> Edits:
        source = None if self.source is None else self.source[some]
        return Edits(self.kind[some], self.layer[some], self.group[some], self.unit[some], self.groups, source)


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


def sites_of(given: Any) -> list[str]:
    """The kinds that are asked for, by the names of SITES or TransformerLens' `z`."""
    found = arguments.words("sites", given, (*SITES, *_ALIASES))
    return arguments.words("sites", [_ALIASES.get(kind, kind) for kind in found], SITES)


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
        values: Values | SourcedValues,
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
