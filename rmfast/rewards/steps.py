"""Process rewards: the head read at the end of each step of a solution, all solutions in one packed run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmfast.arguments import sequence, shown, whole, wholes, word
from rmfast.engine.scorer import Scorer
from rmfast.heads import rowwise
from rmfast.heads.given import occurrences, pattern_of
from rmfast.heads.head import activation_of
from rmfast.heads.tokens import TokenRows
from rmfast.texts.chat import Chat, is_messages
from rmfast.texts.forms import Encoded, Forms, Text
from rmfast.texts.inputs import InputError, tokenise

ACTIVATIONS = ("sigmoid", "softmax", "none")
# Of the steps (S,) of one solution, fp64.
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "min": torch.amin,
    "prod": torch.prod,
    "last": lambda values: values[-1],
    "mean": torch.mean,
}
_SOLUTION = "qSOLUTIONq"  # which no template has


@dataclass(frozen=True, eq=False)
class Solution(Encoded):
    """A text as token ids with the tokens at which its steps end, (S,) int64."""

    ends: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def step_scores(
    rm: Scorer, question: Any, steps: Any = None, *, reduce: str | None = None, separator: str | None = None,
    answer: str | None = None, step_tag_id: int | None = None, returned_token_ids: Sequence[int] | None = None,
    activation: str | None = None, batch_tokens: int | None = None, progress: bool = False, engine: Any = None,
    **encoding: Any,
) -> Any:  # fmt: skip
    """See `RewardModel.step_scores`."""
    if reduce is not None:
        word("reduce", reduce, tuple(REDUCTIONS))
    link = _link(rm, activation, returned_token_ids)
    tag = _tag(rm, step_tag_id)
    if rm.pools:
        raise ValueError("Expected a model whose tokens have rewards of their own, got one that pools the whole text")
    if rm.interventions is not None and rm.interventions.lengths:
        raise ValueError(f"Expected a model without corrections by length, got {rm.interventions}")
    one = False
    if steps is None:
        if separator is not None or answer is not None:
            raise ValueError("Expected steps with separator or answer, got None")
        items = rm.encode(question, **encoding)
        ends = [item.ends if isinstance(item, Solution) else _tagged(item, i, tag) for i, item in enumerate(items)]
    else:
        questions, many, one = _paired(question, steps)
        items = solutions(rm, questions, many, separator=separator, answer=answer, step_tag_id=tag, **encoding)
        ends = [item.ends for item in items]
    values = rm.run(items, ends, batch_tokens, progress, engine)
    found = list(link(torch.cat(values)).split([len(at) for at in ends])) if values else []
    if reduce is None:
        return found[0] if one else found
    reduced = [REDUCTIONS[reduce](each.double()).to(each) for each in found]
    return reduced[0] if one else torch.stack(reduced) if reduced else torch.empty(0)


def solutions(
    rm: Scorer, questions: Sequence[Any], steps: Sequence[Any], *, separator: str | None = None,
    answer: str | None = None, step_tag_id: int | None = None, errors: str = "raise", format: Any = None,
    chat_template_kwargs: Any = None, tools: Any = None, **encoding: Any,
) -> list[Any]:  # fmt: skip
    """A `Solution` for each question and its steps; with errors="return" its InputError where it can't be scored.

    A solution's ids are those of the question as a prompt, and then each step's and its separator's, each tokenised by
    itself, as process reward models are trained (TRL, Skywork-o1-PRM): no token reaches over a step's end. With
    `answer` they are those of a conversation, each step the user's turn and `answer` the model's.
    """
    if not rm.binding.causal:
        raise ValueError(f"Expected a causal model for steps, got {type(rm.binding.root).__name__}")
    for name, text in (("separator", separator), ("answer", answer)):
        if text is not None and not isinstance(text, str):
            raise TypeError(f"Expected {name} to be text, got {shown(text)}")
    if answer is not None and separator is not None:
        raise ValueError("Expected separator or answer, got both")
    forms = Forms(Chat(rm.tokenizer, chat_template_kwargs, tools), True, format)
    tag = _tag(rm, step_tag_id)
    end: Any = np.array([tag]) if separator is None and tag is not None else "\n" if separator is None else separator
    made: list[Any] = []
    pieces: list[list[Any]] = []  # of each: Texts, and ids that are ids already
    for i, (question, own) in enumerate(zip(questions, steps)):
        try:
            pieces.append(_pieces(forms, question, _checked(own), end, answer))
        except Exception as error:  # of a template or a format, too
            pieces.append([InputError(i, _reason(error))])
    flat = [piece for some in pieces for piece in some]
    found = list(flat)

    def attempt(place: int, function: Callable[[], Any]) -> None:
        try:
            found[place] = function()
        except Exception as error:
            found[place] = error

    tokenise(found, rm.tokenizer, True, attempt)
    rest = iter(found)
    pattern = None if answer is None else pattern_of(rm.tokenizer, getattr(rm.binding.config, "model_type", None))
    for i, some in enumerate(pieces):
        parts = [next(rest) for _ in some]
        bad = next((part for part in parts if isinstance(part, Exception)), None)
        if bad is not None:
            made.append(bad if isinstance(bad, InputError) else InputError(i, _reason(bad)))
            continue
        ids = [part.ids if isinstance(part, Encoded) else part for part in parts]
        if pattern is None:
            ids[0] = _opened(parts[0])
            made.append(_joined(i, ids))
        else:
            made.append(_answered(i, ids[0], pattern, len(steps[i])))
    checked = rm.encode([each if isinstance(each, Solution) else [0] for each in made], errors="return", **encoding)
    made = [now if isinstance(was, Solution) else was for was, now in zip(made, checked)]
    bad = next((each for each in made if isinstance(each, InputError)), None)
    if bad is not None and errors == "raise":
        raise bad
    return made


def _reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def _tag(rm: Scorer, given: Any) -> int | None:
    """The id of the token that ends a step, where there is one."""
    if given is not None:
        return whole("step_tag_id", given, 0, rm.binding.vocab_size - 1)
    return rm.pooling if isinstance(rm.pooling, int) else None


def _tagged(item: Encoded, index: int, tag: int | None) -> np.ndarray:
    if tag is None:
        raise ValueError("Expected step_tag_id for texts with tags, since the model brings none, or steps; got neither")
    at = np.flatnonzero(item.ids == tag)
    if not len(at):
        raise InputError(index, f"token id {tag}, which ends a step, is not in it")
    return at


def _paired(question: Any, steps: Any) -> tuple[list[Any], list[Any], bool]:
    """Questions and steps, one of each for a solution, and whether one solution was given."""
    listed = sequence("steps", steps, "a list of texts, or a list of such lists")
    if listed and all(isinstance(step, str) for step in listed):
        return [question], [listed], True
    if isinstance(question, str) or is_messages(question):
        return [question] * len(listed), listed, False
    return sequence("question", question, "one question, or one for each solution", len(listed)), listed, False


def _checked(steps: Any) -> list[str]:
    if not isinstance(steps, list | tuple) or not steps or not all(isinstance(step, str) for step in steps):
        raise ValueError(f"its steps are {shown(steps)}: expected a list of texts")
    return list(steps)


def _pieces(forms: Forms, question: Any, steps: list[str], end: Any, answer: str | None) -> list[Any]:
    """What a solution's ids are made of: the prompt, then step and separator by turns; or one conversation."""
    if answer is not None:
        turns = list(question) if is_messages(question) else [{"role": "user", "content": question}]
        if not isinstance(turns[-1].get("content"), str):
            raise ValueError(f"its question is {shown(question)}: expected text, or messages that end with text")
        first = {**turns[-1], "content": f"{turns[-1]['content']} {steps[0]}"}
        asked = [first, *({"role": "user", "content": step} for step in steps[1:])]
        said = {"role": "assistant", "content": answer}
        return [forms.read([*turns[:-1], *(turn for ask in asked for turn in (ask, said))])]
    whole = forms.read((question, _SOLUTION))
    if not isinstance(whole, Text) or whole.second is not None or _SOLUTION not in whole.text:
        raise ValueError("its format does not give one text with the solution in it")
    prompt = Text(whole.text[: whole.text.rindex(_SOLUTION)], special=whole.special)
    last = Text(end, special=False) if isinstance(end, str) else end
    texts = [piece for step in steps for piece in (Text(step, special=False), last)]
    return [prompt, *texts]


