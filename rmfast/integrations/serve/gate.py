"""What every request passes: the token, the size and time of its body, and errors of one form, without a traceback."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
import logging
import re
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rmfast.integrations.serve.desk import Gone
from rmfast.integrations.serve.metrics import Metrics
from rmfast.integrations.serve.refusals import Denied, Elsewhere, Refusal, Slow, TooLarge, Unscored

logger = logging.getLogger("rmfast.serve")

# Without a token, and so without a body: who asks is a load balancer.
_OPEN = ("/health",)
# Of a body that is refused, most that is read, in times of the limit.
_DISCARDED = 4
# Seconds within which its next part must come: a client that sends no more is waiting for the answer.
_NEXT_PART = 1.0
# Seconds from one refusal that the log tells to the next: hundreds of clients are refused for the same reason.
_TOLD = 1.0


class Gate:
    """Middleware, of plain ASGI.

    Args:
        token: what clients must bring as `Authorization: Bearer TOKEN`, or as the password of a URL; None for no such
            demand.
        loopback: whether the header Host must name this machine.
        body: most bytes of a request's body.
        body_seconds: within which it must have come.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, token: str | None, loopback: bool, body: int, body_seconds: float
    ) -> None:
        self.app, self.metrics, self.body, self.body_seconds = app, metrics, body, body_seconds
        self.token = None if token is None else token.strip().encode()
        self.loopback = loopback
        self.told, self.untold = -_TOLD, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.monotonic(), 0

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            body = await self._body(scope, _parts(receive))
            await self.app(scope, _again(body, receive), told)
        except Gone:
            status = status or 499
        except Exception as error:
            refusal = error if isinstance(error, Refusal) else Unscored("internal error", error)
            if refusal.__cause__ is not None:  # which the client is not told
                logger.error("%s: %s", scope["path"], refusal, exc_info=refusal.__cause__)
            else:
                self._tell(scope, refusal)
            if status:  # the answer has begun
                raise
            if isinstance(refusal, TooLarge | Slow | Denied | Elsewhere):
                refusal.headers["Connection"] = "close"  # of its body there may be more
            await answer(refusal, told)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.latency.labels(route).observe(time.monotonic() - start)

    def _tell(self, scope: Scope, refusal: Refusal) -> None:
        """A line for who runs the server: trainers' own logs have the status of an answer, and not its message."""
        self.untold += 1
        if (now := time.monotonic()) - self.told >= _TOLD:
            route = getattr(scope.get("route"), "path", "other")  # not the path, which a client writes
            others = f" ({self.untold - 1} others since the last line)" if self.untold > 1 else ""
            said = "".join(c if c.isprintable() else " " for c in str(refusal))  # clients' names of fields are in it
            logger.warning("%s: %d %s%s", route, refusal.status, said, others)
            self.told, self.untold = now, 0

    def _check(self, scope: Scope) -> None:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        kind, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        token = token.strip()
        if (kind := kind.lower()) == b"basic":  # of trainers that take a URL alone: http://any:TOKEN@host:8000
            try:
                token = base64.b64decode(token, validate=True).partition(b":")[2]
            except binascii.Error:
                raise Denied() from None
        if not hmac.compare_digest(token, self.token or b"") or kind not in (b"bearer", b"basic"):
            raise Denied()

    async def _body(self, scope: Scope, parts: AsyncGenerator[bytes, None]) -> bytes:
        """The whole body of a request that may be answered, before anything else is done for it."""
        try:
            if scope["path"] in _OPEN:
                return await self._read(scope, parts, 0)
            if self.loopback and not _names_loopback(scope):
                raise Elsewhere()
            if self.token is not None:
                self._check(scope)
            return await self._read(scope, parts, self.body)
        except (Denied, Elsewhere, TooLarge):
            await self._discard(scope, parts)
            raise

    async def _read(self, scope: Scope, parts: AsyncGenerator[bytes, None], most: int) -> bytes:
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value[:20]) > most:
                raise _too_large(most)
        try:
            return await asyncio.wait_for(_whole(parts, most), self.body_seconds)
        except asyncio.TimeoutError:
            raise Slow(f"the body did not come within {self.body_seconds:g} s") from None

    async def _discard(self, scope: Scope, parts: AsyncGenerator[bytes, None]) -> None:
        """Read what is left of a body that is refused, within bounds, and keep nothing of it.

        Most clients read no answer before they have sent all: theirs would be a broken connection. One that expects
        100 (Continue) has sent nothing yet.
        """
        if not any(name == b"expect" for name, _ in scope["headers"]):
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_passed(parts, _DISCARDED * self.body), self.body_seconds)


async def _parts(receive: Receive) -> AsyncGenerator[bytes, None]:
    """A body as it comes. Raises Gone where its client does."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        more = message.get("more_body", False)
        yield message.get("body", b"")


async def _whole(parts: AsyncGenerator[bytes, None], most: int) -> bytes:
    found, size = [], 0
    async for part in parts:
        found.append(part)
        size += len(part)
        if size > most:
            raise _too_large(most)
    return b"".join(found)


async def _passed(parts: AsyncGenerator[bytes, None], most: int) -> None:
    size = 0
    while size <= most:
        try:
            size += len(await asyncio.wait_for(anext(parts), _NEXT_PART))
        except StopAsyncIteration:
            return


def _names_loopback(scope: Scope) -> bool:
    given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    name = re.sub(r":\d*$", "", given[0]) if len(given) == 1 else ""
    return is_loopback(name[1:-1] if name[:1] + name[-1:] == "[]" else name.lower())


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _too_large(most: int) -> TooLarge:
    return TooLarge(f"the body is over the limit of {most} bytes")


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read, and then what the connection does."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def answer(refusal: Refusal, send: Send) -> None:
    """Tell a client why it gets no number."""
    content = json.dumps(problem(refusal)).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **refusal.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": content})


def problem(refusal: Refusal) -> dict[str, Any]:
    return {"error": {"message": str(refusal), "type": refusal.kind, "code": refusal.status}}
