"""The options of runs, which many workloads take and pass down: written out and documented once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Literal, TypedDict, TypeVar, get_type_hints

import torch
from torch import Tensor

from rmfast.arguments import finite, flag, is_whole, sequence, shown, whole, word
from rmfast.binding.compute import COMPUTE
from rmfast.binding.session import on_the_host
from rmfast.texts.inputs import Format, Truncation

F = TypeVar("F", bound=Callable)


class Encoding(TypedDict, total=False):
    """How inputs become token ids.

    Attributes:
        max_length: most tokens of one input; default the model's and tokenizer's own (`RewardModel.max_length`).
        truncation: what is done to an input over max_length: "error" (the default), or cut at the "left" or "right".
            Tokens that the tokenizer adds ([CLS], [SEP]) and a leading BOS are kept.
        format: how pairs become text: "chat", "pair" (the tokenizer's pair encoding), "concat", or a function of one
            input that returns an input; default as the model and tokenizer suggest.
        chat_template_kwargs: what the chat template is given beside the messages, like {"enable_thinking": False}; a
            record's own (docs/reward_model.md) come on top.
        tools: for the chat template: JSON schemas, or functions; a record's own go in their place.
    """

    max_length: int | None
    truncation: Truncation
    format: Format | None
    chat_template_kwargs: Mapping[str, Any] | None
    tools: Sequence[Any] | None


class RunOptions(Encoding, total=False):
    """How inputs become token ids, and how those run.

    Attributes:
        batch_tokens: most tokens (rows) that run at once, padding included; a longer text runs by itself. Default 3,072
            on CPU (6,144 up to a width of 128), 16,384 elsewhere, or what free memory holds; a batch that does not fit
            in a GPU's memory is halved.
        progress: show a progress bar.
    """

    batch_tokens: int | None
    progress: bool


class ScoreOptions(RunOptions, total=False):
    """`RunOptions`, and which engine runs.

    Attributes:
        engine: "packed" (no padding, shared prompts once) or "padded"; default packed where the model can run so.
    """

    engine: Literal["packed", "padded"] | None


_DEFAULTS: dict[str, Any] = {"truncation": "error", "progress": False}  # of all others None


def takes(kind: type, *but: str) -> Callable[[F], F]:
    """For a method with `**options`: shows the options of `kind`, but for some, in its signature, and refuses others.

    Without it a misspelt option would only fail where the options end up, under the name of another function. Such a
    method is a whole workload: what it makes is on the CPU, whatever torch's default device is.
    """
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name not in but}

    def decorate(method: F) -> F:
        signature = inspect.signature(method)
        own = [parameter for parameter in signature.parameters.values() if parameter.kind != parameter.VAR_KEYWORD]
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS.get(name), annotation=hint)
            for name, hint in hints.items()
        ]
        known = {parameter.name for parameter in (*own, *options)}

        @wraps(method)
        def call(*args: Any, **given: Any) -> Any:
            if unknown := given.keys() - known:
                raise TypeError(f"{method.__qualname__}() got an unexpected keyword argument {min(unknown)!r}")
            with on_the_host():
                return method(*args, **given)

        call.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def checked_run(batch_tokens: Any, progress: Any) -> int | None:
    """`batch_tokens` of `RunOptions` as an int, once both are what they are documented to be."""
    flag("progress", progress)
    return None if batch_tokens is None else whole("batch_tokens", batch_tokens, 1)


def checked_pooling(pooling: Any) -> str | int:
    if pooling not in ("auto", "last") if isinstance(pooling, str) else not is_whole(pooling):
        raise ValueError(f'Expected pooling to be "auto", "last" or a token id, got {shown(pooling)}')
    return pooling if isinstance(pooling, str) else int(pooling)


def check_options(pooling: Any, invariant: Any, compute: Any, cuda_graphs: Any) -> None:
    """TypeError or ValueError for options of `rmfast.RewardModel` that say nothing of the model."""
    checked_pooling(pooling)
    if invariant is not None:
        flag("invariant", invariant)
    word("compute", compute, COMPUTE)
    flag("cuda_graphs", cuda_graphs)


def checked_normalization(normalize: tuple[Any, Any], labels: int) -> tuple[Tensor, Tensor]:
    """Mean and std, (), (1,) or (K,) each, of `normalize=(mean, std)`."""
    two = zip(("mean", "std"), sequence("normalize", normalize, "(mean, std)", 2))
    mean, std = (torch.from_numpy(finite(f"{name} in normalize", x)) for name, x in two)
    for name, x in (("mean", mean), ("std", std)):
        if x.dim() > 1 or x.numel() not in (1, labels):
            raise ValueError(f"Expected {name} in normalize to be a number or {labels} of them, got {tuple(x.shape)}")
    if not bool((std > 0).all()):
        raise ValueError(f"Expected the std in normalize to be above 0, got {std.tolist()}")
    return mean, std
