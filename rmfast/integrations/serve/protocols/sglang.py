"""SGLang's reward routes: its own form of /classify, and /v1/embeddings, which verl uses on SGLang.

Its /classify answers as its source does for embeddings: an object for one text, a list for several. What stands in
`meta_info` beside id and prompt_tokens there is left out.
"""

from __future__ import annotations

import uuid
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import RootModel
from starlette.requests import Request
from starlette.responses import Response

from rmfast.integrations.serve.desk import Desk, Served, body_of
from rmfast.integrations.serve.protocols.common import Common, Reply, Usage, columns, reply, route, texts_of, usage
from rmfast.integrations.serve.work import Score


class Embedding(Common):
    """Of /classify, with text."""

    text: str | list[str]

    @property
    def given(self) -> Any:
        return self.text


class Ids(Common):
    """Of /classify, with token ids."""

    input_ids: list[int] | list[list[int]]

    @property
    def given(self) -> Any:
        return self.input_ids


class OpenAI(Common):
    """Of /v1/embeddings."""

    input: str | list[str] | list[int] | list[list[int]]


class Meta(Reply):
    id: str
    prompt_tokens: int


class Embedded(Reply):
    embedding: list[float]
    meta_info: Meta


class EmbeddedTexts(RootModel[list[Embedded]]):
    """Of several."""


class Vector(Reply):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float]


class Vectors(Reply):
    object: Literal["list"] = "list"
    data: list[Vector]
    model: str
    usage: Usage


async def embedded(desk: Desk, request: Request, model: Served, body: Embedding | Ids) -> Response:
    """The answer of /classify in SGLang's form."""
    texts = texts_of(body.given)
    done = await desk.numbers(request, model, Score(), texts)
    found = [
        Embedded(embedding=row, meta_info=Meta(id=body.rid or uuid.uuid4().hex, prompt_tokens=len(item)))
        for row, item in zip(columns(done.results), done.items)
    ]
    return await reply(done, lambda: found[0] if texts == [body.given] else EmbeddedTexts(found))


def router(desk: Desk) -> APIRouter:
    routes = APIRouter()

    async def embeddings(request: Request) -> Response:
        body = await body_of(request, {"input": OpenAI})
        model = desk.model(body.model)
        done = await desk.numbers(request, model, Score(), texts_of(body.input))
        data = [Vector(index=i, embedding=row) for i, row in enumerate(columns(done.results))]
        return await reply(done, lambda: Vectors(data=data, model=model.name, usage=usage(done)))

    route(routes, ["/v1/embeddings"], embeddings, (OpenAI,), Vectors)
    return routes
