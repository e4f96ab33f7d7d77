"""Which head a checkpoint holds, by the names of its tensors outside the body and by its configuration.

`TABLE` is tried from the top. A kind of head is added by one row: the tensors by which it is known, perhaps the
architecture that its config names, and a function that makes the head of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rmfast.heads.binned import Binned
from rmfast.heads.gated import ARMORM, Gated
from rmfast.heads.gaussian import HELPSTEER, Gaussian
from rmfast.heads.head import Head
from rmfast.heads.linear import MLP, Layers, Linear
from rmfast.heads.quantile import Quantile
from rmfast.heads.tokens import TokenHead
from rmfast.heads.two_way import TwoWay

STEP_TOKEN = "<extra_0>"  # at which Qwen2.5-Math-PRM reads, id 151651


@dataclass
class Found:
    """What a checkpoint has beside its body.

    Attributes:
        names: of its tensors outside the body.
        body: what stands before the body's names, like "model.".
        config: its configuration, as a mapping.
        read: gives tensors by their names.
        tokenizer: or None.
        used: names that went into the head.
    """

    names: set[str]
    body: str
    config: dict[str, Any]
    read: Callable[[list[str]], dict[str, Tensor]]
    tokenizer: Any = None
    used: set[str] = field(default_factory=set)

    @property
    def architecture(self) -> str:
        return " ".join(self.config.get("architectures") or [])

    def tensor(self, name: str) -> Tensor:
        """A tensor that is there."""
        self.used.add(name)
        return self.read([name])[name]

    def optional(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self.names else None

    def layer(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a Linear."""
        weight, bias = self.tensor(f"{name}.weight"), self.optional(f"{name}.bias")
        if weight.dim() != 2 or (bias is not None and tuple(bias.shape) != weight.shape[:1]):
            shapes = [tuple(x.shape) for x in (weight, bias) if x is not None]
            raise ValueError(f"Expected {name} to be a linear layer, (n, d) and (n,), got {shapes}")
        return weight, bias

    def layers(self, name: str, activation: str = "relu") -> Layers:
        """Layers that are numbered within a Sequential or ModuleList, batch norms between them folded in."""
        numbers = {int(m[1]) for each in self.names if (m := re.fullmatch(rf"{re.escape(name)}\.(\d+)\.\w+", each))}
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        norm: tuple[Tensor, Tensor] | None = None
        for number in sorted(numbers):
            if f"{name}.{number}.running_var" in self.names:
                norm = self._norm(f"{name}.{number}")
                continue
            weight, bias = self.layer(f"{name}.{number}")
            if norm is not None:
                weight, bias, norm = *_folded(weight, bias, *norm), None
            weights.append(weight)
            biases.append(bias)
        return Layers(weights=weights, biases=biases, activation=activation)

    def _norm(self, name: str) -> tuple[Tensor, Tensor]:
        """A BatchNorm in eval mode as a scale and a shift, fp64."""
        mean, var = (self.tensor(f"{name}.{part}").double() for part in ("running_mean", "running_var"))
        self.optional(f"{name}.num_batches_tracked")
        gain, shift = (self.optional(f"{name}.{part}") for part in ("weight", "bias"))
        scale = torch.rsqrt(var + 1e-5) * (1.0 if gain is None else gain.double())  # eps of nn.BatchNorm1d
        return scale, -mean * scale + (0.0 if shift is None else shift.double())

    def names_of(self, count: int, known: tuple[str, ...]) -> tuple[str, ...]:
        """Names of attributes: the config's own, or those that are known for as many."""
        own = self.config.get("attributes")
        return tuple(own) if isinstance(own, list) and len(own) == count else known if len(known) == count else ()


