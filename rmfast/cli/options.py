"""What the commands share: their options, errors of one line, the model and the backend that were asked for.

Annotations are read by typer at run time: no `from __future__ import annotations`, here and in the commands.
"""

import contextlib
import dataclasses
import functools
import inspect
import os
import re
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

import rmfast
from rmfast.cli.termination import Terminated
from rmfast.texts.chat import template_kwargs, template_tools
from rmfast.texts.columns import Columns
from rmfast.texts.files import STANDARD
from rmfast.texts.remote import Location, location

# What `evaluate` and `probe` run, and compare it with (`other_than`).
Interventions = Annotated[
    list[Path] | None,
    typer.Option(help="A folder with an intervention on the model; several add up.", exists=True, file_okay=False),
]
Against = Annotated[
    str | None,
    typer.Option(help="Another model, or a folder with an intervention on this one: paired differences to it."),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What all commands that run a model share; one command-line option each."""

    model: Annotated[str, typer.Option(help="A model's folder or hub id.")]
    format: Annotated[
        Literal["chat", "pair", "concat"] | None,
        typer.Option(help="How a prompt and a response become one text; default: as the model's tokenizer suggests."),
    ] = None
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(help="For the chat template, as JSON: '{\"enable_thinking\": false}', or @FILE that holds it."),
    ] = None
    tools: Annotated[
        str | None, typer.Option(help="For the chat template, a JSON list of schemas, or @FILE that holds it.")
    ] = None
    truncation: Annotated[
        Literal["error", "left", "right"], typer.Option(help="A text over the limit is an error, or cut on this side.")
    ] = "error"
    max_length: Annotated[int | None, typer.Option(min=1, help="Most tokens of a text; default: the model's.")] = None
    pooling: Annotated[str, typer.Option(help='The token that is read: "auto", "last" or a token id.')] = "auto"
    num_labels: Annotated[
        int | None, typer.Option(min=1, help="Rewards of a text, where the checkpoint does not say.")
    ] = None
    head: Annotated[
        str | None, typer.Option(help="The name of the head's layers in the checkpoint, where it is none of the known.")
    ] = None
    token_head: Annotated[
        list[str] | None,
        typer.Option(help="A token, or its id, whose logit is the reward of a language model; two: their difference."),
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"] | None, typer.Option(help="Default: as it is saved.")
    ] = None
    compute: Annotated[
        Literal["auto", "native", "fp32"],
        typer.Option(help="Linear layers in the weights' dtype, in fp32 on weights as they are, or the faster one."),
    ] = "auto"
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: a GPU if there is one.")] = None
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens that run at once.")] = None
    backend: Annotated[
        Literal["cuda", "triton", "varlen", "cpp", "eager"] | None, typer.Option(help="Default: see `rmfast explain`.")
    ] = None
    invariant: Annotated[
        bool, typer.Option("--invariant", help="The same bits in any batch, or an error where that can't be promised.")
    ] = False
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False
    revision: Annotated[str | None, typer.Option(help="Of a model on the hub.")] = None
    gguf_file: Annotated[str | None, typer.Option(help="The GGUF file in the model's folder.")] = None
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error arose.")] = False


def file_of_option(text: str) -> Location:
    """A file of this machine, or what a URL names. Not typer's Path, which would make s3:/ of s3://."""
    path = location(text)
    if isinstance(path, Path) and path.is_dir():
        raise typer.BadParameter(f"File {text!r} is a directory.")
    return path


def _there(text: str) -> Location:
    path = file_of_option(text)
    if path != STANDARD and isinstance(path, Path) and not path.exists():
        raise typer.BadParameter(f"File {text!r} does not exist.")
    return path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """What `score`, `values` and `steps` share besides."""

    # Locations both: typer takes no unions.
    input: Annotated[
        Any,
        typer.Option(
            help="A .jsonl, .csv or .parquet file or URL (s3://, gs://, hf://), or a pipe; - is standard input.",
            parser=_there,
            metavar="FILE",
        ),
    ]
    output: Annotated[
        Any,
        typer.Option(
            help="The .jsonl, .csv or .parquet file or URL to write, or to go on with; - is standard output, as JSONL.",
            parser=file_of_option,
            metavar="FILE",
        ),
    ]
    shard: Annotated[
        str | None,
        typer.Option(help="K/N: the K-th of N parts, from 0, for `rmfast join`; default: RANK and WORLD_SIZE."),
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where the output exists.")] = False
    on_error: Annotated[
        Literal["stop", "skip", "null"], typer.Option(help="At a bad row: stop, leave it out, or write it with null.")
    ] = "stop"
    columns: Annotated[Columns | None, typer.Option(help="What the rows hold; default: by their column names.")] = None
    prompt_column: Annotated[str, typer.Option()] = "prompt"
    response_column: Annotated[str, typer.Option()] = "response"
    chosen_column: Annotated[str, typer.Option()] = "chosen"
    rejected_column: Annotated[str, typer.Option()] = "rejected"
    messages_column: Annotated[str, typer.Option()] = "messages"
    text_column: Annotated[str, typer.Option()] = "text"
    output_column: Annotated[
        str | None, typer.Option(help="The new column; default: reward, values or step_scores.")
    ] = None
    input_format: Annotated[
        Literal["jsonl", "csv", "parquet"] | None, typer.Option(help="Default: by the file's suffix.")
    ] = None
    window: Annotated[
        int, typer.Option(min=1, max=2**31 - 1, help="Rows read, scored by length and written at a time.")
    ] = 512
    engine: Annotated[
        Literal["packed", "padded"] | None, typer.Option(help="Default: packed where the model can run so.")
    ] = None


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command(options, **own)` one parameter for every field of its options' class, and one-line errors.

    Typer reads a function's signature; writing these 31 parameters out in each command is the alternative.
    """
    first, *own = inspect.signature(command).parameters.values()
    kind = first.annotation
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=field.type,
        )
        for field in dataclasses.fields(kind)
    ]

    def said(message: Any) -> str:
        return in_options(str(message), {parameter.name for parameter in parameters})

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = kind(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: typer.echo(f"rmfast: {said(message)}", err=True)  # one line
                command(options, **given)
        except Terminated as error:
            fail(" ".join(["terminated", *map(str, error.args)]), code=143)
        except KeyboardInterrupt as error:
            fail(" ".join(["interrupted", *map(str, error.args)]), code=130)
        except BrokenPipeError:
            fail("standard output was closed before the last row")
        except Exception as error:
            if options.traceback:
                raise
            fail(" ".join(said(error).split()) or type(error).__name__)

    parameters = sorted([*own, *shared], key=lambda p: p.default is not inspect.Parameter.empty)  # needed ones first
    run.__signature__ = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in parameters])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


# A call, or an argument in a sentence: with truncation="left", expected trust_remote_code=True.
_ARGUMENT = re.compile(
    r"""(?<![\w.])[\w.]+\((?:[^()]|\([^()]*\))*\)|"""
    r"""(?<![\w.(=?&])([a-z_]+)=((["'])[^"'\s]+\3(?:\ or\ \3[^"'\s]+\3)*|True|\d[\d.]*\b)"""
)


def in_options(message: str, names: Collection[str]) -> str:
    """A message of the library, which names its arguments as Python has them, with those that a command has as options:
    truncation="left" is --truncation left."""

    def option(found: re.Match[str]) -> str:
        name, value, quote = found.groups()
        if name not in names:  # or a call, which stays as it is
            return found[0]
        flag = f"--{name.replace('_', '-')}"
        return flag if value == "True" else f"{flag} {value.replace(quote or '', '')}"

    return _ARGUMENT.sub(option, message)


def fail(message: str, code: int = 1) -> NoReturn:
    """One line on stderr, and the exit code."""
    typer.echo(f"rmfast: {message}", err=True)
    raise typer.Exit(code)


def load_model(options: ModelOptions, **more: Any) -> Any:
    """The RewardModel that the options name; `more` is for `rmfast.load`."""
    pooling: str | int = int(options.pooling) if options.pooling.lstrip("-").isdigit() else options.pooling
    given = {
        name: getattr(options, name) for name in ("dtype", "device", "revision", "num_labels", "gguf_file", "head")
    }
    if options.device is None:
        given["device"] = _device_of_rank()
    if options.token_head:
        if options.head is not None:
            raise ValueError("Expected --head or --token-head, got both")
        given["head"] = rmfast.TokenHead(*(int(t) if t.isdigit() else t for t in options.token_head))
    return rmfast.load(
        options.model,
        pooling=pooling,
        trust_remote_code=options.trust_remote_code,
        invariant=options.invariant or None,
        compute=options.compute,
        **{name: value for name, value in given.items() if value is not None} | more,
    )


def other_than(options: ModelOptions, interventions: list[Path], against: str) -> tuple[ModelOptions, list[Path]]:
    """What is compared with: the model under an intervention more, or another model."""
    folder = Path(against)
    if (folder / "intervention.json").exists():
        return options, [*interventions, folder]
    # Which files of the model's own folder or repository are read says nothing of another's.
    return dataclasses.replace(options, model=against, revision=None, gguf_file=None), []


def _device_of_rank() -> str | None:
    """The GPU of a process that is one of several on its machine; None where it is not, or there is no GPU."""
    rank = os.environ.get("LOCAL_RANK", "")
    if not rank.isdigit():
        return None
    import torch

    # Modulo: a launcher may show each process one GPU alone.
    return f"cuda:{int(rank) % torch.cuda.device_count()}" if torch.cuda.is_available() else None


def encoding_of(options: ModelOptions) -> dict[str, Any]:
    """How texts become token ids, as `RewardModel.encode` takes it."""
    return {
        **{name: getattr(options, name) for name in ("max_length", "truncation", "format")},
        "chat_template_kwargs": template_kwargs(text_of_option(options.chat_template_kwargs)) or None,
        "tools": template_tools(text_of_option(options.tools)),
    }


def text_of_option(given: str | None) -> str | None:
    """A text of the command line, or after @ that of a file, without the newline that ends it."""
    if given is None or not given.startswith("@"):
        return given
    return Path(given[1:]).read_bytes().decode().removesuffix("\n").removesuffix("\r")


def files_of_options(*given: str | None) -> list[Path]:
    """The files that options name after @ (`text_of_option`)."""
    return [Path(text[1:]) for text in given if text is not None and text.startswith("@")]


def chosen_backend(options: ModelOptions) -> contextlib.AbstractContextManager[Any]:
    """The backend of --backend for as long as it is entered."""
    return rmfast.backend(options.backend) if options.backend else contextlib.nullcontext()
