"""The notebooks of examples/ run from top to bottom, on a tiny model, and are committed without outputs."""

from __future__ import annotations

from pathlib import Path

import models
import pytest

BOOKS = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    model = tmp_path / "reward-model"
    models.decoder(max_position_embeddings=512).save_pretrained(model)
    models.tokenizer(chat=True).save_pretrained(model)
    monkeypatch.setenv("RMFAST_EXAMPLE_MODEL", str(model))
    monkeypatch.setenv("MPLBACKEND", "agg")
    book = nbformat.read(path, as_version=4)
    assert [cell.outputs for cell in book.cells if cell.cell_type == "code" and cell.outputs] == []
    nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
