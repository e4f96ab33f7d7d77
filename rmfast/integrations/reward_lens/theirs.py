"""What is reward-lens': its modules, its token ids, and the calls that stay its own."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np


class Outside(Exception):
    """The call is reward-lens' own to run; the message says why."""


def installed_version() -> str:
    """reward-lens' version; ImportError, which says what to install, where there is none."""
    try:
        return importlib.import_module("reward_lens").__version__
    except ModuleNotFoundError as error:
        if error.name != "reward_lens":
            raise
        raise ImportError(
            'rmfast.integrations.reward_lens needs reward-lens: pip install "reward-lens[white-box]==3.1.0", or '
            "reward-lens==2.0.1"
        ) from None


def submodule(name: str) -> Any:
    """reward_lens.<name>, imported when it is needed."""
    return importlib.import_module(f"reward_lens.{name}")


def token_ids(tokenized: Any) -> np.ndarray:
    """Of what its tokenize gives; Outside where its mask leaves any out."""
    if tokenized.attention_mask and not all(tokenized.attention_mask):
        raise Outside("a text whose attention mask leaves tokens out")
    return np.asarray(tokenized.input_ids, np.int64)
