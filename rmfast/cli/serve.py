"""`rmfast serve`: reward models behind HTTP."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from rmfast.cli.options import ModelOptions, chosen_backend, encoding_of, load_model, with_options

TOKEN = "RMFAST_TOKEN"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions(ModelOptions):
    """Those of `rmfast serve`."""

    model: Annotated[  # type: ignore[assignment]
        list[str], typer.Option(help="A model's folder or hub id, or NAME=FOLDER_OR_ID; several times for more.")
    ]


@with_options
def serve(
    options: ServeOptions,
    intervention: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder with an intervention, as `debias` writes; several add up.", exists=True, file_okay=False
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address; others than this machine reach 0.0.0.0.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is one that is free.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help=f"Holds the token that clients must bring; default: the environment's {TOKEN}, or none.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    max_wait: Annotated[
        float, typer.Option(min=0, max=1000, help="Milliseconds that a text waits for company where nothing runs.")
    ] = 5.0,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Texts without an answer, beyond which requests get 429.")
    ] = 16384,
    max_texts: Annotated[int, typer.Option(min=1, help="Most texts of a request.")] = 4096,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a request.")] = 1 << 20,
    max_characters: Annotated[int, typer.Option(min=1, help="Most characters of a text.")] = 1 << 20,
    max_body: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = 32 << 20,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds until a request without an answer gets 504.")
    ] = 600,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that requests have to be answered after SIGTERM.")] = 60,
) -> None:
    """Serve reward models to OpenRLHF, verl, slime, TRL and others.

    SIGTERM ends it in an orderly way (see docs/serve.md).
    """
    from rmfast.integrations.serve import Limits, create_app
    from rmfast.integrations.serve import serve as run
    from rmfast.integrations.serve.gate import is_loopback

    token = _token(token_file)
    limits = Limits(
        max_wait=max_wait / 1000, batch_tokens=options.batch_tokens, body=max_body, texts=max_texts,
        tokens=max_tokens, characters=max_characters, queue=max_queue, timeout=timeout, drain=drain,
    )  # fmt: skip
    encoding = {name: value for name, value in encoding_of(options).items() if value is not None}
    with chosen_backend(options):
        models = {}
        for name, source in map(_named, options.model):
            if name in models:
                raise ValueError(f"Expected models of different names, got {name} twice: --model NAME={source}")
            models[name] = _loaded(dataclasses.replace(options, model=source), intervention or [])  # type: ignore[arg-type]
        local = is_loopback(host)
        if token is None and not local:
            typer.echo(f"rmfast: {host} is open to all who reach it: no token is asked for (--token-file)", err=True)
        app = create_app(models, limits=limits, token=token, loopback=token is None and local, encoding=encoding)
        names = ", ".join(models)
        run(app, host=host, port=port, drain=drain, ready=lambda url: typer.echo(f"rmfast: {names} at {url}", err=True))
    typer.echo("rmfast: all requests are answered, the server has ended", err=True)


def _named(given: str) -> tuple[str, str]:
    """The name of a model, by default its id or its folder's last part (clients are told no paths), and its source."""
    name, equals, source = given.partition("=")
    if Path(given).exists():
        return Path(given).resolve().name or given, given
    return (name, source) if equals and name and source else (given, given)


def _token(file: Path | None) -> str | None:
    given = os.environ.get(TOKEN, "") if file is None else file.read_text()
    token = given.strip()  # of the newline that files and secrets end with: no header can bring it
    if not token and (given or file is not None):
        raise ValueError(f"Expected {TOKEN if file is None else file} to hold a token, got nothing")
    return token or None


def _loaded(options: ModelOptions, interventions: list[Path]) -> Any:
    model = load_model(options)
    if interventions:
        from rmfast.interventions import load

        model = model.with_interventions(*map(load, interventions))
    return model
