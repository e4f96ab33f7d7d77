"""What tests of the server share: one that runs in a thread, on loopback at a free port, and plain clients."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import models
import uvicorn

import rmfast
from rmfast.integrations.serve.app import Limits, create_app
from rmfast.integrations.serve.server import listening, url_of


def reward_model(**kw: Any) -> rmfast.RewardModel:
    return rmfast.RewardModel(models.decoder(**kw), models.tokenizer(chat=True))


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The URL of an application that is served."""
    own = listening("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=20))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [own]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield url_of(own)
    finally:
        server.should_exit = True
        thread.join(60)
        own.close()
        assert not thread.is_alive()


@contextmanager
def served(*rms: Any, token: str | None = None, encoding: Any = None, **limits: Any) -> Iterator[str]:
    """The URL of a server of models called m0, m1, ..."""
    named = {f"m{i}": rm for i, rm in enumerate(rms)}
    with running(create_app(named, limits=Limits(**limits), token=token, encoding=encoding)) as url:
        yield url


class Answer:
    def __init__(self, status: int, headers: Any, content: bytes) -> None:
        self.status, self.headers, self.content = status, headers, content

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def message(self) -> str:
        """Of a refusal, in the one form that they all have."""
        error = self.json["error"]
        assert error.keys() == {"message", "type", "code"} and error["code"] == self.status >= 400, error
        for leak in ("Traceback", "/rmfast/", "site-packages", ".py"):
            assert leak not in self.content.decode(), self.content
        return error["message"]


def ask(url: str, path: str, body: Any = None, method: str = "POST", **headers: str) -> Answer:
    """One request; a body that is neither bytes nor None goes as JSON."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    content = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request(method, path, content, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())
    finally:
        connection.close()


def at_once(url: str, path: str, bodies: list[Any], **headers: str) -> list[Answer]:
    """Requests on as many connections, all of them at the same time."""

    async def one(body: Any) -> Answer:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        content = json.dumps(body).encode()
        more = {"Host": "x", "Content-Type": "application/json", "Connection": "close", **headers}
        head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in more.items())
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        answer = await reader.read()
        writer.close()
        head_, _, rest = answer.partition(b"\r\n\r\n")
        return Answer(int(head_.split()[1]), {}, rest)

    async def all_of_them() -> list[Answer]:
        return await asyncio.gather(*map(one, bodies))

    return asyncio.run(all_of_them())
