"""slime's `--rm-type remote_rm --rm-url`: one prompt with its response, to a bare number."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from rmfast.integrations.serve.desk import Desk, body_of
from rmfast.integrations.serve.protocols.common import Body, one_label, record, route, url_of
from rmfast.integrations.serve.refusals import Refused
from rmfast.integrations.serve.work import Score


class Sample(Body):
    """The client's. A prompt that is text has gone through the policy's chat template already: what is scored is
    prompt + response, unless the URL says ?format=chat; one of messages goes through the reward model's template. The
    label is not heeded.
    """

    prompt: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    response: str
    label: Any = None


def router(desk: Desk) -> APIRouter:
    made = APIRouter()

    async def remote_rm(request: Request) -> Response:
        url = url_of(request)
        body = await body_of(request, {"prompt": Sample})
        model = desk.model(url.model)
        one_label(model)
        encoding = url.encoding
        if isinstance(body.prompt, str):
            item: Any = (body.prompt, body.response)
            if not encoding.special:
                item = body.prompt + body.response
            elif encoding.format is None:
                encoding = replace(encoding, format="concat")
        elif url.format not in (None, "chat"):
            raise Refused(f"expected format=chat for a prompt of messages, got {url.format}")
        else:
            item = record([*body.prompt, {"role": "assistant", "content": body.response}])
            encoding = replace(encoding, special=True)
        done = await desk.numbers(request, model, Score(url.normalize), [item], encoding)
        return Response(repr(done.results[0]), media_type="application/json")

    route(made, ["/", "/remote_rm"], remote_rm, (Sample,), None)
    return made
