"""What commands leave behind beside the library's own files: CSV tables, plots, numbers in a terminal."""

from __future__ import annotations

import contextlib
import csv
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from rmfast.texts.files import apart, locked, target


@contextlib.contextmanager
def claimed(folder: Path, names: Iterable[str], reads: Iterable[Path]) -> Iterator[None]:
    """Have a folder of results for this run alone; a file that is read, or is no regular file, is never written."""
    files = [folder / name for name in names]
    for file in files:
        target(file, f"{file.name} in --output")
    apart(reads, files)
    real = Path(os.path.realpath(folder))
    real.parent.mkdir(parents=True, exist_ok=True)
    with locked(real):
        yield


def write_csv(path: Path, rows: list[Any], names: tuple[str, ...]) -> None:
    """A CSV file, in which NaN is an empty field."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([("" if value != value else value) for value in row] for row in rows)


def save_plot(plot: Callable[[], Any], path: Path) -> None:
    """Save what `plot` draws, where matplotlib is installed."""
    try:
        from matplotlib import pyplot

        pyplot.switch_backend("Agg")
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of a language that the font lacks
        axes = plot()
    except ImportError as error:
        typer.echo(f"rmfast: no {path.name}: {error}", err=True)
    else:
        figure = (axes if hasattr(axes, "figure") else axes[0]).figure
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def show(value: Any, digits: int = 4) -> str:
    import numpy as np

    return " ".join(f"{x:.{digits}f}" for x in np.atleast_1d(value))
