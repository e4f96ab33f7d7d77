"""What tests of the command line share: a saved model, running a command, and files of rows."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import models
import pytest
from typer.testing import CliRunner

from rmfast.cli import app


def saved(path: Path, **kw: Any) -> Path:
    """A folder with a saved model, of one label where nothing else is said, and a chat template."""
    models.decoder(**kw).save_pretrained(path)
    models.tokenizer(chat=True).save_pretrained(path)
    return path


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def files(folder: Path, tmp_path: Path, rows: list[Any]) -> list[Any]:
    """The common arguments, for a JSONL input of these rows (a string is a raw line)."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "in.jsonl").write_text("".join(line + "\n" for line in lines))
    return ["--model", folder, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
