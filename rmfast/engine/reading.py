"""At which token of a text its reward is read, and warnings of tokens that are padding."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rmfast.binding.binding import Binding
from rmfast.binding.proof import reader
from rmfast.texts.inputs import Encoded, InputError


def token_reader(binding: Binding, pooling: str | int, warned: set[str]) -> Callable[[np.ndarray, int], int]:
    """The token at which an input is read, by `pooling`: a function of its ids and its index, for its error.

    What it takes from the configuration, whose lookups take 100 µs, is looked up once.
    """
    if pooling == "last":
        return lambda ids, index: len(ids) - 1
    if pooling != "auto":
        which = 0 if binding.reading == "first" else -1

        def of_token(ids: np.ndarray, index: int) -> int:
            found = np.flatnonzero(ids == pooling)
            if not len(found):
                raise InputError(index, f"token id {pooling}, at which pooling={pooling} reads, is not in it")
            return int(found[which])

        return of_token
    read, pad = reader(binding), getattr(binding.config, "pad_token_id", None)
    telling = pad is not None and binding.reading == "last but pad"

    def at(ids: np.ndarray, index: int) -> int:
        if telling and ids[-1] == pad:
            _warn_of_pad(binding, pad, warned)
        return read(ids)

    return at


def _warn_of_pad(binding: Binding, pad: int, warned: set[str]) -> None:
    if "end" in warned:
        return
    warned.add("end")
    eos = getattr(binding.config, "eos_token_id", None)
    same = pad in eos if isinstance(eos, list | tuple) else pad == eos
    warnings.warn(
        f"A text ends with token {pad}, this model's pad_token_id{' and eos_token_id' if same else ''}. As in "
        'transformers, the reward is read at the last token that is not; pooling="last" reads the very last',
        stacklevel=8,
    )


def warn_of_padding(
    binding: Binding, tokenizer: Any, pooling: str | int, encoded: Sequence[Any], warned: set[str]
) -> None:
    """Of token ids that come in a padded batch: their pads are run like other tokens."""
    pads, starts = (
        {id_ for of in (binding.config, tokenizer) if isinstance(id_ := getattr(of, name, None), int)}
        for name in ("pad_token_id", "bos_token_id")
    )
    if not pads:
        return
    at_the_end = pooling != "auto" or not binding.reads_rows
    for i, item in enumerate(encoded):
        if not isinstance(item, Encoded) or item.fixed is not None or len(item) < 2:  # an error; text; one token
            continue
        ids = item.ids
        first, last = int(ids[0]), int(ids[-1])
        if first not in pads and last not in pads:
            continue
        # One such token may begin a text where padding is also BOS, or end it where it is EOS; two are padding.
        left = first in pads and (first not in starts or int(ids[1]) == first)
        right = at_the_end and last in pads and last == int(ids[-2])
        if left or right:
            warned.add("ids")
            warnings.warn(
                f"Input {i} {'begins' if left else 'ends'} with token {first if left else last}, which is padding. "
                "Token ids are scored as they are, pads included; give the tokenizer's result, with its input_ids "
                "and attention_mask, to leave them out",
                stacklevel=5,
            )
            return
