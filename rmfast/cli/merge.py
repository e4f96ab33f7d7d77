"""`rmfast merge`: the mean of several reward models' weights."""

from pathlib import Path
from typing import Annotated

import typer

from rmfast.cli.options import fail


def merge(
    models: Annotated[list[str], typer.Argument(help="Folders or hub ids of models fine-tuned from one base.")],
    output: Annotated[Path, typer.Option(help="The folder to write; a new one.", file_okay=False)],
) -> None:
    """Write the mean of several models' weights as a checkpoint.

    That is WARM; `--model` takes the folder (see docs/ensembles.md).
    """
    try:
        from rmfast.loading.merge import merge as merged

        distances = merged(models, output)
    except Exception as error:
        fail(" ".join(str(error).split()) or type(error).__name__)
    for model, distance in zip(models, distances):
        typer.echo(f"{model}: {distance:.4f} of its norm from the first")
    typer.echo(f"rmfast: the mean of {len(models)} models in {output}", err=True)
