"""Command lines and files of every kind: a run gives the right rows, or one line that says what is wrong.

Whatever is written lies in a folder of the test's own, and so does every path that a command is given: text that is
made up has no slash. Devices are nodes made there, which only root can.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import inspect
import io
import json
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import models
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from fuzzing import fuzz, worst
from hypothesis import strategies as st
from typer.testing import CliRunner

import rmfast
from rmfast.cli import app
from rmfast.texts.tables import read_rows

SECONDS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    models.decoder().save_pretrained(folder)
    models.tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rm(folder: Path) -> Iterator[rmfast.RewardModel]:
    """The model, which commands then get at once."""
    load = rmfast.load
    rm = load(folder)
    with pytest.MonkeyPatch.context() as patch:
        cached = lambda model, **kw: rm if str(model) == str(folder) else load(model, **kw)  # noqa: E731
        patch.setattr(rmfast, "load", cached, raising=False)
        yield rm


@contextlib.contextmanager
def within(place: Path) -> Iterator[None]:
    """In that folder, and for a limited time: a run that hangs is an error."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"over {SECONDS} s")

    before, handler = os.getcwd(), signal.signal(signal.SIGALRM, late)
    os.chdir(place)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        os.chdir(before)


def run(place: Path, *args: Any) -> Any:
    """A command that ends as documented: 0, one line and 1, or a usage and 2."""
    with within(place):
        done = CliRunner().invoke(app, [str(arg) for arg in args])
    assert done.exit_code in (0, 1, 2), done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    if done.exit_code == 1:
        last = done.stderr.splitlines()[-1]
        assert last.startswith("rmfast: ") and len(last) > len("rmfast: Error"), done.stderr
    return done


# Files whose rows are right, bad, or no rows at all.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
GOOD = st.fixed_dictionaries({"text": TEXT}, optional={"more": VALUE})
OTHER = st.dictionaries(st.sampled_from(["text", "prompt", "response", "chosen", "rejected", "messages", ""]), VALUE)
DEEP = st.integers(1, 3000).map(lambda n: b'{"text": "deep", "more": ' + b"[" * n + b"]" * n + b"}")
LINE = (
    GOOD.map(lambda row: json.dumps(row).encode())
    | OTHER.map(lambda row: json.dumps(row, ensure_ascii=False).encode())
    | VALUE.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=30)
    | DEEP
    | st.sampled_from([b"", b"{", b'{"text": "\\ud800"}', b'{"text": "a", "text": "b"}', b'\xef\xbb\xbf{"text": "a"}'])
)
ENDS = st.sampled_from([b"\n", b"\r\n", b"\n\n"])
JSONL = st.tuples(st.lists(LINE, max_size=12), ENDS).map(lambda given: b'{"text": "first"}\n' + given[1].join(given[0]))
CELL = TEXT | st.sampled_from(['"', '""', ",", "\r", "\n", "\x00", "\ufeff", '[{"role": "user", "content": "q"}]'])


def _csv(rows: list[list[str]]) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["text", "more"], *rows])
    return file.getvalue().encode("utf-8", "surrogatepass")


CSV = (
    st.lists(st.lists(CELL, min_size=2, max_size=2), max_size=8).map(_csv)
    | st.lists(st.lists(CELL, max_size=4), max_size=8).map(_csv)
    | st.binary(max_size=60).map(lambda data: b"text,more\n" + data)
)


def _parquet(columns: dict[str, list[Any]]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file)
    return file.getvalue()


COLUMN = st.sampled_from([["a", "b"], ["a", None], [None, None], [1, 2], [[1], []], [b"a", b"\xff"], [{"a": 1}, None]])
PARQUET = st.dictionaries(st.sampled_from(["text", "messages", "more"]), COLUMN, min_size=1).map(_parquet)
CONTENTS = {"jsonl": JSONL, "csv": CSV, "parquet": PARQUET}
DAMAGE: st.SearchStrategy[Callable[[bytes], bytes]] = st.one_of(
    st.just(lambda data: data),
    st.floats(0, 1).map(lambda part: lambda data: data[: int(part * len(data))]),
    st.binary(max_size=9).map(lambda more: lambda data: data + more),
    st.binary(max_size=9).map(lambda more: lambda data: more + data),
    st.just(gzip.compress),
    st.floats(0, 1).map(lambda part: lambda data: gzip.compress(data)[: 1 + int(part * len(gzip.compress(data)))]),
)


