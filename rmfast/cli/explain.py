"""`rmfast explain`: which backend and engine would run, and why."""

from typing import Annotated

import typer

import rmfast
from rmfast.cli.options import fail


def explain(
    op: Annotated[str | None, typer.Option(help="One op; default: all.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: those here.")] = None,
    model: Annotated[str | None, typer.Option(help="Also tell which engine scores this model, and why.")] = None,
) -> None:
    """Tell which backend would run for each op, and for each that would not, why, and what would fix it."""
    try:
        if model is None:
            typer.echo(str(rmfast.explain(op, device)))
        elif op is None:
            typer.echo(rmfast.load(model, device=device).explain())
        else:
            raise ValueError("Expected --op or --model, got both")
    except Exception as error:
        fail(" ".join(str(error).split()))
