"""Which compiled libraries are used."""

from __future__ import annotations

import pytest

from rmfast import backends


@pytest.mark.skipif(backends.library_path("_C") is None, reason="no compiled library")
def test_a_library_of_another_version_is_not_used(monkeypatch):
    """Its ops would read what they are given as something else."""
    monkeypatch.setattr(backends, "_INTERFACE", 0)
    assert "_C.so was built from another version of rmfast; fix: " in backends._load.__wrapped__("_C")
