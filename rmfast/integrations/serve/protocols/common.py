"""What the protocols share: strict bodies, the query of a URL, inputs, token counts, activations."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from rmfast.integrations.serve.desk import Served
from rmfast.integrations.serve.refusals import Refused
from rmfast.integrations.serve.scheduler import Done
from rmfast.integrations.serve.work import Encoding

# A response of more tokens, which may have a number for each, would hold up the event loop for milliseconds.
_LONG = 1 << 14

Handler = Callable[[Request], Awaitable[Response]]


class Body(BaseModel):
    """A request's body. A field that it does not know is refused, and no text is taken for a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Reply(BaseModel):
    """A response's body."""


class Usage(Reply):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


def usage(done: Done) -> Usage:
    return Usage(prompt_tokens=done.tokens, total_tokens=done.tokens)


async def reply(done: Done, make: Callable[[], BaseModel]) -> Response:
    """The response of what `make` gives, without what is None; made in another thread where it is long."""
    if done.tokens <= _LONG:
        return _json(make)
    return await asyncio.to_thread(_json, make)


def _json(make: Callable[[], BaseModel]) -> Response:
    return Response(make().model_dump_json(exclude_none=True), media_type="application/json")


def route(
    router: APIRouter, paths: list[str], handler: Handler, body: tuple[type[Body], ...], replies: type[Reply] | None
) -> None:
    """Have POST requests of these paths handled; the schemas are for `/openapi.json`."""
    schemas: list[Any] = [kind.model_json_schema(ref_template="#/components/schemas/{model}") for kind in body]
    content = {"application/json": {"schema": schemas[0] if len(schemas) == 1 else {"oneOf": schemas}}}
    told: dict[int | str, dict[str, Any]] = {200: {"model": replies}} if replies else {}
    for path in paths:
        router.add_api_route(
            path, handler, methods=["POST"], response_model=None, responses=told,
            openapi_extra={"requestBody": {"required": True, "content": content}},
        )  # fmt: skip


def made(prefix: str, given: str | None) -> dict[str, Any]:
    """Id and time of a response."""
    return {"id": f"{prefix}-{given or uuid.uuid4().hex}", "created": int(time.time())}


class Common(Body):
    """Fields that change no number are taken and not heeded: user, request_id, rid, priority, cache_salt."""

    model: str | None = None
    user: str | None = None
    request_id: str | None = Field(default=None, max_length=200)
    rid: str | None = Field(default=None, max_length=200)
    priority: int = 0
    cache_salt: str | None = None
    encoding_format: Literal["float"] = "float"


class Url(Body):
    """What clients whose body is fixed can say in their URL: `http://host:8000/get_reward?model=NAME`."""

    model: str | None = None
    format: Literal["chat", "pair", "concat"] | None = None
    normalize: Literal["own"] | None = None
    truncation: Literal["error", "left", "right"] | None = None
    special_tokens: Literal["true", "false"] = "true"

    @property
    def encoding(self) -> Encoding:
        return Encoding(format=self.format, truncation=self.truncation, special=self.special_tokens == "true")


def url_of(request: Request) -> Url:
    given = dict(request.query_params)
    if unknown := given.keys() - Url.model_fields.keys():
        raise Refused(f"expected {', '.join(Url.model_fields)} in the URL's query, got {min(unknown)[:100]!r}")
    if len(given) != len(request.query_params.multi_items()):
        raise Refused("expected each name once in the URL's query")
    try:
        url = Url.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise Refused(f"{first['loc'][0]} in the URL's query: {first['msg']}") from None
    if url.format is not None and url.special_tokens == "false":
        raise Refused("expected format or special_tokens=false in the URL's query, got both")
    return url


def one_label(model: Served) -> None:
    """Refused where a protocol has room for one number of a text, and the model gives several."""
    if model.rm.num_labels != 1:
        raise Refused(
            f"{model.name!r} gives {model.rm.num_labels} rewards for each text, and this route has room for one: "
            "use /classify, /pooling or /score with inputs"
        )


def texts_of(given: Any) -> list[Any]:
    """One text or several, each a string or token ids, as a list."""
    return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)


def record(messages: Any, kwargs: Any = None, tools: Any = None) -> dict[str, Any]:
    """A conversation as `RewardModel.score` takes it."""
    more = {"chat_template_kwargs": kwargs, "tools": tools}
    return {"messages": messages, **{name: value for name, value in more.items() if value is not None}}


def columns(results: list[Any]) -> list[list[float]]:
    """(K,) floats of each text; K is 1 where a result is a number."""
    return [each if isinstance(each, list) else [each] for each in results]


def activated(model: Served, logits: list[float], asked: bool | None) -> list[float]:
    """The head's raw output, or where a client asks for it what vLLM's classifier makes of it.

    By `problem_type`: nothing of a regression's, a sigmoid of several labels'; else a softmax, and a sigmoid of one.
    """
    kind = getattr(model.rm.binding.config, "problem_type", None)
    if not asked or kind == "regression":
        return logits
    if len(logits) == 1 or kind == "multi_label_classification":
        return [1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x)) for x in logits]
    top = max(logits)
    parts = [math.exp(x - top) for x in logits]
    return [part / sum(parts) for part in parts]


def label_of(model: Served, numbers: list[float]) -> str:
    """The name of the largest."""
    best = max(range(len(numbers)), key=numbers.__getitem__)
    names: Mapping[int, str] = getattr(model.rm.binding.config, "id2label", None) or {}
    return str(names.get(best, f"LABEL_{best}")) if len(names) == len(numbers) else f"LABEL_{best}"
