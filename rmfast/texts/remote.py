"""Files that are not on this machine (s3://, gs://, hf://, ...), by fsspec: what is read and written whole, at once."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_GLOB = re.compile(r"[*?\[]")
_LOCAL = re.compile(r"(file|local)://", re.IGNORECASE)
# What gives fsspec these, where it is none of what rmfast needs anyway.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


@dataclass(frozen=True)
class Remote:
    """A file that fsspec names. An object store shows an object whole or not at all, and can't be appended to."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def scheme(self) -> str:
        return self.url.partition("://")[0].lower()

    @property
    def name(self) -> str:
        return self._pure.name

    @property
    def suffix(self) -> str:
        return self._pure.suffix

    @property
    def stem(self) -> str:
        return self._pure.stem

    def with_name(self, name: str) -> Remote:
        return Remote(self.url[: len(self.url) - len(self.name)] + name)

    def read(self) -> bytes | None:
        """All of it, or None where there is none."""
        system, path = self._opened()
        try:
            return system.cat_file(path)
        except FileNotFoundError:
            return None

    def copy_into(self, file: IO[bytes]) -> None:
        """Raises OSError where there is none."""
        system, path = self._opened()
        with system.open(path, "rb") as given:
            shutil.copyfileobj(given, file, 1 << 20)

    def write(self, data: bytes) -> None:
        """In place of what is there."""
        self._into_folder(lambda system, path: system.pipe_file(path, data))

    def write_file(self, local: Path) -> None:
        """The bytes of a file of this machine, in place of what is there."""
        self._into_folder(lambda system, path: system.put_file(str(local), path))

    def size(self) -> int | None:
        """None where there is none. Raises ValueError where it is a folder: some stores give one the size 0."""
        system, path = self._opened()
        try:
            about = system.info(path)
        except FileNotFoundError:
            return None
        if about["type"] == "directory":
            raise ValueError(f"Expected {self} to be a file, but it is a folder")
        return about["size"]

    def below(self) -> dict[str, int]:
        """Names and sizes of the files in this folder, at any depth."""
        system, path = self._opened()
        try:
            found = system.find(path, detail=True)
        except FileNotFoundError:
            return {}
        return {name.rpartition(f"/{self.name}/")[2]: about["size"] for name, about in found.items()}

    def remove(self) -> None:
        """The file, if there is one. Raises ValueError where it is a folder."""
        if self.size() is not None:  # stores differ in what they do where there is none
            system, path = self._opened()
            system.rm_file(path)

    def remove_below(self, names: list[str]) -> None:
        """Files in this folder, in one request or commit where the store has such."""
        self.expect_one()  # `rm`, unlike `rm_file`, takes these for patterns
        system, path = self._opened()
        if names:
            system.rm([f"{path}/{name}" for name in names])

    def expect_one(self) -> None:
        """Raise ValueError for a name that fsspec may take for a pattern of several."""
        if _GLOB.search(self.url):
            raise ValueError(f"Expected a URL without *, ? and [, got {self}")

    def beside(self) -> list[Remote]:
        """The files in the folder that this is in."""
        system, path = self._opened()
        try:
            found = system.ls(path.rpartition("/")[0], detail=True)
        except FileNotFoundError:
            return []
        names = sorted(about["name"].rpartition("/")[2] for about in found if about["type"] != "directory")
        return [self.with_name(name) for name in names]

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self.url.partition("://")[2])

    def _opened(self) -> tuple[Any, str]:
        """The file system, which holds nothing of what it has listed, and the path in it."""
        import fsspec

        try:
            system, path = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            extra = _EXTRAS.get(self.scheme)
            hint = "" if extra is None else f': pip install "rmfast[{extra}]"'
            raise ImportError(f"{self.scheme}:// needs a package that is not installed{hint} ({error})") from error
        system.invalidate_cache()
        return system, path

    def _into_folder(self, write: Any) -> None:
        """Where folders are real ones, the first write makes them; to ask would cost a request of each."""
        system, path = self._opened()
        try:
            write(system, path)
        except FileNotFoundError:
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            write(system, path)


Location = Path | Remote


def location(text: str) -> Location:
    """A path of this machine, or what a URL names."""
    if _LOCAL.match(text):
        return Path(_LOCAL.sub("", text))
    return Remote(text) if _URL.match(text) else Path(text)
