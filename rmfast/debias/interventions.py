"""Interventions: small saved edits that take a bias out of a reward model.

    NeuronClamp        output channels of projections set to values (CIRM, arXiv 2604.27495)
    DirectionRemoval   directions taken out of the stream, before or after the final norm (arXiv 2603.03291)
    LengthPenalty      the reward less a number for each character of the response
    LWR                the reward less a lowess curve of reward on characters

All are values: `save` and `load`, `+`, `RewardModel.with_interventions` and `RewardModel.score(interventions=)`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from rmfast import arguments
from rmfast.texts.inputs import inputs_of

if TYPE_CHECKING:
    from rmfast.engine.scorer import Scorer

Positions = Literal["last", "all"]
Side = Literal["before", "after"]
_JSON, _TENSORS = "intervention.json", "intervention.safetensors"


class Intervention:
    """What all interventions have in common.

    Attributes:
        fingerprint: of the model that it was made with (`RewardModel.fingerprint`), which alone takes it; None for any.
    """

    kind: ClassVar[str]
    fingerprint: str | None
    __array_ufunc__ = None  # else an array + an intervention would be an array of sums

    @property
    def parts(self) -> tuple[Intervention, ...]:
        """The interventions that it is the sum of, at most one of each kind and side, length corrections apart."""
        return (self,)

    @property
    def lengths(self) -> tuple[LengthCorrection, ...]:
        """Those of `parts` that go by the length of the response."""
        return tuple(part for part in self.parts if isinstance(part, LengthCorrection))

    def __add__(self, other: Any) -> Intervention:
        """Both at once.

        Clamps of the same positions become one, and directions of the same side are orthonormalised together.

        Raises:
            ValueError: they clamp one neuron to two values, remove directions on one side with two strengths, or were
                made with different models.
        """
        if not isinstance(other, Intervention):
            return NotImplemented
        return combined([self, other])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes intervention.json and intervention.safetensors into the folder `path`, made where there is none."""
        tensors: dict[str, Tensor] = {}
        described = []
        for i, part in enumerate(self.parts):
            settings, arrays = part._state()
            described.append({"kind": part.kind, "fingerprint": part.fingerprint, **settings})
            tensors |= {f"{i}.{name}": x.contiguous() for name, x in arrays.items()}
        text = json.dumps({"format": 1, "parts": described}, indent=2) + "\n"  # metadata may fail: before any file
        folder = arguments.path("path", path)
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, folder / _TENSORS)
        (folder / _JSON).write_text(text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Any:
        """Reads what `save` wrote.

        Raises:
            ValueError: the folder holds no intervention, or one of another class.
        """
        found = load(path)
        if not isinstance(found, cls):
            raise ValueError(f"Expected {path} to hold a {cls.__name__}, got a {type(found).__name__}")
        return found

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Settings for the JSON and tensors for safetensors."""
        raise TypeError(f"{type(self).__name__} has no state of its own")

    @classmethod
    def _from(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Intervention:
        raise TypeError(f"{cls.__name__} has no state of its own")


@dataclass(frozen=True, eq=False)
class NeuronClamp(Intervention):
    """Neurons set to values. A neuron is an output channel of a projection (`projections`), its bias included.

    Attributes:
        neurons: by the projection's name in the model, (indices (j,) int64, values (j,)); no neuron twice.
        positions: "last", the token at which `score` reads, or "all" tokens.
        fingerprint: as in Intervention.
        metadata: how it came about, as JSON has it (`debias.fit` keeps k, accuracies and times here); lost in a sum of
            clamps of the same positions.

    Raises:
        ValueError, TypeError: indices are negative, repeated or not of integers, or as many values as indices are
            expected, finite, and there are others.
    """

    kind = "neuron_clamp"
    neurons: Mapping[str, tuple[Tensor, Tensor]]
    positions: Positions = "last"
    fingerprint: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arguments.word("positions", self.positions, ("last", "all"))
        _expect_fingerprint(self.fingerprint)
        for name, given, of in (("neurons", self.neurons, "module names"), ("metadata", self.metadata, "names")):
            if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
                raise TypeError(f"Expected {name} to be a mapping of {of}, got {arguments.shown(given)}")
        neurons = {name: _neurons(name, pair) for name, pair in self.neurons.items()}
        object.__setattr__(self, "neurons", {name: pair for name, pair in neurons.items() if len(pair[0])})

    def __len__(self) -> int:
        """How many neurons are clamped."""
        return sum(len(indices) for indices, _ in self.neurons.values())

    def __repr__(self) -> str:
        return f"NeuronClamp({len(self)} neurons of {len(self.neurons)} projections, positions={self.positions!r})"

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors: dict[str, Tensor] = {}
        for name, (indices, values) in self.neurons.items():
            tensors |= {f"{name}.indices": indices, f"{name}.values": values}
        return {"positions": self.positions, "metadata": dict(self.metadata), "modules": list(self.neurons)}, tensors

    @classmethod
    def _from(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> NeuronClamp:
        neurons = {name: (tensors[f"{name}.indices"], tensors[f"{name}.values"]) for name in settings["modules"]}
        return cls(neurons, settings["positions"], settings["fingerprint"], settings.get("metadata", {}))


@dataclass(frozen=True, eq=False)
class DirectionRemoval(Intervention):
    """Directions taken out of the stream h at every token that is read: h − α Σ_j (p_j·h) p_j.

    Attributes:
        directions: (J, d) fp32; given in any length and angle to each other, kept orthonormal.
        strength: α; 1 takes them out.
        norm: "before" the final norm, or "after" it (Mechanistic Reward Shaping's own place), which is the same as
            taking them out of the head's weight.
        fingerprint: as in Intervention.

    Raises:
        ValueError, TypeError: directions are not (J, d), not finite, or linearly dependent; strength is not finite.
    """

    kind = "direction_removal"
    directions: Tensor
    strength: float = 1.0
    norm: Side = "before"
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        arguments.word("norm", self.norm, ("before", "after"))
        _expect_fingerprint(self.fingerprint)
        object.__setattr__(self, "strength", arguments.number("strength", self.strength))
        x = torch.from_numpy(arguments.finite("directions", self.directions, "J", "d"))
        if 0 in x.shape:
            raise ValueError(f"Expected directions to be of shape (J, d), got {tuple(x.shape)}")
        size = x.norm(dim=1, keepdim=True)
        if not bool((size > 0).all()):
            raise ValueError("Expected directions that are not 0, got one that is")
        q, r = torch.linalg.qr((x / size).T)
        least = float(r.diagonal().abs().min()) if x.size(0) <= x.size(1) else 0.0
        if least < 1e-6:
            raise ValueError(f"Expected {x.size(0)} linearly independent directions, got dependent ones")
        object.__setattr__(self, "directions", (q * r.diagonal().sign()).T.float().contiguous())

    def __repr__(self) -> str:
        return f"DirectionRemoval({tuple(self.directions.shape)}, strength={self.strength}, norm={self.norm!r})"

    @classmethod
    def mean_difference(
        cls,
        rm: Scorer,
        with_: Sequence[Any],
        without: Sequence[Any],
        *,
        strength: float = 1.0,
        norm: Side = "before",
        **encoding: Any,
    ) -> DirectionRemoval:
        """The direction from texts without an attribute to texts with it: the difference of their mean streams.

        Args:
            rm: the model.
            with_, without: texts, as `score` takes them; their streams are read where `score` reads.
            strength, norm: of the removal; the streams are those on that side of the final norm.
            **encoding: max_length, truncation, format, chat_template_kwargs, tools, as for `score`.

        Raises:
            ValueError: there are no texts, their means are the same, or the model has no such side of a norm.
        """
        from rmfast.engine.scorer import Scorer

        arguments.instance("rm", rm, Scorer)
        arguments.word("norm", norm, ("before", "after"))
        arguments.number("strength", strength)
        means = []
        for name, given in (("with_", with_), ("without", without)):
            texts = arguments.sequence(name, given, "a sequence of texts")
            if not texts:
                raise ValueError(f"Expected {name} to hold at least one text, got none")
            with inputs_of(name):
                means.append(_streams(rm, texts, norm, encoding).double().mean(0))
        if not bool((means[0] - means[1]).any()):
            raise ValueError("Expected with_ and without to be texts of different mean streams, got the same")
        return cls((means[0] - means[1])[None], strength, norm, rm.fingerprint)

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"strength": self.strength, "norm": self.norm}, {"directions": self.directions}

    @classmethod
    def _from(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> DirectionRemoval:
        return cls(tensors["directions"], settings["strength"], settings["norm"], settings["fingerprint"])


class LengthCorrection(Intervention):
    """A reward less what a response of its length is expected to get."""

    def expected(self, characters: Sequence[int] | np.ndarray) -> np.ndarray:
        """What is taken off the reward of responses of so many characters: (n,) -> (n,) float64."""
        raise TypeError(f"{type(self).__name__} has no formula of its own")


@dataclass(frozen=True)
class LengthPenalty(LengthCorrection):
    """The reward less `per_character` for each character of the response."""

    kind = "length_penalty"
    per_character: float = 0.001
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        _expect_fingerprint(self.fingerprint)
        object.__setattr__(self, "per_character", arguments.number("per_character", self.per_character))

    def expected(self, characters: Sequence[int] | np.ndarray) -> np.ndarray:
        return self.per_character * arguments.array("characters", characters, "n")

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"per_character": self.per_character}, {}

    @classmethod
    def _from(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> LengthPenalty:
        return cls(settings["per_character"], settings["fingerprint"])


@dataclass(frozen=True, eq=False)
class LWR(LengthCorrection):
    """The reward less a locally weighted regression of reward on the response's characters.

    Attributes:
        characters: (P,) float64, ascending: where the curve is given.
        rewards: (P,) float64, the curve; linear between, and constant beyond its ends.
        fingerprint: as in Intervention.
    """

    kind = "lwr"
    characters: Tensor
    rewards: Tensor
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        _expect_fingerprint(self.fingerprint)
        x, y = _curve(self.characters, self.rewards)
        if not len(x) or not (np.diff(x) > 0).all():
            raise ValueError(f"Expected characters to be ascending, at least one, got {x.tolist()[:8]}")
        object.__setattr__(self, "characters", torch.from_numpy(x))
        object.__setattr__(self, "rewards", torch.from_numpy(y))

    @classmethod
    def fit(cls, characters: Any, rewards: Any, *, frac: float = 0.5, fingerprint: str | None = None) -> LWR:
        """The lowess curve (statsmodels) of rewards (n,) on the responses' characters (n,).

        Args:
            frac: the share of the responses that each point of the curve is fitted to.

        Raises:
            ValueError: the arrays differ in length, hold less than 3 responses or one length alone; frac is not in
                (0, 1], or so small that the curve is not defined.
            ImportError: statsmodels is not installed.
        """
        try:
            from statsmodels.nonparametric.smoothers_lowess import lowess
        except ImportError as error:
            raise ImportError('LWR.fit needs statsmodels: pip install "rmfast[debias]"') from error
        x, y = _curve(characters, rewards)
        if len(x) < 3 or len(np.unique(x)) < 2:
            raise ValueError(f"Expected characters of at least 3 responses of different lengths, got {len(x)}")
        frac = arguments.number("frac", frac, 0, 1, above=True)
        curve = lowess(y, x, frac=frac)
        at, first = np.unique(curve[:, 0], return_index=True)
        fitted = curve[first, 1]
        if not np.isfinite(fitted).all():
            raise ValueError(f"Expected a larger frac: {frac} of {len(x)} responses span no two lengths at some place")
        return cls(torch.from_numpy(at), torch.from_numpy(fitted), fingerprint)

    def __repr__(self) -> str:
        return f"LWR({len(self.characters)} points)"

    def expected(self, characters: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.interp(arguments.array("characters", characters, "n"), self.characters.numpy(), self.rewards.numpy())

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {"characters": self.characters, "rewards": self.rewards}

    @classmethod
    def _from(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> LWR:
        return cls(tensors["characters"], tensors["rewards"], settings["fingerprint"])


@dataclass(frozen=True, eq=False)
class Combined(Intervention):
    """Several interventions at once, made by `+`."""

    kind = "combined"
    some: tuple[Intervention, ...]
    fingerprint: str | None = None

    @property
    def parts(self) -> tuple[Intervention, ...]:
        return self.some


_KINDS: dict[str, type[Intervention]] = {c.kind: c for c in (NeuronClamp, DirectionRemoval, LengthPenalty, LWR)}


def load(path: str | os.PathLike[str]) -> Intervention:
    """Reads any intervention that was saved into the folder `path`; ValueError where it holds none."""
    folder = arguments.path("path", path)
    if not (folder / _JSON).is_file() or not (folder / _TENSORS).is_file():
        raise ValueError(f"Expected {path} to be a folder with {_JSON} and {_TENSORS}, as save() writes")
    try:
        described = json.loads((folder / _JSON).read_text())
        tensors = safetensors.torch.load_file(folder / _TENSORS)
        if described["format"] != 1:
            raise ValueError(f"format {described['format']}, which this version of rmfast does not know")
        parts = []
        for i, settings in enumerate(described["parts"]):
            own = {name.partition(".")[2]: x for name, x in tensors.items() if name.partition(".")[0] == str(i)}
            parts.append(_KINDS[settings["kind"]]._from(settings, own))
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"Expected {path} to hold an intervention as save() writes it, got {error}") from error
    return combined(parts)


def _neurons(name: str, pair: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise TypeError(f"Expected (indices, values) for neurons of {name}, got {arguments.shown(pair)}")
    of, most = f"neurons of {name}: ", 2**63 - 1
    at = torch.tensor(arguments.wholes(of + "indices", pair[0], least=0, most=most), dtype=torch.int64)
    to = torch.from_numpy(arguments.finite(of + "values", pair[1], len(at)))
    # As they are given: numbers of 64 bits stay so in tensors and arrays.
    to = to if str(getattr(pair[1], "dtype", None)).endswith("float64") else to.float()
    at, order = at.sort()
    if not bool((at.diff() > 0).all()):
        raise ValueError(f"Expected different indices of neurons of {name}, got one twice")
    return at, to[order].contiguous()


def _expect_fingerprint(fingerprint: Any) -> None:
    if fingerprint is not None:
        arguments.instance("fingerprint", fingerprint, str)


def _curve(characters: Any, rewards: Any) -> tuple[np.ndarray, np.ndarray]:
    x = arguments.finite("characters", characters, "n")
    return x, arguments.finite("rewards", rewards, len(x))


def combined(interventions: Iterable[Intervention]) -> Intervention:
    """Their sum, in which parts of one kind and side are one."""
    parts = [part for some in interventions for part in some.parts]
    prints = {part.fingerprint for part in parts} - {None}
    if len(prints) > 1:
        raise ValueError("Expected interventions of one model, got those of models with different fingerprints")
    found = next(iter(prints), None)
    merged: list[Intervention] = []
    clamps = [part for part in parts if isinstance(part, NeuronClamp)]
    for positions in ("all", "last"):
        merged += _merged_clamps([clamp for clamp in clamps if clamp.positions == positions], positions, found)
    _merged_clamps(clamps, "all", found)  # "last" is one of "all": there they must agree as well
    for side in ("before", "after"):
        removals = [part for part in parts if isinstance(part, DirectionRemoval) and part.norm == side]
        if len({removal.strength for removal in removals}) > 1 or len({r.directions.size(1) for r in removals}) > 1:
            raise ValueError(
                f"Expected directions that are removed {side} the norm to agree in strength and size, so that they can "
                f"be orthonormalised together, got {removals}"
            )
        if removals:
            directions = torch.cat([removal.directions for removal in removals])
            merged.append(
                DirectionRemoval(directions, removals[0].strength, side, found) if len(removals) > 1 else removals[0]
            )
    merged += [part for part in parts if isinstance(part, LengthCorrection)]
    return merged[0] if len(merged) == 1 else Combined(tuple(merged), found)


def _merged_clamps(clamps: list[NeuronClamp], positions: Positions, fingerprint: str | None) -> list[Intervention]:
    if len(clamps) < 2:
        return list(clamps)
    by_name: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for clamp in clamps:
        for name, pair in clamp.neurons.items():
            by_name.setdefault(name, []).append(pair)
    neurons = {}
    for name, pairs in by_name.items():
        at, to = (torch.cat([pair[i].to(pair[i].dtype if i == 0 else torch.float64) for pair in pairs]) for i in (0, 1))
        unique, inverse = at.unique(return_inverse=True)
        values = to.new_zeros(len(unique)).scatter_(0, inverse, to)
        if len(clash := (values[inverse] != to).nonzero()):
            i = int(clash[0])
            raise ValueError(
                f"Expected one value for each neuron, got {float(to[i])} and {float(values[inverse[i]])} for neuron "
                f"{int(at[i])} of {name}"
            )
        neurons[name] = (unique, values if any(pair[1].dtype == torch.float64 for pair in pairs) else values.float())
    return [NeuronClamp(neurons, positions, fingerprint)]


def _streams(rm: Scorer, inputs: Sequence[Any], side: Side, encoding: dict[str, Any]) -> Tensor:
    """(N, d): the stream before or after the final norm where `score` reads."""
    binding = rm.binding
    if rm.pools:
        raise ValueError(
            f"{type(binding.root).__name__} pools by itself, so that no stream of a token makes its reward"
        )
    if side == "before" and not binding.leaves_norm_out:
        raise ValueError('Expected norm="after": the model has no final norm, or one with hooks')

    def stream(hidden: Tensor, rows: Tensor) -> Tensor:
        return hidden.reshape(-1, hidden.size(-1))[rows] if side == "before" else binding.normed(hidden, rows)[0]

    encoded = rm.encode(inputs, **encoding)
    read = [np.array([at]) for at in rm.positions(encoded)]
    return torch.cat(rm.run(encoded, read, head=stream))
