"""A short soak of the server (`python tests/fuzz/serve_soak.py 10` is a long one)."""

from __future__ import annotations

import os

import pytest
from fuzzing import LONG, tried

pytest.importorskip("fastapi")

from serve_soak import soak


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads what a process holds in /proc")
def test_no_score_is_wrong_whatever_clients_do():
    counts, _ = soak(30 if LONG else 6, seed=os.getpid() if LONG else 0, rounds=2 if LONG else 1)
    assert counts["score"] > 50 and counts["leave"] > 10 and counts["malformed"] > 5
    for what, count in counts.items():
        tried(f"served: {what}", count)
