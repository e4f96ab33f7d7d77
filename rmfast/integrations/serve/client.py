"""A reward function for TRL's GRPO and RLOO that asks a server, with nothing but the standard library."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine
from typing import Any

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
        timeout: seconds to wait for an answer.
        name: what logs call it.

    Raises (by the function):
        RuntimeError: the server has refused, with its message. No reward is ever made up.
        OSError: the server can't be reached, or gave no answer in time.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"Expected url to begin with http:// or https://, got {url!r}")

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
