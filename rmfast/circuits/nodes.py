"""Nodes: the parts of a decoder that write to the residual stream and those that read it.

A sender writes, a receiver reads what all senders of earlier layers (and attention of its own) have written; an *edge*
is a pair of them. The words for each:

    embedding     sender     what the first layer is given
    head_out      sender     a query head's part of what attention adds to the stream, through the output projection
    mlp_out       sender     what the MLP adds to the stream
    q_input       receiver   the stream as a query head's projection reads it
    k_input       receiver   the stream as a K/V head's key projection reads it
    v_input       receiver   the stream as a K/V head's value projection reads it
    mlp_input     receiver   the stream as the MLP reads it
    reward        receiver   the stream as the final norm and the head read it
"""

from __future__ import annotations

from typing import Any, NamedTuple

SENDERS = ("embedding", "head_out", "mlp_out")
RECEIVERS = ("q_input", "k_input", "v_input", "mlp_input", "reward")
WITH_HEADS = ("head_out", "q_input", "k_input", "v_input")


class Node(NamedTuple):
    """One sender or receiver.

    Attributes:
        kind: one of SENDERS or RECEIVERS.
        layer: from 0; None for the embedding and the reward.
        head: the query head (head_out, q_input) or K/V head (k_input, v_input); None for the other kinds.
    """

    kind: str
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        where = ", ".join(str(x) for x in (self.layer, self.head) if x is not None)
        return f"{self.kind}[{where}]" if where else self.kind


def with_nodes(stored: dict[str, Any]) -> dict[str, Any]:
    """What was read from JSON, with its senders and receivers as nodes."""
    return {**stored, **{side: [Node(*node) for node in stored[side]] for side in ("senders", "receivers")}}
