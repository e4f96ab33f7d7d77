"""Rows read and lines written: what is no row, and an output that was cut short."""

from __future__ import annotations

from rmfast.texts.tables import Output, Row, dump_line, read_rows


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


def test_skipped_rows_logged_ahead_of_lost_lines_are_not_confused(tmp_path):
    output = Output(tmp_path / "o", {"run": 1})
    output.begin()
    output.append([b"0\n", b"2\n", b"3\n", b"6\n"], [(n, _row(n)) for n in (1, 4, 5)])
    (tmp_path / "o").write_bytes(b"0\n2\n")
    assert Output(tmp_path / "o", {"run": 1}).next_row == 3
    (tmp_path / "o").write_bytes(b"")
    assert Output(tmp_path / "o", {"run": 1}).next_row == 0
    (tmp_path / "o").write_bytes(b"0\n2\n3\n6\n7\n")
    assert Output(tmp_path / "o", {"run": 1}).next_row == 8


def test_a_skipped_row_whose_lines_were_lost_may_get_a_line(tmp_path):
    output = Output(tmp_path / "o", {"run": 1})
    output.begin()
    output.append([b"0\n", b"1\n"], [(2, _row(2))])
    (tmp_path / "o").write_bytes(b"0\n")  # killed between the log and the lines
    again = Output(tmp_path / "o", {"run": 1})
    again.begin()
    again.append([b"1\n", b"2\n"], [])  # with --on-error null
    assert again.next_row == Output(tmp_path / "o", {"run": 1}).next_row == 3


def _row(line: int) -> Row:
    return Row(line, {}, "bad")
