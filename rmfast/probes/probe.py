"""A probe: a small function that edits one thing of a response, and what its edit is compared with."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from rmfast import arguments


@dataclass(frozen=True)
class Edit:
    """What a probe makes of one response.

    Attributes:
        response: the edited response.
        control: the response that it is compared with; None for the unedited one.
        inserted: (place, text) where the edit is no more than a text put in, which could change the content: the
            control is then a neutral text of as many tokens, put in at the same place (a placebo).
        prompt: of the edited response and of its control, where it is not the one that was given.
    """

    response: str
    control: str | None = None
    inserted: tuple[int, str] | None = None
    prompt: str | None = None

    def __post_init__(self) -> None:
        if self.control is not None and self.inserted is not None:
            raise ValueError("Expected an edit with a control, or with what it inserted, got both")


def insert(response: str, place: int, text: str, prompt: str | None = None) -> Edit:
    """An edit that puts a text into a response, with a placebo as its control."""
    return Edit(response[:place] + text + response[place:], inserted=(place, text), prompt=prompt)


Function = Callable[[str, str, random.Random], "Edit | str | None"]


@dataclass(frozen=True)
class Probe:
    """One edit of responses.

    Attributes:
        name: unique in a suite.
        axis: what it is about; the doses of one thing share it.
        edit: (prompt, response, rng) to an `Edit`, to the edited response where its control is the unedited one, or to
            None where the edit has no place in that response. It sees texts alone; `rng` is seeded by the text.
        dose: how much of it, where the axis has several.
    """

    name: str
    axis: str
    edit: Function
    dose: float | None = None

    def __call__(self, prompt: str, response: str, rng: random.Random) -> Edit | None:
        """The edit, or None where it changes nothing.

        Raises:
            TypeError, ValueError: the function gives something else, or an empty response.
        """
        made = self.edit(prompt, response, rng)
        if made is None:
            return None
        made = Edit(made) if isinstance(made, str) else made
        arguments.instance(f"what probe {self.name!r} gives", made, Edit, ", a text or None")
        if not made.response.strip():
            raise ValueError(f"Expected probe {self.name!r} to leave something of a response, got an empty one")
        return None if made.response == (response if made.control is None else made.control) else made


def probe(axis: str, *, name: str | None = None, dose: float | None = None) -> Callable[[Function], Probe]:
    """Makes a function a `Probe`, named as the function is (with spaces for underscores)."""

    def of(function: Function) -> Probe:
        arguments.function("the probe", function, "(prompt, response, rng)")
        return Probe(name or function.__name__.replace("_", " "), axis, function, dose)

    return of
