"""`rmfast debias`: preference pairs in; the clamp of the neurons that carry biases, and reports, out."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rmfast.cli.options import (
    ModelOptions,
    chosen_backend,
    encoding_of,
    files_of_options,
    load_model,
    with_options,
)
from rmfast.cli.results import claimed, save_plot, write_csv
from rmfast.cli.rows import located
from rmfast.texts.columns import cell_of, template_columns
from rmfast.texts.tables import Row, read_rows

_FILES = ("intervention.safetensors", "intervention.json", "report.csv", "report.png")


@with_options
def debias(
    options: ModelOptions,
    pairs: Annotated[
        Path,
        typer.Option(help="Columns prompt, chosen, rejected: .jsonl, .csv or .parquet.", exists=True, dir_okay=False),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write.", file_okay=False)],
    test: Annotated[
        Path | None,
        typer.Option(help="Pairs to report on; default: those it is fitted on.", exists=True, dir_okay=False),
    ] = None,
    attributes: Annotated[str | None, typer.Option(help="Like length,overlap; default: all five.")] = None,
    k: Annotated[
        str, typer.Option(help='"search", a number, or one for each, like length=500,overlap=100.')
    ] = "search",
    trials: Annotated[int, typer.Option(min=1, help="Of the search.")] = 100,
    positions: Annotated[
        Literal["last", "all"], typer.Option(help="The tokens at which neurons are clamped.")
    ] = "last",
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where the output exists.")] = False,
) -> None:
    """Find the neurons that carry biases and clamp them: writes the intervention and reports (see docs/debias.md)."""
    if (output / "intervention.json").exists() and not overwrite:
        raise ValueError(f"Expected --output to hold no intervention, got {output}; --overwrite starts anew")
    fitted = [_preference(row, pairs) for row in read_rows(pairs)]
    tested = fitted if test is None else [_preference(row, test) for row in read_rows(test)]
    names = None if attributes is None else [name.strip() for name in attributes.split(",")]
    ks = _numbers("--k", k)
    encoding = encoding_of(options)
    from rmfast import debias as method

    reads = [pairs, *([] if test is None else [test])]
    reads += files_of_options(options.tools, options.chat_template_kwargs)
    with claimed(output, _FILES, reads), chosen_backend(options):
        model = load_model(options)
        progress = sys.stderr.isatty()
        clamp = method.fit(
            model, fitted, attributes=names, k=ks, trials=trials, positions=positions, seed=seed, progress=progress,
            batch_tokens=options.batch_tokens, **encoding,
        )  # fmt: skip
        reports = {
            name: method.report(rm, tested, attributes=names, batch_tokens=options.batch_tokens, **encoding)
            for name, rm in (("before", model), ("after", model.with_interventions(clamp)))
        }
        clamp.save(output)
        rows = [(name, *row) for name, report in reports.items() for row in report.rows]
        write_csv(output / "report.csv", rows, ("model", *reports["before"].rows[0]._fields))
        save_plot(lambda: method.plot(reports), output / "report.png")
    chosen = "  ".join(f"{name} {each}" for name, each in clamp.metadata["k"].items())
    typer.echo(f"{len(clamp)} neurons clamped, k: {chosen}")
    typer.echo("reports on the pairs it was fitted on, which flatter it" if test is None else f"reports on {test.name}")
    for name, report in reports.items():
        typer.echo(f"\n{name}: {report}")


def _preference(row: Row, path: Path) -> dict[str, Any]:
    """The pair of one row, with the prompt where there is one."""
    with located(row, path):
        sides = {name: cell_of(row, name) for name in ("chosen", "rejected")}
        own = template_columns(row)
        return (
            {**own, **sides} if row.data.get("prompt") is None else {**own, "prompt": cell_of(row, "prompt"), **sides}
        )


def _numbers(name: str, given: str) -> Any:
    """A number, or length=500,overlap=100 as a dict; "search" as it is."""
    if given == "search":
        return given
    try:
        if "=" not in given:
            return int(given)
        return {key.strip(): int(value) for key, value in (item.split("=") for item in given.split(","))}
    except ValueError:
        raise ValueError(
            f'Expected {name} to be "search", a number, or like length=500,overlap=100, got {given!r}'
        ) from None