@fuzz(
    60,
    content=st.tuples(st.just("jsonl"), JSONL)
    | st.tuples(st.just("csv"), CSV)
    | st.tuples(st.just("parquet"), PARQUET),
    damage=DAMAGE,
    out=st.sampled_from(["out.jsonl", "out.csv", "out.parquet", "-"]),
    pipe=st.booleans(),
    command=st.sampled_from(["score", "values"]),
    window=st.integers(1, 9),
)
def test_every_row_of_a_file_gets_its_reward_or_a_reason(
    folder, rm, tmp_path_factory, content, damage, out, pipe, command, window
):
    place = tmp_path_factory.mktemp("rows")
    kind, data = content[0], damage(content[1])
    source, copy = place / f"in.{kind}", place / "copy"
    copy.write_bytes(data)
    if pipe:
        os.mkfifo(source)
        threading.Thread(target=_feed, args=[source, data], daemon=True).start()
    else:
        source.write_bytes(data)
    args = [command, "--model", folder, "--input", source, "--output", out, "--window", window]
    done = run(place, *args, "--on-error", "null")
    if done.exit_code:
        assert done.exit_code == 1
        return
    given = list(read_rows(copy, kind))
    if out == "-":
        written = [json.loads(line) for line in done.stdout.split("\n")[:-1]]
    else:
        written = [row.data for row in read_rows(place / out)]
    assert len(written) == len(given)
    for before, after in zip(given, written):
        _check(rm, command, before.data, after)


def _feed(pipe: Path, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):
        pipe.write_bytes(data)


