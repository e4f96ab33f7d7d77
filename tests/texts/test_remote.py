"""Files that fsspec names: what is read and written, and runs that leave parts there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stored import store  # noqa: F401  a fixture
from texts_windows import RUN, WINDOWS

from rmfast.texts.files import Source
from rmfast.texts.output import opened, write_whole
from rmfast.texts.remote import Remote, location
from rmfast.texts.remote_output import RemoteOutput
from rmfast.texts.tables import Row, read_rows

WHOLE = b"".join(line for lines, _ in WINDOWS for line in lines)


def go_on(path: Remote, windows: int = len(WINDOWS), kind: str = "jsonl", each: bool = True, **kw: Any) -> RemoteOutput:
    """Write the windows that are missing, up to this many of them, with `each` a part for each."""
    output = RemoteOutput(path, RUN, kind=kind, **kw)
    output.begin()
    first = 0
    for lines, skipped in WINDOWS[:windows]:
        if first == output.next_row:
            output.append(lines, [(number, Row(number + 1, {}, "bad")) for number in skipped])
            if each:
                output.flush()
        first += len(lines) + len(skipped)
    if windows == len(WINDOWS):
        output.finish()
    return output


@pytest.mark.parametrize(
    "text, found",
    [
        ("s3://bucket/a/b.jsonl.gz", Remote("s3://bucket/a/b.jsonl.gz")),
        ("file:///a/b.csv", Path("/a/b.csv")),
        ("a:b/c.csv", Path("a:b/c.csv")),
        ("s3:/bucket/a", Path("s3:/bucket/a")),
        ("-", Path("-")),
    ],
)
def test_a_url_is_told_from_a_path(text, found):
    assert location(text) == found


def test_the_names_of_a_url_are_those_of_its_last_part():
    url = Remote("hf://datasets/a/b@main/in.jsonl.gz")
    assert (url.name, url.suffix, url.stem, url.scheme) == ("in.jsonl.gz", ".gz", "in.jsonl", "hf")
    assert url.with_name("out.csv") == Remote("hf://datasets/a/b@main/out.csv")


def test_a_missing_package_is_named_with_what_brings_it(monkeypatch):
    import fsspec

    def missing(*_: Any, **__: Any) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ImportError, match=r'pip install "rmfast\[s3\]" \(Install s3fs to access S3\)'):
        Remote("s3://bucket/x.jsonl").read()


def test_an_input_is_copied_once_and_opened_often(store):  # noqa: F811
    url = Remote(f"{store}/in.jsonl")
    url.write(b'{"id": 1}\n{"id": 2}\n')
    source = Source.of(url)
    url.remove()
    for _ in range(2):
        assert [row.data["id"] for row in read_rows(source)] == [1, 2]
    assert source.name == "in.jsonl"
    with pytest.raises(FileNotFoundError):
        Source.of(url)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("windows", range(len(WINDOWS)))
@pytest.mark.parametrize("each", [True, False])
def test_a_run_that_ends_anywhere_goes_on_elsewhere(store, kind, windows, each):  # noqa: F811
    whole, path = Remote(f"{store}/whole.{kind}"), Remote(f"{store}/o.{kind}")
    go_on(whole, kind=kind)
    before = go_on(path, windows, kind, each)
    assert path.read() is None
    after = go_on(path, kind=kind)
    assert path.read() == whole.read()
    assert after.header == before.header
    assert list(Remote(f"{path}.run").below()) == []
    again = RemoteOutput(path, RUN, kind=kind)
    assert again.finished and again.next_row == 9
    assert (
        Remote(f"{path}.run.jsonl").read().splitlines()[1:-1]
        == [  # type: ignore[union-attr]
            *Remote(f"{whole}.run.jsonl").read().splitlines()[1:-1]  # type: ignore[union-attr]
        ]
    )


def test_windows_are_held_for_some_seconds_and_written_when_the_run_ends(store, monkeypatch):  # noqa: F811
    path, clock = Remote(f"{store}/o.jsonl"), [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with pytest.raises(KeyError), opened(path, RUN) as output:
        output.begin()
        for now, (lines, skipped) in zip((1, 14, 16, 17), WINDOWS):
            clock[0] = now
            output.append(lines, [(number, Row(number + 1, {}, "bad")) for number in skipped])
        assert output.next_row == 9
        assert len(Remote(f"{path}.run").below()) == 1  # of the three windows that were there after 15 s
        raise KeyError
    assert RemoteOutput(path, RUN).next_row == 9


def test_two_processes_of_one_run_do_no_harm(store):  # noqa: F811
    path = Remote(f"{store}/o.jsonl")
    go_on(path, 1)
    one, two = (RemoteOutput(path, RUN) for _ in range(2))
    for output, parts in ((one, [[1], [2]]), (two, [[1, 2]])):
        output.begin()
        for part in parts:
            for lines, skipped in (WINDOWS[i] for i in part):
                output.append(lines, [(number, Row(number + 1, {}, "bad")) for number in skipped])
            output.flush()
    assert RemoteOutput(path, RUN).next_row == 7
    go_on(path)
    assert path.read() == WHOLE


def test_a_run_that_another_replaced_writes_nothing(store):  # noqa: F811
    path = Remote(f"{store}/o.jsonl")
    old = go_on(path, 3)
    go_on(path, 2, overwrite=True)
    old.append(*[WINDOWS[3][0], []])
    with pytest.raises(ValueError, match="begun anew by another run"):
        old.finish()
    go_on(path)
    assert path.read() == WHOLE


def test_a_part_that_is_not_whole_is_written_again(store):  # noqa: F811
    path = Remote(f"{store}/o.jsonl")
    go_on(path, 3)
    folder = Path(store.removeprefix("stored://")) / "o.jsonl.run"
    last = max(folder.rglob("*.jsonl"))
    last.write_bytes(last.read_bytes()[:-1])
    assert RemoteOutput(path, RUN).next_row == 5
    go_on(path)
    assert path.read() == WHOLE


def test_a_part_that_was_changed_is_refused(store):  # noqa: F811
    path = Remote(f"{store}/o.jsonl")
    go_on(path, 3)
    folder = Path(store.removeprefix("stored://")) / "o.jsonl.run"
    last = max(folder.rglob("*.jsonl"))
    last.write_bytes(last.read_bytes().replace(b'{"id": 6}', b'{"id": 9}'))
    with pytest.raises(ValueError, match="to be as the run left it"):
        go_on(path)
    assert path.read() is None
    last.unlink()
    go_on(path)
    assert path.read() == WHOLE


def test_the_file_of_another_run_or_of_none_is_left_alone(store):  # noqa: F811
    path = Remote(f"{store}/o.jsonl")
    path.write(b"mine")
    with pytest.raises(ValueError, match="is of no run of rmfast"):
        RemoteOutput(path, RUN)
    assert path.read() == b"mine"
    go_on(path, overwrite=True)
    with pytest.raises(ValueError, match="was begun with run 1 and now it is 2"):
        RemoteOutput(path, {"run": 2})
    path.write(b"longer than it was before, by hand")
    with pytest.raises(ValueError, match="to be as the run left it"):
        RemoteOutput(path, RUN)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_never_taken_for_an_output(overwrite):
    path = Remote("memory://folders/rewards.parquet")
    part = Remote(f"{path}/part-0.parquet")
    part.write(b"mine")
    with pytest.raises(ValueError, match=r"rewards\.parquet to be a file, but it is a folder"):
        go_on(path, kind="parquet", overwrite=overwrite)
    with pytest.raises(ValueError, match=r"rewards\.parquet to be a file, but it is a folder"):
        write_whole(path, [WHOLE], overwrite=overwrite)
    log = Remote("memory://folders/o.jsonl.run.jsonl/mine")
    log.write(b"mine")
    with pytest.raises((ValueError, OSError)):
        go_on(Remote("memory://folders/o.jsonl"), overwrite=overwrite)
    assert part.read() == log.read() == b"mine"


@pytest.mark.parametrize("name", ["rewards[12].jsonl", "*.jsonl", "rewards?.jsonl"])
def test_names_that_may_be_patterns_are_no_outputs_and_remove_nothing_else(name):
    others = [Remote(f"memory://patterns/{other}") for other in ("rewards1.jsonl", "rewards2.jsonl")]
    for other in others:
        other.write(b"mine")
        Remote(f"{other}.run/{'0' * 32}/000000000000-1-5.jsonl").write(b"mine")
    path = Remote(f"memory://patterns/{name}")
    with pytest.raises(ValueError, match=r"a URL without \*, \? and \["), opened(path, RUN, overwrite=True):
        pass
    with pytest.raises(ValueError, match=r"a URL without \*, \? and \["):
        write_whole(path, [WHOLE], overwrite=True)
    path.write(b"old")
    path.remove()
    assert path.read() is None
    with pytest.raises(ValueError, match="a URL without"):
        Remote(f"{path}.run").remove_below([f"{'0' * 32}/000000000000-1-5.jsonl"])
    assert all(other.read() == b"mine" and len(Remote(f"{other}.run").below()) == 1 for other in others)


def test_of_the_folder_beside_an_output_only_parts_are_removed(store):  # noqa: F811
    path = Remote(f"{store}/o.jsonl")
    mine = Remote(f"{path}.run/mine.jsonl")
    mine.write(b"mine")
    go_on(path, 2)
    assert len(Remote(f"{path}.run").below()) == 3
    go_on(path, overwrite=True)
    assert Remote(f"{path}.run").below() == {"mine.jsonl": 4}
    assert write_whole(path, [WHOLE], overwrite=True) == 5
    assert mine.read() == b"mine" and Remote(f"{path}.run.jsonl").read() is None


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_whole_file_is_written_in_one_go(store, kind):  # noqa: F811
    path = Remote(f"{store}/new/o.{kind}")
    assert write_whole(path, [WHOLE[:20], WHOLE[20:]]) == 5
    rows = [int(row.data["id"]) for row in read_rows(path)]
    assert rows == [json.loads(line)["id"] for line in WHOLE.splitlines()]
    with pytest.raises(ValueError, match="exists: give another"):
        write_whole(path, [WHOLE])
    assert write_whole(path, [WHOLE[:20]], overwrite=True) == 2
