"""vLLM's pooling routes, which verl uses among others: /classify, /pooling, /score, and their twins under /v1.

Raw logits come back unless `use_activation` is true, where vLLM's own default is an activation.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from rmfast.integrations.serve.desk import Desk, Served, body_of
from rmfast.integrations.serve.protocols import own
from rmfast.integrations.serve.protocols.common import (
    Common,
    Reply,
    Usage,
    activated,
    columns,
    label_of,
    made,
    one_label,
    record,
    reply,
    route,
    texts_of,
    usage,
)
from rmfast.integrations.serve.protocols.sglang import Embedding, Ids, embedded
from rmfast.integrations.serve.refusals import Refused
from rmfast.integrations.serve.scheduler import Done
from rmfast.integrations.serve.work import Encoding, Score, Values

Task = Literal["classify", "token_classify"]


class Pooling(Common):
    """What its requests have in common."""

    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    truncation_side: Literal["left", "right"] | None = None
    padding: Literal["do_not_pad"] | None = None

    @property
    def special(self) -> bool:
        return True

    @property
    def encoding(self) -> Encoding:
        """truncate_prompt_tokens is the most tokens of a text, −1 the model's; the beginning is kept by default."""
        most = self.truncate_prompt_tokens
        if most == 0:
            raise Refused("truncate_prompt_tokens: expected −1 or a positive number, got 0")
        if most is None:
            return Encoding(special=self.special)
        side = self.truncation_side or "right"
        return Encoding(max_length=None if most == -1 else most, truncation=side, special=self.special)


class Completion(Pooling):
    """Of texts, or of their token ids."""

    input: str | list[str] | list[int] | list[list[int]]
    add_special_tokens: bool = True

    @property
    def special(self) -> bool:
        return self.add_special_tokens

    def inputs(self) -> list[Any]:
        return texts_of(self.input)


class Conversation(Pooling):
    """Of one conversation."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: Literal[False] = False
    continue_final_message: Literal[False] = False
    add_special_tokens: Literal[False] = False

    def inputs(self) -> list[Any]:
        return [record(self.messages, self.chat_template_kwargs, self.tools)]


class PoolingCompletion(Completion):
    task: Task


class PoolingConversation(Conversation):
    task: Task


class Texts(Pooling):
    text_1: str | list[str]
    text_2: str | list[str]

    def sides(self) -> tuple[Any, Any]:
        return self.text_1, self.text_2


class Documents(Pooling):
    queries: str | list[str]
    documents: str | list[str]

    def sides(self) -> tuple[Any, Any]:
        return self.queries, self.documents


class Class(Reply):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classes(Reply):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Class]
    usage: Usage


class Pooled(Reply):
    index: int
    object: Literal["pooling"] = "pooling"
    data: list[float] | list[list[float]]


class Pools(Reply):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Pooled]
    usage: Usage


class Scored(Reply):
    index: int
    object: Literal["score"] = "score"
    score: float


class Scores(Reply):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Scored]
    usage: Usage


def pairs(first: str | list[str], second: str | list[str]) -> list[Any]:
    """As many of each, or one of the first for all of the second."""
    ones = [first] if isinstance(first, str) else first
    twos = [second] if isinstance(second, str) else second
    if len(ones) == 1:
        ones = ones * len(twos)
    if len(ones) != len(twos):
        raise Refused(f"expected one text, or one for each of the {len(twos)}, got {len(ones)}")
    return list(zip(ones, twos))


def classes(model: Served, body: Pooling, done: Done) -> Classes:
    rows = [activated(model, row, body.use_activation) for row in columns(done.results)]
    data = [Class(index=i, label=label_of(model, row), probs=row, num_classes=len(row)) for i, row in enumerate(rows)]
    return Classes(**made("classify", body.request_id), model=model.name, data=data, usage=usage(done))


def pools(model: Served, body: PoolingCompletion | PoolingConversation, done: Done) -> Pools:
    def pooled(rows: list[Any]) -> list[Any]:
        return [activated(model, row, body.use_activation) for row in columns(rows)]

    found = pooled(done.results) if body.task == "classify" else list(map(pooled, done.results))
    data = [Pooled(index=i, data=each) for i, each in enumerate(found)]
    return Pools(**made("pool", body.request_id), model=model.name, data=data, usage=usage(done))


def scores(model: Served, body: Pooling, done: Done) -> Scores:
    rows = [activated(model, row, body.use_activation) for row in columns(done.results)]
    data = [Scored(index=i, score=row[0]) for i, row in enumerate(rows)]
    return Scores(**made("score", body.request_id), model=model.name, data=data, usage=usage(done))


def router(desk: Desk) -> APIRouter:
    routes = APIRouter()

    async def classify(request: Request) -> Response:
        kinds: dict[str, Any] = {
            "input": Completion, "messages": Conversation, "text": Embedding, "input_ids": Ids,
        }  # fmt: skip
        body: Any = await body_of(request, kinds)
        model = desk.model(body.model)
        if isinstance(body, Embedding | Ids):
            return await embedded(desk, request, model, body)
        done = await desk.numbers(request, model, Score(), body.inputs(), body.encoding)
        return await reply(done, lambda: classes(model, body, done))

    async def pooling(request: Request) -> Response:
        kinds: dict[str, Any] = {"input": PoolingCompletion, "messages": PoolingConversation}
        body: Any = await body_of(request, kinds)
        model = desk.model(body.model)
        work = Score() if body.task == "classify" else Values()
        done = await desk.numbers(request, model, work, body.inputs(), body.encoding)
        return await reply(done, lambda: pools(model, body, done))

    async def score(request: Request) -> Response:
        kinds: dict[str, Any] = {"inputs": own.Inputs, "text_1": Texts, "queries": Documents}
        body: Any = await body_of(request, kinds)
        model = desk.model(body.model)
        if isinstance(body, own.Inputs):
            return await own.scored(desk, request, model, body)
        one_label(model)
        done = await desk.numbers(request, model, Score(), pairs(*body.sides()), body.encoding)
        return await reply(done, lambda: scores(model, body, done))

    route(routes, ["/classify", "/v1/classify"], classify, (Completion, Conversation, Embedding, Ids), Classes)
    route(routes, ["/pooling", "/v1/pooling"], pooling, (PoolingCompletion, PoolingConversation), Pools)
    route(routes, ["/score", "/v1/score"], score, (own.Inputs, Texts, Documents), Scores)
    return routes
