"""What a request asks of a model: inputs to token ids, and those to plain numbers, by the model's own methods."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from rmfast.engine.scorer import Scorer
from rmfast.rewards.steps import solutions
from rmfast.texts.forms import Text
from rmfast.texts.inputs import tokenise


@dataclass(frozen=True)
class Encoding:
    """How inputs become token ids, as `RewardModel.encode` takes it; None leaves it to the server's options.

    Attributes:
        special: whether the tokenizer adds its special tokens to a string (vLLM's add_special_tokens).
    """

    format: str | None = None
    max_length: int | None = None
    truncation: str | None = None
    special: bool = True


PLAIN = Encoding()


class Work(Protocol):
    """Equal works share batches, so a work is hashable."""

    @property
    def name(self) -> str: ...

    def encode(self, rm: Any, inputs: list[Any], encoding: dict[str, Any]) -> list[Any]:
        """An `Encoded` of each input, or its InputError."""

    def run(self, rm: Any, items: list[Any]) -> list[Any]:
        """Of each encoded input its numbers: a float, or (nested) lists of floats."""


@dataclass(frozen=True)
class Score:
    """`RewardModel.score`."""

    normalize: str | None = None
    name = "score"

    def encode(self, rm: Any, inputs: list[Any], encoding: dict[str, Any]) -> list[Any]:
        return rm.encode(inputs, errors="return", **encoding)

    def run(self, rm: Any, items: list[Any]) -> list[Any]:
        return rm.score(items, normalize=self.normalize).tolist()


@dataclass(frozen=True)
class Values:
    """`RewardModel.token_values`."""

    normalize: str | None = None
    name = "values"

    def encode(self, rm: Any, inputs: list[Any], encoding: dict[str, Any]) -> list[Any]:
        return rm.encode(inputs, errors="return", **encoding)

    def run(self, rm: Any, items: list[Any]) -> list[Any]:
        return [values.tolist() for values in rm.token_values(items, normalize=self.normalize)]


@dataclass(frozen=True)
class Steps:
    """`RewardModel.step_scores`, of (question, steps), or of texts with tags where `listed` is False."""

    listed: bool
    reduce: str | None = None
    separator: str | None = None
    answer: str | None = None
    step_tag_id: int | None = None
    returned_token_ids: tuple[int, ...] | None = None
    activation: str | None = None
    name = "steps"

    def encode(self, rm: Any, inputs: list[Any], encoding: dict[str, Any]) -> list[Any]:
        encoding = {name: value for name, value in encoding.items() if name != "truncation"}  # it would take steps away
        if not self.listed:
            return rm.encode(inputs, errors="return", **encoding)
        questions, steps = [question for question, _ in inputs], [own for _, own in inputs]
        return solutions(
            rm, questions, steps, separator=self.separator, answer=self.answer, step_tag_id=self.step_tag_id,
            errors="return", **encoding,
        )  # fmt: skip

    def run(self, rm: Any, items: list[Any]) -> list[Any]:
        found = rm.step_scores(
            items, reduce=self.reduce, step_tag_id=self.step_tag_id, activation=self.activation,
            returned_token_ids=self.returned_token_ids,
        )  # fmt: skip
        return [each.tolist() for each in found]


def options_of(rm: Scorer, own: Encoding, server: dict[str, Any]) -> dict[str, Any]:
    """The options of `RewardModel.encode` for a request: its own on top of the server's."""
    given = {name: getattr(own, name) for name in ("format", "max_length", "truncation")}
    options = server | {name: value for name, value in given.items() if value is not None}
    if not own.special:
        options["format"] = partial(_as_it_stands, rm)
    return options


def _as_it_stands(rm: Scorer, text: Any) -> Any:
    """A string's tokens without those that the tokenizer adds; what is none, as it is."""
    if not isinstance(text, str):
        return text
    if not text:
        raise ValueError("it is empty")
    found: list[Any] = [Text(text, None, len(text), special=False)]

    def attempt(place: int, function: Callable[[], Any]) -> None:
        found[place] = function()

    tokenise(found, rm.tokenizer, rm.binding.causal, attempt)
    return found[0]


def finite(numbers: Any) -> bool:
    """Whether all numbers of a result are."""
    return bool(np.isfinite(np.asarray(numbers, dtype=np.float64)).all())


def warm(rm: Any) -> None:
    """Find out what a model's first run does (which engine, which tiles), before a client waits for it."""
    ids = [min(10, rm.binding.vocab_size - 1)] * 4
    with suppress(ValueError):  # a head that looks for a pattern in its texts
        rm.score([ids] if rm.pools else [ids, ids[:2]], positions=None if rm.pools else [0, 0])
