"""Our own routes: /score, /values and /steps, with inputs in every form that `RewardModel.score` takes, as JSON.

/score is answered beside vLLM's (`rmfast.integrations.serve.protocols.vllm`), told by the field `inputs`.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from rmfast.integrations.serve.desk import Desk, Served, body_of
from rmfast.integrations.serve.protocols.common import Body, Reply, reply, route
from rmfast.integrations.serve.refusals import Refused
from rmfast.integrations.serve.scheduler import Done
from rmfast.integrations.serve.work import Encoding, Score, Steps, Values
from rmfast.texts.chat import is_messages


class Formatted(Body):
    """How inputs become token ids, as `RewardModel.score` takes it."""

    model: str | None = None
    format: Literal["chat", "pair", "concat"] | None = None
    max_length: int | None = Field(default=None, ge=1)
    truncation: Literal["error", "left", "right"] | None = None

    @property
    def encoding(self) -> Encoding:
        return Encoding(self.format, self.max_length, self.truncation)


class Inputs(Formatted):
    """Texts: strings, [prompt, response] pairs, lists of messages, of token ids, or records of them."""

    inputs: list[Any]
    normalize: Literal["own"] | None = None
    return_token_ids: bool = False


class Solutions(Formatted):
    """A question and the steps of its solutions, or a question for each solution."""

    question: str | list[Any]
    steps: list[str] | list[list[str]]
    reduce: Literal["min", "prod", "last", "mean"] | None = None
    separator: str | None = None
    answer: str | None = None
    step_tag_id: int | None = Field(default=None, ge=0)
    returned_token_ids: list[int] | None = None
    activation: Literal["sigmoid", "softmax", "none"] | None = None
    truncation: None = None

    def pairs(self) -> tuple[list[Any], bool]:
        """(question, steps) of each solution, and whether one was given by itself."""
        if self.steps and isinstance(self.steps[0], str):
            return [(self.question, self.steps)], True
        one = isinstance(self.question, str) or is_messages(self.question)
        questions: list[Any] = [self.question] * len(self.steps) if one else list(self.question)
        if len(questions) != len(self.steps):
            raise Refused(
                f"expected one question, or one for each of {len(self.steps)} solutions, got {len(questions)}"
            )
        return list(zip(questions, self.steps)), False


class Tagged(Formatted):
    """Texts with a token behind each step."""

    inputs: list[Any]
    reduce: Literal["min", "prod", "last", "mean"] | None = None
    step_tag_id: int | None = Field(default=None, ge=0)
    returned_token_ids: list[int] | None = None
    activation: Literal["sigmoid", "softmax", "none"] | None = None
    truncation: None = None


class Rewards(Reply):
    """`rewards` are one number of each input, or K; `tokens` how many it has; `token_ids` where they were asked for."""

    model: str
    rewards: list[float] | list[list[float]]
    tokens: list[int]
    token_ids: list[list[int]] | None = None


class TokenValues(Reply):
    """`values` are (T,) of each input, or (T, K)."""

    model: str
    values: list[list[float]] | list[list[list[float]]]
    tokens: list[int]
    token_ids: list[list[int]] | None = None


class StepScores(Reply):
    """`scores` are (S,) of each solution; of one alone, or with reduce, one level less."""

    model: str
    scores: float | list[float] | list[list[float]]
    tokens: list[int]


def _of(model: Served, done: Done, ids: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"model": model.name, "tokens": [len(item) for item in done.items]}
    return found | ({"token_ids": [item.ids.tolist() for item in done.items]} if ids else {})


async def scored(desk: Desk, request: Request, model: Served, body: Inputs) -> Response:
    """The answer of /score with inputs."""
    done = await desk.numbers(request, model, Score(body.normalize), body.inputs, body.encoding)
    return await reply(done, lambda: Rewards(rewards=done.results, **_of(model, done, body.return_token_ids)))


def router(desk: Desk) -> APIRouter:
    routes = APIRouter()

    async def values(request: Request) -> Response:
        body = await body_of(request, {"inputs": Inputs})
        model = desk.model(body.model)
        done = await desk.numbers(request, model, Values(body.normalize), body.inputs, body.encoding)
        return await reply(done, lambda: TokenValues(values=done.results, **_of(model, done, body.return_token_ids)))

    async def steps(request: Request) -> Response:
        kinds: dict[str, Any] = {"steps": Solutions, "inputs": Tagged}
        body: Any = await body_of(request, kinds)
        model = desk.model(body.model)
        listed = isinstance(body, Solutions)
        inputs, one = body.pairs() if listed else (body.inputs, False)
        returned = None if body.returned_token_ids is None else tuple(body.returned_token_ids)
        more = {"separator": body.separator, "answer": body.answer} if listed else {}
        work = Steps(
            listed, body.reduce, step_tag_id=body.step_tag_id, returned_token_ids=returned, activation=body.activation,
            **more,
        )  # fmt: skip
        done = await desk.numbers(request, model, work, inputs, body.encoding)
        scores = done.results[0] if one else done.results
        return await reply(done, lambda: StepScores(scores=scores, **_of(model, done, False)))

    route(routes, ["/values"], values, (Inputs,), TokenValues)
    route(routes, ["/steps"], steps, (Solutions, Tagged), StepScores)
    return routes
