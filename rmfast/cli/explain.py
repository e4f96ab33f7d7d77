"""`rmfast explain`: which backend and engine would run, and why."""

from typing import Annotated, Any, Literal

import typer

import rmfast
from rmfast.cli.options import fail


def explain(
    op: Annotated[str | None, typer.Option(help="One op; default: all.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: those here.")] = None,
    model: Annotated[str | None, typer.Option(help="Also tell which engine scores this model, and why.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"] | None, typer.Option(help="Default: as it is saved.")
    ] = None,
    compute: Annotated[
        Literal["auto", "native", "fp32"], typer.Option(help="The arithmetic of linear layers, as for `score`.")
    ] = "auto",
    num_labels: Annotated[
        int | None, typer.Option(min=1, help="Rewards of a text, where the checkpoint does not say.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
) -> None:
    """Tell which backend runs each op, and why others do not.

    Also what would make them run, and with --model which engine scores that model.
    """
    try:
        if model is None:
            typer.echo(str(rmfast.explain(op, device)))
        elif op is None:
            more: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
            loaded = rmfast.load(
                model, dtype=dtype, device=device, compute=compute, trust_remote_code=trust_remote_code, **more
            )
            typer.echo(loaded.explain())
        else:
            raise ValueError("Expected --op or --model, got both")
    except Exception as error:
        fail(" ".join(str(error).split()))