def _check(rm: rmfast.RewardModel, command: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    column = "reward" if command == "score" else "values"
    results = [after[name] for name in (column, f"{column}_chosen", f"{column}_rejected") if name in after]
    assert results
    if any(result in (None, "") for result in results):
        assert after["error"]
        return
    result = results[0]
    result = json.loads(result) if isinstance(result, str) else result
    if column in after and isinstance(before.get("text"), str):
        expected = (rm.score if command == "score" else rm.token_values)([before["text"]])[0]
        error = (torch.tensor(result) - expected).abs().max().item()
        worst(f"{command} of a file against the library", error)
        assert error < 1e-5


# Outputs of every kind: what is there before a run is there after it, unless it is the run's own.
def _linked(to: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(to)


def _node(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        os.mkfifo(path)


def _mine(path: Path) -> None:
    path.write_text("mine\n")


PLACES: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda path: None,
    "an empty file": Path.touch,
    "somebody's file": _mine,
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a device": _node,
    "a link to nothing": _linked("new"),
    "a link to somebody's file": lambda path: (_mine(path.with_name("notes")), path.symlink_to("notes")),
    "a link to a device": lambda path: (_node(path.with_name("node")), path.symlink_to("node")),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "the input": lambda path: os.link(path.with_name("in.jsonl"), path),
    "a link to the input": _linked("in.jsonl"),
    "a link to the model": _linked("model/config.json"),
}
NAMES = ["out.jsonl", "out.csv", "out.parquet", "out.txt", "out", ".jsonl", "deep/er/out.jsonl", "in.jsonl/out.jsonl"]
BESIDE = ["", ".run.jsonl", ".run.lock", ".run.rows.jsonl", ".run.csv", ".run.parquet"]


def seen(place: Path) -> dict[str, Any]:
    """All that is in a folder: what it is, and what files hold."""
    found = {}
    for path in sorted(place.rglob("*")):
        status = path.lstat()
        regular = stat.S_ISREG(status.st_mode)
        link = os.readlink(path) if path.is_symlink() else None
        found[str(path.relative_to(place))] = (
            status.st_mode,
            status.st_rdev,
            link,
            path.read_bytes() if regular else None,
        )
    return found


@fuzz(
    80,
    name=st.sampled_from(NAMES[:3]) | st.sampled_from(NAMES),
    kind=st.sampled_from(list(PLACES)),
    beside=st.sampled_from(BESIDE),
    overwrite=st.booleans(),
)
def test_an_output_is_written_whole_or_left_alone(folder, rm, tmp_path_factory, name, kind, beside, overwrite):
    place = tmp_path_factory.mktemp("outputs")
    rows = [{"id": i, "text": f"text {i}"} for i in range(5)]
    (place / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "model").mkdir()
    for file in folder.iterdir():
        os.link(file, place / "model" / file.name)  # a long run makes many
    there = place / f"{name}{beside}"
    if there.parent == place:
        PLACES[kind](there)
    before = seen(place)
    args = ["score", "--model", place / "model", "--input", "in.jsonl", "--output", name]
    done = run(place, *args, *(["--overwrite"] if overwrite else []))
    after = seen(place)
    if done.exit_code == 0:
        out = place / name
        assert [int(row.data["id"]) for row in read_rows(out, _kind(name))] == [0, 1, 2, 3, 4]
        own = {str(Path(os.path.realpath(out)).relative_to(place))}
        own |= {f"{real}{end}" for real in own for end in BESIDE[1:]}
    else:
        own = set()
    kept = {path: what for path, what in before.items() if path not in own}
    assert {path: after.get(path) for path in kept} == kept
    for path, what in before.items():
        if what[0] != after.get(path, what)[0]:
            assert stat.S_ISREG(what[0])


def _kind(name: str) -> str:
    return {".csv": "csv", ".parquet": "parquet"}.get(Path(name).suffix, "jsonl")


# Command lines: every option of every command, with values that fit and values that do not.
COMMANDS = {command.callback.__name__: command.callback for command in app.registered_commands}
JUNK = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.sampled_from(["-1", "0", "1", "3", "100", "1e3", "", "nan", "-", "9" * 30])
WORDS = st.sampled_from(
    ["all", "joint", "0", "0-2", "5-1", "0-999999999999", "-1", "1,,2", "resid_post", "mlp_out,attn_out", "head_out",
     "length", "length=3", "length=x", "chat", "last", "auto", "7", "@in.jsonl", "@nowhere", "@", "a good film", "cpu"]
)  # fmt: skip
PATHS = st.sampled_from(
    ["in.jsonl", "in.csv", "pairs.jsonl", "nowhere.jsonl", "folder", "out.jsonl", "out.csv", "-", ""]
)
CALLED = {"model", "input", "pairs", "data", "output", "clean", "corrupted", "traceback"}
SLOW = {"debias": {"trials": "2", "k": "1"}, "evaluate": {"resamples": "20", "parity": "2"}}  # of commands, always so


def _value(option: inspect.Parameter) -> st.SearchStrategy[list[str]]:
    """An option as a command line has it."""
    flag = f"--{option.name.replace('_', '-')}"
    kinds = _kinds(option.annotation)
    if bool in kinds:
        return st.just([flag])
    values = NUMBERS if int in kinds else PATHS if Path in kinds else WORDS | JUNK
    if words := [kind for kind in kinds if isinstance(kind, str)]:
        values = st.sampled_from(words) | values
    return values.map(lambda value: [flag, value])


def _kinds(annotation: Any) -> set[Any]:
    """The types, and the words of Literals, that an annotation names."""
    parts = get_args(annotation)
    if isinstance(annotation, str) or not parts:
        return {annotation}
    return set().union(*map(_kinds, parts[:1] if get_origin(annotation) is Annotated else parts))


def _line(command: str) -> st.SearchStrategy[list[str]]:
    own = [
        o
        for o in inspect.signature(COMMANDS[command]).parameters.values()
        if o.name not in {*CALLED, *SLOW.get(command, {})}
    ]
    few = st.lists(st.sampled_from(own).flatmap(_value), max_size=4)
    return few.map(lambda options: [command, *(word for option in options for word in option)])


JUNK_LINE = st.lists(JUNK, max_size=3).map(lambda words: ["score", *words])
LINES = st.sampled_from(sorted(COMMANDS)).flatmap(_line) | JUNK_LINE


@fuzz(60, line=LINES, needed=st.booleans(), out=st.sampled_from(["new", "new.jsonl", "new.parquet", "folder", "-"]))
def test_any_command_line_ends_as_documented(folder, rm, tmp_path_factory, line, needed, out):
    place = tmp_path_factory.mktemp("lines") / "here"
    (place / "folder").mkdir(parents=True)
    (place / "in.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (place / "in.csv").write_text("text\none\ntwo\n")
    pairs = [{"prompt": f"p{i}", "chosen": f"good {'x' * i}", "rejected": f"bad {'y' * (9 - i)}"} for i in range(8)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    always = {
        "score": ["--model", folder, "--input", "in.jsonl", "--output", out],
        "values": ["--model", folder, "--input", "in.jsonl", "--output", out],
        "sweep": ["--model", folder, "--clean", "a good film", "--corrupted", "a grim film", "--output", out],
        "debias": ["--model", folder, "--pairs", "pairs.jsonl", "--output", out],
        "evaluate": ["--model", folder, "--data", "pairs.jsonl", "--output", out],
    }
    given = always.get(line[0], []) if needed else []
    slow = [word for name, value in SLOW.get(line[0], {}).items() for word in (f"--{name}", value)]
    run(place, line[0], *given, *slow, *line[1:])
