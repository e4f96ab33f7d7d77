"""An object store on this disk: what is put there is there whole or not at all, and nothing can be appended to."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem


class Store(LocalFileSystem):
    """`stored:///PATH`, shared by all processes of this machine, unlike fsspec's memory."""

    protocol = "stored"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix("stored://")

    def pipe_file(self, path: str, value: bytes, **kw: Any) -> None:
        part = f"{path}.{uuid.uuid4().hex}.part"
        Path(part).write_bytes(value)
        os.replace(part, path)

    def put_file(self, lpath: str, rpath: str, **kw: Any) -> None:  # type: ignore[override]
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def find(self, path: str, **kw: Any) -> Any:
        found = super().find(path, **kw)
        return {name: about for name, about in found.items() if not name.endswith(".part")}


@pytest.fixture
def store(tmp_path: Path) -> str:
    """The URL of a folder that is empty."""
    fsspec.register_implementation("stored", Store, clobber=True)
    (tmp_path / "store").mkdir()
    return f"stored://{tmp_path}/store"