def _folded(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """A layer behind a scale and shift of what it is given."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    moved = weight.double() @ shift
    return (weight.double() * scale).to(wide), (moved if bias is None else moved + bias.double()).to(wide)


@dataclass(frozen=True)
class Kind:
    """A row of the table.

    Attributes:
        of: published models that are of this kind.
        tensors: names that must be there.
        make: the head of what was found.
        architecture: a regular expression that the config's architectures must have somewhere.
        body: what must stand before the body's names.
        model_type: the config's.
    """

    of: str
    tensors: tuple[str, ...]
    make: Callable[[Found], Head]
    architecture: str = ""
    body: str | None = None
    model_type: str | None = None

    def fits(self, found: Found) -> bool:
        there = found.names.issuperset(self.tensors) and re.search(self.architecture, found.architecture) is not None
        return there and self.body in (None, found.body) and self.model_type in (None, found.config.get("model_type"))


def chain(name: str, reading: str | int = "last", append: int | None = None) -> Callable[[Found], Head]:
    """A Linear, or layers with ReLU between them, of that name."""

    def make(found: Found) -> Head:
        given: dict[str, Any] = {"reading": reading, "append": append, "normalization": _normalization(found.config)}
        if f"{name}.weight" in found.names:
            weight, bias = found.layer(name)
            return Linear(weight=weight, bias=bias, **given)
        return MLP(layers=found.layers(name), **given)

    return make


def _normalization(config: dict[str, Any]) -> tuple[float, float] | None:
    """(mean, std) of OpenRLHF's rewards."""
    mean, std = config.get("mean"), config.get("std")
    return (float(mean), float(std)) if isinstance(mean, int | float) and isinstance(std, int | float) else None


def _gated(found: Found) -> Head:
    weight, bias = found.layer("regression_layer")
    transform = found.optional("reward_transform_matrix")
    gate = found.layers("gating.layers")
    scale = found.optional("gating.logit_scale")
    quantiles = int(found.config.get("num_quantiles") or 1)
    attributes = int(found.config.get("num_objectives") or weight.size(0) // quantiles)
    if weight.size(0) != attributes * quantiles:
        raise ValueError(
            f"Expected regression_layer.weight to have num_objectives · num_quantiles = {attributes} · {quantiles} "
            f"rows, got {weight.size(0)}"
        )
    given: dict[str, Any] = {
        "weight": weight,
        "bias": bias,
        "transform": torch.eye(attributes) if transform is None else transform,
        "gate": gate,
        "temperature": float(found.config.get("gating_temperature") or 10),
        "scale": 1.0 if scale is None else float(scale.double().reshape(-1)[0]),
        "reading": "before pad",
        "names": found.names_of(attributes, ARMORM),
    }
    return Gated(**given) if quantiles == 1 else Quantile(**given, quantiles=quantiles)


def _gaussian(found: Found) -> Head:
    weight, bias = found.layer("score")
    gate = found.layers("weights.fc", "selu")
    return Gaussian(
        weight=weight, bias=bias, gate=gate, reading="before pad", names=found.names_of(gate.out, HELPSTEER)
    )


def _binned(found: Found) -> Head:
    gate, softmax = found.layers("gating_layer.network", "leaky_relu"), bool(found.config.get("softmax"))
    return Binned(
        layers=found.layers("regression_layer.network", "leaky_relu"),
        gate=gate,
        temperature=float(found.config.get("temperature") or 1.0) if softmax else None,
        reading="before pad",
        names=found.names_of(gate.out, ()),
    )


def _two_way(found: Found) -> Head:
    step = None if found.tokenizer is None else found.tokenizer.get_vocab().get(STEP_TOKEN)
    return TwoWay(layers=found.layers("score"), reading="last" if step is None else step)


_OPENRLHF = r"\b(RewardModel|CriticModel)\b"

TABLE = (
    Kind("ArmoRM, QRM", ("regression_layer.weight", "gating.layers.0.weight"), _gated),
    Kind("URM-LLaMa-3.1", ("score.weight", "weights.fc.0.weight"), _gaussian),
    Kind("LDL-Reward-Gemma", ("regression_layer.network.0.weight", "gating_layer.network.0.weight"), _binned),
    Kind("Qwen2.5-Math-PRM", ("score.0.weight", "score.2.weight"), _two_way, "Process"),
    Kind("INF-ORM", ("score.0.weight", "score.2.weight"), chain("score", "before pad"), "INFORM"),
    Kind("GRM", ("v_head.summary.0.weight",), chain("v_head.summary")),
    Kind("GRM, TRL, LlamaFactory, Skywork-o1-PRM", ("v_head.summary.weight",), chain("v_head.summary")),
    Kind("Athene", ("v_head.weight",), chain("v_head", 128003, 128003), "Athene"),
    Kind("Starling", ("v_head.weight",), chain("v_head", "before pad"), body="transformer.", model_type="llama"),
    Kind("UltraRM, Eurus", ("regression_head.weight",), chain("regression_head")),
    Kind("OpenRLHF", ("value_head.weight",), chain("value_head"), _OPENRLHF),
    Kind("OpenRLHF", ("score.weight",), chain("score"), _OPENRLHF),
)


def kind_of(found: Found) -> Kind | None:
    """The row that a checkpoint fits, or None."""
    return next((kind for kind in TABLE if kind.fits(found)), None)


def named(found: Found, name: str) -> Head | None:
    """The Linear, or layers with ReLU between them, of a name that the caller gives; None where there is none."""
    if not any(each.startswith(f"{name}.") for each in found.names):
        return None
    return chain(name, "last but pad")(found)


def token_head(config: dict[str, Any]) -> TokenHead | None:
    """What vLLM's keys classifier_from_token and method say: of two tokens [false, true] the difference, or each."""
    tokens, method = config.get("classifier_from_token"), config.get("method")
    if not tokens:
        return None
    if method == "no_post_processing":
        return TokenHead(*tokens, difference=False)
    if method in (None, "from_2_way_softmax") and len(tokens) == 2:
        return TokenHead(*reversed(tokens))
    raise ValueError(
        'Expected classifier_from_token in the config to be two tokens with method "from_2_way_softmax", or tokens '
        f'with "no_post_processing", got {tokens} with {method!r}'
    )
