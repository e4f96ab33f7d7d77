"""The texts of a suite: edited responses and their controls, as `RewardModel.score` takes them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rmfast.probes.edits import FILLER
from rmfast.probes.probe import Edit, Probe
from rmfast.texts.pairs import Pair


@dataclass(frozen=True)
class Response:
    """One response: its prompt and text, and the input of `RewardModel.score` that it is part of."""

    prompt: str
    text: str
    input: Any


@dataclass(frozen=True)
class Variant:
    """What one probe compares for one response: its place among the responses, and two inputs."""

    of: int
    edited: Any
    control: Any


def responses_of(pairs: Sequence[Pair]) -> list[Response]:
    """The two responses of each pair in turn."""
    return [
        Response(pair.prompt, text, given)
        for pair in pairs
        for text, given in zip((pair.chosen, pair.rejected), pair.inputs)
    ]


def variants_of(
    probe: Probe, responses: Sequence[Response], most: int, seed: int, count: Callable[[str], int]
) -> list[Variant]:
    """The variants of at most so many responses to which the probe applies.

    Responses are taken in an order drawn anew for each probe, so that one axis' texts say nothing of another's; an edit
    draws by the response's own text, so that the same text is edited alike in every suite.
    """
    order = list(range(len(responses)))
    random.Random(f"{seed} {probe.name}").shuffle(order)
    found: list[Variant] = []
    for i in order:
        if len(found) == most:
            break
        each = responses[i]
        edit = probe(each.prompt, each.text, random.Random(f"{seed} {probe.name} {each.text}"))
        if edit is not None:
            rng = random.Random(f"{seed} {probe.name} control {each.text}")
            control = _control(edit, each.text, count, rng)
            found.append(Variant(i, _with(each, edit.response, edit.prompt), _with(each, control, edit.prompt)))
    return sorted(found, key=lambda variant: variant.of)


def _control(edit: Edit, text: str, count: Callable[[str], int], rng: random.Random) -> str:
    """The control's text; where something was inserted, with neutral sentences in its place, as long in tokens as whole
    sentences come."""
    if edit.inserted is None:
        return text if edit.control is None else edit.control
    place, inserted = edit.inserted
    before, after = edit.response[:place], edit.response[place + len(inserted) :]
    lead, tail = (inserted[: len(inserted) - len(inserted.lstrip())], inserted[len(inserted.rstrip()) :])
    # Without the space around it, which tokenizers count by itself at an end and as part of a word in a text.
    wanted, chosen = count(inserted.strip()), list[str]()
    others = [sentence for sentence in FILLER if sentence != inserted.strip()]
    rng.shuffle(others)
    lengths = {sentence: count(sentence) for sentence in others}
    missing = wanted
    while others and (not chosen or missing >= min(lengths[sentence] for sentence in others)):
        # The last one closes the gap, as near as may be; those before it are as they were shuffled.
        near = min(others, key=lambda sentence: abs(lengths[sentence] - missing))
        drawn = near if missing < 2 * max(lengths.values()) else others[0]
        chosen.append(drawn)
        others.remove(drawn)
        missing -= lengths[drawn]
    return before + lead + " ".join(chosen) + tail + after


def _with(response: Response, text: str, prompt: str | None) -> Any:
    """The response's input with another text of the response, and perhaps of its prompt."""
    given = response.input
    if isinstance(given, str):  # a whole text, of which the response is the end
        head = given[: len(given) - len(response.text)]
        return (head if prompt is None else _replaced(head, response.prompt, prompt)) + text
    if isinstance(given, tuple):
        return (given[0] if prompt is None else prompt, text)
    if isinstance(given, Mapping):
        record = dict(given)
        if isinstance(record["response"], str):
            record["response"] = text
            if prompt is not None:
                record["prompt"] = _prompted(record["prompt"], response.prompt, prompt)
            return record
        return {**record, "response": _answered(record["response"], text)} | (
            {} if prompt is None else {"prompt": _prompted(record["prompt"], response.prompt, prompt)}
        )
    messages = _answered(given, text)
    return messages if prompt is None else [*_prompted(messages[:-1], response.prompt, prompt), messages[-1]]


def _answered(messages: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """The conversation with another last turn."""
    return [*map(dict, messages[:-1]), {**messages[-1], "content": text}]


def _prompted(given: Any, old: str, new: str) -> Any:
    """A prompt, a text or messages, with what the probe put behind it in its last user's turn."""
    if given is None or isinstance(given, str):
        return new
    if not new.startswith(old.rstrip()):
        raise ValueError("Expected a probe of conversations to add to the prompt's end, got another prompt")
    added, messages = new[len(old.rstrip()) :], [dict(message) for message in given]
    last = max(i for i, message in enumerate(messages) if message.get("role") == "user")
    messages[last]["content"] = str(messages[last]["content"]).rstrip() + added
    return messages


def _replaced(head: str, old: str, new: str) -> str:
    """A whole text's beginning with another prompt; what stands between the two, such as a role, stays behind it."""
    place = head.rindex(old.rstrip()) if old.strip() else 0
    return head[:place] + new + head[place + len(old.rstrip()) :]
