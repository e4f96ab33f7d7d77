"""Where protocols bring their requests: models by name, and the way from a body to numbers or a refusal."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.requests import Request

from rmfast.integrations.serve.metrics import Metrics
from rmfast.integrations.serve.refusals import Late, Refused, TooLarge, Unknown
from rmfast.integrations.serve.scheduler import Ask, Done, Scheduler
from rmfast.integrations.serve.work import PLAIN, Encoding, Work
from rmfast.texts.chat import template_kwargs
from rmfast.texts.forms import BATCH

M = TypeVar("M", bound=BaseModel)

# A body of more bytes is read in another thread: it would hold up the event loop for milliseconds.
_LARGE = 1 << 16

_FAULTS = 3  # of a body, most that its client is told

# What a record may have.
_KEYS = (*BATCH, "messages", "prompt", "response", "text", "chat_template_kwargs", "tools")


class Gone(Exception):
    """The client has disconnected, so that there is nobody to tell."""


@dataclass(frozen=True)
class Served:
    """A model by its name."""

    name: str
    rm: Any
    scheduler: Scheduler


class Desk:
    """What the routes of all protocols share.

    Args:
        models: by name, at least one.
        timeout: seconds until a request without an answer is refused.
        texts, characters: most texts of one request, and characters of one of them.
    """

    def __init__(
        self, models: Mapping[str, Served], metrics: Metrics, *, timeout: float, texts: int, characters: int
    ) -> None:
        self.models, self.metrics = dict(models), metrics
        self.timeout, self.texts, self.characters = timeout, texts, characters

    def model(self, name: str | None) -> Served:
        """The model of that name; of no name the only one."""
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None:
            raise Refused(f"expected model to be one of {self._names()}, got none")
        if name not in self.models:
            raise Unknown(f"expected model to be one of {self._names()}, got {name[:200]!r}")
        return self.models[name]

    def _names(self) -> str:
        return ", ".join(map(repr, self.models))

    async def numbers(
        self, request: Request, model: Served, work: Work, inputs: list[Any], encoding: Encoding = PLAIN
    ) -> Done:
        """The numbers of all inputs.

        Raises:
            Refusal: there are none.
            Gone: the client has disconnected. What waits of its texts is dropped.
        """
        if not inputs:
            raise Refused("expected one text or more, got none")
        if len(inputs) > self.texts:
            raise TooLarge(f"the request has {len(inputs)} texts, over the limit of {self.texts}")
        characters = 0
        for i, item in enumerate(inputs):
            characters += (count := _characters(item))
            if count > self.characters:  # a tokenizer would be at it for seconds
                raise TooLarge(f"input {i} has {count} characters, over the limit of {self.characters}")
            if isinstance(item, dict):
                _check_record(i, item)
        answer: asyncio.Future[Any] = asyncio.wrap_future(
            model.scheduler.submit(Ask(work, inputs, encoding, characters))
        )
        gone: asyncio.Future[Any] = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait([answer, gone], timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if gone.done():
                self.metrics.disconnects.inc()
                raise Gone
            raise Late(self.timeout)
        finally:
            gone.cancel()
            answer.cancel()


def _characters(item: Any) -> int:
    """Of all texts in an input. A list that begins with a number is one of token ids."""
    if isinstance(item, str):
        return len(item)
    if isinstance(item, dict):
        return sum(map(_characters, item.values()))
    if isinstance(item, list | tuple) and not (item and isinstance(item[0], int)):
        return sum(map(_characters, item))
    return 0


def _check_record(index: int, record: dict[str, Any]) -> None:
    """Refused for a key that is not heeded, and a template of the client's own, a program that would run here."""
    if unknown := [key for key in record if key not in _KEYS]:
        raise Refused(f"input {index}: expected a record with keys of {', '.join(_KEYS)}, got {unknown[0][:200]!r}")
    try:
        given = template_kwargs(record.get("chat_template_kwargs"))
    except ValueError as error:
        raise Refused(f"input {index}: {str(error)[:500]}") from None
    if "chat_template" in given:
        raise Refused(
            f"input {index}: expected chat_template_kwargs without chat_template: the model brings the template"
        )


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def body_of(request: Request, kinds: Mapping[str, type[M]]) -> M:
    """The body as the one of several kinds of requests whose telling field it has.

    Args:
        kinds: by the field that tells a kind. Each refuses what it does not know, since a field that is not heeded
            would change a number in silence.

    Raises:
        Refused: it is none of them.
    """
    body = await request.body()
    read = _read if len(body) <= _LARGE else _elsewhere
    found = read(body, kinds)
    return await found if asyncio.iscoroutine(found) else found  # type: ignore[return-value]


async def _elsewhere(body: bytes, kinds: Mapping[str, type[M]]) -> M:
    return await asyncio.to_thread(_read, body, kinds)


_ANYTHING: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def _read(body: bytes, kinds: Mapping[str, type[M]]) -> M:
    try:
        if len(kinds) == 1:
            return next(iter(kinds.values())).model_validate_json(body)
        fields = _ANYTHING.validate_json(body)
        there = [name for name in kinds if name in fields]
        if len(there) != 1:
            got = " and ".join(there) or ", ".join(map(repr, list(fields)[:20])) or "nothing"
            raise Refused(f"expected one of the fields {', '.join(kinds)}, got {got}")
        return kinds[there[0]].model_validate_json(body)
    except ValidationError as error:
        raise Refused(_said(error)) from None


def _said(error: ValidationError) -> str:
    """The first of a body's faults, in short: places and what is wrong, and nothing of the body but names of fields."""
    faults = error.errors(include_url=False, include_input=False, include_context=False)[:_FAULTS]
    return "; ".join(map(_fault, faults))


def _fault(fault: Any) -> str:
    place = ".".join(str(part)[:100] for part in fault["loc"])
    what = "this route has no such field" if fault["type"] == "extra_forbidden" else fault["msg"][:300]
    return f"{place}: {what}" if place else what
