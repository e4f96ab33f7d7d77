"""`rmfast probe`: preference pairs in; what edits of one thing do to the reward, as JSON, CSV and a plot, out."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rmfast.cli.options import (
    Against,
    Interventions,
    ModelOptions,
    chosen_backend,
    encoding_of,
    files_of_options,
    load_model,
    other_than,
    with_options,
)
from rmfast.cli.results import claimed, save_plot, write_csv
from rmfast.cli.rows import preference
from rmfast.texts.tables import read_rows

_FILES = ("probes.json", "probes.csv", "probes.png")


@with_options
def probe(
    options: ModelOptions,
    pairs: Annotated[
        Path,
        typer.Option(help="Columns prompt, chosen, rejected: .jsonl, .csv or .parquet.", exists=True, dir_okay=False),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write.", file_okay=False)],
    probes: Annotated[str | None, typer.Option(help="Like bold,typos; default: all.")] = None,
    most: Annotated[int, typer.Option(min=1, help="Responses at most for each probe.")] = 300,
    level: Annotated[float, typer.Option(help="Of the tests, over all probes together.")] = 0.05,
    intervention: Interventions = None,
    against: Against = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where the output exists.")] = False,
) -> None:
    """Edit one thing of responses, and test what the reward does.

    One after the other: length, bold type, agreement and more (see docs/probes.md).
    """
    if (output / _FILES[0]).exists() and not overwrite:
        raise ValueError(f"Expected --output to hold no probes.json, got {output}; --overwrite starts anew")
    read = [preference(row, pairs) for row in read_rows(pairs)]
    names = None if probes is None else [name.strip() for name in probes.split(",")]
    encoding = encoding_of(options)
    from rmfast import interventions
    from rmfast.probes import run

    def found_in(options: ModelOptions, folders: list[Path]) -> Any:
        model = load_model(options).with_interventions(*map(interventions.load, folders))
        return run(
            model, read, probes=names, most=most, level=level, seed=seed, progress=sys.stderr.isatty(),
            batch_tokens=options.batch_tokens, **encoding,
        )  # fmt: skip

    reads = [pairs, *files_of_options(options.tools, options.chat_template_kwargs)]
    with claimed(output, _FILES, reads), chosen_backend(options):
        results = {"model": found_in(options, intervention or [])}
        if against is not None:
            results[f"against {against}"] = other = found_in(*other_than(options, intervention or [], against))
            results["difference, in spreads"] = results["model"].minus(other)
        output.mkdir(parents=True, exist_ok=True)
        results["model"].save(output / _FILES[0])
        rows = [(name, *effect) for name, found in results.items() for effect in found.effects]
        write_csv(output / _FILES[1], rows, ("result", *results["model"].effects[0]._fields))
        save_plot(results["model"].plot, output / _FILES[2])
    for name, found in results.items():
        typer.echo(f"{name}: {found}\n" if len(results) > 1 else f"{found}")
