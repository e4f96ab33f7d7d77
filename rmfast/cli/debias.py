"""`rmfast debias`: preference pairs in; a clamp of the neurons that carry biases, and what it gains, out."""

import contextlib
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
from rmfast.cli.rows import preference
from rmfast.texts.tables import read_rows

_CLAMP = ("intervention.safetensors", "intervention.json")
_FILES = (*_CLAMP, "report.csv", "report.png")


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
        typer.Option(help="Pairs to judge on; default: --pairs, cross-validated.", exists=True, dir_okay=False),
    ] = None,
    attributes: Annotated[
        str | None,
        typer.Option(help="Like length,overlap; NAME for columns NAME_chosen and NAME_rejected; default: all five."),
    ] = None,
    k: Annotated[
        str, typer.Option(help='"search", a number or a share below 1, or one for each, like length=500,overlap=0.001.')
    ] = "search",
    choices: Annotated[str | None, typer.Option(help="What the search takes k from, like 50,0.01,0.03.")] = None,
    rule: Annotated[
        Literal["one_se", "accuracy"],
        typer.Option(help="k: the fewest neurons within a standard error of the best, or the best."),
    ] = "one_se",
    trials: Annotated[int, typer.Option(min=1, help="Of each search.")] = 30,
    folds: Annotated[int, typer.Option(min=2, help="Of the cross-validation.")] = 5,
    controls: Annotated[int, typer.Option(min=0, help="Draws of as many random neurons.")] = 5,
    positions: Annotated[
        Literal["last", "all"], typer.Option(help="The tokens at which neurons are clamped.")
    ] = "last",
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the search, the folds and the draws.")] = 0,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Write the clamp where the interval of its held-out gain includes 0, too.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where the output exists.")] = False,
) -> None:
    """Clamp the neurons that carry biases, if held-out pairs gain.

    Reports are written always, the clamp where its gain is shown (see docs/debias.md).
    """
    if (output / "intervention.json").exists() and not overwrite:
        raise ValueError(f"Expected --output to hold no intervention, got {output}; --overwrite starts anew")
    names = None if attributes is None else [name.strip() for name in attributes.split(",")]
    columns = [f"{name}_{side}" for name in names or [] for side in ("chosen", "rejected")]
    fitted = [preference(row, pairs, columns) for row in read_rows(pairs)]
    tested = None if test is None else [preference(row, test, columns) for row in read_rows(test)]
    asked: dict[str, Any] = {"k": _numbers("--k", k)}
    if choices is not None:
        asked["choices"] = [_number("--choices", each) for each in choices.split(",")]
    encoding = encoding_of(options)
    from rmfast import debias as method

    reads = [pairs, *([] if test is None else [test])]
    reads += files_of_options(options.tools, options.chat_template_kwargs)
    with claimed(output, _FILES, reads), chosen_backend(options):
        found = method.validate(
            load_model(options), fitted, test=tested, attributes=names, rule=rule, folds=folds, trials=trials,
            controls=controls, positions=positions, confidence=confidence, seed=seed, progress=sys.stderr.isatty(),
            batch_tokens=options.batch_tokens, **asked, **encoding,
        )  # fmt: skip
        reports = {
            name: method.report(None, tested or fitted, rewards=rewards, attributes=names, confidence=confidence)
            for name, rewards in (("before", found.before), ("after", found.after))
        }
        written = bool(len(found.clamp)) and (found.reliable or anyway)
        output.mkdir(parents=True, exist_ok=True)
        for name in _CLAMP:
            (output / name).unlink(missing_ok=True)  # of an earlier run, which this one may not bear out
        if written:
            found.clamp.save(output)
        rows = [(name, *row) for name, report in reports.items() for row in report.rows]
        rows += [("gain", *row) for row in found.rows]
        write_csv(output / "report.csv", rows, ("model", *found.rows[0]._fields))
        save_plot(lambda: method.plot(reports), output / "report.png")
    typer.echo(f"{found}\n")
    chosen = "  ".join(f"{name} {each}" for name, each in found.clamp.metadata["k"].items())
    typer.echo(f"the clamp of all pairs: {len(found.clamp)} neurons, k: {chosen}")
    if not written:
        why = "" if len(found.clamp) else "; it is empty, give --k for another"
        typer.echo(f"no intervention is written{why or ' (--anyway writes it)'}")
    for name, report in reports.items():
        typer.echo(f"\n{name}: {report}")


def _numbers(name: str, given: str) -> Any:
    """A number, or length=500,overlap=0.001 as a dict; "search" as it is."""
    if given == "search":
        return given
    if "=" not in given:
        return _number(name, given)
    each = [(key.strip(), _number(name, value)) for key, _, value in (item.partition("=") for item in given.split(","))]
    if len(dict(each)) < len(each):
        raise ValueError(f"Expected {name} to name each attribute once, got {given!r}")
    return dict(each)


def _number(name: str, given: str) -> int | float:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(given)
    what = "numbers like 50,0.01" if name == "--choices" else '"search", a number, or like length=500,overlap=0.001'
    raise ValueError(f"Expected {name} to be {what}, got {given!r}")
