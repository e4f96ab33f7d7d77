"""`Head`: a reward head as data, a small program over rows of the final normed stream.

A program goes in steps, each in one place so that every engine and workload can run its part:

    reads     which tokens of a text: the one where the reward is read, and for some heads the end of the prompt
    linears   one stacked weight for those of a row, so that they are one `reward_head` call, final norm included
    values    what is kept of a row: (M, V); of a gate's, what its gate makes of it
    rewards   gate and reduction: of a row's values, and of those at the gate's token, (M, K)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rmfast.binding.proof import READINGS

if TYPE_CHECKING:
    from typing_extensions import Self

Apply = Callable[[Tensor, Any], Tensor]  # a weight (C, d) and a bias (C,) or None, to rows: (M, C)


class LinearMap(NamedTuple):
    """weight (A, d) and bias (A,) or None, of a row."""

    weight: Tensor
    bias: Tensor | None


def activation_of(labels: int) -> str | None:
    """What makes process rewards of a head that is linear maps alone: a value's sigmoid, the softmax of two classes."""
    return {1: "sigmoid", 2: "softmax"}.get(labels)


def expect_layer(weight: object, bias: object, name: str = "weight") -> None:
    """ValueError, by name, for what is no weight (n, d) and bias (n,) or None of one linear layer."""
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"Expected {name} to be a floating tensor (outputs, d), got {_shown(weight)}")
    if bias is None:
        return
    if not isinstance(bias, Tensor) or tuple(bias.shape) != (weight.size(0),) or not bias.is_floating_point():
        wanted = f"a floating tensor ({weight.size(0)},) or None"
        raise ValueError(f"Expected the bias of {name} to be {wanted}, got {_shown(bias)}")


def expect_width(gate: int, width: int) -> None:
    if gate != width:
        raise ValueError(f"Expected a gate that reads rows of width {width}, as the rest of the head does, got {gate}")


def _shown(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@dataclass(eq=False, kw_only=True)
class Head:
    """What all kinds of heads have; a kind says what its tensors are.

    Attributes:
        reading: where pooling="auto" reads a text: a rule in `rmfast.binding.proof.READINGS`, or a token's id.
        append: a token that texts are to end in, and are given where they do not; ids are left as they are.
        normalization: (mean, std) that come with the head, applied where `score` is asked for normalize="own".
        names: of the attributes that `rewards` holds in `score(..., output="all")`.
    """

    reading: str | int = "last"
    append: int | None = None
    normalization: tuple[float, float] | None = None
    names: tuple[str, ...] = ()

    #: Whether the head reads a second token, the end of the prompt.
    gated = False
    #: Whether `linear` is a map of attributes, of which each text, or token, has a mixture of its own.
    mixes = False
    #: Whether it reads all of a text's tokens at once, and so has no value of one of them.
    pools = False
    #: Why a row's bits may depend on the rows beside it; None where they do not.
    moves: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if isinstance(self.reading, str) and self.reading not in READINGS:
            raise ValueError(
                f"Expected reading to be a token's id or one of {', '.join(READINGS)}, got {self.reading!r}"
            )

    @property
    def kind(self) -> str:
        """Its name in errors."""
        return type(self).__name__

    @property
    def num_labels(self) -> int:
        """K, the rewards of one token."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """d, of the rows."""
        raise NotImplementedError

    @property
    def step_activation(self) -> str | None:
        """What makes process rewards of its rewards: "sigmoid", "softmax" of two, "none"; None: it does not say."""
        return None

    def on(self, rows: Tensor, logits: Tensor | None) -> Self:
        """The head for a model that gives these normed rows (T, d) on a few tokens, and, where it is a language model,
        logits (T, vocabulary).

        Raises:
            ValueError: it does not fit the model.
        """
        if rows.size(-1) != self.width:
            raise ValueError(
                f"Expected a head for hidden states of width {rows.size(-1)}, got {self.kind} of width {self.width}"
            )
        with torch.inference_mode(False):  # kept, and autograd may save its tensors
            return self.to(rows.device)

    def to(self, device: torch.device) -> Self:
        """The head with its tensors on a device."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: part.to(device) for name, part in parts.items() if hasattr(part, "to")})

    def values(self, apply: Apply, rows: Callable[[], Tensor]) -> Tensor:
        """(M, V), what is kept of each row.

        Args:
            apply: a linear map of the rows, as one op with the final norm.
            rows: gives the normed rows (M, d), for what is no linear map.
        """
        raise NotImplementedError

    def gate_values(self, apply: Apply) -> Tensor:
        """(M, G), what a gated head keeps of rows that its gate reads: the last of its values."""
        raise NotImplementedError

    def rewards(self, values: Tensor, gates: Tensor | None = None) -> Tensor:
        """(M, K) of the rows' values; `gates` (M or 1, V) are those at the gate's token, for a gated head."""
        raise NotImplementedError

    def outputs(self, values: Tensor, gates: Tensor | None = None) -> dict[str, Tensor]:
        """The named parts of `score(..., output="all")`, each with a row for each of `values`."""
        return {"rewards": self.rewards(values, gates)}

    def linear(self) -> LinearMap | None:
        """The linear map of a row, of which `mixed` makes the rewards; None for a head that is no such thing."""
        return None

    def mixed(self, values: Tensor, gates: Tensor | None = None) -> Tensor | None:
        """(M, K, A): what each output of `linear` counts in the rewards, the gate frozen; None: K = A, each itself."""
        return None

    def mix(self, parts: Tensor, values: Tensor, gates: Tensor | None = None) -> Tensor:
        """What makes the outputs of `linear`, (M, ..., A), as what makes the rewards, (M, ..., K), by `mixed`."""
        weights = self.mixed(values, gates)
        if weights is None:
            return parts
        weights = weights.to(parts)
        weights = weights.reshape(len(parts), *[1] * (parts.dim() - 2), *weights.shape[1:])
        return (weights @ parts[..., None])[..., 0]

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        found: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                found[field.name] = value
            elif hasattr(value, "tensors"):
                found |= {f"{field.name}.{name}": tensor for name, tensor in value.tensors().items()}
        return found
