"""A reward function for TRL's GRPO and RLOO that asks a server, with nothing but the standard library."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine
from typing import Any

from rmfast import arguments
from rmfast.integrations.completions import records

Reward = Callable[..., Coroutine[Any, Any, list[float]]]


def remote_reward(
    url: str, *, model: str | None = None, token: str | None = None, timeout: float = 600.0, name: str = "rmfast",
    format: str = "concat",
) -> Reward:  # fmt: skip
    """An async reward function of (prompts, completions, **columns), as TRL's GRPOTrainer takes it.

    Conversations go through the reward model's chat template. A prompt that is text is scored as prompt + completion,
    unless `format` says otherwise. Columns tools and chat_template_kwargs of the data set are heeded.

    Args:
        url: of the server, such as "http://127.0.0.1:8000".
        model: its name there, where the server has several.
        token: what the server asks for (`rmfast serve --token-file`).
        timeout: seconds to wait for an answer.
        name: what logs call it.

    The function raises a RuntimeError with the server's message where that has refused, and an OSError where it can't
    be reached or gives no answer in time. No reward is ever made up.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """
    for what, value in (("url", url), ("name", name), ("model", model), ("token", token)):
        if not isinstance(value, str) and not (value is None and what in ("model", "token")):
            raise TypeError(f"Expected {what} to be text, got {arguments.shown(value)}")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"Expected url to begin with http:// or https://, got {arguments.shown(url)}")
    arguments.number("timeout", timeout, 0, above=True)
    arguments.word("format", format, ("chat", "pair", "concat"))

    def post(body: dict[str, Any]) -> list[float]:
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(url.rstrip("/") + "/score", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return json.load(response)["rewards"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"the reward server refused ({error.code}): {_message(error)}") from None

    async def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        body = {"inputs": records(prompts, completions, columns), "format": format, "model": model}
        return await asyncio.to_thread(post, {field: value for field, value in body.items() if value is not None})

    reward.__name__ = name
    return reward


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, LookupError, TypeError, OSError):
        return error.reason
