"""A process that serves: its socket, its signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

# Clients keep their connections this long without a request (longer than they do themselves, so that none is closed
# under a request that is just sent).
_KEEP_ALIVE = 75


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: `serve` has handlers that end the process with 0, where uvicorn's raise the signal again."""
        yield


def serve(
    app: Any, *, host: str = "127.0.0.1", port: int = 8000, drain: float = 60.0,
    ready: Callable[[str], None] = lambda url: None, log_level: str = "warning",
) -> None:  # fmt: skip
    """Serve an ASGI application until SIGTERM or SIGINT.

    Then no connection is accepted any more, requests that were sent are answered within `drain` seconds, and the
    function returns; a second signal ends it at once.

    Args:
        port: 0 for one that is free.
        ready: told the URL, once the application has started.

    Raises:
        OSError: the address can't be had.
        RuntimeError: the application has not started.
    """
    with listening(host, port) as own:
        asyncio.run(_serve(app, own, drain, ready, log_level))


async def _serve(app: Any, own: socket.socket, drain: float, ready: Callable[[str], None], log_level: str) -> None:
    config = uvicorn.Config(
        app, log_level=log_level, access_log=False, lifespan="on", server_header=False,
        timeout_keep_alive=_KEEP_ALIVE, timeout_graceful_shutdown=math.ceil(drain),
    )  # fmt: skip
    server = _Server(config)
    loop = asyncio.get_running_loop()

    def end() -> None:
        server.force_exit = server.should_exit  # at the second signal
        server.should_exit = True

    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, end)
    running = asyncio.ensure_future(server.serve(sockets=[own]))
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    if server.started:
        ready(url_of(own))
    await running
    if not server.started:
        raise RuntimeError("the server has not started")


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise OSError(f"{host}:{port} can't be had: {error.strerror or error}") from None
    return made


def url_of(own: socket.socket) -> str:
    host, port = own.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
