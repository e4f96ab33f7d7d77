"""Results kept in a folder: the tensors of a dataclass in one file, its other fields beside it as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rmfast.arguments import path as path_of

R = TypeVar("R")
_VERSION = 1  # of the files


def save(result: Any, folder: str | Path, stem: str, tensors: Collection[str]) -> None:
    """Write `stem`.safetensors, with the fields named `tensors` but for those that are None, and `stem`.json, with the
    others, to a folder, made where there is none."""
    path = path_of("folder", folder)
    path.mkdir(parents=True, exist_ok=True)
    held = {name: getattr(result, name) for name in tensors}
    save_file({name: x.contiguous() for name, x in held.items() if x is not None}, path / f"{stem}.safetensors")
    rest = {field.name: getattr(result, field.name) for field in fields(result) if field.name not in tensors}
    about = {"format": f"rmfast.{type(result).__name__}", "version": _VERSION, **rest}
    (path / f"{stem}.json").write_text(json.dumps(about, default=np.generic.item) + "\n", encoding="utf-8")


def load(kind: type[R], folder: str | Path, stem: str, read: Callable[[dict[str, Any]], dict[str, Any]]) -> R:
    """The result of a class that `save` wrote, exactly.

    Args:
        read: what JSON has made of the fields beside tensors, as they were.

    Raises:
        ValueError: the folder holds none, or one of another version.
    """
    path = path_of("folder", folder)
    try:
        rest = json.loads((path / f"{stem}.json").read_text(encoding="utf-8"))
        if not isinstance(rest, dict) or rest.pop("format", None) != f"rmfast.{kind.__name__}":
            raise ValueError(f"{stem}.json is something else")
        if (version := rest.pop("version", None)) != _VERSION:
            raise ValueError(f"its version is {version}, this rmfast reads {_VERSION}")
        return kind(**{**read(rest), **load_file(path / f"{stem}.safetensors")})
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise ValueError(f"Expected a folder that {kind.__name__}.save wrote, got {str(path)!r}: {error}") from error
