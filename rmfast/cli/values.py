"""`rmfast values`: every row of a file with the reward at every token."""

from typing import Annotated

import typer

from rmfast.cli.options import Options, with_options
from rmfast.cli.run import Run


@with_options
def values(
    options: Options,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also write the tokens and their ids.")] = False,
) -> None:
    """Write every row with the reward at every token of its text."""
    run = Run("values", options, options.output_column or "values", tokens=tokens)
    run.go("token_values")
