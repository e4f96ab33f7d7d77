"""docs/models.md is what its script makes: a row of all families, and of some the row that they have now."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TABLE = (ROOT / "docs" / "models.md").read_text()
spec = importlib.util.spec_from_file_location("make_models", ROOT / "docs" / "site" / "make_models.py")
make_models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_models)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon", "bloom", "bert"])
def test_a_row_is_what_a_run_gives(family):
    (found,) = make_models.tried([family])
    assert found.row() in TABLE, f"run python docs/site/make_models.py: {found.row()} {found.notes()}"
    for note in found.notes():
        assert note in TABLE


def test_every_family_has_a_row_and_none_has_wrong_scores():
    rows = [line.strip("| ").split(" | ") for line in TABLE.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == make_models.FAMILIES
    assert all(len(row) == len(make_models.COLUMNS) for row in rows)
    assert {row[make_models.COLUMNS.index("scores")] for row in rows[1:]} == {make_models.YES}
