"""`rmfast evaluate`: a benchmark's rows in; scores, a table with intervals, the leaderboards' JSON and a plot out."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rmfast.cli.options import Against, Interventions, ModelOptions, Options, files_of_options, other_than, with_options
from rmfast.cli.results import claimed, save_plot, write_csv

_FILES = (
    "results.json",
    "scores.json",
    "table.csv",
    "table.png",
    "against.csv",
    "against.png",
    "parity.csv",
    "data.jsonl",
)


@with_options
def evaluate(
    options: ModelOptions,
    data: Annotated[
        str,
        typer.Option(
            help="A table or .json file, or a benchmark's name: rewardbench, rewardbench2, rm-bench, processbench."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write, or to go on with.", file_okay=False)],
    layout: Annotated[
        Literal["pairs", "rewardbench", "rewardbench2", "rm-bench", "processbench"] | None,
        typer.Option(help="What the rows hold; default: by their columns."),
    ] = None,
    subset_column: Annotated[
        str | None, typer.Option(help="The column by which figures are told apart; default: subset.")
    ] = None,
    step_tag: Annotated[
        str | None, typer.Option(help="Of processbench: the token behind each step, like <extra_0>.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Of processbench: a step of a lower value is wrong; default 0.5.")
    ] = None,
    intervention: Interventions = None,
    against: Against = None,
    parity: Annotated[
        int | None,
        typer.Option(min=1, help="Also score so many texts alone, in batches and by transformers, and compare."),
    ] = None,
    on_error: Annotated[
        Literal["stop", "null"], typer.Option(help="At a bad row: stop, or leave it out of the figures.")
    ] = "stop",
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap over prompts.")] = 1000,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    window: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Rows scored and written at a time.")] = 512,
    engine: Annotated[
        Literal["packed", "padded"] | None, typer.Option(help="Default: packed where the model can run so.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where the output exists.")] = False,
) -> None:
    """Score a benchmark and print its figures with n and intervals.

    A run that was stopped goes on (see docs/evaluate.md).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"Expected --confidence to be in (0, 1), got {confidence}")
    from rmfast.cli.benchmark import BenchmarkRun, as_lines, figures_of, first_layout, parity_of
    from rmfast.evaluation.data import files_of, is_table

    files = files_of(data)
    bootstrap: dict[str, Any] = {"resamples": resamples, "confidence": confidence, "seed": seed}
    reads = [*files, *files_of_options(options.tools, options.chat_template_kwargs)]
    shared = {"on_error": on_error, "window": window, "engine": engine, "overwrite": overwrite, "shard": "0/1"}
    with claimed(output, _FILES, reads):
        input_ = files[0] if is_table(files) else as_lines(files, output / "data.jsonl")
        of = first_layout(input_, layout, step_tag, threshold, subset_column)
        if parity is not None and of.method != "score":
            raise ValueError(f"Expected no --parity with the layout {of.name}, whose texts have several scores")

        def scored(model: ModelOptions, interventions: list[Path], name: str) -> Any:
            own = {field.name: getattr(model, field.name) for field in dataclasses.fields(ModelOptions)}
            given = Options(**own, input=input_, output=output / name, **shared)  # type: ignore[arg-type]
            BenchmarkRun(given, of, subset_column, step_tag, interventions).go(of.method)
            return figures_of(of, given, subset_column, **bootstrap)

        result = scored(options, intervention or [], "rows.jsonl")
        board = result.leaderboard(options.model), result.leaderboard_scores(options.model)
        for name, found in zip(("results.json", "scores.json"), board):
            (output / name).write_text(json.dumps(found, indent=4, ensure_ascii=False), encoding="utf-8")
        write_csv(output / "table.csv", result.rows, result.rows[0]._fields)
        save_plot(result.plot, output / "table.png")
        typer.echo(str(result))
        if parity is not None:
            report = parity_of(result, options, intervention or [], parity, seed)
            write_csv(output / "parity.csv", report.rows, report.rows[0]._fields)
            typer.echo(f"\nparity: {report}")
        if against is not None:
            other = scored(*other_than(options, intervention or [], against), "against.jsonl")
            changes = result.minus(other)
            write_csv(output / "against.csv", changes.rows, changes.rows[0]._fields)
            save_plot(changes.plot, output / "against.png")
            typer.echo(f"\nagainst {against}\n{changes}")
