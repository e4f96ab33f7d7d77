"""Datasets of Hugging Face: `dataset.map(scorer(rm), batched=True)`."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

import rmfast
from rmfast import arguments
from rmfast.engine.scorer import Scorer
from rmfast.integrations.batches import METHODS, Batches, columns_of

__all__ = ["scorer"]


def scorer(
    rm: Any,
    *,
    columns: Mapping[str, str] | Sequence[str] | None = None,
    values: bool = False,
    column: str | None = None,
    on_error: Literal["raise", "column"] = "raise",
    **options: Any,
) -> Any:
    """A function of batches for `Dataset.map(..., batched=True)`.

    Texts of a batch share the prompts that they begin with: give `map` a batch_size of some thousands.

    Args:
        rm: a `rmfast.RewardModel`.
        columns: what is scored, of prompt, response, chosen, rejected, messages, text, like ["prompt", "response"]; or
            what the dataset calls them, like {"prompt": "question", "response": "answer"}. Default: those that it has.
        values: the reward at every token, `rm.token_values`.
        column: the new one; default reward, or values. Of pairs there are two, ending in _chosen and _rejected.
        on_error: at a row that can't be scored "raise" a ValueError, or write null and the reason in a "column" error.
        **options: of `rm.score`: max_length, truncation, format, batch_tokens, engine, normalize, ...

    Returns:
        A function that gives the new columns: numbers (lists of K for K rewards; lists of T for values). What it is
        cached by in `map` is the model, to the last bit, and all options, functions by their code (those of modules by
        name). It is not sent to other processes (num_proc).

    Raises:
        ValueError, TypeError: an argument is wrong; from the function, the dataset's columns are not those.
    """
    arguments.instance("rm", rm, Scorer)
    arguments.word("on_error", on_error, ("raise", "column"))
    method = "token_values" if arguments.flag("values", values) else "score"
    name = METHODS[method] if column is None else arguments.instance("column", column, str)
    return _Scorer(rm, columns, name, method, on_error, options)


class _Scorer:
    def __init__(self, rm: Scorer, columns: Any, column: str, method: str, on_error: Any, options: Any) -> None:
        self.rm = rm
        self.of = (columns, column, method, on_error, options)

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        columns, column, method, on_error, options = self.of
        names = list(batch)
        batches = Batches(*columns_of(columns, names), column, method, on_error, options)
        batches.expect_new(names)
        rows = [dict(zip(names, cells)) for cells in zip(*(batch[name] for name in names))]
        return batches.score(self.rm, rows)

    def __reduce__(self) -> Any:
        """By which `map` tells whether it has done this before: what the model and the options are, not the model."""
        return _Elsewhere, (_digest(self.rm), rmfast.__version__, _options_digest(self.of))


class _Elsewhere:
    """What another process gets of a scorer."""

    def __init__(self, *of: str) -> None:
        self.of = of

    def __call__(self, batch: Any) -> Any:
        raise TypeError("a scorer stays in its process: expected num_proc=None, or rmfast.integrations.ray for several")


class _Hash:
    """A file that keeps the digest of what is written to it."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)


class _Digester(pickle.Pickler):
    """The same bytes in every process: sets in an order, tensors as digests of what they hold."""

    def persistent_id(self, found: Any) -> Any:
        if isinstance(found, set | frozenset):
            return tuple(sorted(map(repr, found)))
        if not isinstance(found, Tensor):
            return None
        data = found.detach().cpu().contiguous().reshape(-1)
        return (
            str(found.dtype),
            tuple(found.shape),
            hashlib.sha256(data.view(torch.uint8).numpy().data).hexdigest(),
        )


def _options_digest(of: Any) -> str:
    """As `map` digests its function: functions by their code and what they close over, those of modules by name."""
    from datasets.fingerprint import Hasher

    try:
        return Hasher.hash(of)
    except Exception as error:  # PicklingError, TypeError, what an object's own methods raise
        raise ValueError(
            f"Expected options of which datasets can make a digest ({error}); give map new_fingerprint="
        ) from error


def _digest(rm: Scorer) -> str:
    """Of all that a model is: weights, configuration, tokenizer, interventions."""
    file = _Hash()
    try:
        _Digester(file).dump(rm)  # type: ignore[arg-type]
    except Exception as error:  # AttributeError, TypeError, PicklingError
        raise ValueError(
            f"Expected a model that pickle can read: a local function is in it? ({error}); give map new_fingerprint="
        ) from error
    return file.digest.hexdigest()
