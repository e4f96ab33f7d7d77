"""The options of runs, which many workloads take and pass down: written out and documented once."""

from __future__ import annotations

from typing import Literal, TypedDict

from rmfast.texts.inputs import Format, Truncation


class Encoding(TypedDict, total=False):
    """How inputs become token ids.

    Attributes:
        max_length: most tokens of one input; default the model's and tokenizer's own (`RewardModel.max_length`).
        truncation: what is done to an input over max_length: "error" (the default), or cut at the "left" or "right".
            Tokens that the tokenizer adds ([CLS], [SEP]) and a leading BOS are kept.
        format: how pairs become text: "chat", "pair" (the tokenizer's pair encoding), "concat", or a function of one
            input that returns an input; default as the model and tokenizer suggest.
    """

    max_length: int | None
    truncation: Truncation
    format: Format | None


class Options(Encoding, total=False):
    """How inputs become token ids, and how those run.

    Attributes:
        batch_tokens: most tokens (rows) that run at once, padding included; a longer text runs by itself. Default 3,072
            on CPU, 16,384 elsewhere, or what free memory holds; a batch that does not fit in a GPU's memory is halved.
        progress: show a progress bar.
    """

    batch_tokens: int | None
    progress: bool


class ScoreOptions(Options, total=False):
    """`Options`, and which engine runs.

    Attributes:
        engine: "packed" (no padding, shared prompts once) or "padded"; default packed where the model can run so.
    """

    engine: Literal["packed", "padded"] | None
