"""What trainers give a reward function, as inputs of `RewardModel.score`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def records(prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Prompts and completions, each texts or messages, as records, with the template's columns of a data set."""
    found = []
    for i, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        text = {"prompt": p, "response": c} if isinstance(p, str) else {"messages": [*p, *c]}
        own = {name: columns[name][i] for name in ("tools", "chat_template_kwargs") if columns.get(name)}
        found.append({**text, **own})
    return found
