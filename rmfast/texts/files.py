"""Which files a run reads and writes: pipes are read once, outputs are regular files, and have one run at a time."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO

from rmfast.texts.remote import Location, Remote

STANDARD = Path("-")  # standard input, or output
LOCK = ".run.lock"
_OWNER = b'{"pid": '  # how a lock begins
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True)
class Source:
    """An input that can be opened as often as needed: a file, or the copy of what came through a pipe or a network.

    `path` is what to open, `name` what messages call it, `given` what was asked for. A copy is a file without a name,
    so that nothing is left of it however the process ends.
    """

    path: Path
    name: str
    given: Location
    held: IO[bytes] | None = None

    @classmethod
    def of(cls, given: Location) -> Source:
        """Raises ValueError for what is neither file nor pipe, and where standard input is closed."""
        if isinstance(given, Remote):
            return cls._copied(given.copy_into, given.name, given)
        if given == STANDARD:
            if sys.stdin is None:
                raise ValueError("Expected standard input to be open")
            return cls._copied(partial(_copy, sys.stdin.buffer), "standard input", given)
        mode = given.stat().st_mode
        if stat.S_ISFIFO(mode):
            with given.open("rb") as pipe:
                return cls._copied(partial(_copy, pipe), str(given), given)
        if not stat.S_ISREG(mode):
            raise ValueError(f"Expected the input {given} to be a file or a pipe, but it is {_kind(mode)}")
        return cls(given, given.name, given)

    @classmethod
    def _copied(cls, copy_into: Callable[[IO[bytes]], None], name: str, given: Location) -> Source:
        copy = tempfile.TemporaryFile()  # noqa: SIM115  as long as the Source is there
        with naming(Path(tempfile.gettempdir())):  # the only one of the two that may be full
            copy_into(copy)
            copy.flush()
        return cls(Path(f"/proc/self/fd/{copy.fileno()}"), name, given, copy)


def _copy(given: IO[bytes], copy: IO[bytes]) -> None:
    shutil.copyfileobj(given, copy, 1 << 20)


def target(path: Path, argument: str) -> Path:
    """The regular file that an output is or will be, at the end of symbolic links.

    Raises ValueError where something else is there: a device or a pipe must never be truncated, replaced or removed.
    """
    real = Path(os.path.realpath(path))
    try:
        status = real.stat()
    except FileNotFoundError:
        return real
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"Expected {argument} to be a regular file, but {path} is {_kind(status.st_mode)}")
    for standard in (1, 2):
        with contextlib.suppress(OSError):  # it may be closed
            if os.path.samestat(os.fstat(standard), status):
                raise ValueError(f"Expected {argument} to be another file than the one that messages go to, got {path}")
    return real


def apart(reads: Iterable[Path], writes: Iterable[Path]) -> None:
    """Raise ValueError where a file that is read is one that would be written or removed, under whatever name."""
    for read, write in itertools.product(list(reads), list(writes)):
        try:
            same = read.samefile(write)
        except FileNotFoundError:
            same = False
        if same:
            raise ValueError(f"Expected other files to be read than written, got {read} ({write} would replace it)")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other runs from an output file or folder while this one has it, by a lock beside it that names the owner.

    The system releases the lock with the process, however it ends, so that what a killed one left is simply taken.
    Raises ValueError where another process has it.
    """
    lock = path.with_name(path.name + LOCK)
    file = _acquired(lock, path)
    try:
        owner = {"pid": os.getpid(), "since": datetime.now().astimezone().isoformat(timespec="seconds")}
        with naming(lock):
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(owner).encode() + b"\n", 0)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)


def _acquired(lock: Path, path: Path) -> int:
    """The descriptor of the lock file that has this name, with the lock."""
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            status = os.fstat(file)
            owner = os.pread(file, 4096, 0) if stat.S_ISREG(status.st_mode) else b"?"
            if not _OWNER.startswith(owner[: len(_OWNER)]):  # a kill or a full disk may have left a part of it
                raise ValueError(f"Expected {lock} to be a lock of rmfast, got another file")
            _lock(file, path, owner)
            with contextlib.suppress(FileNotFoundError):  # its owner ended and removed it before we had it
                if os.path.samestat(status, os.stat(lock)):
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int, path: Path, owner: bytes) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        try:
            named = "process {pid}, since {since}".format(**json.loads(owner))
        except (ValueError, KeyError):  # it has not written it yet
            named = "another process"
        raise ValueError(f"{path} is being written by {named}: one run at a time") from None
    except OSError as error:  # some network file systems have none
        warnings.warn(f"{path} can't be locked ({error.strerror}): let no other run write it", stacklevel=2)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system, such as a full disk, say which file they are about."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "something else")
