"""An output beside its log: killed anywhere, changed by hand, damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from texts_windows import RUN, WINDOWS

from rmfast.texts.output import Output
from rmfast.texts.tables import Row, read_rows


def go_on(path: Path, kind: str = "jsonl", windows: int = len(WINDOWS), **kw: Any) -> Output:
    """Write the windows that are missing, up to this many of them."""
    output = Output(path, RUN, kind=kind, **kw)
    output.begin()
    first = 0
    for lines, skipped in WINDOWS[:windows]:
        if first == output.next_row:
            output.append(lines, [(number, Row(number + 1, {}, "bad")) for number in skipped])
        first += len(lines) + len(skipped)
    if windows == len(WINDOWS):
        output.finish()
    return output


def ids(path: Path) -> list[int]:
    return [int(row.data["id"]) for row in read_rows(path)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "o.jsonl"


def test_any_state_that_a_kill_leaves_ends_in_the_same_bytes(path):
    go_on(path)
    whole, log_path = path.read_bytes(), path.with_name("o.jsonl.run.jsonl")
    log = log_path.read_bytes().splitlines(keepends=True)
    states = [
        (b"".join(log[:n]) + log[n][:torn], size) for n in range(1, 6) for torn in (0, 5) for size in _sizes(log, n)
    ]
    assert len(states) > 40
    for logged, size in states:
        log_path.write_bytes(logged)
        path.write_bytes(whole[:size])
        go_on(path)
        assert path.read_bytes() == whole
        assert log_path.read_bytes().endswith(b'{"finished": 9}\n')


def _sizes(log: list[bytes], n: int) -> range:
    """How long the output may be once n lines of the log are written: the last window's lines may not be all there."""
    sizes = [json.loads(line)["bytes"] for line in log[1:n] if b"bytes" in line]
    return range(sum(sizes[:-1]), sum(sizes) + 1)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("windows", [1, 3])
def test_a_table_is_there_when_the_run_has_finished_and_nothing_is_left_beside_it(tmp_path, kind, windows):
    path = tmp_path / f"o.{kind}"
    go_on(path, kind, windows)
    assert not path.exists()
    go_on(path, kind)
    assert ids(path) == [0, 2, 5, 6, 7]
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, f"{path.name}.run.jsonl"]
    assert Output(path, RUN, kind=kind).finished


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_changed_after_the_run_is_refused(tmp_path, kind):
    path = tmp_path / f"o.{kind}"
    go_on(path, kind)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{path.name} to be as the run left it"):
        Output(path, RUN, kind=kind)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[1:],
        lambda lines: lines[:1] + lines[2:],
        lambda lines: lines[::-1],
        lambda lines: [lines[0].replace(b"0", b"1"), *lines[1:]],
        lambda lines: [*lines, b'{"id": 99}\n'],
        lambda lines: [*lines, b"no newline"],
    ],
    ids=["first deleted", "second deleted", "reversed", "edited", "added", "half added"],
)
def test_lines_changed_by_hand_are_noticed_and_left_alone(path, change, finished):
    go_on(path, windows=4 if finished else 3)
    changed = b"".join(change(path.read_bytes().splitlines(keepends=True)))
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=r"o.jsonl to be as the run left it, but .*row"):
        Output(path, RUN)
    assert path.read_bytes() == changed


def test_lines_missing_at_the_end_of_a_finished_output_are_noticed(path):
    go_on(path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="rows from 8 on were changed"):
        Output(path, RUN)


def test_lost_windows_of_an_unfinished_output_are_written_again_and_said(path):
    whole = (go_on(path), path.read_bytes())[1]
    log = path.with_name("o.jsonl.run.jsonl")
    log.write_bytes(log.read_bytes().removesuffix(b'{"finished": 9}\n'))
    path.write_bytes(b"")
    with pytest.warns(UserWarning, match="lost rows from 1 on"):
        go_on(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [0, 2, 3])
@pytest.mark.parametrize("bad", [b"{bad\n", b"[1]\n", b"\xff\n", b'{"row": "x"}\n', b'{"row": 3}\n', b""])
def test_a_damaged_log_is_named_with_its_line(path, line, bad):
    go_on(path)
    log = path.with_name("o.jsonl.run.jsonl")
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:line], bad, *lines[line + 1 :]]))
    with pytest.raises(ValueError, match=r"o.jsonl.run.jsonl, line \d is damaged|log_format"):
        Output(path, RUN)


def test_a_run_of_rows_that_are_all_left_out_goes_on(path):
    output = Output(path, RUN)
    output.begin()
    output.append([], [(0, Row(1, {}, "bad"))])
    again = Output(path, RUN)
    assert again.next_row == 1
    assert path.read_bytes() == b""


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_run_that_ended_before_its_first_row_gives_way_to_any(path, kind):
    Output(path, {"run": 2}, kind=kind).begin()
    go_on(path, kind)
    assert json.loads(path.with_name("o.jsonl.run.jsonl").read_bytes().splitlines()[0]).items() >= RUN.items()


def test_a_file_that_no_log_speaks_of_is_left_alone(path):
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="of no run of rmfast"):
        Output(path, RUN)
    go_on(path, overwrite=True)
    assert ids(path) == [0, 2, 5, 6, 7]
