"""MLPs of a decoder layer taken apart: with a gate (Llama) and without (GPT-2, NeoX, OPT), by names and formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.binding.compute import outside
from rmfast.binding.modules import is_plain, own_attribute
from rmfast.ops import gated_activation

# The projections into the MLP and the one out of it: two (or both in one) where there is a gate, else one.
_NAMES = [
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
]
_FUNCTIONS = ("act_fn", "activation_fn", "act")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
}
_IN_THE_OP = ("silu", "gelu", "gelu_tanh")  # the others are exact, in whichever vectors


@dataclass
class Mlp:
    """An MLP by its parts, on rows (n, d).

    Attributes:
        module: what holds the parts; the layer itself where they lie in it (OPT).
        first, down: their names.
        activation: the formula of its function.
    """

    module: Any
    first: tuple[str, ...]
    down: str
    activation: str

    @classmethod
    def of(cls, module: Any) -> Mlp | None:
        """A module as an MLP, if it has the parts of one alone, and a function of a known formula."""
        parts = {name for name, part in module.named_children() if not isinstance(part, nn.Dropout)}
        found = _names(parts)
        if found is None or parts - {*found[0], found[1], *_FUNCTIONS}:
            return None
        activation = _activation(module)
        return None if activation is None else cls(module, *found, activation)

    @classmethod
    def within(cls, layer: Any) -> Mlp | None:
        """The MLP whose parts lie in the layer itself, beside others."""
        found = _names({name for name, _ in layer.named_children()})
        activation = None if found is None else _activation(layer)
        return cls(layer, *found, activation) if found is not None and activation is not None else None

    def moved(self, copies: Mapping[nn.Module, nn.Module]) -> Mlp:
        return replace(self, module=copies[self.module])

    @property
    def parts(self) -> set[str]:
        """Names of what belongs to it."""
        return {*self.first, self.down, *_FUNCTIONS}

    @property
    def function(self) -> Any:
        return function_of(self.module)

    @property
    def down_proj(self) -> Any:
        return getattr(self.module, self.down)

    @property
    def up_proj(self) -> Any:
        """What first reads its rows."""
        return getattr(self.module, self.first[0])

    def neurons(self, y: Tensor) -> Tensor:
        """Its inner activations (n, m)."""
        made = [getattr(self.module, name)(y) for name in self.first]
        if self.first == ("gate_up_proj",):
            made = list(made[0].chunk(2, dim=-1))
        gate, *rest = made
        if self.activation not in _IN_THE_OP:
            out = _ACTIVATIONS[self.activation](gate)
            return out * rest[0] if rest else out
        # Times 1 where there is no gate: the op's vectors are of one row, and not of all as torch's.
        up = rest[0] if rest else gate.new_ones(gate.size(-1)).expand_as(gate)
        with outside():
            return gated_activation(gate, up, kind=self.activation)

    def __call__(self, y: Tensor) -> Tensor:
        return self.down_proj(self.neurons(y))


def function_of(module: nn.Module) -> Any:
    """An MLP's activation, a function or a module, by the names that transformers gives it; None: it has none."""
    return next((found for name in _FUNCTIONS if (found := own_attribute(module, name)) is not None), None)


def _names(parts: set[str]) -> tuple[tuple[str, ...], str] | None:
    return next(((first, down) for first, down in _NAMES if {*first, down} <= parts), None)


def _activation(module: Any) -> str | None:
    act = function_of(module)
    if not callable(act) or not is_plain(module):
        return None
    if isinstance(act, nn.Module) and any(True for _ in act.parameters()):
        return None  # what it learns may take it away from the formula
    near, far = torch.linspace(-4, 4, 33), torch.logspace(0.6, 6, 28)  # bounds (gelu_10) show where neurons are large
    x = torch.cat([near, far, -far])
    matches = [kind for kind, formula in _ACTIVATIONS.items() if torch.allclose(act(x), formula(x), atol=1e-6)]
    return matches[0] if matches else None
