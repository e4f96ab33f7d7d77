"""Path patching as anyone would write it: two forwards of the unmodified model with plain hooks, for one path.

The truth that rmfast's is judged by, so nothing here comes from rmfast but the words for nodes. The first forward puts
what attention adds (and what MLPs add, where they are frozen) back to the base run's in every layer, but for the change
of the sender, and notes what the receiver makes of its input; the second puts this into the base run.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import oracle as O
import torch
from torch import Tensor, nn

MADE = {"q_input": "q", "k_input": "k", "v_input": "v", "mlp_input": "mlp_out", "reward": "resid_post"}


def part(model: nn.Module, ids: list[int], layer: int, head: int) -> Tensor:
    """(T, d): what one head adds to the stream, a norm behind attention with the scale that it has in this run."""
    block = O.layers(model)[layer]
    project: Any = O._place(block, "head_out")[0]
    z = O.activation(model, ids, "head_out", layer)
    weight = project.weight if "Conv1D" in type(project).__name__ else project.weight.T
    out = z[:, head] @ weight.unflatten(0, z.shape[1:])[head]
    behind: Any = O._place(block, "attn_out")[0]
    if project in list(behind.modules()):
        return out.detach()
    whole = project(z.flatten(1))
    gain = behind.weight + 1 if "Gemma" in type(behind).__name__ else behind.weight
    eps = behind.eps if hasattr(behind, "eps") else behind.variance_epsilon
    return (out * gain * torch.rsqrt(whole.square().mean(-1, keepdim=True) + eps)).detach()


def sent(model: nn.Module, ids: list[int], sender: Any) -> Tensor:
    """(T, d): what a sender adds to the stream."""
    if sender.kind == "head_out":
        return part(model, ids, sender.layer, sender.head)
    kind = "resid_pre" if sender.kind == "embedding" else sender.kind
    return O.activation(model, ids, kind, sender.layer or 0)[:, 0]


def path(
    model: nn.Module, base: list[int], other: list[int], read: int, sender: Any, receiver: Any, positions: list[int],
    through: str = "residual", partner: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """The reward (K,) of the base run with one path patched at some positions."""
    blocks = O.layers(model)
    kinds = ("attn_out", "mlp_out")
    kept = {(kind, m): O.activation(model, base, kind, m)[:, 0] for kind in kinds for m in range(len(blocks))}
    there = positions if partner is None else [partner[t] for t in positions]
    change = torch.zeros_like(kept["attn_out", 0])
    change[positions] = (sent(model, other, sender)[there] - sent(model, base, sender)[positions]).to(change)
    lands = {"embedding": "resid_pre", "head_out": "attn_out", "mlp_out": "mlp_out"}[sender.kind], sender.layer or 0
    kind, layer = MADE[receiver.kind], len(blocks) - 1 if receiver.layer is None else receiver.layer
    seen: list[Tensor] = []

    def frozen(part: str, m: int, x: Tensor) -> Tensor:
        if (part, m) == (kind, layer):
            seen.append(x.clone())
        runs_anew = part == "mlp_out" and through == "mlps" and (part, m) != lands
        x = x if runs_anew else kept[part, m].view_as(x)
        return x + change.view_as(x) if (part, m) == lands else x

    def noted(x: Tensor) -> None:
        seen.append(x.clone())

    with ExitStack() as stack:
        if sender.kind == "embedding":
            O._at(stack, blocks[0], "in", lambda x: x + change.view_as(x))
        if kind != "mlp_out":
            O._at(stack, *O._place(blocks[layer], kind), noted)
        for m, block in enumerate(blocks):
            for each in kinds:
                O._at(stack, *O._place(block, each), partial(frozen, each, m))
        O._reward(model, base, read, None)
    x, unit = seen[0].reshape(len(base), -1), receiver.head or 0
    new = x[positions][:, O._columns(blocks[layer], kind, unit, x.size(-1))]
    return O.oracle(model, base, read, kind, layer, positions, unit, new)
