"""What the fuzz tests share: how many examples, for how long, and a count of what was tried.

A test is written once and run in two ways: a few examples, always the same, with all other tests; and, with
RMFAST_FUZZ=long (`make fuzz MINUTES=30`), many that are never the same:

    @fuzz(30, text=st.text())
    def test_any_text_has_a_reward(rm, text):
        worst("reward against transformers", abs(rm.score([text])[0] - expected(text)))

Every example counts under the test's name; `tried` counts what an example has many of (batches, calls), and `worst`
keeps the largest error.
"""

from __future__ import annotations

import functools
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings

LONG = os.environ.get("RMFAST_FUZZ") == "long"
UNTIL = float(os.environ.get("RMFAST_FUZZ_UNTIL", "inf"))  # seconds since the epoch
COUNTS: Counter[str] = Counter()
WORST: dict[str, float] = {}


def fuzz(examples: int, **strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of as many examples, or of ten times as many in a long run, which ends when its time is over."""
    profile = settings(
        max_examples=examples * (10 if LONG else 1),
        derandomize=not LONG,
        database=None,
        deadline=None,
        print_blob=LONG,
        suppress_health_check=list(HealthCheck),  # fixtures are made once; examples are large and slow
    )

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        failed: list[Exception] = []

        @functools.wraps(test)
        def run(*args: Any, **kw: Any) -> None:
            if time.time() > UNTIL and not failed:  # a failure is still made as small as it can be
                return
            tried(test.__name__.removeprefix("test_").replace("_", " "))
            try:
                test(*args, **kw)
            except Exception as error:
                failed.append(error)
                raise

        return profile(given(**strategies)(run))

    return decorate


def tried(what: str, count: int = 1) -> None:
    COUNTS[what] += count


def worst(what: str, error: float) -> None:
    """Keep the largest error; NaN is larger than all."""
    known = WORST.get(what, 0.0)
    WORST[what] = error if error != error or error > known else known


def save(folder: Path) -> None:
    """What this process has tried, for `report`."""
    (folder / f"{uuid.uuid4()}.json").write_text(json.dumps([COUNTS, WORST]))


def report(folder: Path) -> str:
    """What all processes have tried, and the worst errors."""
    for file in folder.glob("*.json"):
        counts, errors = json.loads(file.read_text())
        COUNTS.update(counts)
        for what, error in errors.items():
            worst(what, error)
    lines = [f"{count:>10,}  {what}" for what, count in sorted(COUNTS.items())]
    return "\n".join([*lines, *(f"{error:>10.3g}  worst error: {what}" for what, error in sorted(WORST.items()))])
