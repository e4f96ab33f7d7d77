"""The final norm, its scale frozen, and a linear head as one linear map of the stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rmfast.binding.binding import Binding, Removal
from rmfast.binding.modules import active, is_readable, plain_linear
from rmfast.binding.norm_map import NormMap


@dataclass(frozen=True)
class FrozenHead:
    """The final norm and a linear head as a linear map of the stream h, the norm's scale frozen at some h_L:

        reward = scale(h_L) · direction·h + constant, for any part h of h_L; for h = h_L the model's own

    Directions that the model loses before or after the norm (`Binding.before`, `after`) are taken from `direction`.

    Of a program with a gate it is the map before the gate, of A attributes in place of K rewards.

    Attributes:
        norm: the final norm; one that does nothing for norm="raw", whose scale is 1.
        direction: (K, d), γ⊙w, less its own mean for a layer norm: h need not be centred.
        constant: (K,), the head's bias and β·w.
        dtype: of them and of `scale`: fp32, fp64 for an fp64 model.
        before: what h loses before the norm's scale is taken.
    """

    norm: NormMap
    direction: Tensor
    constant: Tensor
    dtype: torch.dtype
    before: Removal | None

    @classmethod
    def of(cls, binding: Binding, norm: Literal["frozen", "raw"]) -> FrozenHead:
        """Reads the model's weights as they are now.

        Raises:
            ValueError: the head is not a single readable nn.Linear, or the norm is of no known kind or hooked.
        """
        linear: Any = linear_head(binding)
        check_norm(binding, norm)
        stored = next(p.dtype for p in binding.root.parameters() if p.is_floating_point())
        dtype = torch.float64 if stored == torch.float64 else torch.float32
        with binding.session(grad=True), torch.no_grad():
            weight, bias = (None if x is None else x.detach().to(dtype) for x in (linear.weight, linear.bias))
            assert weight is not None
            weight = weight if binding.after is None else binding.after.of(weight)
            given = binding.norm_arguments(weight.device) if norm == "frozen" else {"norm": None}
            final = NormMap.of(dtype, **given)
            direction = final.fold(weight)
            direction = direction if binding.before is None else binding.before.of(direction)  # a symmetric map
            constant = final.constant(weight) if bias is None else final.constant(weight) + bias
            return cls(final, direction, constant, dtype, binding.before)

    def scale(self, stream: Tensor) -> Tensor:
        """(n, d) -> (n, 1), the norm's scale on these streams."""
        stream = stream if self.before is None else self.before.of(stream)
        return self.norm.scale(stream.to(self.dtype))


def linear_head(binding: Binding) -> Any:
    """The one readable nn.Linear that the head is, or what a program is but for its gate (`rmfast.heads.Head.linear`);
    ValueError for any other."""
    name = type(binding.root).__name__
    if binding.program is not None:
        found = binding.program.linear()
        if found is None:
            raise ValueError(
                f"Expected a head of {name} that is linear in one token's stream, but for a gate, got "
                f'{binding.program.kind}, which is not; the lens with norm="final" and patching need no such head'
            )
        return found
    if not binding.reads_rows:
        raise ValueError(f"{name} pools by itself: expected a head that reads one token's stream, a single nn.Linear")
    linear = plain_linear(binding.head)
    if linear is None:
        kinds = ", ".join(type(active(module)).__name__ for module in binding.head)
        raise ValueError(
            f"Expected the head of {name} to be a single nn.Linear with a readable weight and no hooks, so that the "
            f"reward is linear in the stream but for its norm, got {kinds}"
        )
    if linear.weight.size(0) != binding.num_labels:
        raise ValueError(
            f"Expected the head of {name} to have {binding.num_labels} labels, as when the model was bound, got "
            f"{linear.weight.size(0)}: make a new RewardModel of the model"
        )
    return linear


def check_norm(binding: Binding, norm: str) -> None:
    """ValueError for a final norm with hooks, which then can't be left out, or (norm="frozen") of no known kind."""
    if binding.norm is None:
        return
    kind = type(active(binding.norm)).__name__
    if not binding.leaves_norm_out:
        raise ValueError(
            f"Expected the body and its final norm ({kind}) to be without hooks, and without a forward set on them"
        )
    if norm == "frozen" and (binding.norm_kind is None or not is_readable(active(binding.norm))):
        raise ValueError(
            f'Expected the final norm to be an RMS or layer norm with a readable weight, or norm="raw", got {kind}'
        )
