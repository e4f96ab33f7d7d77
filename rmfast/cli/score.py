"""`rmfast score`: every row of a file with its reward."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rmfast.cli.options import Options, with_options
from rmfast.cli.results import show
from rmfast.cli.run import Run
from rmfast.texts.files import STANDARD
from rmfast.texts.remote import Location
from rmfast.texts.tables import read_rows


@with_options
def score(
    options: Options,
    stats: Annotated[bool, typer.Option("--stats", help="Print mean, spread and, of pairs, the accuracy.")] = False,
    intervention: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder with an intervention, as `debias` writes; several add up.", exists=True, file_okay=False
        ),
    ] = None,
) -> None:
    """Write every row with the reward of its text.

    Of chosen/rejected pairs it is both texts' (see docs/cli.md).
    """
    if stats and options.output == STANDARD:
        raise ValueError("Expected --output to be a file with --stats, which are computed from it, got -")
    run = Run("score", options, options.output_column or "reward", interventions=intervention or [])
    run.go("score")
    if stats:
        typer.echo(_statistics(run.path, run.column))


def _statistics(path: Location, column: str) -> str:
    """Mean and spread of each reward column of an output file, and the accuracy of its pairs (a tie counts half)."""
    import numpy as np

    names = [column, column + "_chosen", column + "_rejected"]
    sums: dict[str, Any] = {}
    wins: Any = 0.0
    pairs = empty = 0
    ties: Any = 0
    for row in read_rows(path):
        cells = {name: row.data[name] for name in names if row.data.get(name) not in (None, "")}
        found = {name: np.asarray(_number(cell), dtype=np.float64) for name, cell in cells.items()}
        empty += not found
        for name, reward in found.items():
            n, mean, square = sums.get(name, (0, 0.0, 0.0))  # Welford's running mean and sum of squares
            step = reward - mean
            mean = mean + step / (n + 1)
            sums[name] = n + 1, mean, square + step * (reward - mean)
        if len(found) == 2:
            margin = found[names[1]] - found[names[2]]
            wins, ties, pairs = wins + (margin > 0) + 0.5 * (margin == 0), ties + (margin == 0), pairs + 1
    lines = []
    if pairs:
        lines.append(f"pairs {pairs}  accuracy {show(wins / pairs)}  ties {show(ties, 0)}")
    for name, (n, mean, square) in sums.items():
        lines.append(f"{name}  n {n}  mean {show(mean)}  std {show(np.sqrt(square / n))}")
    if empty:
        lines.append(f"rows without a reward {empty}")
    return "\n".join(lines) or "no rows"


def _number(cell: Any) -> Any:
    """A reward, or those of several labels; in CSV they are text."""
    return json.loads(cell) if isinstance(cell, str) else cell
