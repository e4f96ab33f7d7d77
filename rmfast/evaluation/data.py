"""Where an evaluation's rows come from: files, published benchmarks by name, and mappings in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rmfast import arguments
from rmfast.texts.chat import messages_in
from rmfast.texts.tables import SUFFIXES, Row, read_rows

# Data sets on the hub, and the files of each that are evaluated: the splits "filtered" ("raw" has more) and "test" of
# the two RewardBenches, RM-Bench's one file, and ProcessBench's four (gsm8k, math, olympiadbench, omnimath), as the
# benchmarks' own code loads them. Names of files may change: where none is there the error says what is missing, and a
# downloaded file can be given in place of the name. The columns are those of each `Layout`'s docstring.
PUBLISHED: dict[str, tuple[str, str]] = {
    "rewardbench": ("allenai/reward-bench", "data/filtered*.parquet"),
    "rewardbench2": ("allenai/reward-bench-2", "data/test*.parquet"),
    "rm-bench": ("THU-KEG/RM-Bench", "total_dataset.json"),
    "processbench": ("Qwen/ProcessBench", "*.json"),
}


def files_of(given: str | Path) -> list[Path]:
    """The file itself, or those of a published benchmark, downloaded where they aren't in the hub's cache.

    Raises:
        ValueError: there is no such file or name, or the benchmark's files are not found.
    """
    path = Path(given)
    if path.exists() or str(given) not in PUBLISHED:
        if not path.is_file():
            raise ValueError(f"Expected data to be a file or one of {', '.join(PUBLISHED)}, got {str(given)!r}")
        return [path]
    from huggingface_hub import snapshot_download

    repository, pattern = PUBLISHED[str(given)]
    try:
        folder = Path(snapshot_download(repository, repo_type="dataset", allow_patterns=pattern))
    except Exception as error:  # of a network, the hub or the disk
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The data set {repository} ({pattern}) is not in the hub's cache and could not be downloaded. Without a "
            f"network, give a file that was downloaded elsewhere in place of {str(given)!r}. "
            f"{type(error).__name__}: {reason}"
        ) from error
    if not (found := sorted(folder.glob(pattern))):
        raise ValueError(f"Expected files {pattern} in the data set {repository}, found none: give a file")
    return found


def is_table(files: list[Path]) -> bool:
    """Whether it is one file that `rmfast.texts.tables.read_rows` reads as it stands."""
    names = [file.name.lower().removesuffix(".gz") for file in files]
    return len(files) == 1 and names[0].endswith(tuple(SUFFIXES))


def rows_of(files: Iterable[Path]) -> Iterator[Row]:
    """The rows of all files, tables or JSON arrays of objects.

    Raises ValueError for a file of another form.
    """
    for file in files:
        if file.suffix.lower() != ".json":
            yield from read_rows(file)
            continue
        try:
            found = json.loads(file.read_bytes())
        except ValueError:  # an object on each line
            yield from read_rows(file, "jsonl")
            continue
        if not isinstance(found, list):
            raise ValueError(f"Expected {file.name} to be a JSON array of objects, got a {type(found).__name__}")
        for number, data in enumerate(found, start=1):
            if not isinstance(data, dict):
                raise ValueError(f"Expected {file.name} to be a JSON array of objects, got a {type(data).__name__}")
            yield Row(number, data)


def given_rows(given: str | Path | Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """The rows of a file, of a benchmark by name, or of mappings."""
    if isinstance(given, str | Path):
        yield from rows_of(files_of(given))
        return
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise TypeError(f"Expected data to be a file, a name or rows, got {type(given).__name__}")
    arguments.expect_dimension("data", given)
    for number, data in enumerate(given):
        if not isinstance(data, Mapping):
            raise TypeError(f"Expected data[{number}] to be a mapping, got {type(data).__name__}")
        yield Row(number + 1, dict(data))


def cells_of(row: Row, subset_column: str | None = None) -> dict[str, Any]:
    """A row's cells, where in CSV a conversation is written out, with those of a column as the subset.

    Raises ValueError for what can't be read.
    """
    if row.error:
        raise ValueError(row.error)
    cells = row.data
    if subset_column is not None:
        subset = cells.get(subset_column)
        if isinstance(subset, bool | float | list | dict) or subset is None:
            raise ValueError(f"column {subset_column!r} holds no text or whole number for a subset but {subset!r}")
        cells = cells | {"subset": str(subset)}
    if row.typed:
        return cells
    texts = {name: cells.get(name) for name in ("prompt", "chosen", "rejected")}
    return cells | {name: messages_in(cell) or cell for name, cell in texts.items() if isinstance(cell, str)}
