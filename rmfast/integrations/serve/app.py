"""The application: models by name behind all protocols, health, metrics."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import rmfast
from rmfast import arguments
from rmfast.engine.scorer import Scorer
from rmfast.integrations.serve.desk import Desk, Served
from rmfast.integrations.serve.gate import Gate
from rmfast.integrations.serve.metrics import Metrics
from rmfast.integrations.serve.protocols import openrlhf, own, sglang, slime, vllm
from rmfast.integrations.serve.scheduler import Scheduler
from rmfast.integrations.serve.work import warm


@dataclass(frozen=True)
class Limits:
    """What a server takes, and how long it waits.

    Attributes:
        max_wait: seconds that a text waits for company where nothing runs.
        batch_tokens: rows of a batch; default what the model takes at once.
        body: most bytes of a request.
        texts, tokens: most of one request.
        characters: most of one text; tokenizers read some million in a second.
        queue: most texts without an answer, beyond which requests get 429.
        timeout: seconds until a request without an answer gets 504.
        body_seconds: within which a request's body must have come.
        drain: seconds that requests have to be answered once the server is told to end.
    """

    max_wait: float = 0.005
    batch_tokens: int | None = None
    body: int = 32 << 20
    texts: int = 4096
    tokens: int = 1 << 20
    characters: int = 1 << 20
    queue: int = 16384
    timeout: float = 600.0
    body_seconds: float = 60.0
    drain: float = 60.0

    def __post_init__(self) -> None:
        for name in ("body", "texts", "tokens", "characters", "queue"):
            arguments.whole(name, getattr(self, name), 1)
        if self.batch_tokens is not None:
            arguments.whole("batch_tokens", self.batch_tokens, 1)
        for name in ("max_wait", "drain"):
            arguments.number(name, getattr(self, name), 0)
        for name in ("timeout", "body_seconds"):
            arguments.number(name, getattr(self, name), 0, above=True)


def create_app(
    models: Mapping[str, Any], *, limits: Limits | None = None, token: str | None = None,
    loopback: bool = False, encoding: Mapping[str, Any] | None = None,
) -> FastAPI:  # fmt: skip
    """An ASGI application that serves reward models (docs/serve.md).

    Each model has a queue and a thread of its own, which live as long as the application's lifespan.

    Args:
        models: a `rmfast.RewardModel` by each name.
        token: what clients must bring as `Authorization: Bearer TOKEN`, or as the password of a URL, but for /health.
        loopback: refuse requests whose header Host names another machine: pages in a browser here are kept out.
        encoding: options of `RewardModel.encode` (format, max_length, truncation, chat_template_kwargs, tools) where a
            request has none.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """
    if not isinstance(models, Mapping) or not models:
        raise TypeError(f"Expected models to be one or more by their names, got {arguments.shown(models)}")
    for name, rm in models.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"Expected models to have names that are text, got {arguments.shown(name)}")
        arguments.instance(f"models[{name!r}]", rm, Scorer)
    if token is not None and (not isinstance(token, str) or not token.strip()):
        raise TypeError("Expected token to be text, or None")
    limits = Limits() if limits is None else arguments.instance("limits", limits, Limits)
    metrics = Metrics()
    served: dict[str, Served] = {}
    desk = Desk(served, metrics, timeout=limits.timeout, texts=limits.texts, characters=limits.characters)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for name, rm in models.items():
            await anyio.to_thread.run_sync(warm, rm)
            scheduler = Scheduler(
                rm, batch_tokens=limits.batch_tokens, max_wait=limits.max_wait, queue=limits.queue,
                tokens=limits.tokens, encoding=dict(encoding or {}), batched=partial(metrics.batched, name),
            )  # fmt: skip
            desk.models[name] = Served(name, rm, scheduler)
            metrics.watch(name, scheduler)
        yield
        for each in desk.models.values():  # requests are answered by now, or given up
            await anyio.to_thread.run_sync(each.scheduler.close, limits.drain)

    app = FastAPI(title="rmfast", version=rmfast.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(
        Gate,
        metrics=metrics,
        token=token,
        loopback=loopback,
        body=limits.body,
        body_seconds=limits.body_seconds,  # type: ignore[arg-type]
    )
    started = int(time.time())

    @app.get("/health")
    async def health() -> Response:
        ready = bool(desk.models) and all(each.scheduler.alive for each in desk.models.values())
        return JSONResponse({"status": "ok" if ready else "unavailable"}, 200 if ready else 503)

    @app.get("/metrics")
    async def page() -> Response:
        text, kind = metrics.page()
        return Response(text, headers={"Content-Type": kind})

    def longest(rm: Any) -> int | None:
        """Most tokens of a text, of a request that has no limit of its own."""
        most = [given for given in (rm.max_length, (encoding or {}).get("max_length")) if given is not None]
        return min(most, default=None)

    @app.get("/v1/models")
    async def listed() -> Response:
        data = [
            {"id": name, "object": "model", "created": started, "owned_by": "rmfast",
             "max_model_len": longest(each.rm), "num_labels": each.rm.num_labels}
            for name, each in desk.models.items()
        ]  # fmt: skip
        return JSONResponse({"object": "list", "data": data})

    async def problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: /openapi.json lists the routes and their methods"
        body = {"message": message, "type": "invalid_request_error", "code": error.status_code}
        return JSONResponse({"error": body}, error.status_code, headers=error.headers)

    app.add_exception_handler(HTTPException, problem)
    for protocol in (openrlhf, vllm, sglang, slime, own):
        app.include_router(protocol.router(desk))
    return app
