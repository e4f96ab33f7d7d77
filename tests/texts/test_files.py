"""Pipes read once, outputs that are regular files, inputs that are never outputs, one run at a time."""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from rmfast.texts.files import Source, apart, locked, target
from rmfast.texts.tables import read_rows


def node(path: Path) -> Path:
    """A device node of the test's own, for root alone: nothing here ever names one of the machine's."""
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes device nodes")
    return path


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def fed(path: Path, data: bytes) -> Path:
    """A pipe that another thread writes `data` into."""
    threading.Thread(target=fifo(path).write_bytes, args=[data], daemon=True).start()
    return path


def test_a_pipe_is_read_once_and_can_be_opened_again(tmp_path):
    source = Source.of(fed(tmp_path / "p.jsonl", b'{"id": 1}\n{"id": 2}\n'))
    for _ in range(2):
        assert [row.data["id"] for row in read_rows(source)] == [1, 2]
    assert source.name == str(tmp_path / "p.jsonl")


def test_rows_of_a_pipe_may_be_gzipped_or_parquet(tmp_path):
    import gzip

    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"id": [1, 2]}), tmp_path / "file")
    pipes = {"jsonl": gzip.compress(b'{"id": 1}\n{"id": 2}\n'), "parquet": (tmp_path / "file").read_bytes()}
    for kind, data in pipes.items():
        assert [row.data["id"] for row in read_rows(fed(tmp_path / kind, data), kind)] == [1, 2]


@pytest.mark.parametrize("make", [node, Path.mkdir], ids=["device", "folder"])
def test_an_input_that_is_neither_file_nor_pipe_is_refused(tmp_path, make):
    make(tmp_path / "in")
    with pytest.raises(ValueError, match=r"to be a file or a pipe, but it is a (device|folder)"):
        Source.of(tmp_path / "in")


@pytest.mark.parametrize("make", [node, fifo, Path.mkdir], ids=["device", "pipe", "folder"])
@pytest.mark.parametrize("link", [False, True])
def test_an_output_that_is_no_regular_file_is_refused(tmp_path, make, link):
    make(tmp_path / "it")
    (tmp_path / "link").symlink_to("it")
    with pytest.raises(ValueError, match=r"Expected --output to be a regular file, but .* is a (device|pipe|folder)"):
        target(tmp_path / ("link" if link else "it"), "--output")


def test_links_are_followed_also_to_a_file_that_is_not_there_yet(tmp_path):
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to(tmp_path / "three")
    assert target(tmp_path / "one", "--output") == tmp_path / "three"


def test_a_loop_of_links_is_an_error_that_names_it(tmp_path):
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(OSError, match="one"):
        target(tmp_path / "one", "--output")


@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_a_file_under_another_name_is_known_as_the_same(tmp_path, make):
    (tmp_path / "a").touch()
    make(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match=r"other files to be read than written"):
        apart([tmp_path / "a"], [tmp_path / "b"])
    apart([tmp_path / "a"], [tmp_path / "c"])


def test_a_second_run_is_refused_and_told_who_has_the_file(tmp_path):
    out = tmp_path / "out"
    with locked(out):
        owner = json.loads((tmp_path / "out.run.lock").read_text())
        assert owner["pid"] == os.getpid()
        assert datetime.fromisoformat(owner["since"])
        with pytest.raises(ValueError, match=rf"out is being written by process {os.getpid()}, since 2"):
            locked(out).__enter__()
    assert not (tmp_path / "out.run.lock").exists()


def test_a_killed_run_has_no_lock(tmp_path):
    child = os.fork()
    if not child:
        with locked(tmp_path / "out"):
            time.sleep(60)
        os._exit(0)
    lock = tmp_path / "out.run.lock"
    deadline = time.monotonic() + 30
    while not (lock.exists() and lock.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    with pytest.raises(ValueError, match=f"process {child}"):
        locked(tmp_path / "out").__enter__()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert lock.exists()
    with locked(tmp_path / "out"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("make", [node, fifo, lambda path: path.write_text("my notes")], ids=["device", "pipe", "file"])
def test_a_file_of_the_locks_name_that_is_no_lock_is_left_alone(tmp_path, make):
    make(tmp_path / "out.run.lock")
    before = os.lstat(tmp_path / "out.run.lock")
    with pytest.raises(ValueError, match=r"out.run.lock to be a lock of rmfast"):
        locked(tmp_path / "out").__enter__()
    after = os.lstat(tmp_path / "out.run.lock")
    assert (before.st_ino, before.st_mode, before.st_size) == (after.st_ino, after.st_mode, after.st_size)


def test_threads_that_run_after_each_other_all_get_the_lock(tmp_path):
    held, refused = [], []

    def one() -> None:
        for _ in range(200):
            try:
                with locked(tmp_path / "out"):
                    held.append(1)
                    assert len(held) == 1
                    held.pop()
            except ValueError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert held == []
    assert all("being written by" in text for text in refused)


@pytest.mark.parametrize(
    "left", [b"", b"{", b'{"pid": 12', b'{"pid": 999999999, "since": "2026-01-01T00:00:00+00:00"}\n']
)
def test_what_a_dead_process_left_of_its_lock_is_taken_over(tmp_path, left):
    (tmp_path / "out.run.lock").write_bytes(left)
    with locked(tmp_path / "out"):
        assert json.loads((tmp_path / "out.run.lock").read_text())["pid"] == os.getpid()
