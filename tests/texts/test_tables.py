"""Rows read and lines written: what is no row, what is no file of its format, and lines as tables."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rmfast.texts.tables import dump_line, read_rows, write_table


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = b"".join(map(dump_line, rows))
    if path.suffix == ".gz":
        text = lines if "jsonl" in path.name else b"text\n" + b"".join(b"%d\n" % i for i in range(len(rows)))
        path.write_bytes(gzip.compress(text))
    else:
        path.with_suffix(".rows").write_bytes(lines)
        write_table(path.with_suffix(".rows"), path, "parquet")


def test_json_nested_too_deeply_is_a_bad_row(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n" + '{"text": "fine"}\n')
    deep, fine = read_rows(tmp_path / "in.jsonl")
    assert (deep.line, fine.line, fine.error) == (1, 2, None)
    assert "recursion" in deep.error


def test_a_csv_quote_that_is_never_closed_is_a_bad_row(tmp_path):
    (tmp_path / "in.csv").write_text('text,id\nfine,1\n"a"b,2\nfine,3\n"open,4\nlost,5\n')
    rows = list(read_rows(tmp_path / "in.csv"))
    assert [(row.line, row.data.get("id")) for row in rows] == [(2, "1"), (3, None), (4, "3"), (5, None)]
    assert rows[1].error.startswith("is not CSV: ")
    assert rows[3].error.startswith("is not CSV: ")


def test_non_finite_numbers_of_the_input_are_written_as_null_at_any_depth():
    row = {"a": float("nan"), "b": [1.5, {"c": float("-inf"), "d": "NaN"}], "e": "Größe"}
    assert dump_line(row).decode() == '{"a": null, "b": [1.5, {"c": null, "d": "NaN"}], "e": "Größe"}\n'


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_lines_as_a_table_hold_the_same_rows(tmp_path, suffix):
    rows = [
        {"id": 1, "text": 'a "quoted",\r\ntext\rof lines', "reward": 0.5},
        {"id": 2, "text": "Größe", "reward": None, "error": "why"},
        {"id": 3, "messages": [{"role": "user", "content": "q"}], "reward": [1, 2.5], "ok": True},
    ]
    if suffix == ".parquet":
        rows[2]["reward"] = 3  # a column has one type
    (tmp_path / "rows").write_bytes(b"".join(map(dump_line, rows)))
    write_table(tmp_path / "rows", tmp_path / f"out{suffix}", suffix[1:])
    names = ["id", "text", "reward", "error", "messages", "ok"]
    read = [row.data for row in read_rows(tmp_path / f"out{suffix}")]
    assert [list(row) for row in read] == [names] * 3
    expected = [{name: row.get(name) for name in names} for row in rows]
    if suffix == ".csv":
        read = [{name: _parsed(cell) for name, cell in row.items()} for row in read]
    assert read == expected


def _parsed(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return cell or None


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_of_no_rows_is_empty(tmp_path, suffix):
    (tmp_path / "rows").write_bytes(b"")
    write_table(tmp_path / "rows", tmp_path / f"out{suffix}", suffix[1:])
    assert list(read_rows(tmp_path / f"out{suffix}")) == []


def test_a_column_of_two_types_that_parquet_can_not_hold_is_named(tmp_path):
    (tmp_path / "rows").write_bytes(b'{"id": 1}\n{"id": "two"}\n')
    with pytest.raises(ValueError, match=r"rows that parquet can hold, got column 'id'.*they are whole in .*rows"):
        write_table(tmp_path / "rows", tmp_path / "out.parquet", "parquet")


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.csv.gz", "in.parquet"])
def test_a_damaged_file_is_named(tmp_path, name):
    rows = [{"text": f"{i} {i * i * 7919}"} for i in range(500)]
    write(tmp_path / name, rows)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"Expected {name} to be readable as "):
        list(read_rows(tmp_path / name))


def test_columns_of_one_name_are_refused_in_parquet_too(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table([[1], [2]], ["text", "text"]), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=r"in.parquet .*different names, got \['text', 'text'\]"):
        list(read_rows(tmp_path / "in.parquet"))
