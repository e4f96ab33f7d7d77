"""Sections that are made once: kept in a folder, each for what it was made of, so that a stopped audit goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Kept:
    """Sections in the files of a folder; without a folder none are kept.

    Args:
        folder: made where there is none.
        of: what all sections depend on (model, texts, versions), as JSON has it.
    """

    def __init__(self, folder: Path | None = None, of: Any = None) -> None:
        self.folder, self.of = folder, of

    def section(self, name: str, settings: Any, make: Callable[[], T]) -> T:
        """The section that is there for these settings, or a new one; `make` gives plain data, as JSON has it."""
        if self.folder is None:
            return make()
        path = self.folder / f"{name}.json"
        digest = hashlib.sha256(json.dumps([self.of, settings], sort_keys=True, default=str).encode()).hexdigest()
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["of"] == digest:
                return kept["section"]
        except (OSError, ValueError, KeyError, TypeError):  # none, or half of one
            pass
        made = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"of": digest, "section": made}, allow_nan=False), encoding="utf-8")
        os.replace(partial, path)
        return made
