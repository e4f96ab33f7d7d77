"""Heads that are functions of the user's own: a module on top of a decoder, mean pooling, a sigmoid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rmfast.arguments import function, word
from rmfast.heads.head import Apply, Head


@dataclass(eq=False)
class FunctionHead(Head):
    """Rewards as a function of the final normed hidden states, in the model's dtype and on its device.

    Args:
        of: a function of hidden states that gives real numbers. A module is run in the mode that it is in.
        reads: "row": of rows (M, d) of the tokens that are read, each for itself: (M,) or (M, K). "text": of all rows
            (T, d) of one text, as a mean over them needs: one number, or (K,).

    A row's bits may depend on the rows beside it as far as the function's do.
    """

    of: Callable[[Tensor], Any]
    reads: str = "row"
    labels: int = 0  # K, once it has been tried

    moves = "its head is a function of its own"

    def __post_init__(self) -> None:
        super().__post_init__()
        function("head", self.of, "hidden states")
        word("reads", self.reads, ("row", "text"))

    @property
    def pools(self) -> bool:  # type: ignore[override]
        return self.reads == "text"

    @property
    def num_labels(self) -> int:
        return self.labels

    @property
    def step_activation(self) -> str:
        return "none"

    def to(self, device: torch.device) -> FunctionHead:
        return self

    def on(self, rows: Tensor, logits: Tensor | None) -> FunctionHead:
        try:
            out = self.of(rows)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"The head could not be run on hidden states {tuple(rows.shape)}: {type(error).__name__}: {error}"
            ) from error
        count = 1 if self.pools else rows.size(0)
        if not isinstance(out, Tensor) or not out.is_floating_point() or not out.numel() or out.numel() % count:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            wanted = "one number or (K,)" if self.pools else f"({count},) or ({count}, K)"
            raise ValueError(f"Expected the head to give {wanted} for hidden states {tuple(rows.shape)}, got {got}")
        return replace(self, labels=out.numel() // count)

    def values(self, apply: Apply, rows: Callable[[], Tensor]) -> Tensor:
        x = rows()
        return (x if self.pools else self.of(x).reshape(x.size(0), -1)).to(torch.promote_types(x.dtype, torch.float32))

    def rewards(self, values: Tensor, gates: Tensor | None = None) -> Tensor:
        if self.pools:
            raise ValueError("The head reads all tokens of a text at once: there is no reward of one token's stream")
        return values

    def of_text(self, rows: Tensor) -> Tensor:
        """(K,) of all rows of one text."""
        return self.of(rows).reshape(self.labels)
