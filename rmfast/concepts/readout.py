"""`Readout`: the final streams of some texts from one pass of the body, and what the head makes of them when edited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmfast.binding.modules import plain_linear
from rmfast.engine.scorer import Scorer
from rmfast.ops import reward_head
from rmfast.patching.watched import run_watched


class Readout:
    """The streams before the final norm where `score` reads, and the head.

    Attributes:
        streams: (N, d), on the CPU.
        rewards: (N, K), those of `score`.

    Raises:
        ValueError: the model pools by itself, or has no final norm to leave out; interventions beside clamps.
    """

    def __init__(
        self, rm: Scorer, inputs: Sequence[Any], *, batch_tokens: int | None = None, progress: bool = False,
        **encoding: Any,
    ) -> None:  # fmt: skip
        self.binding = bound = rm.binding
        self.programmed = bound.program is not None

        def read(hidden: Tensor, rows: Tensor) -> Tensor:
            stream = hidden.reshape(-1, hidden.size(-1))[rows]
            own = bound.row_values(hidden, rows) if self.programmed else bound.rewards(hidden, rows)
            return torch.cat([own, stream.to(own)], 1)

        texts = rm.encode(inputs, **encoding)
        if not texts:
            raise ValueError("Expected inputs to be at least one text, got none")
        at = [np.array([i]) for i in rm.positions(texts)]
        found = run_watched(rm, bound, [], texts, at, read, batch_tokens, progress)
        values = torch.cat([value for value, _ in found])
        own, self.streams = (part.contiguous() for part in values.split([values.size(1) - bound.width, bound.width], 1))
        # Of a gated head, what its gate makes of the prompt's end, which no edit reaches.
        gates = [gate[:, : own.size(1)] for _, gate in found if gate is not None]
        self.gates = torch.cat(gates) if gates else None
        self.own = own
        self.rewards = self._made(own)

    def _made(self, own: Tensor) -> Tensor:
        return self.binding.program.rewards(own, self.gates) if self.programmed else own

    def of(self, edited: Tensor) -> Tensor:
        """(N, K) of streams (N, d) in these ones' place, by any head."""
        with self.binding.session():
            hidden = edited.to(self.binding.device)[None]
            rows = torch.arange(len(edited), device=hidden.device)
            made = self.binding.row_values if self.programmed else self.binding.rewards
            return self._made(made(hidden, rows).cpu().clone())

    def under(self, directions: Tensor, strengths: Tensor, targets: Tensor) -> Tensor:
        """(N, I, K) under interventions of `rmfast.ops.reward_head`, all in one call of it.

        Args: directions (J, d), strengths and targets (I, J).

        Raises:
            ValueError: the head is not linear in the stream but for the norm and a gate that reads another token, or
                the final norm is of no known kind.
        """
        bound, program = self.binding, self.binding.program
        linear = plain_linear(bound.head) if program is None else program.linear()
        if linear is None or (program is not None and program.mixes and not program.gated):
            kind = ", ".join(type(module).__name__ for module in bound.head) if program is None else program.kind
            raise ValueError(
                f"Expected a head that is linear in one token's stream, but for its norm and a gate at another token, "
                f"for all doses in one pass, got {kind}"
            )
        if bound.norm_kind is None:
            raise ValueError(f"Expected an RMS or layer norm before the head, got {type(bound.norm).__name__}")
        with bound.session():
            rows = self.streams.to(bound.device)
            out = reward_head(
                rows, linear.weight.detach().to(rows.device), None if linear.bias is None else linear.bias.detach(),
                **bound.norm_arguments(rows.device), directions=directions.to(rows), strengths=strengths.to(rows),
                targets=targets.to(rows),
            ).cpu().clone()  # fmt: skip
        return out if program is None else program.mix(out, self.own, self.gates)
