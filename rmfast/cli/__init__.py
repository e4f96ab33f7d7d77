"""The `rmfast` command: score files of texts in bounded memory, resume, sweep, explain.

Nothing here imports torch or transformers until a model is needed, so `rmfast --help` stays quick.
"""

from typing import Annotated

import typer

import rmfast
from rmfast.cli import (
    audit,
    debias,
    evaluate,
    explain,
    join,
    merge,
    probe,
    score,
    serve,
    steps,
    strength,
    sweep,
    values,
)

__all__ = ["app", "main"]

app = typer.Typer(
    help="Fast, exact reward-model scoring.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command()(score.score)
app.command()(values.values)
app.command()(steps.steps)
app.command()(sweep.sweep)
app.command()(debias.debias)
app.command()(evaluate.evaluate)
app.command()(probe.probe)
app.command()(serve.serve)
app.command()(audit.audit)
app.command()(strength.strength)
app.command()(merge.merge)
app.command()(join.join)
app.command()(explain.explain)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"rmfast {rmfast.__version__}")
        raise typer.Exit


def main() -> None:
    """The console script: exit code 0, 1 for an error (one line on stderr), 2 for wrong usage, 130 when interrupted."""
    app()