def _opened(prompt: Encoded) -> np.ndarray:
    """A prompt's ids, without what a tokenizer adds at a text's end."""
    own = np.ones(len(prompt), bool) if prompt.fixed is None else ~prompt.fixed
    end = int(np.flatnonzero(own)[-1]) + 1 if own.any() else len(prompt)
    return prompt.ids[:end]


def _joined(index: int, ids: list[np.ndarray]) -> Any:
    ends = np.cumsum([len(part) for part in ids])[2::2] - 1
    if (np.diff(ends, prepend=len(ids[0]) - 1) < 1).any():
        return InputError(index, "one of its steps has no tokens")
    return Solution(np.concatenate(ids).astype(np.int64), ends=ends)


def _answered(index: int, ids: np.ndarray, pattern: tuple[int, ...], count: int) -> Any:
    """Read at the token before each of the last `count` answers."""
    at = occurrences(ids, pattern)
    if len(at) < count:
        return InputError(index, f"the ids {list(pattern)}, which stand before an answer, are in it {len(at)} times")
    return Solution(ids, ends=at[-count:] + len(pattern) - 1)


def _link(rm: Scorer, activation: str | None, returned: Sequence[int] | None) -> Callable[[Tensor], Tensor]:
    """What makes step scores (n,) of the model's rewards (n, K)."""
    program, labels = rm.binding.program, rm.num_labels
    if activation is not None:
        word("activation", activation, ACTIVATIONS)
    columns = [1, 0] if labels == 2 else None  # of two classes the second is right, as in TRL and Qwen2.5-Math-PRM
    own = activation_of(labels) if program is None else program.step_activation
    if returned is not None:
        asked = wholes("returned_token_ids", returned, least=0)
        tokens = isinstance(program, TokenRows)
        known = list(program.ids) if isinstance(program, TokenRows) else list(range(labels))
        if tokens and labels == 1 and asked == known:
            columns = None
        elif labels == 1 or len(asked) < 2 or len(set(asked)) < len(asked) or not set(asked) <= set(known):
            of = f"the tokens {known} of its head" if tokens else f"the labels of its head, in [0, {labels})"
            raise ValueError(
                f"Expected returned_token_ids to be two or more of {of}, the right one first, got {shown(returned)}; "
                "rmfast.load(..., head=rmfast.TokenHead(RIGHT, WRONG)) gives a language model such a head"
            )
        else:
            columns, own = [known.index(each) for each in asked], "softmax"
    activation = activation or own
    if activation is None:
        raise ValueError(
            f"Expected activation to be one of {', '.join(ACTIVATIONS)}, or returned_token_ids: a head of {labels} "
            f"{'reward' if labels == 1 else 'rewards'} ({'the model`s own' if program is None else program.kind}) does "
            "not say what makes step scores of it"
        )
    if activation == "softmax":
        if columns is None:
            raise ValueError(f'Expected returned_token_ids with activation="softmax" for a head of {labels} rewards')
        return lambda values: rowwise.softmax(values[:, columns].contiguous())[:, 0]
    if labels != 1:
        raise ValueError(f"Expected a head of one reward for activation={activation!r}, got {labels}")
    if activation == "none":
        return lambda values: values[:, 0]
    return lambda values: rowwise.each(torch.sigmoid, values[:, 0])
