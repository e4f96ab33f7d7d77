"""OpenRLHF's `--reward.remote_url`: the texts of prompts with their responses, to one reward each."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from rmfast.integrations.serve.desk import Desk, body_of
from rmfast.integrations.serve.protocols.common import Body, Reply, one_label, reply, route, url_of
from rmfast.integrations.serve.refusals import Refused
from rmfast.integrations.serve.work import Score


class Query(Body):
    """The client's: `query` is scored. The prompts are its beginnings, and labels are for rewards by rule."""

    query: list[str]
    prompts: list[Any] | None = None
    labels: list[Any] | None = None


class Rewards(Reply):
    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


def router(desk: Desk) -> APIRouter:
    made = APIRouter()

    async def get_reward(request: Request) -> Response:
        url = url_of(request)
        if url.format is not None:
            raise Refused("expected no format in the URL's query: a query is one text already")
        body = await body_of(request, {"query": Query})
        model = desk.model(url.model)
        one_label(model)
        done = await desk.numbers(request, model, Score(url.normalize), list(body.query), url.encoding)
        return await reply(done, lambda: Rewards(rewards=done.results, scores=done.results, extra_logs={}))

    route(made, ["/get_reward"], get_reward, (Query,), Rewards)
    return made
