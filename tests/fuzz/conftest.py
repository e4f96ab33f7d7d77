"""What was tried, written where a long run collects it."""

from __future__ import annotations

import os
from pathlib import Path

import fuzzing


def pytest_sessionfinish():
    if folder := os.environ.get("RMFAST_FUZZ_TALLY"):
        fuzzing.save(Path(folder))
